"""open_encoder_layers: the fast path of the encoder layer becomes its products, and computes the same."""

import pytest
import torch
from kernels.graphs import Captured, Function, prune
from torch import Tensor, nn

from autosparse_fx.passes import lower_sparse_linear, open_encoder_layers
from autosparse_fx.passes.open_encoder_layers import ENCODER_LAYER

X = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))


def encoder(**options: object) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 256, batch_first=True, **options)  # type: ignore[arg-type]
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_opens(norm_first: bool, activation: str) -> None:
    graph = Captured(prune(encoder(norm_first=norm_first, activation=activation)), X)
    assert graph.count(ENCODER_LAYER) == 2
    assert graph.apply(open_encoder_layers) == 2
    assert graph.count(ENCODER_LAYER) == 0
    assert graph.count(torch.ops.aten.addmm.default) + graph.count(torch.ops.aten.mm.default) == 8


def test_products_run_sparse_then() -> None:
    graph = Captured(prune(encoder()), torch.randn(4, 64, 32))
    assert graph.apply(lower_sparse_linear) == 0
    graph.apply(open_encoder_layers)
    assert graph.apply(lower_sparse_linear) > 0


def test_dense_layers_keep_the_fast_path() -> None:
    graph = Captured(encoder(), X)
    assert graph.apply(open_encoder_layers) == 0
    assert graph.count(ENCODER_LAYER) == 2


def test_masks_keep_the_fast_path() -> None:
    layer = prune(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True))

    def forward(model: Function, x: Tensor) -> Tensor:
        return model.layer(x, src_mask=torch.ones(7, 7, dtype=torch.bool).triu(1))

    graph = Captured(Function(forward, layer=layer), X)
    before = graph.count(ENCODER_LAYER)
    assert graph.apply(open_encoder_layers) == 0
    assert graph.count(ENCODER_LAYER) == before


@pytest.mark.parametrize("dynamic", [True, None])
def test_any_batch_and_length(dynamic: bool | None) -> None:
    model = prune(encoder()).eval()
    compiled = torch.compile(model, backend="autosparse", dynamic=dynamic)
    with torch.no_grad():
        for batch, tokens in ((3, 17), (6, 17), (5, 9), (1, 4)):
            x = torch.randn(batch, tokens, 32)
            torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
