"""What GradientAnnealing counts as an optimizer step, by its hook and by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from annealers import alpha_of, backward, float32, one_step, scaled_step, sgd, sparse_mlp
from torch import Tensor

from autosparse_fx import GradientAnnealing

# what counts as a step


def test_batches_of_gradient_accumulation_do_not_count() -> None:
    model = sparse_mlp()
    optimizer = sgd(model)
    annealer = GradientAnnealing(model, 10, optimizer)
    for step in range(3):
        for micro in range(4):
            backward(model, seed=micro)
            assert annealer.steps == step
        optimizer.step()
        optimizer.zero_grad()
        assert annealer.steps == step + 1


def test_a_step_that_the_gradient_scaler_skips_does_not_count() -> None:
    model = sparse_mlp(decay="linear", alpha=1.0)
    optimizer = sgd(model)
    annealer = GradientAnnealing(model, 10, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    counted = []
    for overflow in (False, True, True, False):
        scaled_step(model, optimizer, scaler, overflow=overflow)
        counted.append((annealer.steps, alpha_of(model)))
    assert [steps for steps, _ in counted] == [1, 1, 1, 2]
    assert [alpha for _, alpha in counted] == [float32(a) for a in (0.9, 0.9, 0.9, 0.8)]


def test_zero_grad_and_closures_do_not_count() -> None:
    model = sparse_mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    annealer = GradientAnnealing(model, 10, optimizer)
    closures = 0

    def closure() -> Tensor:
        nonlocal closures
        closures += 1
        optimizer.zero_grad()
        return backward(model)

    optimizer.step(closure)
    assert closures > 1
    assert annealer.steps == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.01, foreach=True),
        lambda p: torch.optim.SGD(p, lr=0.01, foreach=False),
        lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        lambda p: torch.optim.RMSprop(p, lr=0.01),
    ],
    ids=["sgd-foreach", "sgd-loop", "adamw-foreach", "adamw-fused", "rmsprop"],
)
@pytest.mark.parametrize("by_hook", [True, False])
def test_every_optimizer_counts_by_hook_or_by_step(make: Callable[[Any], torch.optim.Optimizer], by_hook: bool) -> None:
    model = sparse_mlp()
    optimizer = make(model.parameters())
    annealer = GradientAnnealing(model, 10, optimizer if by_hook else None)
    for _ in range(3):
        one_step(model, optimizer)
        if not by_hook:
            annealer.step()
    assert annealer.steps == 3


def test_hook_and_step_train_alike() -> None:
    def run(by_hook: bool) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model = sparse_mlp()
        optimizer = sgd(model, momentum=0.9)
        annealer = GradientAnnealing(model, 30, optimizer if by_hook else None)
        reference.train(model, optimizer, reference.classification_batches(30), None if by_hook else annealer.step)
        return model.state_dict()

    hooked, stepped = run(True), run(False)
    for name in hooked:
        assert torch.equal(hooked[name], stepped[name]), name


def test_stepping_before_the_optimizer_warns_once() -> None:
    model = sparse_mlp()
    optimizer = sgd(model)
    annealer = GradientAnnealing(model, 10)
    with pytest.warns(UserWarning, match=r"no weight has changed.*after optimizer.step\(\)") as caught:
        annealer.step()
        annealer.step()
        one_step(model, optimizer)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_an_optimizer_of_another_model_is_not_taken_for_this_ones() -> None:
    other = sparse_mlp()
    optimizer = sgd(other)
    annealer = GradientAnnealing(other, 10)
    one_step(other, optimizer)
    annealer.step()
    later = GradientAnnealing(sparse_mlp(), 10)
    with pytest.warns(UserWarning, match="no weight has changed") as caught:
        later.step()
        later.step()
    assert len(caught) == 1


def test_stepping_in_order_does_not_warn() -> None:
    model = sparse_mlp()
    optimizer = sgd(model)
    annealer = GradientAnnealing(model, 10)
    for _ in range(10):
        one_step(model, optimizer)
        annealer.step()
    assert annealer.steps == 10


@pytest.mark.parametrize("by_hook", [True, False])
def test_stepping_past_the_end_warns_once_and_alpha_stays_zero(by_hook: bool) -> None:
    model = sparse_mlp(decay="fixed", alpha=1.0, alpha_end=1.0)
    optimizer = sgd(model)
    annealer = GradientAnnealing(model, 2, optimizer if by_hook else None)

    def step() -> None:
        one_step(model, optimizer)
        if not by_hook:
            annealer.step()

    step()
    step()
    offsets = {name: b.clone() for name, b in model.named_buffers() if name.endswith("_offset")}
    with pytest.warns(UserWarning, match="past the annealer's total_steps=2.*alpha stays 0") as caught:
        for _ in range(3):
            step()
    assert len(caught) == 1
    assert annealer.steps == 2 and annealer.alpha == 0.0 and alpha_of(model) == 0.0
    for name, buffer in model.named_buffers():
        if name.endswith("_offset"):
            assert torch.equal(buffer, offsets[name])


# step() by hand, where nothing was stepped


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_by_hand_after_one_that_the_gradient_scaler_skipped_does_not_count(fused: bool) -> None:
    """As with the optimizer's hook; a fused optimizer on the CPU is skipped by the scaler too, or counts by itself."""
    by_hook, by_hand = sparse_mlp(decay="linear", alpha=1.0), sparse_mlp(decay="linear", alpha=1.0)
    by_hand.load_state_dict(by_hook.state_dict())
    counted: list[list[tuple[int, float]]] = []
    for model in (by_hook, by_hand):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=fused)
        annealer = GradientAnnealing(model, 10, optimizer if model is by_hook else None)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        counted.append([])
        for overflow in (False, True, True, False, True, False):
            scaled_step(model, optimizer, scaler, overflow=overflow)
            if model is by_hand:
                annealer.step()
            counted[-1].append((annealer.steps, alpha_of(model)))
    assert counted[0] == counted[1]
    if not fused:
        assert [steps for steps, _ in counted[1]] == [1, 1, 1, 2, 2, 3]


