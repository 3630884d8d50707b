"""fold_batch_norm: a batch norm in evaluation, right behind a convolution of constants, becomes part of it."""

import operator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from autosparse_fx.passes.constants import constant, new_constant, remove_unused_constants

aten = torch.ops.aten
BATCH_NORM = aten._native_batch_norm_legit_no_training.default


def fold_batch_norm(gm: GraphModule) -> int:
    """Scale the filters of each such convolution, and give it the bias that is left; zeros stay zeros.

    ``y = (conv(x, w) + b - mean) * gamma / sqrt(var + eps) + beta``, so with ``scale = gamma / sqrt(var + eps)`` the
    weight becomes ``w * scale`` and the bias ``(b - mean) * scale + beta``.
    """
    folded = 0
    for norm in gm.graph.find_nodes(op="call_function", target=BATCH_NORM):
        convolution = norm.args[0]
        if _is_foldable(norm, convolution):
            _fold(gm, norm, convolution)
            folded += 1
    if folded:
        remove_unused_constants(gm)
        gm.recompile()
    return folded


def _is_foldable(norm: Node, convolution: Node) -> bool:
    return (
        convolution.target is aten.convolution.default
        and len(convolution.users) == 1
        and constant(convolution.args[1]) is not None
        and not convolution.args[6]  # transposed: its output channels are another dimension
        and (convolution.args[2] is None or constant(convolution.args[2]) is not None)
        and all(node is None or constant(node) is not None for node in norm.args[1:5])
        and all(user.target is operator.getitem and user.args[1] == 0 for user in norm.users)
    )


def _fold(gm: GraphModule, norm: Node, convolution: Node) -> None:
    gamma, beta, mean, variance = (constant(node) for node in norm.args[1:5])
    weight, bias = constant(convolution.args[1]), constant(convolution.args[2])
    assert weight is not None and mean is not None and variance is not None
    scale = _wide(variance).add(float(norm.args[6])).rsqrt()  # type: ignore[arg-type]
    if gamma is not None:
        scale = scale * _wide(gamma)
    shift = (0 if bias is None else _wide(bias)) - _wide(mean)
    new_bias = shift * scale
    if beta is not None:
        new_bias = new_bias + _wide(beta)
    new_weight = _wide(weight) * scale.reshape(-1, *[1] * (weight.dim() - 1))
    arguments = list(convolution.args)
    arguments[1] = new_constant(gm, f"{convolution.name}_weight", new_weight.to(weight.dtype), convolution)
    arguments[2] = new_constant(gm, f"{convolution.name}_bias", new_bias.to(weight.dtype), convolution)
    convolution.args = tuple(arguments)
    for user in list(norm.users):
        user.replace_all_uses_with(convolution)
        gm.graph.erase_node(user)
    gm.graph.erase_node(norm)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().double()
