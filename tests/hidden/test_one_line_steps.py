"""Several optimizers, groups that come late, and the kinds of step that hidden thresholds cannot follow."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hidden.one_line import (
    Run,
    assert_equal_states,
    assert_same,
    both,
    net,
    sgd,
    start,
    state_of,
)
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

import autosparse_fx
from autosparse_fx import AutoSparse, GradientAnnealing
from autosparse_fx.hidden.masks import hidden_mask

pytestmark = pytest.mark.usefixtures("eager_graphs")

OPEN = AutoSparse(target_sparsity=None, threshold_init=-2.5)  # nothing but the gradients moves its thresholds
LATE = pytest.mark.filterwarnings("ignore:no optimizer that has taken a step holds the weight")  # yet


# Several optimizers, and groups that come late.


def by_layer(model: nn.Module) -> list[Optimizer]:
    return [SGD(model[i].parameters(), lr=0.1 / (i + 1), momentum=0.9) for i in (0, 2)]


def step_all(run: Run, optimizers: list[Optimizer], number: int) -> None:
    for _ in range(number):
        run.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def prepared_by_layer(model: nn.Module, make: Callable[[nn.Module], list[Optimizer]]) -> tuple[Run, list[Optimizer]]:
    """Each layer prepared by itself and steered by an annealer of its own."""
    for layer in (model[0], model[2]):
        autosparse_fx.sparsify(layer)
    optimizers = make(model)
    annealers = [GradientAnnealing(model[i], 20, o) for i, o in zip((0, 2), optimizers, strict=True)]
    run = start(net(), prepared=False)
    return Run(model, model, optimizers[0], annealers[0], run.batches, []), optimizers


def test_two_optimizers_each_steer_their_own_weights() -> None:
    model = net()
    prepared, own = prepared_by_layer(copy.deepcopy(model), by_layer)
    one = start(model, prepared=False)
    step_all(one, by_layer(model), 20)
    step_all(prepared, own, 20)
    # One alpha for the whole model: the first optimizer to step moves it on for the layers whose backward comes later.
    assert one.losses == pytest.approx(prepared.losses, rel=0.05)
    assert all(layer.sparsity == pytest.approx(0.8, abs=0.01) for layer in autosparse_fx.report(model).layers)


@LATE
def test_a_group_that_is_added_in_the_middle_is_trained_from_then_on() -> None:
    model = net()
    twin = copy.deepcopy(model)
    config = AutoSparse(target_sparsity=None, threshold_init=-2.5, decay="fixed", alpha_end=1.0)
    one = start(model, lambda m: SGD(m[0].parameters(), lr=0.1, momentum=0.9), prepared=False, config=config)
    prepared = start(twin, lambda m: SGD(m[0].parameters(), lr=0.1, momentum=0.9), prepared=True, config=config)
    one.steps(5)
    with pytest.warns(UserWarning, match="weights"), pytest.warns(UserWarning, match="thresholds"):
        prepared.steps(5)
    assert float(autosparse_fx.thresholds(model)["2.weight"]) == -2.5
    for run in (one, prepared):
        run.optimizer.add_param_group({"params": list(run.model[2].parameters()), "lr": 0.05})
        run.model[2].zero_grad()
        run.steps(10)
    assert_same(one, prepared)
    assert float(autosparse_fx.thresholds(model)["2.weight"]) != -2.5


@LATE
def test_a_group_that_is_added_in_the_middle_has_the_alpha_of_the_others_at_once() -> None:
    run = start(net(), lambda m: SGD(m[0].parameters(), lr=0.1), prepared=False)
    run.steps(10)
    run.optimizer.add_param_group({"params": list(run.model[2].parameters())})
    run.backward()
    first, second = (hidden_mask(run.model[i].weight) for i in (0, 2))
    assert first is not None and second is not None
    assert float(first.alpha) == float(second.alpha) < 0.75


@LATE
def test_a_steered_model_reaches_its_target_with_a_group_that_came_late() -> None:
    run = start(net(), lambda m: SGD(m[0].parameters(), lr=0.1), prepared=False)
    run.steps(5)
    run.optimizer.add_param_group({"params": list(run.model[2].parameters())})
    run.steps(15)
    assert autosparse_fx.sparsity(run.model) == pytest.approx(0.8, abs=0.005)


def test_optimizer_in_backward() -> None:
    model = net()
    prepared, own = prepared_by_layer(copy.deepcopy(model), lambda m: [SGD(m[i].parameters(), lr=0.1) for i in (0, 2)])
    one = start(model, prepared=False)
    optimizers = {p: SGD([p], lr=0.1) for p in model.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for _ in range(20):
        one.backward()
    step_all(prepared, own, 20)
    # One alpha for the whole model: the first optimizer to step moves it on for the layers whose backward comes later.
    assert one.losses == pytest.approx(prepared.losses, rel=0.05)
    assert all(layer.sparsity == pytest.approx(0.8, abs=0.01) for layer in autosparse_fx.report(model).layers)


@pytest.mark.parametrize(
    "kinds",
    [
        (SGD, AdamW),
        (AdamW, SGD),
        (SGD, SGD),
    ],
    ids=lambda k: k[0].__name__ + k[1].__name__,
)
def test_another_optimizer_takes_over_in_the_middle(kinds: tuple[Any, Any]) -> None:
    settings = {SGD: {"lr": 0.1, "momentum": 0.9}, AdamW: {"lr": 0.01}}
    config = AutoSparse(target_sparsity=None, threshold_init=-2.5, granularity="channel")
    runs = both(net(), lambda m: kinds[0](m.parameters(), **settings[kinds[0]]), config=config)
    for run in runs:
        run.steps(5)
        run.optimizer = kinds[1](run.model.parameters(), **settings[kinds[1]])
        if run.annealer is not None:
            state = run.annealer.state_dict()
            run.annealer = GradientAnnealing(run.model, 20, run.optimizer)
            run.annealer.load_state_dict(state)
        run.steps(5)
    assert_same(*runs)


def test_a_new_optimizer_of_the_same_class_begins_with_new_moments() -> None:
    run = start(net(), lambda m: AdamW(m.parameters(), lr=0.01), prepared=False)
    run.steps(5)
    run.optimizer = AdamW(run.model.parameters(), lr=0.01)
    run.steps(1)
    (weight, threshold) = (run.model[0].weight, hidden_mask(run.model[0].weight))
    assert run.optimizer.state[weight]["step"] == threshold.optimizer_state["step"] == 1


def test_an_earlier_optimizer_goes_on_where_the_training_is() -> None:
    run = start(net(), prepared=False, total_steps=40)
    first, second = run.optimizer, sgd(run.model)
    alphas = []
    for optimizer, steps in ((first, 8), (second, 20), (first, 4), (second, 4), (first, 4)):
        run.optimizer = optimizer
        run.steps(steps)
        alphas.append(hidden_mask(run.model[0].weight).alpha.item())
    assert hidden_mask(run.model[0].weight).steps == 40
    assert alphas == sorted(alphas, reverse=True) and alphas[-1] == 0
    assert autosparse_fx.sparsity(run.model) == pytest.approx(0.8, abs=0.005)


def test_optimizers_that_step_in_turn_count_together() -> None:
    run = start(net(), prepared=False, total_steps=40)
    both_of_them = run.optimizer, sgd(run.model)
    for _ in range(10):
        for optimizer in both_of_them:
            run.optimizer = optimizer
            run.steps(1)
    assert 10 <= hidden_mask(run.model[0].weight).steps <= 11


def test_another_model_that_begins_or_ends_in_the_middle_changes_nothing(recwarn: pytest.WarningsRecorder) -> None:
    model = net()
    alone = start(copy.deepcopy(model), lambda m: AdamW(m.parameters(), lr=0.01), prepared=False)
    alone.steps(12)
    run = start(model, lambda m: AdamW(m.parameters(), lr=0.01), prepared=False)
    run.steps(4)
    other = start(net(), prepared=False, total_steps=9)
    other.steps(1)
    run.steps(4)
    autosparse_fx.sparsify(other.model)
    run.steps(4)
    assert run.losses == alone.losses
    assert_equal_states(state_of(model), state_of(alone.model))
    assert not recwarn.list


# torch 2.11 scripts something of its own while it traces an optimizer.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("early", [True, False])
def test_a_compiled_optimizer_step(early: bool) -> None:
    runs = both(net(), lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9))
    for run in runs:
        step: Any = torch.compile(run.optimizer.step, backend="eager")
        if early:  # compiled before any hook of ours exists
            step()
        for _ in range(6):
            run.backward()
            step()
            run.optimizer.zero_grad()
    if early:  # the prepared model's annealer has counted the empty step
        assert hidden_mask(runs[0].model[0].weight).steps == 6
    else:
        assert_same(*runs)


def test_a_weight_average_is_of_the_users_weights_alone() -> None:
    run = start(net(), prepared=False)
    run.steps(2)
    average = AveragedModel(run.model)
    run.steps(2)
    average.update_parameters(run.model)
    assert list(average.module.state_dict()) == list(run.model.state_dict())


# What is refused.


def closure(run: Run) -> Callable[[], Tensor]:
    def compute() -> Tensor:
        run.optimizer.zero_grad()
        return run.backward()

    return compute


@pytest.mark.parametrize("kind", [LBFGS, SGD, AdamW])
@pytest.mark.parametrize("keyword", [True, False])
def test_step_with_a_closure_is_refused_with_the_cure(kind: Any, keyword: bool) -> None:
    run = start(net(), lambda m: kind(m.parameters(), lr=0.1), prepared=False)
    run.backward()
    before = state_of(run.model)
    with pytest.raises(RuntimeError, match=rf"{kind.__name__}\.step\(closure\).*autosparse_fx\.sparsify"):
        if keyword:
            run.optimizer.step(closure=closure(run))
        else:
            run.optimizer.step(closure(run))
    assert_equal_states(before, state_of(run.model))


def test_a_closure_of_none_is_none() -> None:
    run = start(net(), prepared=False)
    run.backward()
    run.optimizer.step(None)
    run.optimizer.step(closure=None)


class Named(SGD):
    def __init__(self, params: Any, name: str) -> None:
        super().__init__(params, lr=0.1)
        self.name = name


def test_an_optimizer_that_groups_alone_do_not_make_is_refused_with_the_cure() -> None:
    run = start(net(), lambda m: Named(m.parameters(), "mine"), prepared=False)
    run.backward()
    before = state_of(run.model)
    with pytest.raises(RuntimeError, match=r"Named cannot train the thresholds.*'name'.*autosparse_fx\.sparsify"):
        run.optimizer.step()
    assert_equal_states(before, state_of(run.model))


def test_muon_which_takes_no_thresholds_is_refused_with_the_cure() -> None:
    run = start(net(), lambda m: torch.optim.Muon([m[0].weight, m[2].weight]), prepared=False)
    run.backward()
    with pytest.raises(RuntimeError, match=r"Muon cannot train the thresholds.*autosparse_fx\.sparsify"):
        run.optimizer.step()


def test_the_same_optimizers_are_free_on_a_dense_model() -> None:
    start(net(), prepared=False).steps(1)  # so that our hooks exist
    model, x = net(), torch.randn(4, 16)
    for optimizer in (LBFGS(model.parameters()), Named(model.parameters(), "mine")):
        optimizer.step(lambda: model(x).square().sum())


def test_a_model_that_one_optimizer_was_refused_for_trains_with_another() -> None:
    run = start(net(), lambda m: Named(m.parameters(), "mine"), prepared=False)
    run.backward()
    with pytest.raises(RuntimeError):
        run.optimizer.step()
    run.optimizer = sgd(run.model)
    run.steps(20)
    assert autosparse_fx.sparsity(run.model) == pytest.approx(0.8, abs=0.005)
