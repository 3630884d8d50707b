"""Each operation that multiplies, against a count by hand: forward, and the gradients of both operands."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flops.compare import Around, Count, count
from torch import Tensor, nn

from autosparse_fx.flops import count_flops
from autosparse_fx.flops.formulas import LAYERS


def conv(n: int, into: int, out: int, places: int, kernel: int, groups: int = 1) -> int:
    """Each of ``out`` channels at each place takes a kernel over its group of the ``into`` channels."""
    return n * out * places * (into // groups) * kernel


CONVOLUTIONS = {  # layer, input, MACs; the output sizes are worked out by hand
    "1d": (nn.Conv1d(3, 4, 5, padding=2), (2, 3, 9), conv(2, 3, 4, 9, 5)),
    "2d": (nn.Conv2d(3, 4, 3), (2, 3, 8, 9), conv(2, 3, 4, 6 * 7, 9)),
    "3d": (nn.Conv3d(2, 4, (1, 2, 3)), (2, 2, 4, 5, 6), conv(2, 2, 4, 4 * 4 * 4, 6)),
    "grouped": (nn.Conv2d(6, 9, 3, groups=3), (2, 6, 5, 5), conv(2, 6, 9, 9, 9, groups=3)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6, padding=1), (2, 6, 5, 5), conv(2, 6, 6, 25, 9, groups=6)),
    "dilated": (nn.Conv2d(3, 4, 3, dilation=2), (1, 3, 9, 9), conv(1, 3, 4, 25, 9)),
    "strided": (nn.Conv2d(3, 4, 3, stride=(2, 3), padding=1), (2, 3, 8, 8), conv(2, 3, 4, 4 * 3, 9)),
    "same": (nn.Conv2d(3, 4, 5, padding="same"), (2, 3, 8, 8), conv(2, 3, 4, 64, 25)),
    "reflected": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 8, 8), conv(2, 3, 4, 64, 9)),
    "one image": (nn.Conv2d(3, 4, 3), (3, 8, 8), conv(1, 3, 4, 36, 9)),
    # Transposed: every input element is spread over the kernel; output_padding adds places that cost nothing.
    "transposed 1d": (nn.ConvTranspose1d(3, 4, 5, stride=2), (2, 3, 9), conv(2, 4, 3, 9, 5)),
    "transposed 2d": (
        nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
        (2, 6, 5, 5),
        2 * 6 * 25 * (4 // 2) * 9,
    ),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2, stride=2), (1, 2, 3, 4, 5), conv(1, 3, 2, 60, 8)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str) -> None:
    """Also on an input that wants a gradient, and with the weight frozen: each gradient costs as much again."""
    layer, shape, macs = CONVOLUTIONS[name]
    x = torch.randn(shape)
    assert count(layer, x) == (macs, 0, macs)
    assert count(layer, x.clone().requires_grad_()) == (macs, macs, macs)
    frozen = Around(lambda self, x: self.layer(x), layer=layer)
    layer.weight.requires_grad_(False)
    try:
        assert count(frozen, x) == (macs, 0, 0)
    finally:
        layer.weight.requires_grad_(True)


Product = Callable[[Tensor, Tensor], Tensor]
PRODUCTS: dict[str, tuple[Product, tuple[int, ...], tuple[int, ...], int]] = {  # of x and w, their shapes, MACs
    "mm": (torch.mm, (5, 3), (3, 4), 60),
    "matmul": (torch.matmul, (2, 5, 3), (3, 4), 120),
    "broadcast": (lambda x, w: x @ w, (2, 1, 5, 3), (7, 3, 4), 840),
    "row": (lambda x, w: x @ w, (3,), (3, 4), 12),
    "bmm": (torch.bmm, (2, 5, 3), (2, 3, 4), 120),
    "mv": (torch.mv, (5, 3), (3,), 15),
    "dot": (torch.dot, (3,), (3,), 3),
    "vdot": (torch.vdot, (3,), (3,), 3),
    "addmm": (lambda x, w: torch.addmm(torch.ones(4), x, w), (5, 3), (3, 4), 60),
    "baddbmm": (lambda x, w: torch.baddbmm(torch.ones(1), x, w), (2, 5, 3), (2, 3, 4), 120),
    "addbmm": (lambda x, w: torch.addbmm(torch.ones(5, 4), x, w), (2, 5, 3), (2, 3, 4), 120),
    "addmv": (lambda x, w: torch.addmv(torch.ones(5), x, w), (5, 3), (3,), 15),
    "einsum": (lambda x, w: torch.einsum("bti,oi->bto", x, w), (2, 5, 3), (4, 3), 120),
    "einsum of two batches": (lambda x, w: torch.einsum("bhqd,bhkd->bhqk", x, w), (2, 3, 5, 4), (2, 3, 6, 4), 720),
    "linear": (F.linear, (2, 5, 3), (4, 3), 120),
    "tensordot": (lambda x, w: torch.tensordot(x, w, 2), (2, 5, 3), (5, 3, 4), 120),
    "inner": (torch.inner, (5, 3), (4, 3), 60),
    "multi_dot": (lambda x, w: torch.linalg.multi_dot([x, w]), (5, 3), (3, 4), 60),
    "vmap": (torch.vmap(torch.mm), (2, 5, 3), (2, 3, 4), 120),
    # Elementwise, with or without a sum after it, is no matrix product.
    "outer": (torch.outer, (5,), (4,), 0),
    "elementwise": (lambda x, w: (x * w).sum(-1), (5, 3), (5, 3), 0),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_matrix_product(name: str) -> None:
    """The operand that is an activation and the one that is a parameter are told apart, in either place."""
    function, left, right, macs = PRODUCTS[name]
    x, w = torch.randn(left), torch.randn(right)
    assert count(Around(lambda self, x: function(x, self.w), w=nn.Parameter(w)), x) == (macs, 0, macs)
    assert count(Around(lambda self, x: function(x, self.w), w=w), x.clone().requires_grad_()) == (macs, macs, 0)
    assert count(Around(lambda self, x: function(self.w, x), w=nn.Parameter(x)), w) == (macs, 0, macs)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


@pytest.mark.parametrize(
    "settings",
    [{}, {"is_causal": True}, {"dropout_p": 0.5}, {"attn_mask": torch.zeros(5, 7)}, {"scale": 2.0}],
    ids=["plain", "causal", "dropout", "mask", "scale"],
)
def test_attention_is_two_products(settings: dict[str, Any]) -> None:
    """A mask saves nothing; with gradients q, k, scores and v cost one product each."""
    q, k, v = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 7, 4), torch.randn(3, 2, 7, 6)
    if "is_causal" in settings:
        v = v[..., :4]
    model = Around(lambda self, q, k, v: F.scaled_dot_product_attention(q, k, v, **settings))
    scores, values = 3 * 2 * 5 * 7 * 4, 3 * 2 * 5 * 7 * v.shape[-1]
    assert count(model, (q, k, v)) == (scores + values, 0, 0)
    wanted = tuple(t.clone().requires_grad_() for t in (q, k, v))
    assert count(model, wanted) == (scores + values, 2 * (scores + values), 0)


def test_attention_of_grouped_queries() -> None:
    """Each query meets the keys of its group once: as many products as with keys of its own."""
    q, k = torch.randn(3, 4, 5, 8), torch.randn(3, 2, 7, 8)
    model = Around(lambda self, q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True))
    assert count(model, (q, k)).forward == 2 * 3 * 4 * 5 * 7 * 8


def test_attention_with_gradients_for_the_values_only() -> None:
    q, v = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4, requires_grad=True)
    product = 3 * 2 * 5 * 5 * 4
    model = Around(lambda self, q, v: F.scaled_dot_product_attention(q, q, v))
    assert count(model, (q, v)) == (2 * product, product, 0)


def test_flex_attention() -> None:
    """It is one node in the graph, without gradients where there is no GPU."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 7, 4)
    model = Around(lambda self, q, k: flex.flex_attention(q, k, k, score_mod=lambda s, b, h, i, j: s + i - j))
    assert count(model, (q, k)) == (2 * 2 * 5 * 7 * 4, 0, 0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weights", [True, False])
def test_multihead_attention(training: bool, weights: bool) -> None:
    n, t, d = 2, 5, 8
    layer = nn.MultiheadAttention(d, 2, batch_first=True).train(training)
    model = Around(lambda self, x: self.layer(x, x, x, need_weights=weights)[0], layer=layer).train(training)
    projections, attention = n * t * 4 * d * d, 2 * n * t * t * d
    out = n * t * d * d
    x = torch.randn(n, t, d)
    assert count(model, x) == (projections + attention, 2 * attention + out, projections)


def test_multihead_attention_over_other_sizes() -> None:
    """Keys and values of their own widths have weights of their own."""
    layer = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)
    model = Around(lambda self, q, k, v: self.layer(q, k, v)[0], layer=layer)
    q, k, v = torch.randn(2, 5, 8), torch.randn(2, 7, 6), torch.randn(2, 7, 4)
    flops = count_flops(model, (q, k, v))
    layers = {name: int(macs.forward) for name, macs in flops.by_layer().items()}
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
    assert [layers[f"layer.{name}"] for name in names] == [2 * 5 * 64, 2 * 7 * 48, 2 * 7 * 32, 2 * 5 * 64]
    assert int(flops.dense.forward) == sum(layers.values()) == 640 + 672 + 448 + 640 + 2 * (2 * 5 * 7 * 8)


