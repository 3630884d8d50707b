"""verify: what a well-formed masked graph is, as code; run after every pass in the tests, and by who writes a pass."""

import torch
from torch.fx import Graph, GraphModule, Node

from autosparse_fx.passes.insert_masks import STATE, WEIGHT
from autosparse_fx.passes.modes import modes, writes
from autosparse_fx.passes.tag_recompute import is_between_mask_and_use

MASK = torch.ops.autosparse.threshold_mask.default
GRADIENT = torch.ops.autosparse.anneal_gradient.default


def verify_masked_graph(gm: GraphModule, *, deduped: bool = False, tagged: bool = False) -> None:
    """Check a Dynamo or joint graph.

    Always: nodes are in order; masks and GA gradients have their operands, alpha is 0-d, shapes agree; a weight that
    was marked for masking is read through masks only; the placeholders that were added stand behind all others, in
    threes. With ``deduped``: no two masks of one weight under the same modes. With ``tagged``: no mask, and no cast or
    view of one, is kept for the backward pass.

    Raises:
        AssertionError: naming the node.
    """
    graph = gm.graph
    graph.lint()
    _verify_placeholders(graph)
    seen: set[object] = set()
    mode_of = modes(graph)
    for node in graph.nodes:
        if node.target is MASK:
            _verify_operands(node, node.args)
            key = (node.args[0], node.args[1], mode_of[node])
            written = any(writes(user, n) for n in (node, *node.all_input_nodes) for user in n.users)
            assert not deduped or written or key not in seen, f"{node} masks {node.args[0]} once more"
            seen.add(key)
        elif node.target is GRADIENT:
            _verify_operands(node, node.args[1:])
            assert _shape(node.args[0]) == _shape(node.args[1]), f"{node}: gradient and weight differ in shape"
        if tagged and (node.target is MASK or _is_behind_mask(node)):
            assert "recompute" in node.meta, f"{node} would be kept for the backward pass"
        if WEIGHT in node.meta:
            masked = [user for user in node.users if user.target is MASK]
            dense = [user for user in node.users if user.target is not MASK]
            assert not (masked and dense), f"{node} is masked, and read densely by {dense[0]}"


def _verify_placeholders(graph: Graph) -> None:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    added = [node for node in placeholders if STATE in node.meta]
    assert added == placeholders[len(placeholders) - len(added) :], "placeholders of masks must stand behind all others"
    fields = [node.meta[STATE][1] for node in added]
    assert fields == ["threshold", "offset", "alpha"] * (len(added) // 3), (
        f"placeholders of masks in disorder: {fields}"
    )
    unused = [node for node in added if not node.users]
    assert not unused, f"{unused[0]} is used by no mask"


def _verify_operands(node: Node, operands: tuple[object, ...]) -> None:
    weight, threshold, alpha = operands
    assert all(isinstance(operand, Node) for operand in operands), f"{node}: operands must be nodes"
    assert _shape(alpha) in ((), None), f"{node}: alpha must have no dimensions, got {_shape(alpha)}"
    cut, shape = _shape(threshold), _shape(weight)
    if cut is not None and shape is not None:
        assert len(cut) <= max(1, len(shape)) and all(
            c in (1, n) for c, n in zip(reversed(cut), reversed(shape), strict=False)
        ), f"{node}: threshold {cut} does not broadcast to weight {shape}"


def _is_behind_mask(node: Node) -> bool:
    while is_between_mask_and_use(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
        if node.target is MASK:
            return True
    return False


def _shape(node: object) -> tuple[object, ...] | None:
    value = node.meta.get("val", node.meta.get("example_value")) if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None
