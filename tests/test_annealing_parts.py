"""Annealers of parts of a model, copies of annealers, wrapped optimizers, and what is left of one after an error."""

import copy
import math
import pickle
import warnings
from typing import Any

import pytest
import reference
import torch
from annealers import alpha_of, one_step, sgd, sparse_mlp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.optim import Optimizer

import autosparse_fx
from autosparse_fx import AutoSparse, GradientAnnealing
from autosparse_fx.history import History
from autosparse_fx.steering import TOLERANCE


class Pair(nn.Module):
    """Two networks that are trained against each other, each by an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = reference.mlp(), reference.mlp()


def annealed_parts(total_steps: int) -> tuple[Pair, list[Optimizer], list[GradientAnnealing]]:
    """Two networks that one ``sparsify`` prepared, each with its optimizer and its annealer."""
    pair = autosparse_fx.sparsify(Pair(), AutoSparse(target_sparsity=0.8))
    parts = list(pair.children())
    optimizers: list[Optimizer] = [sgd(part) for part in parts]
    return pair, optimizers, [GradientAnnealing(p, total_steps, o) for p, o in zip(parts, optimizers, strict=True)]


def step_in_turn(pair: Pair, optimizers: list[Optimizer], steps: int) -> None:
    for _ in range(steps):
        for part, optimizer in zip(pair.children(), optimizers, strict=True):
            one_step(part, optimizer)


def test_parts_of_one_model_have_annealers_of_their_own() -> None:
    pair, optimizers, annealers = annealed_parts(60)
    step_in_turn(pair, optimizers, 60)
    assert [annealer.steps for annealer in annealers] == [60, 60]
    for part in pair.children():
        assert autosparse_fx.sparsity(part) == pytest.approx(0.8, abs=TOLERANCE)
    assert alpha_of(pair) == 0.0
    history = autosparse_fx.report(pair).history
    assert len(history.numel) == 6 and all(len(record.sparsity) == 6 for record in history)
    assert history.total_sparsity(history.records[-1]) == pytest.approx(0.8, abs=TOLERANCE)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch, where compiled
@pytest.mark.parametrize("by_part", [True, False], ids=["an annealer for each part", "one for both"])
@pytest.mark.parametrize("backend", [None, "aot_eager", "autosparse"])
def test_the_loop_of_a_gan_may_step_one_part_between_the_passes_of_the_other(
    backend: str | None, by_part: bool
) -> None:
    pair, optimizers, annealers = annealed_parts(20)
    if not by_part:
        annealers = [GradientAnnealing(pair, 20, optimizers[1])]
    shape = nn.Linear(4, 16)  # from what the one gives to what the other takes
    torch._dynamo.reset()
    generator, critic = (torch.compile(p, backend=backend) if backend else p for p in pair.children())
    x = torch.randn(8, 16)
    for _ in range(20):
        fake = shape(generator(x))
        for optimizer in optimizers:
            optimizer.zero_grad()
        (critic(x) - critic(fake.detach())).square().mean().backward()
        optimizers[1].step()
        critic(fake).square().mean().backward()
        optimizers[0].step()
    assert all(annealer.steps == 20 for annealer in annealers)
    assert alpha_of(pair) == 0.0
    assert autosparse_fx.sparsity(pair) == pytest.approx(0.8, abs=TOLERANCE)


def test_parts_are_resumed_one_by_one_with_the_history_of_both() -> None:
    pair, optimizers, annealers = annealed_parts(20)
    step_in_turn(pair, optimizers, 3)
    resumed, optimizers, others = annealed_parts(20)
    for annealer, other in zip(annealers, others, strict=True):
        other.load_state_dict(annealer.state_dict())
    one_step(resumed.generator, optimizers[0])
    history = autosparse_fx.report(resumed).history
    assert [len(record.sparsity) for record in history] == [6, 6, 6, 6]
    assert history.latest()["step"] == 4


def test_a_second_training_of_parts_has_a_history_of_its_own() -> None:
    pair, optimizers, kept = annealed_parts(5)
    step_in_turn(pair, optimizers, 5)
    again = [GradientAnnealing(part, 5, o) for part, o in zip(pair.children(), optimizers, strict=True)]
    assert len(kept[0].history) == 5 and len(again[0].history) == 0 and again[0].history is again[1].history


def test_weights_that_are_no_longer_noted_are_gone_from_the_history() -> None:
    history = History()
    w, s = torch.ones(4), torch.zeros(1)
    history.add(1, 0.5, [("a", w, s), ("b", w, s)])
    history.add(1, 0.5, [("c", w, s)])
    history.add(2, 0.4, [("a", w, s)])
    history.add(3, 0.3, [("a", w, s)])
    assert [list(record.sparsity) for record in history] == [["a", "b", "c"], ["a", "c"], ["a", "c"]]


@pytest.mark.parametrize("rate", [None, torch.tensor(0.1), 0.0])
def test_rates_of_every_kind(rate: Any) -> None:
    model = nn.Sequential(nn.Embedding(4, 16, sparse=True), reference.mlp())
    autosparse_fx.sparsify(model[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    annealer = GradientAnnealing(model[1], 10, optimizer)
    optimizer.param_groups[0]["lr"] = rate
    model(torch.arange(4)).sum().backward()
    annealer._after_optimizer_step(optimizer, (), {})
    assert annealer.steps == 1


def test_parts_of_trainings_of_other_lengths_have_no_gaps() -> None:
    pair = autosparse_fx.sparsify(Pair(), AutoSparse(target_sparsity=0.5))
    optimizers = sgd(pair.generator), sgd(pair.critic)
    GradientAnnealing(pair.generator, 20, optimizers[0])
    GradientAnnealing(pair.critic, 300, optimizers[1])
    for step in range(300):
        if step % 15 == 0:
            one_step(pair.generator, optimizers[0])
        one_step(pair.critic, optimizers[1])
    history = autosparse_fx.report(pair).history
    assert all(len(record.sparsity) == 6 for record in history)
    assert history.total_sparsity(history.records[-1]) == pytest.approx(0.5, abs=TOLERANCE)
    assert history.latest()["sparsity"] == pytest.approx(0.5, abs=TOLERANCE)


def test_an_annealer_that_takes_over_a_part_says_that_the_rest_is_left() -> None:
    pair = autosparse_fx.sparsify(Pair())
    optimizer = sgd(pair)
    whole = GradientAnnealing(pair, 10, optimizer)
    with pytest.warns(UserWarning, match=r"annealer of 6 masked modules is stopped.*'generator\.0', 3 in all"):
        part = GradientAnnealing(pair.critic, 10, optimizer)
    one_step(pair.critic, optimizer)
    assert (whole.steps, part.steps) == (0, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GradientAnnealing(pair, 10, optimizer)  # takes over all that the part has


def poisoned(model: nn.Module) -> dict[str, Any]:
    """The state of a model, of which a weight is then NaN."""
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[0]._parameters["weight"].fill_(math.nan)
    return state


@pytest.mark.parametrize("cure", ["checkpoint", "weights"])
def test_training_goes_on_after_a_failure_that_was_cured(cure: str) -> None:
    model = sparse_mlp(target_sparsity=0.5)
    optimizer = sgd(model)
    annealer = GradientAnnealing(model, 20, optimizer)
    for _ in range(5):
        one_step(model, optimizer)
    saved, state = annealer.state_dict(), poisoned(model)
    with pytest.raises(RuntimeError, match="holds NaN"):
        one_step(model, optimizer)
    optimizer.zero_grad()
    model.load_state_dict(state)
    if cure == "checkpoint":
        annealer.load_state_dict(saved)
    while annealer.steps < 20:
        one_step(model, optimizer)
    assert autosparse_fx.sparsity(model) == pytest.approx(0.5, abs=TOLERANCE)


@pytest.mark.filterwarnings("ignore:finalize")
@pytest.mark.parametrize("steps", [3, 10])
@pytest.mark.parametrize("by_hook", [True, False])
def test_a_finalized_model_trains_on_with_its_annealer(by_hook: bool, steps: int) -> None:
    model = sparse_mlp()
    optimizer = sgd(model, momentum=0.9)
    annealer = GradientAnnealing(model, 10, optimizer if by_hook else None, clear_momentum=by_hook)

    def step() -> None:
        one_step(model, optimizer)
        if not by_hook:
            annealer.step()

    for _ in range(steps):
        step()
    autosparse_fx.finalize(model)
    before = model[0].weight.detach().clone()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the optimizer steps past")
        warnings.filterwarnings("ignore", ".*although no weight has changed")
        step()
    assert not torch.equal(model[0].weight, before)


class Wrapper(Optimizer):
    """As accelerate wraps an optimizer: one by inheritance only."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