def encoder_layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


@pytest.mark.parametrize("training", [True, False])
def test_transformer_encoder_layer(training: bool) -> None:
    """In evaluation too, where eager mode has a fast path of one operation."""
    n, t, d, hidden = 2, 5, 8, 16
    weights, attention = n * t * (4 * d * d + 2 * d * hidden), 2 * n * t * t * d
    expected = Count(weights + attention, weights - n * t * 3 * d * d + 2 * attention, weights)
    assert count(encoder_layer().train(training), torch.randn(n, t, d)) == expected


def test_transformer_encoder_layer_without_gradients() -> None:
    """The fast path of evaluation, which is taken where nothing wants a gradient."""
    model = encoder_layer().eval().requires_grad_(False)
    assert count(model, torch.randn(2, 5, 8)) == (2 * 5 * (4 * 64 + 2 * 128) + 2 * 2 * 25 * 8, 0, 0)


GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1, nn.LSTMCell: 4, nn.GRUCell: 3, nn.RNNCell: 1}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_layer(kind: Any, batch_first: bool) -> None:
    """Two layers in both directions; the input of the first layer alone takes no gradient."""
    n, t, i, h, gates = 2, 7, 3, 5, GATES[kind]
    layer = kind(i, h, 2, bidirectional=True, batch_first=batch_first)
    x = torch.randn((n, t, i) if batch_first else (t, n, i))
    first, other = n * t * gates * h * i * 2, n * t * gates * h * (h + 2 * h + h) * 2
    assert count(layer, x) == (first + other, other, first + other)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_recurrent_layer_with_projection() -> None:
    n, t, i, h, p = 2, 7, 3, 5, 2
    layer = nn.LSTM(i, h, 2, proj_size=p)
    first, other = n * t * 4 * h * i, n * t * (4 * h * (p + p + p) + 2 * h * p)
    assert count(layer, torch.randn(t, n, i)) == (first + other, other, first + other)


