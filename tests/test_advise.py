"""advise: what is timed, what is not, and that nothing is left behind."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import autosparse_fx
from autosparse_fx import advise
from autosparse_fx.advise import Advice, LayerAdvice


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.transposed = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transposed(torch.relu(self.norm(self.conv(x))))
        return self.fc(x.mean((2, 3)))


def test_times_every_layer_that_has_a_sparse_kernel() -> None:
    advice = advise(Net(), torch.randn(2, 3, 8, 8), sparsities=(0.5, 0.9))
    assert [layer.name for layer in advice.layers] == ["conv.weight", "transposed.weight", "fc.weight"]
    conv, transposed, fc = advice.layers
    for layer in (conv, fc):
        assert layer.dense_ms is not None and layer.dense_ms > 0 and set(layer.sparse_ms) == {0.5, 0.9}
        assert layer.reason == "" and layer.speedup(0.9) == layer.dense_ms / layer.sparse_ms[0.9]
    assert transposed.dense_ms is None and transposed.sparse_ms == {} and transposed.reason == "transposed"
    assert transposed.speedup(0.9) is None and transposed.pays_from is None
    text = str(advice)
    assert "conv.weight" in text and "90%" in text and "transposed" in text and "measured on this machine" in text
    assert json.loads(json.dumps(advice.to_dict()))["threads"] == torch.get_num_threads()
    page = advice._repr_html_()
    assert page.count("<tr>") == 1 + 3 + 1 and ">conv.weight<" in page and "measured on this machine" in page


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_layers_are_timed_in_the_dtype_of_the_model(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def linear(x: Tensor, *parameters: Tensor) -> Tensor:
        dtypes.update(tensor.dtype for tensor in (x, *parameters))
        return dense(x, *parameters)

    dtypes: set[torch.dtype] = set()
    dense = F.linear
    monkeypatch.setattr(F, "linear", linear)
    advise(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(8, 4)).to(dtype), torch.ones(2, 3, 1, 1, dtype=dtype)
    )
    assert dtypes == {dtype}


def test_convolution_in_one_dimension() -> None:
    (layer,) = advise(nn.Conv1d(16, 48, 5, stride=2, dilation=3), torch.randn(2, 16, 300), sparsities=(0.9,)).layers
    assert layer.shape == (48, 16, 5) and layer.dense_ms is not None and set(layer.sparse_ms) == {0.9}


def test_pays_from_is_where_sparse_stays_faster() -> None:
    def layer(**milliseconds: float) -> LayerAdvice:
        return LayerAdvice("w", (1,), 1.0, {float(k.replace("_", "0.")): v for k, v in milliseconds.items()})

    assert layer(_7=2.0, _8=0.9, _9=0.5).pays_from == 0.8
    assert layer(_7=0.9, _8=1.1, _9=0.5).pays_from == 0.9
    assert layer(_7=2.0, _8=2.0).pays_from is None


def test_a_layer_that_loses_stays_dense_in_the_total() -> None:
    losing, gaining = LayerAdvice("a", (1,), 1.0, {0.9: 4.0}), LayerAdvice("b", (1,), 3.0, {0.9: 1.0})
    assert Advice((losing, gaining), (0.9,), 1).speedup(0.9) == 4.0 / 2.0
    assert Advice((), (0.9,), 1).speedup(0.9) is None


def test_model_is_left_as_it_was() -> None:
    model = Net()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, random = torch.randn(2, 3, 8, 8), torch.get_rng_state()
    assert advise(model, x, sparsities=(0.9,)).speedup(0.9) is not None  # something was timed
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_compiled_model_is_advised_under_its_own_names_and_left_as_it_was() -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager")
    advice = advise(compiled, torch.randn(2, 3, 8, 8), sparsities=(0.9,))
    assert [layer.name for layer in advice.layers] == ["conv.weight", "transposed.weight", "fc.weight"]
    assert compiled.training and all(module.training for module in model.modules())


@pytest.mark.parametrize("sparsity", [1.0, -0.1])
def test_sparsities_out_of_range_are_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"sparsities must be in \[0, 1\)"):
        advise(Net(), torch.randn(2, 3, 8, 8), sparsities=(sparsity,))


@pytest.mark.parametrize("sparsities", [0.9, None, "0.9", ["0.9"], [True], torch.tensor(0.9)])
def test_sparsities_that_are_no_numbers_are_refused(sparsities: Any) -> None:
    with pytest.raises(TypeError, match=r"sparsities must be (a sequence of )?fractions.*got"):
        advise(Net(), torch.randn(2, 3, 8, 8), sparsities=sparsities)


def test_sparsities_may_be_numbers_of_any_kind() -> None:
    advice = advise(nn.Linear(8, 8), torch.ones(2, 8), np.array([0.5, 0.9], np.float32))
    assert (
        advice.sparsities == pytest.approx((0.5, 0.9)) and len(json.loads(json.dumps(advice.to_dict()))["speedup"]) == 2
    )
    assert list(advise(nn.Linear(8, 8), torch.ones(2, 8), (0,)).layers[0].sparse_ms) == [0.0]


def test_inputs_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="Net could not be run on the example_inputs"):
        advise(Net(), torch.randn(2, 5, 8, 8))


def _prepared(granularity: str) -> nn.Module:
    config = autosparse_fx.AutoSparse(granularity=granularity)
    return autosparse_fx.sparsify(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)), config)


def _normalised() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(32, 64)), nn.Linear(64, 8))


def _pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 8))
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: _prepared("layer"), ["0.weight", "2.weight"]),
        (lambda: _prepared("channel"), ["0.weight", "2.weight"]),
        (_normalised, ["0.parametrizations.weight.original1", "1.weight"]),
        (_pruned, ["0.weight_orig", "1.weight"]),
    ],
    ids=["prepared", "by channel", "normalised", "pruned"],
)
def test_computed_weights_are_named_by_what_holds_their_values(make: Callable[[], nn.Module], names: list[str]) -> None:
    """And not by thresholds or magnitudes, which are parameters too."""
    assert [layer.name for layer in advise(make(), torch.randn(4, 32), sparsities=(0.9,)).layers] == names
