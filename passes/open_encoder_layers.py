"""open_encoder_layers: the fast path of ``nn.TransformerEncoderLayer``, one operator, becomes what it consists of."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from autosparse_fx.passes.constants import constant

ENCODER_LAYER = torch.ops.aten._transformer_encoder_layer_fwd.default
_WEIGHTS = (3, 5, 14, 16)  # of the projections and of the two linear layers, among the operator's arguments


def open_encoder_layers(gm: GraphModule) -> int:
    """Open every layer whose weights are constants and hold zeros, so that other passes see its products."""
    opened = 0
    for node in gm.graph.find_nodes(op="call_function", target=ENCODER_LAYER):
        weights = [constant(node.args[number]) for number in _WEIGHTS]
        without_mask = all(argument is None for argument in node.args[18:])
        if without_mask and not node.kwargs and all(w is not None and bool((w == 0).any()) for w in weights):
            _open(gm, node)
            opened += 1
    if opened:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return opened


def _open(gm: GraphModule, node: Node) -> None:
    arguments: list[Any] = [
        argument.meta["val"] if isinstance(argument, Node) else argument for argument in node.args[:18]
    ]
    tensors = [number for number, argument in enumerate(arguments) if isinstance(argument, Tensor)]

    def layer(*values: Tensor) -> Tensor:
        given = list(arguments)
        for number, value in zip(tensors, values, strict=True):
            given[number] = value
        return _layer(*given)

    traced = make_fx(layer)(*(arguments[number] for number in tensors))
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    known: dict[Node, Any] = {inner: node.args[number] for inner, number in zip(placeholders, tensors, strict=True)}
    with gm.graph.inserting_before(node):
        result = gm.graph.graph_copy(traced.graph, known)
    node.replace_all_uses_with(result)  # type: ignore[arg-type]
    gm.graph.erase_node(node)


def _layer(
    x: Tensor,
    embed_dim: int,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
) -> Tensor:
    """What the operator computes, as ``nn.TransformerEncoderLayer`` does without its fast path."""

    def norm1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm1_weight, norm1_bias, eps)

    def norm2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm2_weight, norm2_bias, eps)

    def attend(x: Tensor) -> Tensor:
        batch, tokens = x.shape[:2]
        split: Any = F.linear(x, qkv_weight, qkv_bias).view(batch, tokens, 3, heads, embed_dim // heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, embed_dim)
        return F.linear(attended, out_weight, out_bias)

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, weight1, bias1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), weight2, bias2)

    if norm_first:
        x = x + attend(norm1(x))
        return x + feed_forward(norm2(x))
    x = norm1(x + attend(x))
    return norm2(x + feed_forward(x))
