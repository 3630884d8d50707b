"""Sparse inference and what forward may take, do and return."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernels.graphs import Function, prune
from kernels.models import MODELS, Seen, assert_same, check, compiled, dense, inputs_of, made
from torch import Tensor, nn

X = torch.randn(2, 16, 12, 14, generator=torch.Generator().manual_seed(0))


# Shapes.


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dynamic", [None, False, True])
def test_batches_of_several_sizes(name: str, dynamic: bool | None) -> None:
    model = made(name)
    fast = compiled(model, dynamic=dynamic)
    for batch in (2, 3, 1, 5, 4, 2):
        check(fast, model, inputs_of(name, batch))


@pytest.mark.parametrize("name", ["stack", "residual", "mlp"])
def test_one_graph_for_a_batch_that_is_marked_dynamic(name: str, seen: Seen) -> None:
    model = made(name)
    fast = compiled(model)
    for batch in (4, 2, 7):
        x = inputs_of(name, batch)
        torch._dynamo.mark_dynamic(x, 0)
        check(fast, model, x)
    assert seen.compilations == 1 and seen.programs > 0


def test_dynamic_batch_survives_a_write(seen: Seen) -> None:
    model = made("mlp")
    fast = compiled(model)
    for batch in (4, 2, 7):
        check(fast, model, inputs_of("mlp", batch))
    with torch.no_grad():
        model.up.weight.mul_(2)
    programs, compilations = seen.programs, seen.compilations
    for batch in (5, 2):
        check(fast, model, inputs_of("mlp", batch))
    assert seen.programs > programs and seen.compilations == compilations + 1


@pytest.mark.parametrize("name", ["stack", "residual", "mobile"])
def test_images_of_other_sizes(name: str) -> None:
    model = made(name)
    fast = compiled(model)
    channels = inputs_of(name).shape[1]
    for size in ((12, 14), (17, 12), (12, 14), (8, 30), (31, 9)):
        check(fast, model, torch.randn(2, channels, *size))


def test_sequences_of_other_lengths() -> None:
    model = made("attention")
    fast = compiled(model)
    for length in (21, 40, 33, 1, 64):
        check(fast, model, torch.randn(2, length, 64))


@pytest.mark.parametrize("name", ["stack", "residual", "mobile"])
def test_channels_last_inputs_and_models(name: str) -> None:
    x = inputs_of(name).to(memory_format=torch.channels_last)
    for model in (made(name), made(name).to(memory_format=torch.channels_last)):
        check(compiled(model), model, x)
        check(compiled(model), model, x[:, :, ::2, 1:])


def test_batch_of_none() -> None:
    model = made()
    with torch.no_grad():
        assert compiled(model)(X[:0]).shape == (0, 16, 12, 14)


# Outputs, and what forward may do besides.


@pytest.mark.parametrize("forward", [
    lambda m, x: {"y": m.layers(x), "n": None, "k": 3, "z": [m.layers(x).sum()]},
    lambda m, x: (m.layers(x), (x.sum(), None)),
    lambda m, x: (m.layers(x), x),
    lambda m, x: (x.view(-1), m.layers(x), x.permute(1, 0, 2, 3)),
    lambda m, x: (m.layers(x), m.layers.first.weight),
    lambda m, x: [y := m.layers(x), y.view(-1), y],
    lambda m, x: (m.layers(x)[:, :3], torch.arange(3)),
    lambda m, x: None if m.layers(x) is None else m.layers(x).shape[0],
], ids=["dict", "tuple", "input", "views of the input", "weight", "views of it", "slice", "number"])  # fmt: skip
def test_outputs(forward: Callable[..., Any]) -> None:
    model = Function(forward, layers=made())
    fast = compiled(model)
    for _ in range(2):
        check(fast, model, X)


def test_output_that_aliases_the_input_still_does() -> None:
    model = Function(lambda m, x: (m.layers(x), x.view(-1), x), layers=made())
    x = X.clone()
    with torch.no_grad():
        _, view, same = compiled(model)(x)
    view[0] = 7.0
    assert x.view(-1)[0] == 7.0 and same is x


def test_results_of_two_calls_are_two_tensors() -> None:
    model = made()
    fast = compiled(model)
    with torch.no_grad():
        first = fast(X)
        kept = first.clone()
        second = fast(2 * X)
    assert torch.equal(first, kept) and not torch.equal(first, second)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = made()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layers(x) * self.calls


def test_buffer_that_forward_writes_to(seen: Seen) -> None:
    model = Counting()
    fast = compiled(model)
    expected = copy.deepcopy(model)
    for number in range(1, 4):
        assert_same(dense(expected, X), dense(expected, X))
        with torch.no_grad():
            assert_same(fast(X), number * dense(model.layers, X))
        assert model.calls == number
    assert seen.programs == 0


def test_input_that_forward_writes_to() -> None:
    model = Function(lambda m, x: m.layers(x.mul_(2)), layers=made())
    x = X.clone()
    with torch.no_grad():
        found = compiled(model)(x)
    assert torch.equal(x, 2 * X)
    assert_same(found, dense(model.layers, 2 * X))


def test_graph_breaks(seen: Seen) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        torch._dynamo.graph_break()
        return F.relu(m.second(x))

    model = Function(forward, first=made(), second=made())
    check(compiled(model), model, X)
    assert seen.programs == 2


def test_two_inputs_of_which_the_later_one_is_used_outside() -> None:
    model = Function(lambda m, x, y: m.layers(x) * y, layers=made())
    check(compiled(model), model, X, torch.randn(2, 16, 12, 14))


def test_tied_weights(seen: Seen) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    model = prune(Tied())
    fast = compiled(model)
    x = torch.randn(40, 64)
    check(fast, model, x)
    with torch.no_grad():
        model.a.weight.mul_(2)
    check(fast, model, x)
    assert seen.programs == 4


def test_functions_that_only_hold_a_model(seen: Seen) -> None:
    model = made("mlp")
    fast = torch.compile(lambda x: model(x) + 1, backend="autosparse")
    x = inputs_of("mlp")
    with torch.no_grad():
        assert_same(fast(x), dense(model, x) + 1)
        model.up.weight.mul_(2)
        assert_same(fast(x), dense(model, x) + 1)
    assert seen.programs > 0


def test_weights_made_in_inference_mode(seen: Seen) -> None:
    with torch.inference_mode():
        model = made()
        fast = compiled(model)
        expected = model.double()(X.double())
        model.float()
        assert_same(fast(X), expected)
