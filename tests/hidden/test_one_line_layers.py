"""The one-line form masks every kind of layer as sparsify does."""

import copy
from collections.abc import Callable

import pytest
import torch
from hidden.compare import (
    INIT,
    check,
    one_line,
    without_inductor,
)
from torch import Tensor, nn

from autosparse_fx import AutoSparse, sparsify, thresholds


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_inductor(monkeypatch)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(16, 8), (4, 16)),
    "linear without bias": (lambda: nn.Linear(16, 8, bias=False), (2, 3, 16)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2), (2, 4, 8, 8)),
    "conv2d circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 8, 8)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 4, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3), (2, 2, 5, 5, 5)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4), (2, 8, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8, padding=1), (2, 8, 5, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 4, 4)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 3), (2, 2, 3, 3, 3)),
    "transposed grouped": (lambda: nn.ConvTranspose2d(8, 12, 3, groups=4), (2, 8, 4, 4)),
}


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layer_equals_the_prepared_one(layer: str, granularity: str) -> None:
    make, shape = LAYERS[layer]
    model = nn.Sequential(make())
    axis = 1 if "transposed" in layer else 0
    masked = check(model, torch.randn(shape), axes={"0.weight": axis}, config={"granularity": granularity})
    assert masked == {"0.weight"}
    channels = model[0].weight.shape[axis] if granularity == "channel" else 1
    assert thresholds(model)["0.weight"].shape == (channels,)


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_bilinear_equals_the_prepared_one(granularity: str) -> None:
    model = nn.Bilinear(3, 4, 5)
    assert check(model, torch.randn(2, 3), torch.randn(2, 4), config={"granularity": granularity}) == {"weight"}


class Attention(nn.Module):
    def __init__(self, cross: bool = False, **arguments: int) -> None:
        super().__init__()
        self.cross = cross
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **arguments)
        with torch.no_grad():
            for p in self.attention.parameters():
                p.copy_(torch.randn_like(p) / 4)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.attention(x, memory, memory)[0] if self.cross else self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["self", "cross", "separate"])
def test_attention_equals_the_prepared_one(kind: str, training: bool) -> None:
    sizes = {"kdim": 6, "vdim": 6} if kind == "separate" else {}
    model = Attention(cross=kind != "self", **sizes).train(training)
    memory = torch.randn(2, 5, sizes.get("kdim", 8))
    masked = check(model, torch.randn(2, 3, 8), memory, config={"granularity": "channel"})
    inner = {"q_proj_weight", "k_proj_weight", "v_proj_weight"} if sizes else {"in_proj_weight"}
    assert masked == {f"attention.{name}" for name in inner | {"out_proj.weight"}}


def encoder(layers: int = 1) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_transformer_encoder_equals_the_prepared_one(training: bool) -> None:
    """Also the layers that ``nn.TransformerEncoder`` copies from one: each has thresholds of its own."""
    masked = check(encoder(2).train(training), torch.randn(2, 3, 8))
    assert masked == {
        f"layers.{i}.{name}.weight".replace("in_proj.", "in_proj_")
        for i in range(2)
        for name in ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")
    }


@pytest.mark.parametrize("make", [encoder, Attention], ids=["encoder", "attention"])
@pytest.mark.parametrize("first", ["evaluated", "trained"])
def test_attention_evaluated_without_gradients_is_masked(make: Callable[[], nn.Module], first: str) -> None:
    """In eval mode and under no_grad these layers hand all of their weights to one fused operator."""
    model = make()
    inputs = (torch.randn(2, 3, 8),) if make is encoder else (torch.randn(2, 3, 8), torch.randn(2, 3, 8))
    twin = sparsify(copy.deepcopy(model), AutoSparse(threshold_init=INIT)).eval()
    step = one_line(model)
    if first == "trained":
        step(*inputs)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(step(*inputs), twin(*inputs))
    assert set(thresholds(model)) == set(thresholds(twin))


@pytest.mark.parametrize("make", [nn.RNNCell, nn.GRUCell, nn.LSTMCell], ids=["rnn", "gru", "lstm"])
def test_recurrent_cell_is_masked_or_refused_by_name(make: Callable[..., nn.Module]) -> None:
    """Dynamo captures it as one call; what must not happen is that it trains dense in silence."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = make(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            state = self.cell(x)
            return self.head(state[0] if isinstance(state, tuple) else state)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    one_line(model)(torch.randn(4, 8)).sum().backward()
    if set(thresholds(model)) != {"cell.weight_ih", "cell.weight_hh", "head.weight"}:
        with pytest.raises(RuntimeError, match=r"(?s)weight 'cell\.weight_ih'.*autosparse_fx\.sparsify"):
            optimizer.step()
