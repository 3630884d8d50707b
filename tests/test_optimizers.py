"""A sparse model under torch's optimizers: variants agree, all reach the target, and what becomes of momentum."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from threads import in_turns
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adagrad, AdamW, NAdam, Optimizer, RMSprop

from autosparse_fx import AutoSparse, GradientAnnealing, sparsify
from autosparse_fx.optimizers import optimizer_steps

# All of torch itself: where a compiled graph begins with a computed tensor.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

STEPS = 40
Make = Callable[[Any], Optimizer]
MOMENTUM: dict[str, tuple[Make, str]] = {
    "sgd": (lambda p: SGD(p, lr=0.05, momentum=0.9), "momentum_buffer"),
    "sgd-fused": (lambda p: SGD(p, lr=0.05, momentum=0.9, fused=True), "momentum_buffer"),
    "adamw": (lambda p: AdamW(p, lr=0.01), "exp_avg"),
    "nadam": (lambda p: NAdam(p, lr=0.01, foreach=True), "exp_avg"),
}


def sparse(**config: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return sparsify(reference.mlp(), AutoSparse(**config))


def train(
    model: nn.Module, make: Make, *, steps: int = STEPS, call: Any = None, **arguments: Any
) -> tuple[Optimizer, list[float]]:
    optimizer = make(model.parameters())
    annealer = GradientAnnealing(model, STEPS, optimizer, **arguments)
    losses = reference.train(call or model, optimizer, reference.classification_batches(steps))
    assert annealer.steps == steps
    return optimizer, losses


def assert_same_state(found: nn.Module, expected: nn.Module, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    state = expected.state_dict()
    for name, value in found.state_dict().items():
        torch.testing.assert_close(
            value, state[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


# Each variant of an optimizer.

VARIANTS: dict[str, tuple[Callable[..., Optimizer], list[dict[str, Any]]]] = {
    "sgd": (lambda p, **v: SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3, **v), [{"foreach": True}, {"fused": True}]),
    "nesterov": (lambda p, **v: SGD(p, lr=0.1, momentum=0.9, nesterov=True, **v), [{"foreach": True}, {"fused": True}]),
    "adamw": (lambda p, **v: AdamW(p, lr=0.01, **v), [{"foreach": True}, {"fused": True}, {"amsgrad": True}]),
    "adafactor": (lambda p, **v: Adafactor(p, lr=0.3, **v), [{"foreach": True}]),
    "adagrad": (lambda p, **v: Adagrad(p, lr=0.05, **v), [{"foreach": True}, {"fused": True}]),
    "rmsprop": (lambda p, **v: RMSprop(p, lr=0.002, **v), [{"foreach": True}, {"momentum": 0.5}]),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_an_optimizer_train_alike_and_reach_the_target(name: str) -> None:
    make, variants = VARIANTS[name]
    plain = sparse(target_sparsity=0.9)
    _, losses = train(plain, lambda p: make(p, foreach=False))
    assert min(losses[-5:]) < 0.95 * losses[0]
    assert reference.total_sparsity(plain) == pytest.approx(0.9, abs=0.005)
    assert all(s.abs().max() > 0 for key, s in plain.named_parameters() if key.endswith("_threshold"))
    for variant in variants:
        other = sparse(target_sparsity=0.9)
        _, found = train(other, lambda p, variant=variant: make(p, **variant))
        assert reference.total_sparsity(other) == pytest.approx(0.9, abs=0.005), variant
        if not variant.keys() & {"amsgrad", "momentum"}:
            assert found[:10] == pytest.approx(losses[:10], rel=0.02), variant


def test_compiled_optimizer_step_trains_as_the_eager_one() -> None:
    # With alpha 1 no gradient jumps where a rounding error takes a weight over its cut.
    models = [sparse(target_sparsity=0.9, alpha=1.0, decay="fixed") for _ in range(2)]
    for model, compiled in zip(models, (False, True), strict=True):
        optimizer = AdamW(model.parameters(), lr=0.01, foreach=True, eps=1e-3)  # less magnifies rounding errors
        annealer = GradientAnnealing(model, STEPS, optimizer)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for x, y in reference.classification_batches(8):
            F.cross_entropy(model(x), y).backward()
            step()
            optimizer.zero_grad()
        assert annealer.steps == 8
    assert_same_state(models[1], models[0])


@pytest.mark.parametrize("compiled", [False, True])
def test_optimizer_in_backward_trains_as_after_it(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.backends.debugging import aot_eager

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, **_: aot_eager(gm, inputs))
    model, plain = sparse(target_sparsity=0.9), sparse(target_sparsity=0.9)
    _, losses = train(plain, lambda p: SGD(p, lr=0.1, momentum=0.9))

    optimizers = {p: SGD([p], lr=0.1, momentum=0.9) for p in model.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    annealer = GradientAnnealing(model, STEPS)
    call = torch.compile(model, backend="autosparse") if compiled else model
    for (x, y), expected in zip(reference.classification_batches(STEPS), losses, strict=True):
        loss = F.cross_entropy(call(x), y)
        loss.backward()
        annealer.step()
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-3)
    assert_same_state(model, plain, rtol=1e-3, atol=1e-4)


# Momentum.


def masked(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: weight.detach().abs() <= torch.sigmoid(s) for name, _, weight, s in reference.masked_parameters(model)
    }


@pytest.mark.parametrize("name", MOMENTUM)
def test_momentum_carries_masked_weights_on_unless_it_is_cleared(name: str) -> None:
    """With alpha 0 a masked weight has no gradient: what moves it is the momentum from when it had one."""
    make, _ = MOMENTUM[name]
    for clear in (False, True):
        model = sparse(target_sparsity=0.8, alpha=1.0, decay="fixed", alpha_end=0.5)
        optimizer, _ = train(model, make, steps=STEPS // 2, clear_momentum=clear)  # alpha is 0 from here on
        assert float(model[0].autosparse_alpha) == 0
        before, was_masked = copy.deepcopy(model.state_dict()), masked(model)
        if isinstance(optimizer, AdamW):
            optimizer.param_groups[0]["weight_decay"] = 0.0
        ((x, y),) = reference.classification_batches(1)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        for weight, was in was_masked.items():
            moved = (model.state_dict()[weight] != before[weight])[was]
            assert not moved.any() if clear else moved.any(), weight


@pytest.mark.parametrize("name", MOMENTUM)
def test_cleared_momentum_is_zero_where_masked_and_kept_elsewhere(name: str) -> None:
    make, key = MOMENTUM[name]
    for granularity in ("layer", "channel"):
        model = sparse(target_sparsity=0.8, granularity=granularity)
        optimizer, _ = train(model, make, clear_momentum=True)
        held = dict(model.named_parameters())
        for weight, where in masked(model).items():
            momentum = optimizer.state[held[weight]][key]
            assert where.any() and (~where).any()
            assert (momentum[where] == 0).all() and (momentum[~where] != 0).float().mean() > 0.9
        assert all(optimizer.state[p][key].any() for name, p in held.items() if name.endswith("_threshold"))
        assert reference.total_sparsity(model) == pytest.approx(0.8, abs=0.005)


def test_a_tied_weight_has_its_momentum_cleared_once() -> None:
    model = sparsify(reference.Tied(), AutoSparse(threshold_init=-2.5, target_sparsity=None))
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    GradientAnnealing(model, 5, optimizer, clear_momentum=True)
    model(torch.arange(50).view(5, 10)).square().sum().backward()
    optimizer.step()
    momentum = optimizer.state[model.get_parameter("mid.bias")]["momentum_buffer"]
    assert momentum.any()
    (where,) = (where for name, where in masked(model).items() if "embed" in name)
    momentum = optimizer.state[model.embed._parameters["weight"]]["momentum_buffer"]
    assert where.any() and not momentum[where].any() and momentum[~where].any()


def test_an_optimizer_without_momentum_has_none_to_clear() -> None:
    train(sparse(), lambda p: SGD(p, lr=0.1), clear_momentum=True)


def test_clearing_momentum_needs_the_optimizer() -> None:
    with pytest.raises(ValueError, match=r"clear_momentum needs the optimizer.*optimizer="):
        GradientAnnealing(sparse(), 10, clear_momentum=True)


# Steps of several threads.


def test_optimizers_step_in_threads_while_others_ask_which_did() -> None:
    class Listener:
        def saw_step(self, optimizer: Optimizer) -> None:
            pass

    listener = Listener()
    optimizer_steps.start(listener)
    before = optimizer_steps.count

    def work(_: int) -> list[Optimizer]:
        made: list[Optimizer] = []
        for _ in range(100):
            parameter = nn.Parameter(torch.ones(1))
            parameter.grad = torch.ones(1)
            made.append(SGD([parameter], lr=0.1))
            made[-1].step()
            assert made[-1] in optimizer_steps.stepped_since(before)
        return made

    made = [optimizer for found in in_turns(4, work) for optimizer in found]
    assert optimizer_steps.count == before + len(made) == before + 400
    assert set(optimizer_steps.stepped_since(before)) == set(made)
    assert optimizer_steps.stepped_since(before + 400) == []