def test_the_optimizer_in_a_wrapper_is_followed() -> None:
    model = sparse_mlp()
    optimizer = Wrapper(sgd(model))
    annealer = GradientAnnealing(model, 10, optimizer)
    one_step(model, optimizer)
    assert annealer.steps == 1


def test_a_wrapper_that_hides_its_optimizer_is_refused_and_changes_nothing() -> None:
    model = sparse_mlp()
    optimizer = sgd(model)
    annealer = GradientAnnealing(model, 10, optimizer)
    hidden = Wrapper(optimizer)
    hidden.inner = vars(hidden).pop("optimizer")
    with pytest.raises(TypeError, match=r"Wrapper has no step hooks.*pass the optimizer that it wraps"):
        GradientAnnealing(model, 10, hidden)
    one_step(model, optimizer)
    assert annealer.steps == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_of_the_whole_training_goes_on_by_itself(copied: Any) -> None:
    model = sparse_mlp(target_sparsity=0.5)
    optimizer = sgd(model)
    annealer = GradientAnnealing(model, 20, optimizer)
    one_step(model, optimizer)
    its_model, its_optimizer, its_annealer = copied((model, optimizer, annealer))
    for _ in range(2):
        one_step(its_model, its_optimizer)
    assert (annealer.steps, its_annealer.steps) == (1, 3)
    one_step(model, optimizer)
    assert (annealer.steps, its_annealer.steps) == (2, 3)
    assert alpha_of(its_model) < alpha_of(model)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_state_dicts_of_distributed_checkpoints_are_no_steps(momentum: float) -> None:
    model = sparse_mlp()
    optimizer = sgd(model, momentum=momentum)
    annealer = GradientAnnealing(model, 10, optimizer)
    get_state_dict(model, optimizer)
    for count in range(1, 4):
        one_step(model, optimizer)
        get_state_dict(model, optimizer)
        assert annealer.steps == count