@pytest.mark.parametrize("settings", [{"nonlinearity": "relu"}, {"bias": False}, {"dropout": 0.5, "num_layers": 2}])
def test_recurrent_layer_settings(settings: dict[str, Any]) -> None:
    layers = settings.get("num_layers", 1)
    assert count(nn.RNN(5, 5, **settings), torch.randn(7, 5)).forward == 7 * 50 * layers


def test_packed_sequences_have_the_rows_of_their_data() -> None:
    """As the layer calls ``torch.lstm`` with one, which Dynamo leaves to eager mode."""
    layer, zeros = nn.LSTM(3, 5, 2), torch.zeros(2, 3, 5)
    arguments = (torch.randn(6, 3), torch.tensor([3, 2, 1]), (zeros, zeros), layer._flat_weights, True, 2, 0.0, True)
    macs = [int(term.macs) for term in LAYERS[torch.lstm]((*arguments, False), {}, None)]
    assert macs == [6 * 20 * 3, 6 * 20 * 5, 6 * 20 * 5, 6 * 20 * 5]


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("steps", [1, 3])
def test_recurrent_cell(kind: Any, steps: int) -> None:
    """From the second step on the hidden state takes a gradient."""
    n, i, h, gates = 2, 3, 5, GATES[kind]

    def run(self: Any, x: Tensor) -> Any:
        hidden = None
        for _ in range(steps):
            hidden = self.cell(x, hidden)
        return hidden

    macs = n * gates * h * (i + h)
    expected = (steps * macs, (steps - 1) * n * gates * h * h, steps * macs)
    assert count(Around(run, cell=kind(i, h)), torch.randn(n, i)) == expected


