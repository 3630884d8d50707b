"""products: the tensors that a node of a graph multiplies by, each with the axis of its output channels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from autosparse_fx.passes.modes import bare_name


@dataclass(frozen=True)
class Operand:
    """One tensor that a node multiplies by."""

    tensor: Node
    axis: int | None  # of its output channels (negative: counted from the end); None: it has none of its own
    is_weight: bool = False  # it is in a place where a layer takes its weight, and never what that is applied to


# Operations that take a weight and what it is applied to, by the bare name that they have as functions of torch, of
# torch.nn.functional and of aten alike: for each position that holds a weight, the axis of its output channels.
_LAYERS: dict[str, dict[int, int]] = {
    **{name: {1: 0} for name in ("linear", "linear_cross_entropy", "conv1d", "conv2d", "conv3d", "convolution")},
    **{name: {1: 1} for name in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")},
    "conv_tbc": {1: 2},
    "bilinear": {2: 0},
}
_TRANSPOSED = 6  # the position of the argument of ``convolution`` that says so
# Products of tensors of which any may be the weight. grouped_mm_fallback is transformers' own.
_PRODUCTS: dict[str, dict[int, int]] = {
    **{name: {0: -2, 1: -1} for name in ("matmul", "imatmul", "mm", "bmm", "mv", "tensordot")},
    **{name: {0: -2, 1: -1} for name in ("grouped_mm", "grouped_mm_fallback")},
    "rmatmul": {0: -1, 1: -2},
    **{name: {0: -2, 1: -2} for name in ("inner", "dot", "vdot", "vecdot", "outer", "ger", "kron")},
    **{name: {1: -2, 2: -1} for name in ("addmm", "baddbmm", "addbmm", "addmv")},
    "addr": {1: 0, 2: 0},
    "scaled_dot_product_attention": {0: -2, 1: -2, 2: -1},
}
_CHAINS = frozenset({"chain_matmul", "multi_dot"})  # products of any number of matrices
# The names that an operand may be passed by, by its position. Where a call has two of one line, the first is meant.
_KEYWORDS = {
    0: ("input", "self", "query", "a", "x", "mat_a"),
    1: (
        *("linear_weight", "weight", "other", "tensor", "key", "b", "y", "mat_b"),
        *("mat1", "batch1", "vec1", "mat", "mat2", "vec2", "vec"),
    ),
    2: ("weight", "mat2", "batch2", "vec2", "vec", "value"),
}
# Calls that hold several weights, by the names of those (all with their output channels first).
_MANY: dict[str, dict[int, str]] = {
    "multi_head_attention_forward": {
        5: "in_proj_weight",
        11: "out_proj_weight",
        18: "q_proj_weight",
        19: "k_proj_weight",
        20: "v_proj_weight",
    },
    **{cell: {2: "w_ih", 3: "w_hh"} for cell in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")},
    "native_multi_head_attention": {5: "qkv_weight", 7: "proj_weight"},
    "transformer_encoder_layer_fwd": {3: "qkv_weight", 5: "proj_weight", 14: "ffn_weight_1", 16: "ffn_weight_2"},
}


def operands(node: Node) -> list[Operand]:
    """The tensors that ``node`` multiplies, where it multiplies and sums or makes all products of two tensors.

    Convolutions, linear and bilinear layers, attention, recurrent cells, and matrix products in all their forms count,
    as functions, as methods and as operators of aten; elementwise products and embedding look-ups do not.
    """
    if node.op not in ("call_function", "call_method"):
        return []
    name = bare_name(node)
    if name == "einsum":
        return _einsum_operands(node)
    if name in _CHAINS:
        given = node.args or tuple(node.kwargs.values())
        factors = [f for arg in given for f in (arg if isinstance(arg, (list, tuple)) else [arg])]
        last = len(factors) - 1
        return [Operand(f, -1 if i == last else -2) for i, f in enumerate(factors) if isinstance(f, Node)]
    if name in _MANY:
        weights = [_argument(node, position, (keyword,)) for position, keyword in _MANY[name].items()]
        return [Operand(weight, 0, is_weight=True) for weight in weights if isinstance(weight, Node)]
    is_layer = name in _LAYERS
    found = []
    for position, axis in (_LAYERS if is_layer else _PRODUCTS).get(name, {}).items():
        operand = _argument(node, position, _KEYWORDS[position])
        if name == "convolution" and _argument(node, _TRANSPOSED, ("transposed",)) is True:
            axis = 1
        if isinstance(operand, Node):
            found.append(Operand(operand, axis, is_layer))
    return found


def _argument(node: Node, position: int, names: Sequence[str]) -> Any:
    if position < len(node.args):
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), None)


def _einsum_operands(node: Node) -> list[Operand]:
    """Those that share a letter that is summed over with another, or have one of their own in the output.

    All others are scales: ``bd,d->bd`` multiplies elementwise.
    """
    tensors, terms, output = _equation(node)
    found = []
    for i, (tensor, term) in enumerate(zip(tensors, terms, strict=False)):
        others = [letter for j, other in enumerate(terms) if j != i for letter in other]
        own = [axis for axis, letter in enumerate(term) if letter in output and letter not in others]
        summed = any(letter in others and letter not in output for letter in term if letter is not ...)
        if len(tensors) > 1 and isinstance(tensor, Node) and (own or summed):
            before = term[: own[0]] if own else []
            axis = None if not own else own[0] - len(term) if ... in before else own[0]
            found.append(Operand(tensor, axis))
    return found


def _equation(node: Node) -> tuple[list[Any], list[list[Any]], list[Any]]:
    """The operands of an einsum, the letters of each, and those of the output, without the ellipsis there."""
    given: list[Any] = [*node.args] if node.args else [node.kwargs.get("equation"), node.kwargs.get("operands")]
    equation, *rest = given
    if not isinstance(equation, str):  # einsum(x, [0, 1], w, [1, 2], [0, 2])
        tensors, terms = given[: len(given) // 2 * 2 : 2], [list(term) for term in given[1::2]]
        output = list(given[-1]) if len(given) % 2 else None
    else:
        tensors = list(rest[0]) if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
        inputs, arrow, result = equation.replace(" ", "").partition("->")
        terms = [_letters(term) for term in inputs.split(",")]
        output = _letters(result) if arrow else None
    if output is None:  # then it has the letters that occur once
        every = [letter for term in terms for letter in term]
        output = [letter for letter in every if every.count(letter) == 1]
    return tensors, terms, [letter for letter in output if letter is not ...]


def _letters(term: str) -> list[Any]:
    return [... if letter == "." else letter for letter in term.replace("...", ".")]