@pytest.mark.parametrize("grads", [True, False])
def test_a_step_of_a_warm_up_with_rate_zero_counts(grads: bool) -> None:
    model = sparse_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    annealer = GradientAnnealing(model, 10, optimizer)
    if grads:
        one_step(model, optimizer)
    else:
        optimizer.step()
    assert annealer.steps == 1


def test_an_annealer_leaves_the_masks_of_a_later_sparsify_alone() -> None:
    model = sparse_mlp(target_sparsity=0.8)
    optimizer = sgd(model)
    first = GradientAnnealing(model, 20, optimizer)
    for _ in range(10):
        one_step(model, optimizer)
    autosparse_fx.finalize(model, reach_target=True)
    autosparse_fx.sparsify(model, AutoSparse(target_sparsity=None, alpha=0.0, threshold_init=-50.0))
    before = autosparse_fx.thresholds(model)
    with pytest.warns(UserWarning, match="finalized and made sparse anew since this annealer was made"):
        one_step(model, optimizer)
    for _ in range(4):
        one_step(model, optimizer)
    assert alpha_of(model) == 0.0 and first.steps == 10
    assert autosparse_fx.sparsity(model) == pytest.approx(0.8, abs=TOLERANCE)
    for name, logit in autosparse_fx.thresholds(model).items():
        torch.testing.assert_close(logit, before[name])


def test_two_trainings_with_one_optimizer_are_steered_by_the_second_only() -> None:
    model = sparse_mlp(target_sparsity=0.8)
    optimizer = sgd(model)
    first = GradientAnnealing(model, 40, optimizer)
    one_step(model, optimizer)
    autosparse_fx.finalize(model, reach_target=True)
    autosparse_fx.sparsify(model, AutoSparse(target_sparsity=0.9))
    optimizer.add_param_group({"params": [p for n, p in model.named_parameters() if n.endswith("_threshold")]})
    second = GradientAnnealing(model, 20, optimizer)
    for _ in range(20):
        one_step(model, optimizer)
    assert (first.steps, second.steps) == (1, 20)
    assert autosparse_fx.sparsity(model) == pytest.approx(0.9, abs=TOLERANCE)


class Sam(Optimizer):
    """An optimizer that steps another one, and is never stepped itself."""

    def __init__(self, parameters: Any) -> None:
        self.inner = torch.optim.SGD(parameters, lr=0.05)
        super().__init__(self.inner.param_groups, {})


@pytest.mark.parametrize("own", [True, False])
def test_training_by_an_optimizer_that_is_not_heard_is_a_warning(own: bool) -> None:
    model, other = sparse_mlp(), sparse_mlp()
    sam = Sam(list(model.parameters()))
    annealer = GradientAnnealing(model, 100, sam if own else None)
    apart = sgd(other)
    heard = GradientAnnealing(other, 100, apart)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(30):  # of other weights
            one_step(other, apart)
        for _ in range(19):
            one_step(model, sam.inner)
    with pytest.warns(UserWarning, match=r"20 steps of SGD have trained masked weights \('0\.weight', 3 in all\)"):
        one_step(model, sam.inner)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_step(model, sam.inner)  # once
    assert (annealer.steps, heard.steps) == (0, 30)


def test_training_on_by_another_optimizer_after_the_end_is_no_warning() -> None:
    model = sparse_mlp(target_sparsity=0.8)
    annealer = GradientAnnealing(model, 20, optimizer := sgd(model))
    for _ in range(20):
        one_step(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = sgd(model)
        for _ in range(25):
            one_step(model, other)
    assert annealer.steps == 20


def test_modules_that_have_left_the_model_are_not_missed() -> None:
    model = autosparse_fx.sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    earlier = GradientAnnealing(model, 10, optimizer)
    with autosparse_fx.dense_weights(model):
        model[2] = nn.Linear(8, 2)
        del model[1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    annealer = GradientAnnealing(model, 10, optimizer)
    optimizer.step()
    assert (earlier.steps, annealer.steps) == (0, 1)