def test_first_steps_that_the_gradient_scaler_skips_do_not_count_either() -> None:
    model = sparse_mlp()
    annealer = GradientAnnealing(model, 100)
    with pytest.warns(UserWarning, match=r"does not count \(which is right where GradScaler skipped"):
        for _ in range(15):
            annealer.step()
    assert annealer.steps == 0
    one_step(model, sgd(model))
    annealer.step()
    assert annealer.steps == 1


def test_step_by_hand_at_every_batch_of_gradient_accumulation_counts_the_optimizers_steps() -> None:
    model = sparse_mlp()
    optimizer = sgd(model)
    annealer = GradientAnnealing(model, 10)
    one_step(model, optimizer)
    annealer.step()
    for _ in range(3):
        for _ in range(3):
            backward(model)
            annealer.step()
        optimizer.step()
        annealer.step()
    assert annealer.steps == 4


@pytest.mark.parametrize("seen_before", [False, True])
@pytest.mark.filterwarnings("ignore:.*no weight has changed:UserWarning")
def test_an_optimizer_that_torch_does_not_see_counts_after_a_while_and_all_of_it(seen_before: bool) -> None:
    """One that is no torch.optim.Optimizer, and writes through .data."""
    model = sparse_mlp(target_sparsity=None)
    annealer = GradientAnnealing(model, 100)
    if seen_before:
        model.load_state_dict(model.state_dict())
    for step in range(1, 61):
        backward(model)
        for parameter in model.parameters():
            parameter.data.sub_(parameter.grad, alpha=0.01)
            parameter.grad = None
        annealer.step()
        held = 21 if seen_before else 20  # what loading wrote passes for the first step
        assert annealer.steps == (step if step > held else seen_before)
    assert alpha_of(model) == float32(annealer.alpha) < 0.75


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_step_by_hand_counts_when_the_optimizer_step_is_compiled() -> None:
    model = sparse_mlp()
    optimizer = sgd(model)
    step = torch.compile(optimizer.step, backend="eager")
    annealer = GradientAnnealing(model, 10)
    for _ in range(3):
        backward(model)
        step()
        annealer.step()
    assert annealer.steps == 3
