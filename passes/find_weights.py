"""find_weights: the parameters that a Dynamo graph multiplies by, found by their use and not by a layer's class."""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from autosparse_fx._compat import HigherOrderOperator

# op -> for each position that holds a weight, the axis of its output channels (negative: counted from the end).
_MULTIPLICATIONS: dict[Any, dict[int, int]] = {
    F.linear: {1: 0},
    F.bilinear: {2: 0},
    torch.bilinear: {2: 0},
    **{conv: {1: 0} for conv in (torch.conv1d, torch.conv2d, torch.conv3d)},
    **{conv: {1: 1} for conv in (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)},
    **{
        product: {0: -2, 1: -1}
        for product in (
            operator.matmul,
            torch.matmul,
            torch.mm,
            torch.bmm,
            torch.mv,
            torch.linalg.matmul,
            torch.tensordot,
            "matmul",
            "mm",
            "bmm",
            "mv",
            "__matmul__",
        )
    },
    **{product: {0: -2, 1: -2} for product in (torch.inner, "inner")},
    **{
        product: {1: -2, 2: -1}
        for product in (torch.addmm, torch.baddbmm, torch.addbmm, torch.addmv, "addmm", "baddbmm", "addbmm", "addmv")
    },
}
# Calls that hold several weights, by the names of those (all with their output channels first).
_LAYERS: dict[Any, dict[int, str]] = {
    F.multi_head_attention_forward: {
        5: "in_proj_weight",
        11: "out_proj_weight",
        18: "q_proj_weight",
        19: "k_proj_weight",
        20: "v_proj_weight",
    },
    **{
        cell: {2: "w_ih", 3: "w_hh"}
        for cell in (torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell)
    },
    torch._native_multi_head_attention: {5: "qkv_weight", 7: "proj_weight"},
    torch._transformer_encoder_layer_fwd: {3: "qkv_weight", 5: "proj_weight", 14: "ffn_weight_1", 16: "ffn_weight_2"},
}
# Through these a weight is still the same weight; the transpositions exchange its last two axes.
_TRANSPOSITIONS = frozenset(
    {
        *(torch.t, torch.transpose, torch.swapaxes, "t", "transpose", "swapaxes"),
        *(torch.ops.aten.numpy_T, torch.ops.aten.mT),  # what Dynamo makes of w.T and w.mT
    }
)
_CASTS = frozenset({"to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous"})
# The names that a weight may be passed by, by its position.
_KEYWORDS = {
    0: ("input", "self"),
    1: ("weight", "other", "mat2", "mat1", "batch1", "vec"),
    2: ("weight", "mat2", "batch2"),
}
_VIEWS = frozenset(
    {
        torch.reshape,
        torch.permute,
        torch.squeeze,
        torch.unsqueeze,
        torch.flatten,
        torch.chunk,
        torch.split,
        torch.unbind,
        operator.getitem,
        *("reshape", "view", "permute", "squeeze", "unsqueeze", "flatten", "unflatten", "expand", "chunk", "split"),
        *("narrow", "select", "unbind", "__getitem__"),
    }
)


def find_weights(gm: GraphModule, is_weight: Callable[[Node], bool]) -> dict[Node, int]:
    """Return the sources (placeholders and get_attr nodes) for which ``is_weight`` holds and that ``gm`` multiplies by.

    Convolutions, linear and bilinear layers, and matrix products in all their forms count, through views, casts and
    transpositions, and inside the subgraphs of higher-order ops. Elementwise products and embedding look-ups do not.

    Returns:
        For each such node the axis of its output channels, as seen from the parameter.
    """
    found: dict[Node, int] = {}
    for node in gm.graph.nodes:
        for operand, axis in _operands(node):
            source, transposed, viewed = _source(operand)
            if source is not None and is_weight(source):
                found.setdefault(source, _channel_axis(source, axis, transposed, viewed))
        for operand, inner in _subgraph_operands(gm, node):
            subgraph, placeholder = inner
            source, transposed, viewed = _source(operand)
            if source is not None and is_weight(source):
                axis_inside = find_weights(subgraph, lambda n, p=placeholder: n is p).get(placeholder)  # type: ignore[misc]
                if axis_inside is not None:
                    found.setdefault(source, _channel_axis(source, axis_inside, transposed, viewed))
    return found


