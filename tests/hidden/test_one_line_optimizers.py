"""The optimizers, and the ways to call them, under which hidden thresholds train as those of a prepared model."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hidden.one_line import (
    Run,
    assert_equal_states,
    assert_same,
    assert_same_models,
    both,
    masked_output,
    net,
    sgd,
    start,
    state_of,
)
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

import autosparse_fx
from autosparse_fx import AutoSparse
from autosparse_fx.hidden import masks, training
from autosparse_fx.hidden.masks import hidden_mask

pytestmark = pytest.mark.usefixtures("eager_graphs")

OPEN = AutoSparse(target_sparsity=None, threshold_init=-2.5)  # nothing but the gradients moves its thresholds
OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "sgd_momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "sgd_nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "sgd_fused": lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adam_foreach": lambda p: Adam(p, lr=0.01, weight_decay=0.01, foreach=True),
    "adam_fused": lambda p: Adam(p, lr=0.01, betas=(0.8, 0.99), fused=True),
    "adam_tensor_lr": lambda p: Adam(p, lr=torch.tensor(0.01)),
    "rmsprop": lambda p: RMSprop(p, lr=0.001, momentum=0.5, eps=1e-3),  # less makes whole steps of rounding errors
    "adagrad": lambda p: Adagrad(p, lr=0.05, lr_decay=0.01),
    "nadam": lambda p: NAdam(p, lr=0.01),
    "radam": lambda p: RAdam(p, lr=0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_trains_thresholds_as_those_of_the_prepared_model(kind: str) -> None:
    runs = both(net(), lambda m: OPTIMIZERS[kind](m.parameters()), config=AutoSparse(granularity="channel"))
    for run in runs:
        run.steps(10)
    assert_same(*runs)
    for run in runs:  # and on, with what they remember of each threshold
        run.steps(10)
    assert_same(*runs)


class Counting(SGD):
    """Keeps a step count in its groups, as RAdam's first versions, AdaBound or schedule-free optimizers do."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    p.data.sub_(group["lr"] / group["count"] * p.grad)


def test_an_optimizer_that_counts_in_its_groups() -> None:
    runs = both(net(), lambda m: Counting(m.parameters(), lr=1.0), config=OPEN)
    for run in runs:
        run.steps(5)
    assert_same(*runs)


