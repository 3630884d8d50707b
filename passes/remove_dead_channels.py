"""remove_dead_channels: channels between convolutions that are zero, constant or unused are cut out of both."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from autosparse_fx.kernels.ops import activate
from autosparse_fx.passes.constants import constant, new_constant, remove_unused_constants
from autosparse_fx.passes.epilogues import activation_of

aten = torch.ops.aten
CONVOLUTION = aten.convolution.default


def remove_dead_channels(gm: GraphModule) -> int:
    """Remove channels until none is dead; return how many were.

    A channel is dead where all its consumers' weights for it are zero, or where its filter is zero: then it is constant
    and adds a constant to its consumers, which becomes part of their bias. Consumers that pad would see the constant
    end at the border, so for them it must be zero.
    """
    removed = 0
    while found := sum(_remove_from(gm, path) for path in _paths(gm)):
        removed += found
    if removed:
        remove_unused_constants(gm)
        gm.recompile()
    return removed


@dataclass(frozen=True)
class _Path:
    """A convolution, what follows it channel by channel, and the convolutions that read the result."""

    producer: Node
    between: Sequence[Node]  # activations, and convolutions of one channel per group
    consumers: Sequence[Node]


def _paths(gm: GraphModule) -> list[_Path]:
    paths = []
    for producer in gm.graph.find_nodes(op="call_function", target=CONVOLUTION):
        between: list[Node] = []
        end = producer
        while len(end.users) == 1 and _is_by_channel(user := next(iter(end.users)), end):
            between.append(user)
            end = user
        consumers = list(end.users)
        if _has_constants(producer) and consumers and all(_reads(node, end) for node in consumers):
            paths.append(_Path(producer, between, consumers))
    return paths


def _has_constants(node: Node, *, groups: int = 1) -> bool:
    arguments: tuple[Any, ...] = node.args
    _, weight, bias, _, _, _, transposed, _, its_groups = arguments
    return (
        not transposed
        and bool(its_groups == groups)
        and constant(weight) is not None
        and (bias is None or constant(bias) is not None)
    )


def _reads(node: Node, source: Node) -> bool:
    return node.target is CONVOLUTION and node.args[0] is source and _has_constants(node)


def _is_by_channel(node: Node, source: Node) -> bool:
    if activation_of(node) is not None:
        return True
    if node.target is not CONVOLUTION or node.args[0] is not source:
        return False
    weight = constant(node.args[1])
    return weight is not None and int(weight.shape[1]) == 1 and _has_constants(node, groups=weight.shape[0])


def _remove_from(gm: GraphModule, path: _Path) -> int:
    weight, bias = _parameters(path.producer)
    is_constant = weight.flatten(1).count_nonzero(1) == 0
    value = bias.clone()
    for node in path.between:
        if node.target is CONVOLUTION:
            its_weight, its_bias = _parameters(node)
            if its_weight.shape[0] != len(value):
                return 0
            if _pads(node):
                is_constant &= value == 0
            value = value * its_weight.flatten(1).sum(1) + its_bias
        else:
            value = activate(value, *activation_of(node))  # type: ignore[misc]
    is_used = torch.zeros_like(is_constant)
    for node in path.consumers:
        its_weight, _ = _parameters(node)
        is_used |= its_weight.transpose(0, 1).flatten(1).count_nonzero(1) > 0
        if _pads(node):
            is_constant &= value == 0
    is_alive = is_used & ~is_constant
    if not is_alive.any():
        is_alive[0] = True  # of nothing no tensor can be made
    if is_alive.all():
        return 0
    _shrink(gm, path, is_alive, torch.where(is_constant, value, 0.0))
    return int((~is_alive).sum())


def _pads(node: Node) -> bool:
    return any(padding != 0 for padding in node.args[4])  # type: ignore[union-attr]


def _parameters(node: Node) -> tuple[Tensor, Tensor]:
    weight, bias = constant(node.args[1]), constant(node.args[2])
    assert weight is not None
    return weight, weight.new_zeros(weight.shape[0]) if bias is None else bias


def _shrink(gm: GraphModule, path: _Path, is_alive: Tensor, value: Tensor) -> None:
    for node in (path.producer, *path.between):
        if node.target is CONVOLUTION:
            weight, bias = _parameters(node)
            _set(gm, node, weight[is_alive], bias[is_alive])
            if node is not path.producer:
                node.args = (*node.args[:8], int(is_alive.sum()))
        before = node.meta["val"]
        node.meta["val"] = before.new_empty((before.shape[0], int(is_alive.sum()), *before.shape[2:]))
    for node in path.consumers:
        weight, bias = _parameters(node)
        added = (weight.flatten(2).sum(2)[:, ~is_alive] * value[~is_alive]).sum(1)
        _set(gm, node, weight[:, is_alive], bias + added)


def _set(gm: GraphModule, node: Node, weight: Tensor, bias: Tensor) -> None:
    new_weight = new_constant(gm, f"{node.name}_weight", weight, node)
    new_bias = new_constant(gm, f"{node.name}_bias", bias, node)
    node.args = (node.args[0], new_weight, new_bias, *node.args[3:])