def _operands(node: Node) -> list[tuple[Node, int | None]]:
    """The tensors that ``node`` multiplies, each with the axis of its output channels."""
    if node.op not in ("call_function", "call_method"):
        return []
    if node.target is torch.einsum:
        return _einsum_operands(node)
    if node.target in _LAYERS:
        layer = _LAYERS[node.target].items()
        weights = [node.args[i] if i < len(node.args) else node.kwargs.get(name) for i, name in layer]
        return [(weight, 0) for weight in weights if isinstance(weight, Node)]
    positions = _MULTIPLICATIONS.get(node.target, {})
    operands: list[tuple[Node, int | None]] = []
    for position, axis in positions.items():
        given = node.args[position : position + 1] or [node.kwargs.get(name) for name in _KEYWORDS[position]]
        operands += [(operand, axis) for operand in given if isinstance(operand, Node)]
    return operands


def _einsum_operands(node: Node) -> list[tuple[Node, int | None]]:
    equation, *rest = node.args
    operands = list(rest[0]) if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
    if not isinstance(equation, str):
        return [(operand, None) for operand in operands if isinstance(operand, Node)]
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow:  # then the output has the letters that occur once
        output = "".join(letter for letter in inputs if letter.isalpha() and inputs.count(letter) == 1)
    result: list[tuple[Node, int | None]] = []
    for i, operand in enumerate(operands):
        others = "".join(term for j, term in enumerate(terms) if j != i)
        own = [axis for axis, letter in enumerate(terms[i]) if letter in output and letter not in others]
        if isinstance(operand, Node):
            result.append((operand, own[0] if own else None))
    return result if len(operands) > 1 else []


def _source(node: Node) -> tuple[Node | None, bool, bool]:
    """Follow views and casts back: the node they start from, whether it was transposed, and otherwise viewed."""
    transposed = viewed = False
    while True:
        if node.op in ("placeholder", "get_attr"):
            return node, transposed, viewed
        if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], Node):
            return None, transposed, viewed
        if node.target in _TRANSPOSITIONS or (node.target is getattr and node.args[1] in ("T", "mT")):
            transposed = not transposed
        elif node.target in _VIEWS:
            viewed = True
        elif node.target not in _CASTS:
            return None, transposed, viewed
        node = node.args[0]


def _channel_axis(source: Node, axis: int | None, transposed: bool, viewed: bool) -> int:
    value = source.meta.get("example_value", source.meta.get("val"))
    dims = value.dim() if isinstance(value, torch.Tensor) else 0
    if axis is None or viewed or dims == 0:
        return 0
    axis = max(0, axis + dims) if axis < 0 else axis
    if transposed and axis >= dims - 2:
        axis = 2 * dims - 3 - axis  # exchange the last two
    return min(max(axis, 0), dims - 1)


def _subgraph_operands(gm: GraphModule, node: Node) -> list[tuple[Node, tuple[GraphModule, Node]]]:
    """The operands of a higher-order op, each with the placeholder of the subgraph that receives it."""
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
    pairs: list[tuple[Node, tuple[GraphModule, Node]]] = []
    for _, subgraph in subgraphs:
        placeholders = [n for n in subgraph.graph.nodes if n.op == "placeholder"]
        operands = flat[-len(placeholders) :] if placeholders else []
        if len(operands) == len(placeholders):
            pairs += [(o, (subgraph, p)) for o, p in zip(operands, placeholders, strict=True) if isinstance(o, Node)]
    return pairs