class Assigning(SGD):
    """Gives its parameters other memory at every step."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = p.data - group["lr"] * p.grad


def test_an_optimizer_that_assigns_data() -> None:
    runs = both(net(), lambda m: Assigning(m.parameters(), lr=0.5), config=OPEN)
    for run in runs:
        run.steps(5)
    assert_same(*runs)
    for run in runs:
        assert all(bool((logit != OPEN.threshold_init).all()) for logit in autosparse_fx.thresholds(run.model).values())


# Gradients that something was done to.


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_may_be_zeroed_or_dropped(to_none: bool) -> None:
    runs = both(net(), config=OPEN)
    for run in runs:
        for _ in range(10):
            run.optimizer.zero_grad(set_to_none=to_none)
            run.backward()
            run.optimizer.step()
    assert_same(*runs)


def test_a_batch_that_zero_grad_throws_away_leaves_no_trace() -> None:
    model = net()
    runs = [start(copy.deepcopy(model), prepared=False, config=OPEN) for _ in range(2)]
    for run in runs:
        run.steps(3)
    run = runs[0]
    for value in (torch.nan, torch.inf, 1.0):
        run.compiled(torch.full((4, 16), value)).sum().backward()
        run.optimizer.zero_grad(set_to_none=value == 1.0)
    for run in runs:
        run.steps(3)
    assert runs[0].losses == runs[1].losses
    assert_equal_states(state_of(runs[0].model), state_of(runs[1].model))


def test_steps_without_a_gradient_leave_the_thresholds_where_they_are() -> None:
    runs = both(net(), config=OPEN)
    for run in runs:
        run.steps(3)
        run.optimizer.step()
        for _ in range(3):
            run.backward()
            run.model[0].zero_grad()
            run.optimizer.step()
            run.optimizer.zero_grad()
    assert_same(*runs)
    assert hidden_mask(runs[0].model[0].weight).steps == 7


@pytest.mark.parametrize("frozen", ["0", "0 2"])
def test_a_weight_that_is_frozen_stays_masked(frozen: str) -> None:
    run = start(net(), prepared=False, config=OPEN)
    run.steps(3)
    for index in frozen.split():
        run.model.get_submodule(index).requires_grad_(False)
    torch._dynamo.reset()  # torch 2.11 does not notice
    x = torch.randn(5, 16)
    torch.testing.assert_close(run.compiled(x).detach(), masked_output(run.model, x))


def test_accumulated_gradients_make_one_step() -> None:
    runs = both(net(), config=AutoSparse(granularity="channel"))
    for run in runs:
        for _ in range(6):
            for _ in range(3):
                run.backward(scale=1 / 3)
            run.optimizer.step()
            run.optimizer.zero_grad()
    assert_same(*runs)
    mask = hidden_mask(runs[0].model[0].weight)
    assert mask is not None and mask.steps == 6


def clip_norm(run: Run) -> None:
    """As for the weights alone, so that both models clip by the same norm; thresholds follow their weights."""
    total = torch.nn.utils.get_total_norm([p.grad for p in run.weights()])
    torch.nn.utils.clip_grads_with_norm_(run.model.parameters(), 0.05, total)


def clip_value(run: Run) -> None:
    torch.nn.utils.clip_grad_value_(run.weights(), 0.003)
    if run.prepared:  # the gradient of a threshold is by definition a sum over that of its weight
        for module in (run.model[0], run.model[2]):
            s = autosparse_fx.thresholds(module)["weight"]
            weight, g = module._parameters["weight"], torch.sigmoid(s)
            module.weight_threshold.grad = -0.1 * g * (1 - g) * (weight.sign() * weight.grad).sum()


@pytest.mark.parametrize("clip", [clip_norm, clip_value])
def test_clipped_gradients_clip_those_of_the_thresholds(clip: Callable[[Run], None]) -> None:
    runs = both(net(), config=OPEN)
    for run in runs:
        for _ in range(10):
            run.backward()
            clip(run)
            run.optimizer.step()
            run.optimizer.zero_grad()
    assert_same(*runs)
    plain = start(net(), prepared=False, config=OPEN)
    plain.steps(10)
    assert runs[0].losses != plain.losses


def test_gradients_that_a_hook_of_the_optimizer_changes() -> None:
    runs = both(net(), config=OPEN)
    for run in runs:

        def clip(optimizer: Optimizer, args: Any, kwargs: Any, run: Run = run) -> None:
            clip_value(run)

        run.optimizer.register_step_pre_hook(clip)
        run.steps(10)
    assert_same(*runs)


# GradScaler.


def scaled_step(run: Run, scaler: torch.amp.GradScaler, scale: float = 1.0, unscale: bool = False) -> None:
    x, y = next(run.batches)
    loss = F.cross_entropy(run.compiled(x), y)
    scaler.scale(loss * scale).backward()
    if unscale:
        scaler.unscale_(run.optimizer)
    scaler.step(run.optimizer)
    scaler.update()
    run.optimizer.zero_grad()
    run.losses.append(float(loss.detach()))


@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_scaler_gives_the_thresholds_that_training_without_gives(fused: bool, unscale: bool) -> None:
    model, make = net(), lambda m: AdamW(m.parameters(), lr=0.01, fused=fused)
    plain = start(copy.deepcopy(model), make, prepared=False)
    plain.steps(12)
    run = start(model, make, prepared=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4)
    for _ in range(12):
        scaled_step(run, scaler, unscale=unscale)
    assert scaler.get_scale() == 8192
    assert run.losses == pytest.approx(plain.losses, rel=1e-4)
    assert_same_models(model, plain.model)


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_the_scaler_skips_trains_nothing(fused: bool) -> None:
    runs = both(net(), lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9, fused=fused), config=OPEN)
    for run in runs:
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        for i in range(8):
            before = None if i != 4 else state_of(run.model)
            scaled_step(run, scaler, scale=torch.inf if i == 4 else 1.0)
            if before is not None:
                assert_equal_states(before, state_of(run.model))
    assert_same(*runs)
    mask, annealer = hidden_mask(runs[0].model[0].weight), runs[1].annealer
    assert mask is not None and annealer is not None
    assert mask.steps == annealer.steps == (8 if fused else 7)


def test_a_fused_optimizer_goes_on_without_the_scaler_that_skipped_its_last_step() -> None:
    runs = both(net(), lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9, fused=True), config=OPEN)
    for run in runs:
        run.step()
        scaled_step(run, torch.amp.GradScaler("cpu", init_scale=16.0), scale=torch.inf)
        run.steps(5)
    assert_same(*runs)


@pytest.mark.filterwarnings("ignore:no optimizer that has taken a step")
def test_groups_whose_parameters_are_exchanged_train_and_steer_what_they_hold() -> None:
    """As where layers are trained in turn: as many parameters as before, and others."""
    model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(2)))
    step = torch.compile(model, backend="autosparse", options={"total_steps": 8, "target_sparsity": 0.5})
    optimizer = SGD(model[0].parameters(), lr=0.1)
    x = torch.randn(8, 16)
    for layer in (0, 1, 0, 1):
        optimizer.param_groups[0]["params"] = list(model[layer].parameters())
        before = [float(hidden_mask(m.weight).offset) if hidden_mask(m.weight) else None for m in model]
        for _ in range(2):
            step(x).square().mean().backward()
            optimizer.step()
            model.zero_grad()
        after = [float(hidden_mask(m.weight).offset) for m in model]
        assert after[layer] != before[layer]
        assert before[1 - layer] is None or after[1 - layer] == before[1 - layer]


def test_a_count_of_steps_goes_where_fused_optimizers_want_it() -> None:
    """As after a state that was loaded on another device; the meta device stands for a GPU."""
    threshold = torch.nn.Parameter(torch.zeros(1, device="meta"))
    for options, device in (({"fused": None}, "cpu"), ({"capturable": True}, "meta")):
        twin = Adam([threshold])
        twin.param_groups[0].update(options)
        twin.state[threshold]["step"] = torch.tensor(3.0)
        training._place_steps(twin)
        assert twin.state[threshold]["step"].device.type == device


@pytest.mark.gpu
def test_masks_follow_a_weight_to_its_device_and_are_trained_there_anew() -> None:
    model = net()
    compiled = torch.compile(model, backend="autosparse", options={"total_steps": 8, "granularity": "channel"})
    optimizer = sgd(model)
    compiled(torch.randn(8, 16)).square().sum().backward()
    optimizer.step()
    mask, before = hidden_mask(model[0].weight), masks.membership()
    mask.holder(model[0].weight)
    assert masks.membership() == before
    holder = mask.holder(model.cuda()[0].weight)
    assert masks.membership() > before
    assert {t.device.type for t in (*holder.parameters(), *holder.buffers())} == {"cuda"}
    assert mask.optimizer_state["momentum_buffer"].device.type == "cuda"
    optimizer.load_state_dict(optimizer.state_dict())
    compiled(torch.randn(8, 16, device="cuda")).square().sum().backward()
    optimizer.step()
    model.cpu()
    assert 0 <= autosparse_fx.sparsity(model) <= 1
