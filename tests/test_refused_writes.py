"""What would write to a masked copy, or look for a parameter and find one, is refused by name outside dense_weights."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from torch import Tensor, nn

from autosparse_fx import AutoSparse, dense_weights, sparsify

CONFIG = AutoSparse(alpha=0.5, threshold_init=-2.5)


@pytest.mark.parametrize(
    "value",
    [lambda m: torch.zeros(64, 64), lambda m: m.weight, lambda m: np.zeros((64, 64)), lambda m: 3.0],
    ids=["tensor", "its own masked copy", "array", "number"],
)
def test_assigning_what_is_no_parameter_names_the_weight_and_the_cure(value: Callable[[nn.Module], Any]) -> None:
    model = sparsify(reference.mlp(), CONFIG)
    stored = model[2]._parameters["weight"]
    with pytest.raises(TypeError, match=r"weight '2\.weight' \[64, 64\] of Linear is masked.*Parameter.*dense_weights"):
        model[2].weight = value(model[2])
    assert model[2]._parameters["weight"] is stored
    assert "weight" not in vars(model[2])


@pytest.mark.parametrize("make", [lambda: nn.LSTM(4, 3), lambda: nn.GRUCell(4, 3)], ids=["lstm", "gru_cell"])
def test_assigning_to_a_recurrent_layer_too(make: Callable[[], nn.Module]) -> None:
    model = sparsify(make(), CONFIG)
    name = "weight_hh_l0" if hasattr(model, "weight_hh_l0") else "weight_hh"
    with pytest.raises(TypeError, match=rf"weight '{name}'.*dense_weights"):
        setattr(model, name, torch.zeros(12, 3))


def test_parameters_and_what_is_not_masked_are_assigned_as_ever() -> None:
    model = sparsify(reference.mlp(), CONFIG)
    layer, weight, bias = model[0], nn.Parameter(torch.ones(64, 16)), nn.Parameter(torch.ones(64))
    layer.weight, layer.bias, layer.note, layer.kept = weight, bias, "a note", torch.ones(2)
    assert layer._parameters["weight"] is weight and layer._parameters["bias"] is bias
    assert vars(layer)["note"] == "a note" and torch.equal(vars(layer)["kept"], torch.ones(2))
    with pytest.raises(TypeError, match="cannot assign"):  # torch's own
        layer.bias = torch.ones(64)


def test_inside_dense_weights_assigning_is_torch_s_own_affair() -> None:
    model = sparsify(reference.mlp(), CONFIG)
    with dense_weights(model):
        with pytest.raises(TypeError, match="cannot assign"):
            model[0].weight = torch.zeros(64, 16)
        model[0].weight = nn.Parameter(torch.full((64, 16), 2.0))
    assert torch.equal(model.state_dict()["0.weight"], torch.full((64, 16), 2.0))


def test_class_with_setattr_of_its_own_keeps_it() -> None:
    seen = []

    class Watched(nn.Linear):
        def __setattr__(self, name: str, value: object) -> None:
            seen.append(name)
            super().__setattr__(name, value)

    model = sparsify(nn.Sequential(Watched(4, 3)), CONFIG)
    seen.clear()
    model[0].note = 1
    model[0].weight = nn.Parameter(torch.ones(3, 4))
    with pytest.raises(TypeError, match="masked by autosparse_fx"):
        model[0].weight = torch.ones(3, 4)
    assert seen == ["note", "weight"]


class Counting(nn.Linear):
    """Writes to itself in its forward: a number, a tensor, a buffer."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.detach() * 2
        self.seen = self.seen + x.detach().sum()
        return super().forward(x)


def test_forward_that_writes_attributes_compiles_into_one_graph_as_the_dense_one_does() -> None:
    dense = nn.Sequential(Counting(4, 3))
    model = sparsify(copy.deepcopy(dense), CONFIG)
    graphs: dict[str, list[torch.fx.GraphModule]] = {"dense": [], "sparse": []}

    def compiled(m: nn.Module, name: str) -> Any:
        def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
            graphs[name].append(gm)
            return gm.forward

        return torch.compile(m, backend=backend, fullgraph=True)

    forwards = [compiled(dense, "dense"), compiled(model, "sparse")]
    for _ in range(3):
        for forward in forwards:
            forward(torch.ones(2, 4))
    assert len(graphs["sparse"]) == len(graphs["dense"])
    assert model[0].calls == dense[0].calls == 3
    assert model[0].seen == dense[0].seen == 24
    assert torch.equal(model[0].last, torch.full((2, 4), 2.0))


# Looking for a parameter.


def test_get_parameter_of_a_masked_name_outside_is_refused() -> None:
    model = sparsify(reference.mlp(), CONFIG)
    with pytest.raises(RuntimeError, match=r"weight '2\.weight' \[64, 64\].*get_parameter.*dense_weights\(model\)"):
        model.get_parameter("2.weight")
    with pytest.raises(AttributeError):
        model.get_parameter("2.nothing")


def test_get_parameter_finds_what_is_not_masked_and_inside_all() -> None:
    model = sparsify(reference.mlp(), AutoSparse(threshold_init=-2.5, rules={"0.weight": None}))
    for name in ("0.weight", "2.bias", "2.weight_threshold"):
        assert model.get_parameter(name) is dict(model.named_parameters())[name]
    with dense_weights(model):
        assert model.get_parameter("2.weight") is model[2]._parameters["weight"]
    assert isinstance(getattr(model[2], "weight"), Tensor)  # noqa: B009  (as get_parameter asks)


# Freezing.


def test_modules_freeze_and_thaw_as_ever() -> None:
    model = sparsify(reference.mlp(), CONFIG)
    model[0].requires_grad_(False)
    assert not model[0].weight.requires_grad and model[2].weight.requires_grad
    model(torch.randn(2, 16)).sum().backward()
    assert model[0]._parameters["weight"].grad is None and model[0].weight_threshold.grad is None
    assert model[2]._parameters["weight"].grad is not None
    model[0].requires_grad_(True)
    assert model[0].weight.requires_grad
    with dense_weights(model):
        model[2].weight.requires_grad_(False)
    assert not model[2]._parameters["weight"].requires_grad
