"""Mixed precision: autocast to bfloat16 and float16, GradScaler, and weights that are bfloat16 themselves."""

import copy
import math
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import autosparse_fx
from autosparse_fx import AutoSparse, GradientAnnealing, finalize, sparsify

# All of torch itself: where a compiled graph begins with a computed tensor.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

HALF = [torch.bfloat16, torch.float16]
MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (reference.mlp, (16,)),
    "convolutions": (reference.ConvNet, (1, 8, 8)),
}


def gradients(call: Any, model: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        loss = F.cross_entropy(call(x), y)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.backends.debugging import aot_eager

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, **_: aot_eager(gm, inputs))


# Autocast.


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_under_autocast_are_those_of_the_reference(name: str, dtype: torch.dtype, granularity: str) -> None:
    """The masked weight is a float32 tensor that gets the gradient of a dense weight with its values."""
    make, shape = MODELS[name]
    model = sparsify(make(), AutoSparse(threshold_init=-2.5, granularity=granularity))
    dense = finalize_quietly(copy.deepcopy(model))
    ((x, y),) = reference.classification_batches(1, shape)
    found = gradients(model, model, x, y, dtype)
    plain = gradients(dense, dense, x, y, dtype)
    for key, module, weight, s in reference.masked_parameters(model):
        alpha = float(module.autosparse_alpha)
        _, dw, ds = reference.gradients(weight, s, alpha, plain[key])
        assert found[key].dtype == torch.float32
        torch.testing.assert_close(found[key].double(), dw, rtol=1e-5, atol=1e-7, msg=lambda t, k=key: f"{k}: {t}")
        threshold = found[f"{key}_threshold"]
        assert threshold.dtype == torch.float32
        torch.testing.assert_close(threshold.double(), 0.1 * ds.flatten(), rtol=1e-3, atol=1e-6)


def finalize_quietly(model: nn.Module) -> nn.Module:
    with pytest.warns(UserWarning, match="target"):
        return finalize(model)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("one_line", [False, True])
def test_compiled_under_autocast_equals_eager(
    dtype: torch.dtype, one_line: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_inductor(monkeypatch)
    dense = reference.ConvNet()
    model = sparsify(copy.deepcopy(dense), AutoSparse(threshold_init=-2.5))
    ((x, y),) = reference.classification_batches(1, (1, 8, 8))
    expected = gradients(model, model, x, y, dtype)
    compiled = dense if one_line else copy.deepcopy(model)
    options = {"total_steps": 5, "threshold_init": -2.5} if one_line else None
    found = gradients(torch.compile(compiled, backend="autosparse", options=options), compiled, x, y, dtype)
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=2e-2, atol=1e-3, msg=lambda t, k=key: f"{k}: {t}")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_inductor_under_autocast_equals_eager(dtype: torch.dtype) -> None:
    model = sparsify(reference.ConvNet(), AutoSparse(threshold_init=-2.5))
    ((x, y),) = reference.classification_batches(1, (1, 8, 8))
    expected = gradients(model, model, x, y, dtype)
    found = gradients(torch.compile(model, backend="autosparse"), model, x, y, dtype)
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=2e-2, atol=2e-3, msg=lambda t, k=key: f"{k}: {t}")


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_masks_are_not_computed_in_half_precision_by_a_backward_inside_autocast(dtype: torch.dtype) -> None:
    model = sparsify(reference.mlp(), AutoSparse(threshold_init=-2.5))
    w = model[0]._parameters["weight"]
    s, alpha = (-2.5 + 0.1 * model[0].weight_threshold).detach().requires_grad_(), torch.tensor(0.5)
    g = torch.randn_like(w)

    def both() -> tuple[Tensor, ...]:
        masked = autosparse_fx.ops.threshold_mask(w, s, alpha)
        return masked, *torch.autograd.grad(masked, (w, s), g)

    expected = both()
    with torch.autocast("cpu", dtype):
        found = both()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# GradScaler.


def scaled_training(
    model: nn.Module, call: Any, optimizer: torch.optim.Optimizer, overflows: set[int], steps: int
) -> tuple[GradientAnnealing, torch.amp.GradScaler]:
    annealer = GradientAnnealing(model, steps - len(overflows), optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for i, (x, y) in enumerate(reference.classification_batches(steps)):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(call(x), y)
        scaler.scale(loss * (math.inf if i in overflows else 1.0)).backward()
        before = copy.deepcopy(model.state_dict())
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        if i in overflows:
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return annealer, scaler


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("make", [SGD, AdamW])
def test_float16_training_with_skipped_steps_reaches_the_target(
    make: Any, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_inductor(monkeypatch)
    model = sparsify(reference.mlp(), AutoSparse(target_sparsity=0.9))
    call = torch.compile(model, backend="autosparse") if compiled else model
    optimizer = make(model.parameters(), lr=0.05 if make is SGD else 0.01)
    annealer, scaler = scaled_training(model, call, optimizer, {0, 7, 8, 30}, 64)
    assert annealer.steps == 60
    assert scaler.get_scale() == 2.0**6
    assert reference.total_sparsity(model) == pytest.approx(0.9, abs=0.005)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    finalize(model)


# Weights in bfloat16.


@pytest.mark.parametrize("make", ["sgd", "adamw", "adamw-fused", "adafactor"])
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_pure_bfloat16_training_reaches_the_target(make: str, granularity: str) -> None:
    model = sparsify(reference.mlp(), AutoSparse(target_sparsity=0.9, granularity=granularity)).to(torch.bfloat16)
    optimizer = {
        "sgd": lambda: SGD(model.parameters(), lr=0.1, momentum=0.9),
        "adamw": lambda: AdamW(model.parameters(), lr=0.01),
        "adamw-fused": lambda: AdamW(model.parameters(), lr=0.01, fused=True),
        "adafactor": lambda: torch.optim.Adafactor(model.parameters(), lr=0.2),
    }[make]()
    GradientAnnealing(model, 60, optimizer)
    losses = []
    for x, y in reference.classification_batches(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.bfloat16()).float(), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    assert {p.dtype for name, p in model.named_parameters() if name.endswith("_threshold")} == {torch.float32}
    assert reference.total_sparsity(model) == pytest.approx(0.9, abs=0.005)
    finalize(model)
    zeros = [m.weight == 0 for m in model if isinstance(m, nn.Linear)]
    assert sum(int(z.sum()) for z in zeros) / sum(z.numel() for z in zeros) == pytest.approx(0.9, abs=0.005)


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_compiled_bfloat16_training_equals_eager(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_inductor(monkeypatch)
    model = sparsify(reference.mlp(), AutoSparse(target_sparsity=0.9, granularity=granularity)).to(torch.bfloat16)
    twin = copy.deepcopy(model)
    step = torch.compile(twin, backend="autosparse")
    for m, call in ((model, model), (twin, step)):
        optimizer = SGD(m.parameters(), lr=0.05)
        GradientAnnealing(m, 10, optimizer)
        for x, y in reference.classification_batches(5):
            optimizer.zero_grad()
            F.cross_entropy(call(x.bfloat16()).float(), y).backward()
            optimizer.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=2e-2, atol=2e-3, msg=lambda text, name=name: f"{name}: {text}")
