"""Multiply-accumulates of the operations that multiply, from the shapes of their operands.

``PRODUCTS`` goes by ATen operator (or the name of another), as a graph runs them; ``LAYERS`` and ``POOLING`` by the
function in a Dynamo graph, for what ATen takes apart into many steps, or where only the function tells what is meant.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


class Term(NamedTuple):
    """A product of two operands; None for an activation that arises inside the operation, from the terms before."""

    macs: sympy.Expr
    operands: tuple[Tensor | None, ...]


Formula = Callable[[Sequence[Any], Mapping[str, Any], Any], list[Term]]  # of positional and named arguments, and result


def size(tensor: Tensor) -> list[sympy.Expr]:
    """The shape of a tensor, symbols included."""
    dims: Sequence[Any] = tensor.shape
    return [d.node.expr if isinstance(d, torch.SymInt) else sympy.Integer(d) for d in dims]


def numel(tensor: Tensor) -> sympy.Expr:
    return sympy.prod(size(tensor))


def _operand(args: Sequence[Any], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    """An argument of a function, however it was passed."""
    return args[position] if position < len(args) else kwargs[name]


def _matrix_product(first: int) -> Formula:
    """``[..., m, k] @ [..., k, n]`` at positions ``first`` and the one after it; vectors have no m or n."""

    def terms(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
        a, b = args[first], args[first + 1]
        return [Term(numel(a) * (size(b)[-1] if b.dim() > 1 else 1), (a, b))]

    return terms


def _addbmm(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    return [Term(numel(args[1]) * size(args[2])[-1], (args[1], args[2]))]


def _convolution(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    """Every element of the output (transposed: of the input) meets the kernel once."""
    x, weight, transposed = args[0], args[1], args[6]
    return [Term(numel(x if transposed else out) * sympy.prod(size(weight)[1:]), (x, weight))]


def _grouped_product(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    """``[T, k] @ [G, k, n]``, where each row meets one matrix of the group, and its kin; of two matrices the groups are
    parts of the dimension that is summed over."""
    a, b = (_operand(args, kwargs, i, name) for i, name in enumerate(("input", "mat2")))
    groups = size(out)[0] if a.dim() == b.dim() == 2 else 1
    return [Term(numel(out) / groups * size(a)[-1], (a, b))]


def _time_batch_channels(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    """``conv_tbc``, whose weight is ``[kernel, in, out]``."""
    x, weight = args[:2]
    return [Term(numel(out) * sympy.prod(size(weight)[:2]), (x, weight))]


def _attention(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    """``softmax(q @ k.T) @ v`` over ``[batch, heads, length, width]``; a causal or given mask saves nothing here."""
    q, k, v = args[:3]
    pairs = numel(q) / size(q)[-1] * size(k)[-2]
    return [Term(pairs * size(q)[-1], (q, k)), Term(pairs * size(v)[-1], (None, v))]


def _native_attention(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    """The fast path of ``nn.MultiheadAttention``: projections, attention over all heads, projection."""
    q, k, width, qkv, projection = args[0], args[1], args[3], args[5], args[7]
    rows = numel(q) / size(q)[-1]
    pairs = rows * size(k)[-2] * width
    parts = [Term(rows * numel(qkv), (q, qkv)), Term(pairs, (None, None)), Term(pairs, (None, None))]
    return [*parts, Term(rows * numel(projection), (None, projection))]


def _encoder_layer(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    """The fast path of ``nn.TransformerEncoderLayer``: attention, and two linear layers."""
    x, width, heads, qkv, qkv_bias, projection = args[:6]
    attention = _native_attention((x, x, x, width, heads, qkv, qkv_bias, projection), {}, out)
    rows = numel(x) / size(x)[-1]
    return [*attention, *(Term(rows * numel(args[i]), (None, args[i])) for i in (14, 16))]


PRODUCTS: dict[Any, Formula] = {
    aten._grouped_mm: _grouped_product,
    "transformers.grouped_mm_fallback": _grouped_product,  # by its name, since it is there with transformers only
    aten.conv_tbc: _time_batch_channels,
    aten._native_multi_head_attention: _native_attention,
    aten._transformer_encoder_layer_fwd: _encoder_layer,
    **{op: _matrix_product(0) for op in (aten.mm, aten.bmm, aten.mv, aten.dot, aten.vdot)},
    **{op: _matrix_product(1) for op in (aten.addmm, aten.baddbmm, aten.addmv)},
    aten.addbmm: _addbmm,
    aten.convolution: _convolution,
    **{
        getattr(aten, name): _attention
        for name in (
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_fused_attention_overrideable",
        )
        if hasattr(aten, name)
    },
}


def _recurrent(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    """``torch.lstm``, ``gru`` and ``rnn_*`` over ``[T, N, features]``: each weight meets each row of each step once.

    The arguments are ``(x, hidden, weights, biases, layers, dropout, training, bidirectional, ...)``; packed sequences
    come as ``(data, batch_sizes, ...)``, and have as many rows as ``data``.
    """
    x = args[0]
    packed = isinstance(args[1], Tensor) and args[1].dim() == 1
    weights, _, layers, _, _, bidirectional = args[2 + packed : 8 + packed]
    matrices = [w for w in weights if w.dim() == 2]
    each = len(matrices) // (layers * (1 + bidirectional))  # into the cell, from step to step, perhaps a projection
    first = range(0, each * (1 + bidirectional), each)
    rows = numel(x) / size(x)[-1]
    return [Term(rows * numel(w), (x if i in first else None, w)) for i, w in enumerate(matrices)]


def _cell(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    """``torch.lstm_cell`` and its kin: ``(x, hidden, w_ih, w_hh, ...)``, where an LSTM's hidden state is a pair."""
    x, hidden, w_ih, w_hh = args[:4]
    hidden = hidden[0] if isinstance(hidden, (list, tuple)) else hidden
    rows = numel(x) / size(x)[-1]
    return [Term(rows * numel(w_ih), (x, w_ih)), Term(rows * numel(w_hh), (hidden, w_hh))]


