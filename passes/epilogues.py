"""What may follow a layer and be computed with it, or costs nothing: activations and views, as ATen spells them."""

import math
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten

VIEWS = (aten.view.default, aten._unsafe_view.default)
_BY_NAME = {
    aten.relu.default: "relu",
    aten.silu.default: "silu",
    aten.hardswish.default: "hardswish",
    aten.hardsigmoid.default: "hardsigmoid",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.mish.default: "mish",
}
# What bounds those that are given none.
_BOUNDS = {aten.hardtanh.default: (-1.0, 1.0), aten.clamp.default: (-math.inf, math.inf)}


def activation_of(node: Node) -> tuple[str, list[float]] | None:
    """The name of an activation in the sparse operators, with its constants, or None for another node."""
    if node.target in _BY_NAME:
        return _BY_NAME[node.target], []
    if node.target is aten.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu", []
    given: list[Any] = [*node.args[1:]]
    if node.target is aten.leaky_relu.default:
        return "leaky_relu", [float(given[0]) if given else 0.01]
    if node.target is aten.elu.default:
        alpha, scale, input_scale = (*given, 1.0, 1.0, 1.0)[:3]
        return ("elu", [float(alpha * scale), float(scale)]) if input_scale == 1 else None
    if node.target in _BOUNDS:
        bounds = [
            end if bound is None else bound
            for bound, end in zip([*given, None, None], _BOUNDS[node.target], strict=False)
        ]
        return None if any(isinstance(bound, Node) for bound in bounds) else ("clamp", [float(b) for b in bounds])
    return None


def only_user(node: Node) -> Node | None:
    """The one node that uses this one; None where there is none or more."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def same_shape(a: Node, b: Node) -> bool:
    """Whether two nodes have the same sizes; symbolic ones by name, so that nothing is guarded."""
    x, y = a.meta["val"], b.meta["val"]
    return [str(s) for s in x.shape] == [str(s) for s in y.shape] and x.dtype == y.dtype


def erase_unused(node: Node) -> None:
    """Erase a node that nothing uses any more, and whatever it alone has used; looking through the whole graph instead,
    for every layer, would take the square of their number."""
    pending = [node]
    while pending:
        unused = pending.pop()
        sources = unused.all_input_nodes
        unused.graph.erase_node(unused)
        pending += [source for source in sources if not source.users and not source.is_impure()]
