"""lower_sparse_conv: a convolution whose weight holds enough zeros becomes ``autosparse::sparse_conv``, with its bias,
the residual that is added, and its activation.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from autosparse_fx._compat.dynamo_graphs import size_hint
from autosparse_fx.kernels import choice, ops  # noqa: F401  (the operators must exist)
from autosparse_fx.kernels.choice import DENSE_SCALE, MOST_TAPS, Choice, choose, lacking
from autosparse_fx.passes.casts import drop_casts_between, narrowed, widened
from autosparse_fx.passes.constants import constant, new_constant, remove_unused_constants
from autosparse_fx.passes.epilogues import activation_of, erase_unused, only_user, same_shape
from autosparse_fx.passes.sparse_groups import choose_each, choose_together, drop_groups_that_lose, sparse_ones

aten = torch.ops.aten
SPARSE_CONV = torch.ops.autosparse.sparse_conv.default


def lower_sparse_conv(gm: GraphModule) -> int:
    """Lower every convolution that gains, and those between them where that costs less than converting tensors."""
    convolutions = gm.graph.find_nodes(op="call_function", target=aten.convolution.default)
    scale = gm.meta.get(DENSE_SCALE, 1.0)
    choose_each(convolutions, lambda node, runs_code: _choice(node, scale, runs_code=runs_code))
    choose_together(convolutions, _conversion)
    drop_groups_that_lose(convolutions, _conversion)
    chosen = sparse_ones(convolutions)
    for node in reversed(chosen):
        _lower(gm, node)
    if chosen:
        drop_casts_between(gm, SPARSE_CONV)
        remove_unused_constants(gm)
        gm.recompile()
    return len(chosen)


def window_arguments(node: Node) -> list[Any]:
    """Stride, padding and dilation of a convolution, in all its dimensions: a single number stands for two."""
    given: Any = node.args[3:6]
    return [[*values] * ((node.meta["val"].dim() - 2) // len(values)) for values in given]


def _conversion(tensor: Node) -> float:
    """Cycles for each element that sparse layers take from others or give to them; an input may be as they like it."""
    value: Tensor = tensor.meta["val"]
    is_as_liked = tensor.op == "placeholder" and value.dtype == torch.float32 and value.is_contiguous()
    return 0 if is_as_liked else choice.CONVERT


def _choice(node: Node, scale: float, *, runs_code: bool) -> Choice:
    reason = _unsupported(node)
    if reason:
        return Choice(False, reason, False)
    weight = constant(node.args[1])
    assert weight is not None
    groups = int(node.args[8])  # type: ignore[arg-type]
    if groups > 1 and weight.shape[1] == 1:  # either kernel takes about as long
        return Choice(False, "grouped")
    found = choose(
        entries=int(weight.count_nonzero()),
        rows=weight.shape[0],
        depth=weight[0].numel(),
        channels=weight.shape[1] * groups,
        columns=math.prod(node.meta["val"].shape[2:]),
        units=size_hint(node.meta["val"].shape[0]),
        is_plain=weight[0, 0].numel() == 1 and set(node.args[3]) == {1} and set(node.args[4]) == {0},  # type: ignore[arg-type]
        runs_code=runs_code,
        dtype=node.meta["val"].dtype,
        scale=scale,
    )
    if groups > 1:
        return Choice(False, "grouped", dense=min(found.dense, found.sparse), sparse=found.sparse)
    return found


def _unsupported(node: Node) -> str:
    source, weight, bias, _, _, _, transposed, _, _ = node.args
    value, stored = node.meta["val"], constant(weight)
    if stored is None or not (bias is None or constant(bias) is not None):
        return "its weight is no constant"
    if transposed:
        return "transposed"
    if value.dim() not in (3, 4):
        return f"{value.dim() - 2}-dimensional" if value.dim() > 2 else "without a batch dimension"
    if reason := lacking(stored, value):
        return reason
    if stored[0, 0].numel() > MOST_TAPS:
        return f"a window of {' x '.join(map(str, stored.shape[2:]))}"
    if not _is_static(value) or not _is_static(source.meta["val"]):  # type: ignore[union-attr]
        return "the size of its images is dynamic"
    return ""


def _is_static(value: Tensor) -> bool:
    return all(isinstance(size, int) for size in value.shape[1:])


def _lower(gm: GraphModule, node: Node) -> None:
    source, weight, bias, *_, groups = node.args
    end, residual = node, None
    add = only_user(end)
    if add is not None and add.target is aten.add.Tensor and not add.kwargs and same_shape(add, node):
        others = [other for other in add.args if other is not end]
        if len(others) == 1 and isinstance(others[0], Node) and same_shape(others[0], node):
            end, residual = add, others[0]
    user = only_user(end)
    activation, constants = (activation_of(user) if user is not None else None) or ("none", [])
    if user is not None and activation != "none":
        end = user
    if bias is None:
        stored = constant(weight)
        assert stored is not None
        bias = new_constant(gm, f"{node.name}_bias", stored.new_zeros(stored.shape[0], dtype=torch.float32), node)
    given: list[Any] = [source, weight, bias, residual]
    tensors = [None if tensor is None else widened(gm, tensor, end) for tensor in given]
    with gm.graph.inserting_before(end):
        arguments: Any = (*tensors, *window_arguments(node), groups, activation, constants)
        lowered = gm.graph.call_function(SPARSE_CONV, arguments)
    lowered.meta.update({key: value for key, value in node.meta.items() if key != "val"})
    lowered.meta["val"] = end.meta["val"].float().contiguous()
    end.replace_all_uses_with(narrowed(lowered, end.meta["val"].dtype, end))
    erase_unused(end)
