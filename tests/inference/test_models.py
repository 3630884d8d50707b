"""Which calls of ``torch.compile(model, backend="autosparse")`` run sparse, and that all are right."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from kernels.graphs import prune
from kernels.models import MODELS, Seen, Stack, assert_same, check, compiled, dense, inputs_of, made
from torch import Tensor, nn

from autosparse_fx import AutoSparse, finalize, sparsify

X = torch.randn(2, 16, 12, 14, generator=torch.Generator().manual_seed(0))


# Models.


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_models(name: str, mode: Callable[[], Any], seen: Seen) -> None:
    model, x = made(name), inputs_of(name)
    fast = compiled(model)
    with mode():
        assert_same(fast(x), dense(model, x))
        first = seen.programs
        assert_same(fast(x), dense(model, x))
    assert first > 0 and seen.programs == 2 * first and seen.compilations == 1


@pytest.mark.parametrize("name", MODELS)
def test_dense_models_never_run_sparse_and_compile_once(name: str, seen: Seen) -> None:
    model, x = made(name, 0.0), inputs_of(name)
    fast = compiled(model)
    for _ in range(3):
        check(fast, model, x)
    assert seen.programs == 0 and seen.compilations == 1


def test_only_layers_that_gain_run_sparse(seen: Seen) -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), prune(nn.Conv2d(32, 32, 3)), nn.ReLU(), nn.Conv2d(32, 8, 3))
    check(compiled(model), model, X)
    assert seen.programs == 1
    assert len(seen.graphs[0].graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default)) == 2


def test_finalized_model_that_was_trained(seen: Seen) -> None:
    torch.manual_seed(0)
    model = sparsify(Stack(), AutoSparse(alpha=0.5, threshold_init=-2.5, target_sparsity=None))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    model = finalize(model).eval()
    assert 0.8 < (model.first.weight == 0).float().mean() < 1
    check(compiled(model), model, X)
    assert seen.programs == 1


@pytest.mark.parametrize("options", [None, {"total_steps": 10, "threshold_init": -2.5}], ids=["prepared", "one line"])
def test_model_that_is_not_finalized_keeps_its_masks(options: dict[str, Any] | None, seen: Seen) -> None:
    model = Stack()
    if options is None:
        sparsify(model, AutoSparse(threshold_init=-2.5))
    fast = compiled(model, options=options)
    for _ in range(2):
        fast(X).sum().backward()
        with torch.no_grad():
            before = fast.eval()(X)
            for parameter in model.parameters():
                parameter.mul_(1.5)
            assert not torch.equal(fast(X), before)
        fast.train()
    assert seen.programs == 0


# Grad mode, training mode, dtypes.


def test_gradients_are_those_of_the_dense_model(seen: Seen) -> None:
    model = made().requires_grad_(False)
    fast = compiled(model)
    check(fast, model, X)
    x, wide = X.clone().requires_grad_(), X.double().requires_grad_()
    fast(x).square().sum().backward()
    copy.deepcopy(model).double()(wide).square().sum().backward()
    assert_same(x.grad, wide.grad)
    assert seen.programs == 1
    check(fast, model, X)
    assert seen.programs == 2


@pytest.mark.parametrize("name", ["stack", "residual"])
def test_training_mode_under_no_grad(name: str, seen: Seen) -> None:
    """Batch statistics are computed, and running ones are written."""
    model, x = made(name).train(), inputs_of(name, 4)
    expected, buffers = copy.deepcopy(model), dict(model.named_buffers())
    with torch.no_grad():
        assert_same(compiled(model)(x), expected(x), 1e-4)
    assert_same(buffers, dict(expected.named_buffers()))
    assert seen.programs == (1 if name == "stack" else 0)
    check(compiled(model.eval()), model, x)


@pytest.mark.parametrize("name", ["stack", "mlp"])
def test_float64_runs_dense(name: str, seen: Seen) -> None:
    model, x = made(name).double(), inputs_of(name).double()
    found = check(compiled(model), model, x, tolerance=1e-12)
    assert found.dtype == torch.float64 and seen.programs == 0


def test_sparse_model_that_gains_nothing_is_dense_with_constant_weights(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autosparse_fx.kernels.choice.MARGIN", 0.0)
    for sparsity, is_constant in ((0.3, False), (0.9, True)):
        torch._dynamo.reset()
        seen.graphs.clear()
        model = made(sparsity=sparsity)
        fast = compiled(model)
        check(fast, model, X)
        model.first.weight.data.copy_(2 * model.first.weight.data)
        with torch.no_grad():
            model.first.bias.add_(1.0)
        check(fast, model, X)
        constants = [len(list(graph.buffers())) for graph in seen.graphs]
        assert constants == ([4, 4] if is_constant else [0]) and seen.programs == 0


def test_zeros_of_what_is_no_weight_make_no_model_sparse(seen: Seen) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)
            self.register_buffer("mask", torch.full((256, 256), -1e9).triu(1))  # as attention adds them
            self.table = nn.Embedding(1000, 16)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.layer(self.table(tokens))
            return torch.softmax(x @ x.transpose(1, 2) + self.mask, -1)

    model = Masked()
    check(compiled(model), model, torch.randint(1000, (2, 256)))
    assert not list(seen.graphs[0].buffers()) and seen.compilations == 1


def test_zeros_in_whole_channels_count_although_a_pass_removes_them(seen: Seen) -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 1))
    with torch.no_grad():
        model[0].weight[8:], model[0].bias[8:] = 0.0, 0.0
    check(compiled(model), model, X)
    assert [tuple(b.shape) for b in seen.graphs[0].buffers() if b.dim() > 1] == [(8, 16, 3, 3), (16, 8, 1, 1)]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_half_precision_is_about_as_exact_as_dense_or_more(name: str, dtype: torch.dtype, seen: Seen) -> None:
    model, x = made(name).to(dtype), inputs_of(name).to(dtype)
    expected = dense(model, x)
    with torch.no_grad():
        found, eager = compiled(model)(x), model(x)
    assert found.dtype == dtype and seen.programs > 0
    assert error(found, expected) <= max(1.2 * error(eager, expected), torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", MODELS)
def test_autocast_runs_sparse(name: str, seen: Seen) -> None:
    model, x = made(name), inputs_of(name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, eager = compiled(model)(x), model(x)
    assert found.dtype == eager.dtype and seen.programs > 0
    assert error(found, dense(model, x)) <= max(1.2 * error(eager, dense(model, x)), 2**-8)


@pytest.mark.parametrize("name", MODELS)
def test_weights_that_freezing_made_attributes(name: str, seen: Seen) -> None:
    """Inductor's option, set for the process, lets Dynamo put weights into its graphs."""
    model, x = made(name), inputs_of(name)
    with inductor_config.patch(freezing=True):
        fast = compiled(model)
        check(fast, model, x)
        count = seen.programs
        assert count > 0
        check(fast, model, torch.cat([x, x]))
        with torch.no_grad():
            next(model.parameters()).mul_(-1.0)
        check(fast, model, x)
    assert seen.programs >= 3 * count