def test_bilinear() -> None:
    """First with the one input, then with the other: what arises between takes a gradient."""
    rows, first, second = 6, 6 * 3 * 4 * 5, 6 * 5 * 4
    x, y = torch.randn(2, rows // 2, 3), torch.randn(2, rows // 2, 4)
    assert count(nn.Bilinear(3, 4, 5), (x, y)) == (first + second, second, first)


def test_bilinear_by_keyword() -> None:
    model = Around(lambda self, x, y: F.bilinear(x, y, weight=self.w), w=nn.Parameter(torch.randn(5, 3, 4)))
    assert count(model, (torch.randn(2, 3), torch.randn(2, 4))).forward == 2 * 5 * (12 + 4)


def test_embeddings_multiply_nothing() -> None:
    """But the table takes the gradient that the next layer gives it."""
    ids = torch.arange(6).view(2, 3)
    assert count(nn.Embedding(9, 4), ids) == (0, 0, 0)
    assert count(nn.EmbeddingBag(9, 4), ids) == (0, 0, 0)
    assert count(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), ids) == (48, 48, 48)


POOLING = {  # input, additions
    "1d": (nn.AvgPool1d(2), (2, 3, 8), 2 * 3 * 4 * 2),
    "2d": (nn.AvgPool2d(3, stride=2, padding=1), (2, 3, 8, 8), 2 * 3 * 16 * 9),
    "2d uneven": (nn.AvgPool2d((2, 3)), (2, 3, 8, 9), 2 * 3 * 12 * 6),
    "3d": (nn.AvgPool3d(2), (2, 3, 4, 4, 4), 2 * 3 * 8 * 8),
    "adaptive 1d": (nn.AdaptiveAvgPool1d(1), (2, 3, 8), 48),
    "adaptive 2d": (nn.AdaptiveAvgPool2d((2, 1)), (2, 3, 4, 5), 2 * 3 * 20),
    "adaptive 3d": (nn.AdaptiveAvgPool3d(1), (2, 3, 2, 2, 2), 48),
    "by keyword": (Around(lambda self, x: F.avg_pool2d(x, kernel_size=2)), (2, 3, 4, 4), 2 * 3 * 4 * 4),
}


@pytest.mark.parametrize("name", POOLING)
def test_average_pooling_is_counted_apart(name: str) -> None:
    layer, shape, additions = POOLING[name]
    flops = count_flops(layer, torch.randn(shape))
    assert int(flops.pooling) == additions
    assert int(flops.dense.step) == int(flops.sparse.step) == 0
    assert flops.by_layer() == {}


@pytest.mark.parametrize(
    "pool",
    [
        pytest.param(lambda x: F.avg_pool2d(x, (2,)), id="one size for both"),
        pytest.param(lambda x: F.avg_pool2d(input=x, kernel_size=2), id="input by keyword"),
        pytest.param(lambda x: F.adaptive_avg_pool2d(input=x, output_size=1), id="adaptive by keyword"),
    ],
)
def test_average_pooling_however_it_is_called(pool: Callable[[Tensor], Tensor]) -> None:
    flops = count_flops(Around(lambda self, x: pool(x)), torch.randn(2, 3, 4, 4))
    assert int(flops.pooling) == 2 * 3 * 16


def test_what_is_not_counted() -> None:
    """Normalizations, activations, other pooling, dropout and losses."""
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.GELU(), nn.MaxPool2d(2), nn.Dropout(), nn.GroupNorm(3, 3), nn.Softmax(1)
    )
    flops = count_flops(model, torch.randn(2, 3, 4, 4))
    assert (flops.products, int(flops.dense.step), int(flops.pooling)) == ((), 0, 0)
