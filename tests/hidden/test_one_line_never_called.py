"""Models that options ask to be sparse and of which Dynamo captures no graph: they never train dense in silence."""

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from hidden.compare import Mlp, one_line, options, without_inductor
from torch import Tensor, nn

import autosparse_fx
from autosparse_fx import AutoSparse, finalize, sparsify, thresholds

# All of torch itself: where a compiled graph begins with a computed tensor.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
MISSED = r"weight '{}' .* is trained, but no compiled graph has masked it(?s:.)*autosparse_fx\.sparsify"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_inductor(monkeypatch)
    gc.collect()  # no compiled model of another test


@contextlib.contextmanager
def missed(name: str, model: nn.Module) -> Iterator[None]:
    """It is an error that names the weight and the cure, and no weight has changed."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=MISSED.format(name)):
        yield
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value)


def step(model: nn.Module, call: Callable[..., Any], x: Tensor = X, steps: int = 1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        out = call(x)
        (out[0] if isinstance(out, tuple) else out).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


class BreakInLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        return x


@torch.compiler.disable
def eagerly(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


class Disabled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return eagerly(self.layer, x)


UNSEEN = {
    "lstm": (lambda: nn.LSTM(16, 8), "weight_ih_l0"),
    "lstm in a Sequential": (lambda: nn.Sequential(nn.LSTM(16, 8)), "0.weight_ih_l0"),
    "graph break in a loop": (BreakInLoop, "layers.0.weight"),
    "disabled": (Disabled, "layer.weight"),
}


@pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "in place"])
@pytest.mark.parametrize("kind", UNSEEN)
def test_module_without_any_graph_is_an_error_of_the_first_step(kind: str, in_place: bool) -> None:
    make, name = UNSEEN[kind]
    model: Any = make()
    if in_place:
        model.compile(backend="autosparse", options=options())
        call = model
    else:
        call = one_line(model)
    with missed(name, model):
        step(model, call)


def test_a_layer_that_no_step_has_used_is_not_missed() -> None:
    model = nn.ModuleDict({"used": nn.Linear(16, 16), "unused": nn.LSTM(16, 16)})
    for parameter in model["unused"].parameters():
        parameter.grad = torch.zeros_like(parameter)  # as wrappers leave it that reduce all gradients

    @torch.compile(backend="autosparse", options=options())
    def call(x: Tensor) -> Tensor:
        return model["used"](x)

    step(model, call)
    assert set(thresholds(model)) == {"used.weight"}
    call = one_line(model["unused"])
    with missed("unused.weight_ih_l0", model):
        step(model, call)


def test_names_are_those_of_the_whole_model() -> None:
    model = nn.Sequential(nn.Linear(16, 16), BreakInLoop())
    model[1].compile(backend="autosparse", options=options())
    with missed("1.layers.0.weight", model):
        step(model, model)


def closing_over(model: nn.Module) -> Callable[..., Any]:
    def function(x: Tensor) -> Tensor:
        for _ in range(1):
            x = eagerly(model, x)
        return x

    return function


class Trainer:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def call(self, x: Tensor) -> Tensor:
        return eagerly(self.model, x)


COMPILED = {
    "closure": closing_over,
    "method of the model": lambda model: model.forward,
    "method of an object that holds it": lambda model: Trainer(model).call,
}


@pytest.mark.parametrize("kind", COMPILED)
def test_functions_and_methods_are_searched_for_models(kind: str) -> None:
    model = BreakInLoop()
    with missed("layers.0.weight", model):
        step(model, torch.compile(COMPILED[kind](model), backend="autosparse", options=options()))


def test_the_loop_that_calls_the_uncompiled_model_is_an_error() -> None:
    model = Mlp()
    compiled = one_line(model)
    with missed("0.weight", model):
        step(model, model)
    step(model, compiled)
    assert len(thresholds(model)) == 3


def test_a_model_that_is_compiled_after_a_dense_warm_up_is_looked_at_again() -> None:
    model = BreakInLoop()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    call: Any = model

    def steps(number: int) -> None:
        for _ in range(number):
            call(X).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(3)
    call = one_line(model)
    with missed("layers.0.weight", model):
        steps(1)


# Nothing else is refused.


def test_a_rule_leaves_such_a_model_dense() -> None:
    model = nn.LSTM(16, 8)
    step(model, one_line(model, rules={"*": None}), steps=3)
    assert not thresholds(model)


def test_frozen_weights_and_evaluation_are_no_error() -> None:
    model = nn.Sequential(nn.LSTM(16, 16))
    head = nn.Linear(16, 4)
    compiled = one_line(model)
    with torch.no_grad():
        compiled(X)
    model.requires_grad_(False)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)
    head(compiled(X)[0]).sum().backward()
    optimizer.step()


def test_other_models_are_left_alone_by_it_and_by_invalid_options() -> None:
    kept = [one_line(nn.LSTM(16, 8)), one_line(Mlp(), target_sparsity=5.0), one_line(Mlp(), rules={"nope": None})]
    for model in (reference.mlp(), nn.LSTM(16, 8)):
        step(model, model, steps=2)
    assert len(kept) == 3


def test_invalid_options_that_dynamo_swallows_are_an_error_of_the_first_step() -> None:
    model = Mlp()
    with torch._dynamo.config.patch(suppress_errors=True), pytest.raises(ValueError, match=r"target_sparsity.*5\.0"):
        step(model, one_line(model, target_sparsity=5.0))


def test_a_compiled_model_that_is_gone_asks_for_nothing() -> None:
    model = nn.LSTM(16, 8)
    garbage = [one_line(model)]
    garbage.append(garbage)  # only the collector finds it
    del garbage
    step(model, model)


def test_a_prepared_model_and_a_finalized_one_are_no_error() -> None:
    model = nn.Sequential(nn.LSTM(16, 16))
    compiled = one_line(model)
    sparsify(model, AutoSparse(target_sparsity=None))
    step(model, model, steps=2)

    other = Mlp()
    kept = one_line(other, target_sparsity=None)
    step(other, kept)
    finalize(other)
    step(other, other, steps=2)
    assert compiled is not None and kept is not None


def test_an_optimizer_of_nothing_sparse_gets_no_hook_of_its_own() -> None:
    model = reference.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(len(o._optimizer_step_pre_hooks)))
    model(X).sum().backward()
    optimizer.step()
    assert seen == [1]


def test_a_step_with_a_closure_is_refused_before_the_first_graph() -> None:
    model = Mlp()
    compiled = one_line(model)
    optimizer = torch.optim.LBFGS(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(compiled(X), torch.zeros(4, 4))
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"LBFGS\.step\(closure\).*autosparse_fx\.sparsify"):
        optimizer.step(closure)
    assert not autosparse_fx.thresholds(model)
