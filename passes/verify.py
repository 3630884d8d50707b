"""verify: what a well-formed masked graph is, as code; run after every pass in the tests, and by who writes a pass."""

import torch
from torch.fx import Graph, GraphModule, Node

from autosparse_fx.passes.insert_masks import FIELDS, NAMING_USES, STATE, WEIGHT
from autosparse_fx.passes.modes import is_written_to, modes
from autosparse_fx.passes.tag_recompute import is_between_mask_and_use

MASK = torch.ops.autosparse.threshold_mask.default
GRADIENT = torch.ops.autosparse.anneal_gradient.default


def verify_masked_graph(gm: GraphModule, *, deduped: bool = False, tagged: bool = False) -> None:
    """Check a Dynamo or joint graph, and its subgraphs.

    Always: nodes are in order; masks and GA gradients have their operands, alpha is 0-d, shapes agree; a weight that
    was marked for masking is read through masks only (or named, for gradients), and with its own threshold; the
    placeholders that were added stand behind all others, in threes. With ``deduped``: no two masks of one weight under
    the same modes. With ``tagged``: no mask is kept for the backward pass, and no cast or view of one but what a
    depthwise layer reads.

    Raises:
        AssertionError: naming the node.
    """
    for module in gm.modules():
        if isinstance(module, GraphModule):
            _verify(module.graph, deduped, tagged)


def _verify(graph: Graph, deduped: bool, tagged: bool) -> None:
    try:
        graph.lint()
    except RuntimeError as error:
        raise AssertionError(str(error)) from error
    _verify_placeholders(graph)
    seen: set[object] = set()
    mode_of = modes(graph)
    for node in graph.nodes:
        if node.target is MASK:
            _verify_operands(node, node.args, 3)
            key = (node.args[0], node.args[1], mode_of[node])
            assert not deduped or key not in seen or is_written_to((node, *node.all_input_nodes)), (
                f"{node} masks {node.args[0]} once more"
            )
            seen.add(key)
        elif node.target is GRADIENT:
            _verify_operands(node, node.args[1:], 3)
            assert _shape(node.args[0]) == _shape(node.args[1]), f"{node}: gradient and weight differ in shape"
        if tagged and (node.target is MASK or _is_behind_mask(node)):
            assert "recompute" in node.meta, f"{node} would be kept for the backward pass"
        if WEIGHT in node.meta and not is_written_to([node]):
            _verify_weight(node)


def _verify_weight(weight: Node) -> None:
    for user in weight.users:
        assert user.target in NAMING_USES, f"{weight} is to be masked, and is read densely by {user}"
        for source in _placeholders_behind(user.args[1:]):
            owner = source.meta.get(STATE, (weight.name,))[0]
            assert owner == weight.name, f"{user} masks {weight} with {source}, which belongs to {owner}"


def _placeholders_behind(operands: tuple[object, ...]) -> list[Node]:
    pending, found = [operand for operand in operands if isinstance(operand, Node)], []
    while pending:
        node = pending.pop()
        found += [node] if node.op == "placeholder" else []
        pending.extend(node.all_input_nodes)
    return found


def _verify_placeholders(graph: Graph) -> None:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    added = [node for node in placeholders if STATE in node.meta]
    for node in placeholders[len(placeholders) - len(added) :]:
        assert node in added, f"{node} stands behind the placeholders of masks, which must be the last"
    for i, node in enumerate(added):
        wanted = (added[i - i % 3].meta[STATE][0], FIELDS[i % 3])
        assert node.meta[STATE] == wanted, f"{node} is {node.meta[STATE]} where {wanted} must stand"
        assert node.users, f"{node} is used by no mask"
    assert len(added) % 3 == 0, f"{added[-1]} is the last placeholder of a mask that lacks others"


def _verify_operands(node: Node, operands: tuple[object, ...], count: int) -> None:
    assert len(operands) == count, f"{node} has {len(operands)} operands besides the gradient, not {count}"
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
