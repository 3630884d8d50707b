"""lower_sparse_conv: a convolution whose weight holds enough zeros becomes ``autosparse::sparse_conv``, with its bias,
the residual that is added, and its activation.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from autosparse_fx._compat.dynamo_graphs import size_hint
from autosparse_fx.kernels import ops  # noqa: F401  (the operators must exist)
from autosparse_fx.kernels.choice import CHOICE, Choice, choose, lacking
from autosparse_fx.kernels.library import library
from autosparse_fx.passes.constants import constant, new_constant, remove_unused_constants
from autosparse_fx.passes.epilogues import activation_of, only_user, same_shape

aten = torch.ops.aten
SPARSE_CONV = torch.ops.autosparse.sparse_conv.default


def lower_sparse_conv(gm: GraphModule) -> int:
    """Lower every convolution that gains, and those between them that lose little by it."""
    convolutions = gm.graph.find_nodes(op="call_function", target=aten.convolution.default)
    for node in convolutions:
        node.meta[CHOICE] = _choice(node)
    chosen = [node for node in convolutions if node.meta[CHOICE].is_sparse]
    if chosen and library().machine.runs_code:
        chosen.extend(_close_between(convolutions))
    for node in convolutions:
        if node not in chosen and _is_between(node, chosen):
            node.meta[CHOICE] = Choice(True, "grouped, between layers that run sparse")
            chosen.append(node)
    order = {node: number for number, node in enumerate(gm.graph.nodes)}
    for node in sorted(chosen, key=order.__getitem__, reverse=True):
        _lower(gm, node)
    if chosen:
        remove_unused_constants(gm)
        gm.recompile()
    return len(chosen)


def _choice(node: Node) -> Choice:
    reason = _unsupported(node)
    if reason:
        return Choice(False, reason, False)
    weight = constant(node.args[1])
    assert weight is not None
    if int(node.args[8]) > 1:  # type: ignore[arg-type]
        return Choice(False, "grouped")
    return choose(
        entries=int(weight.count_nonzero()),
        rows=weight.shape[0],
        depth=weight[0].numel(),
        channels=weight.shape[1],
        columns=math.prod(node.meta["val"].shape[2:]),
        units=size_hint(node.meta["val"].shape[0]),
        is_plain=weight[0, 0].numel() == 1 and set(node.args[3]) == {1} and set(node.args[4]) == {0},  # type: ignore[arg-type]
    )


def _unsupported(node: Node) -> str:
    source, weight, bias, _, _, _, transposed, _, _ = node.args
    value, stored = node.meta["val"], constant(weight)
    if stored is None or not (bias is None or constant(bias) is not None):
        return "its weight is no constant"
    if transposed:
        return "transposed"
    if value.dim() != 4:
        return f"{value.dim() - 2}-dimensional" if value.dim() > 2 else "without a batch dimension"
    if reason := lacking(stored, value):
        return reason
    if not _is_static(value) or not _is_static(source.meta["val"]):  # type: ignore[union-attr]
        return "the size of its images is dynamic"
    return ""


def _is_static(value: Tensor) -> bool:
    return all(isinstance(size, int) for size in value.shape[1:])


def _close_between(convolutions: list[Node]) -> set[Node]:
    """Take in the layers about as fast on a sparse kernel that lie between such as gain, behind some and before others.

    Their tensors would be converted twice. None where all of them together cost half of what the others gain.
    """
    gain = [node for node in convolutions if node.meta[CHOICE].is_sparse]
    close = {node for node in convolutions if node.meta[CHOICE].is_close}.difference(gain)
    behind, before = set(gain), set(gain)
    for node in convolutions:  # in the order of the graph
        if node in close and not behind.isdisjoint(_sources(node)):
            behind.add(node)
    for node in reversed(convolutions):
        if node in before:
            before.update(close.intersection(_sources(node)))
    between = close & behind & before
    gained = sum(node.meta[CHOICE].saved for node in gain)
    if -sum(node.meta[CHOICE].saved for node in between) > gained / 2:
        return set()
    for node in between:
        node.meta[CHOICE] = replace(node.meta[CHOICE], is_sparse=True, reason="between layers that run sparse")
    return between


def _sources(node: Node) -> list[Node]:
    """The convolutions whose results a convolution reads, added to others or activated."""
    found, seen, todo = [], set(), list(node.all_input_nodes[:1])
    while todo:
        source = todo.pop()
        if source in seen:
            continue
        seen.add(source)
        if source.target is aten.convolution.default:
            found.append(source)
        elif source.target is aten.add.Tensor or activation_of(source) is not None:
            todo.extend(source.all_input_nodes)
    return found


def _is_between(node: Node, chosen: list[Node]) -> bool:
    """Whether a grouped convolution gets its input from a layer that runs sparse, and gives it to such layers only."""
    if _unsupported(node) or int(node.args[8]) == 1:  # type: ignore[arg-type]
        return False
    source: Node = node.args[0]  # type: ignore[assignment]
    if activation_of(source) is not None:
        source = source.args[0]  # type: ignore[assignment]
    users = list(node.users)
    if len(users) == 1 and activation_of(users[0]) is not None:
        users = list(users[0].users)
    return source in chosen and all(user in chosen for user in users)


def _lower(gm: GraphModule, node: Node) -> None:
    source, weight, bias, stride, padding, dilation, _, _, groups = node.args
    end, residual = node, None
    add = only_user(end)
    if add is not None and add.target is aten.add.Tensor and not add.kwargs and same_shape(add, node):
        others = [other for other in add.args if other is not end]
        if len(others) == 1 and isinstance(others[0], Node) and same_shape(others[0], node):
            end, residual = add, others[0]
    user = only_user(end)
    activation, clamp = (activation_of(user) if user is not None else None) or ("none", [])
    if user is not None and activation != "none":
        end = user
    if bias is None:
        stored = constant(weight)
        assert stored is not None
        bias = new_constant(gm, f"{node.name}_bias", stored.new_zeros(stored.shape[0]), node)
    with gm.graph.inserting_before(end):
        lowered = gm.graph.call_function(
            SPARSE_CONV,
            (source, weight, bias, residual, stride, padding, dilation, groups, activation, clamp),
        )
    lowered.meta.update({key: value for key, value in node.meta.items() if key != "val"})
    lowered.meta["val"] = end.meta["val"].contiguous()
    end.replace_all_uses_with(lowered)
    gm.graph.eliminate_dead_code()
