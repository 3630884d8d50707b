"""tag_recompute: masked weights are computed again in the backward pass instead of being kept for it."""

import operator

import torch
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

aten = torch.ops.aten
MASK = torch.ops.autosparse.threshold_mask.default

_CASTS = frozenset({torch.ops.prims.convert_element_type.default, aten._to_copy.default})
# Casts and views: what may stand between a mask and the operation that uses it. Untagged, they would be kept instead.
_CHEAP = _CASTS | frozenset(
    {
        aten.alias.default,
        aten.expand.default,
        aten.permute.default,
        aten.reshape.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.t.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.view.default,
        operator.getitem,
    }
)
_LOGIT = frozenset({aten.mul.Tensor, aten.add.Tensor, aten.view.default, aten.reshape.default})


def tag_recompute(gm: GraphModule) -> int:
    """Tag every mask node of a joint graph, with the casts and views behind it, for recomputation.

    The partitioner then saves the weight and the threshold, which exist anyway, and neither the masked weight nor its
    low-precision copy. Without the tags it saves one masked copy of every weight, because a matrix multiplication of
    the backward pass reads it. The few operations that make the logit are tagged as well, and fold into the kernel of
    the mask; saved, they would take a kernel of their own.

    The low-precision copy that a depthwise convolution reads is left to the partitioner, which keeps it as it keeps
    that of the dense model: it is small, and made again it would lose the memory format that the forward pass gave it,
    and with it the gradient of the convolution's input its own.

    Returns:
        The number of nodes that were tagged.
    """
    masks = [node for node in gm.graph.nodes if node.target is MASK]
    found = {node for mask in masks for node in _logit(mask)}
    pending = masks
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(user for user in node.users if is_between_mask_and_use(user))
    tagged = 0
    for node in found:
        if "recompute" not in node.meta:  # a user's own checkpoint policy goes first
            node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
            tagged += 1
    return tagged


def _logit(mask: Node) -> list[Node]:
    """What computes ``offset + scale * threshold``, from the mask back to the parameters."""
    found: list[Node] = []
    pending = [mask.args[1]]
    while pending:
        node = pending.pop()
        if isinstance(node, Node) and node.target in _LOGIT:
            found.append(node)
            pending.extend(node.all_input_nodes)
    return found


def is_between_mask_and_use(node: Node) -> bool:
    """Whether a node is a cast or a view that is to be computed again with the mask: all but depthwise casts."""
    return node.target in _CHEAP and not _is_copy_for_depthwise_convolution(node)


def _is_copy_for_depthwise_convolution(node: Node) -> bool:
    """Whether a cast is the weight of a convolution whose groups have one input channel each."""
    return node.target in _CASTS and any(
        user.target is aten.convolution.default and user.args[1] is node and node.meta["val"].shape[1] == 1
        for user in node.users
    )
