"""Sparse inference and what forward may take, do and return."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernels.graphs import Function, prune
from kernels.models import MODELS, Seen, assert_same, check, compiled, dense, inputs_of, made
from torch import Tensor, nn
from torch.nn.utils import prune as pruning
from torch.testing._internal.two_tensor import TwoTensor

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


def detection_head(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    """What behind the convolutions relies on where they put their results."""
    y = F.relu(m.first(x))
    batch, _, height, width = y.shape
    boxes = m.second(y).view(batch, -1, 4, height, width).permute(0, 3, 4, 1, 2).reshape(batch, -1, 4)
    turned = y.permute(0, 2, 3, 1)
    parts = (*y.split([48, 80], 1), y[:, ::2], y[..., 1:, 1:], m.norm(y), m.norm(y).relu()[:, 1:])
    return boxes, y, 2 * y, turned, turned.view(-1), turned.sigmoid(), *turned.unbind(0), m.linear(turned), *parts


@pytest.mark.parametrize("channels_last", [False, True], ids=["plain model", "channels-last model"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_results_lie_in_memory_as_in_eager_mode(channels_last: bool, dynamic: bool | None, seen: Seen) -> None:
    model = prune(
        Function(
            detection_head,
            first=nn.Conv2d(16, 128, 3, padding=1),
            second=nn.Conv2d(128, 36, 3, padding=1),
            linear=nn.Linear(128, 64),
            norm=nn.GroupNorm(4, 128),
        )
    )
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 24, 20, 16).permute(0, 3, 1, 2)  # an image as most libraries load it
    fast = compiled(model, dynamic=dynamic)
    with torch.no_grad():
        for found, expected in zip(fast(x), model(x), strict=True):
            assert_same(found, expected)
            assert found.stride() == expected.stride()
    assert dynamic or seen.programs > 0


def test_results_taken_by_their_strides_come_from_dense_layers(seen: Seen) -> None:
    model = prune(Function(lambda m, x: m.a(x).as_strided((2, 8, 4), (1792, 56, 1)), a=nn.Conv2d(16, 32, 3, padding=1)))
    check(compiled(model), model, X.to(memory_format=torch.channels_last))
    assert seen.programs == 0


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
            return self.b(F.softsign(self.a(x)))

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


@pytest.mark.parametrize("one", [{"stride": (2,)}, {"dilation": (2,)}, {"padding": (2,)}], ids=str)
def test_one_number_for_both_dimensions(one: dict[str, Any], seen: Seen) -> None:
    model = prune(nn.Sequential(nn.Conv2d(16, 32, 3, **one), nn.ReLU(), nn.Conv2d(32, 16, 1))).eval()
    check(compiled(model), model, X)
    assert seen.programs == 1


@pytest.mark.parametrize(
    "activation",
    [nn.LeakyReLU(), nn.LeakyReLU(-0.3), nn.ELU(), nn.ELU(0.5), nn.SELU(), nn.Hardtanh(-0.2, 0.3), nn.Mish()],
    ids=str,
)
def test_activations_keep_their_constants(activation: nn.Module, seen: Seen) -> None:
    model = prune(nn.Sequential(nn.Conv2d(16, 64, 3), activation, nn.Conv2d(64, 16, 1), activation)).eval()
    check(compiled(model), model, X)
    check(compiled(model), model, 40 * X)
    assert seen.programs == 2


def test_tensors_of_a_subclass_run_as_they_are(seen: Seen, caplog: pytest.LogCaptureFixture) -> None:
    """As the local parts of distributed tensors are, or quantised weights."""
    model = made()
    x = TwoTensor(X, 2 * X)
    with caplog.at_level("INFO", "autosparse_fx"), torch.no_grad():
        found = compiled(model)(x)
    assert isinstance(found, TwoTensor)
    assert_same([found.a, found.b], [dense(model, X), dense(model, 2 * X)])
    assert seen.programs == 0 and "tensors of a subclass" in caplog.text


@pytest.mark.parametrize("layer, why", [
    (nn.Conv3d(16, 32, 3), "3-dimensional (1)"),
    (nn.Bilinear(16, 16, 32), "its graph has no layer that has one"),
], ids=["layer without a kernel", "no layer"])  # fmt: skip
def test_why_nothing_runs_sparse_is_in_the_log(layer: nn.Module, why: str, caplog: pytest.LogCaptureFixture) -> None:
    x = [torch.randn(4, 16)] * 2 if isinstance(layer, nn.Bilinear) else [torch.randn(4, 16, 5, 6, 7)]
    with caplog.at_level("INFO", "autosparse_fx"):
        check(compiled(layer), layer, *x)
    assert f"no sparse kernels: {why}" in caplog.text


def test_call_with_gradients_says_what_it_lacks(seen: Seen, caplog: pytest.LogCaptureFixture) -> None:
    model = made()

    @torch.compile(backend="autosparse")
    def evaluate(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x)

    with caplog.at_level("INFO", "autosparse_fx"):
        assert_same(evaluate(X), dense(model, X))
    assert seen.programs == 0 and "torch.no_grad() or torch.inference_mode() around the call" in caplog.text


def energy(m: Any, x: Tensor, *, with_forces: bool) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = m.second(F.softplus(m.first(x))).sum()
        return (y.detach(), *torch.autograd.grad(y, x)) if with_forces else (y, x)


@pytest.mark.parametrize("with_forces", [False, True])
def test_gradients_that_forward_asks_for_under_no_grad(
    with_forces: bool, seen: Seen, caplog: pytest.LogCaptureFixture
) -> None:
    """As models of energies and forces do."""
    forward = functools.partial(energy, with_forces=with_forces)
    model = prune(Function(forward, first=nn.Linear(64, 96), second=nn.Linear(96, 64))).eval()
    x = torch.randn(21, 64)
    with caplog.at_level("INFO", "autosparse_fx"), torch.no_grad():
        found = compiled(model)(x)
        expected = model(x)
    assert_same(found, expected)
    if not with_forces:
        with torch.enable_grad():
            assert_same(torch.autograd.grad(*found), torch.autograd.grad(*expected))
    assert seen.programs == 0 and "computes gradients" in caplog.text


# Weights that the graph computes.


def pruned(model: nn.Module) -> nn.Module:
    for module in (model.first, model.second):
        pruning.l1_unstructured(module, "weight", 0.9)
    return model


def test_pruning_of_torch_runs_sparse_and_follows_its_masks(seen: Seen) -> None:
    model = pruned(made(sparsity=0.0))
    fast = compiled(model)
    check(fast, model, X)
    programs = seen.programs
    assert programs > 0
    with torch.no_grad():
        model.first.weight_mask[0] = 0.0
    check(fast, model, X)
    assert seen.programs > programs


def test_weight_that_is_computed_and_returned_is_the_callers_own(seen: Seen) -> None:
    model = Function(
        lambda m, x: (F.conv2d(x, w := m.layers.first.weight * m.layers.first.weight, padding=1), w),
        layers=made(),
    )
    fast = compiled(model)
    with torch.no_grad():
        before, weight = fast(X)
        weight.zero_()
        after, _ = fast(X)
    assert torch.equal(before, after) and seen.programs == 2


def test_attention_to_a_memory_runs_sparse(seen: Seen) -> None:
    """Its weights are cut out of one."""
    model = prune(nn.TransformerDecoderLayer(64, 4, 256, batch_first=True)).eval()
    check(compiled(model), model, torch.randn(2, 9, 64), torch.randn(2, 21, 64))
    assert seen.programs > 1
