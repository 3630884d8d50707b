"""find_weights: the parameters that a Dynamo graph multiplies by, found by their use and not by a layer's class."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from autosparse_fx._compat.dynamo_graphs import HigherOrderOperator, is_module_state
from autosparse_fx.passes.modes import is_autograd_function
from autosparse_fx.passes.origins import depending_on, origins
from autosparse_fx.passes.products import Operand, operands


def find_weights(gm: GraphModule, is_weight: Callable[[Node], bool]) -> dict[Node, int]:
    """Return the sources (placeholders and get_attr nodes) for which ``is_weight`` holds and that ``gm`` multiplies by.

    Convolutions, linear and bilinear layers, attention and matrix products in all their forms count, inside the
    subgraphs of higher-order ops too. Elementwise products and embedding look-ups do not.

    A parameter is multiplied by also where it is used through views, copies, casts, joinings and arithmetic, by itself
    or with other parameters. What is masked is the parameter itself, so of ``linear(x, w * scale)`` it is ``w`` whose
    zeros are zeros of the product, of ``linear(x, w + b @ a)`` it is each of the three, and of ``linear(x, exp(w))``
    nothing.

    Returns:
        For each such node the axis of its output channels, as seen from the parameter: 0 where it cannot be told.
    """

    def is_input(node: Node) -> bool:
        return node.op == "placeholder" and not is_module_state(node) and not is_weight(node)

    found: dict[Node, int] = {}
    for source, axis, _ in _multiplied(gm, {n for n in gm.graph.nodes if is_input(n)}):
        if is_weight(source) and source not in found:
            found[source] = _valid(axis, source)
    return found


def _multiplied(gm: GraphModule, inputs: set[Node]) -> Iterator[tuple[Node, int | None, bool]]:
    """All sources that ``gm`` multiplies by, each use with an axis, and whether it is as the weight of a layer."""
    nodes = list(gm.graph.nodes)
    varying = depending_on(inputs, nodes)
    for node in nodes:
        for operand in (*operands(node), *_inside(gm, node, varying)):
            for source, axis in origins(operand.tensor, operand.axis, varying, is_weight=operand.is_weight):
                yield source, axis, operand.is_weight


def _inside(gm: GraphModule, node: Node, varying: set[Node]) -> Iterator[Operand]:
    """The operands of a higher-order op that its subgraphs multiply by."""
    for subgraph, passed in _subgraphs(gm, node):
        inputs = {placeholder for placeholder, operand in passed.items() if operand in varying}
        for source, axis, is_weight in _multiplied(subgraph, inputs):
            if source in passed:
                if axis is not None and axis >= 0:  # ``scan`` hands on one weight of a stack at a time
                    axis += max(_dims(passed[source]) - _dims(source), 0)
                yield Operand(passed[source], axis, is_weight)


def _dims(node: Node) -> int:
    value = node.meta.get("example_value", node.meta.get("val"))
    return value.dim() if isinstance(value, torch.Tensor) else 1


def _valid(axis: int | None, source: Node) -> int:
    dims = _dims(source)
    if axis is None or dims == 0:
        return 0
    return min(axis if axis >= 0 else max(axis + dims, 0), dims - 1)


def _subgraphs(gm: GraphModule, node: Node) -> list[tuple[GraphModule, dict[Node, Node]]]:
    """The subgraphs of a higher-order op, each with its placeholders and the operand that each of those receives."""
    if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
        return []
    subgraphs = [
        (i, getattr(gm, str(arg.target)))
        for i, arg in enumerate(node.args)
        if isinstance(arg, Node)
        and arg.op == "get_attr"
        and isinstance(getattr(gm, str(arg.target), None), GraphModule)
    ]
    if not subgraphs:
        return []
    last = subgraphs[-1][0]
    flat: list[Any] = []
    for arg in node.args[last + 1 :]:
        flat.extend(arg if isinstance(arg, (list, tuple)) else [arg])
    found: list[tuple[GraphModule, dict[Node, Node]]] = []
    for _, subgraph in subgraphs[:1] if is_autograd_function(node) else subgraphs:
        placeholders = [n for n in subgraph.graph.nodes if n.op == "placeholder"]
        passed = flat[-len(placeholders) :] if placeholders else []
        if len(passed) == len(placeholders):
            found.append((subgraph, {p: o for p, o in zip(placeholders, passed, strict=True) if isinstance(o, Node)}))
    return found