def _bilinear(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    """``sum_ij a_i W_oij b_j``: first with a, then with b."""
    a, b, weight = (_operand(args, kwargs, i, name) for i, name in enumerate(("input1", "input2", "weight")))
    rows = numel(a) / size(a)[-1]
    return [Term(rows * numel(weight), (a, weight)), Term(rows * size(weight)[0] * size(b)[-1], (None, b))]


def _average_pool(dims: int) -> Formula:
    """One addition for each element of each window."""

    def terms(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
        kernel = _operand(args, kwargs, 1, "kernel_size")
        sizes = list(kernel) if isinstance(kernel, (list, tuple)) else [kernel]
        window = sympy.prod(sizes * dims if len(sizes) == 1 else sizes)
        return [Term(numel(out) * window, (_operand(args, kwargs, 0, "input"),))]

    return terms


def _adaptive_average_pool(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    """Every element of the input is added once."""
    x = _operand(args, kwargs, 0, "input")
    return [Term(numel(x), (x,))]


LAYERS: dict[Any, Formula] = {
    **{getattr(torch, name): _recurrent for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
    **{getattr(torch, name): _cell for name in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")},
    **dict.fromkeys((F.bilinear, torch.bilinear), _bilinear),
    **({flex: _attention} if (flex := getattr(torch.ops.higher_order, "flex_attention", None)) else {}),
}
# Averages add and do not multiply: they are counted apart.
POOLING: dict[Any, Formula] = {
    F.avg_pool1d: _average_pool(1),
    F.avg_pool2d: _average_pool(2),
    F.avg_pool3d: _average_pool(3),
    **dict.fromkeys((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d), _adaptive_average_pool),
}
