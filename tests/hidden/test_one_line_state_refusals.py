"""States of one-line models that do not fit, or are something else: refused by name, and nothing is changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hidden.one_line import assert_equal_states, net, start, state_of
from torch import nn

import autosparse_fx
from autosparse_fx import AutoSparse


def wrong_name(state: dict[str, Any]) -> None:
    state["9.weight"] = state.pop("2.weight")


def wrong_shape(state: dict[str, Any]) -> None:
    state["2.weight"]["threshold"] = torch.zeros(3)


def wrong_offset(state: dict[str, Any]) -> None:
    state["2.weight"]["offset"] = torch.zeros(1, 1)


@pytest.mark.usefixtures("eager_graphs")
@pytest.mark.parametrize(
    ("spoil", "words"),
    [(wrong_name, "'9.weight'"), (wrong_shape, "threshold of '2.weight'"), (wrong_offset, "offset of '2.")],
)
@pytest.mark.parametrize("called", [True, False])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(spoil: Any, words: str, called: bool) -> None:
    run = start(net(), prepared=False)
    run.steps(5)
    state = autosparse_fx.state_dict(run.model)
    spoil(state)
    other = start(net(), prepared=False)
    if called:
        other.steps(1)
    before = state_of(other.model)
    with pytest.raises(ValueError, match=words):
        autosparse_fx.load_state_dict(other.model, state)
    assert_equal_states(before, state_of(other.model))
    assert len(autosparse_fx.thresholds(other.model)) == 2 * called


@pytest.mark.usefixtures("eager_graphs")
def test_a_state_of_a_per_channel_model_of_another_width_is_refused() -> None:
    run = start(net(), prepared=False, config=AutoSparse(granularity="channel"))
    run.steps(1)
    other = nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 4))
    with pytest.raises(ValueError, match=r"'0\.weight' has shape \[32\].*\[20\]"):
        autosparse_fx.load_state_dict(other, autosparse_fx.state_dict(run.model))
    assert not autosparse_fx.thresholds(other)


@pytest.mark.parametrize("prepare", [lambda m: m, autosparse_fx.sparsify])
def test_a_dense_or_prepared_model_has_no_such_state(prepare: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"Sequential has no hidden thresholds.*sparsify"):
        autosparse_fx.state_dict(prepare(net()))


@pytest.mark.usefixtures("eager_graphs")
def test_a_prepared_model_takes_no_such_state() -> None:
    run = start(net(), prepared=False)
    run.steps(1)
    prepared = autosparse_fx.sparsify(net())
    with pytest.raises(ValueError):
        autosparse_fx.load_state_dict(prepared, autosparse_fx.state_dict(run.model))


@pytest.mark.usefixtures("eager_graphs")
@pytest.mark.parametrize("kept", [(), ("0.weight",)])
def test_a_state_that_lacks_weights_is_refused(kept: tuple[str, ...]) -> None:
    run = start(net(), prepared=False)
    run.steps(2)
    state = autosparse_fx.state_dict(run.model)
    with pytest.raises(ValueError):
        autosparse_fx.load_state_dict(run.model, {name: state[name] for name in kept})


OTHER_STATES: dict[str, Callable[[dict[str, Any]], tuple[Any, type[Exception], str]]] = {
    "the model": lambda _: (net().state_dict(), ValueError, r"'0\.weight' is a tensor: .*with model\.load_state_dict"),
    "an optimizer": lambda _: (torch.optim.SGD(net().parameters(), lr=0.1).state_dict(), ValueError, "'state' lacks"),
    "a checkpoint": lambda own: (
        {"epoch": 3, "autosparse": own},
        ValueError,
        "'epoch' lacks 'name'.*a whole checkpoint",
    ),
    "half an entry": lambda own: (
        {**own, "2.weight": {"name": "2.weight", "axis": 0}},
        ValueError,
        r"'2\.weight' lacks 'threshold', 'offset', 'steps':",
    ),
    "nothing": lambda _: (None, TypeError, r"what autosparse_fx\.state_dict\(model\) returned, got NoneType"),
}


@pytest.mark.usefixtures("eager_graphs")
@pytest.mark.parametrize("name", OTHER_STATES)
def test_what_is_no_such_state_is_refused_with_the_cure(name: str) -> None:
    run = start(net(), prepared=False)
    run.steps(1)
    own = autosparse_fx.state_dict(run.model)
    before = state_of(run.model)
    other, error, words = OTHER_STATES[name](own)
    with pytest.raises(error, match=words):
        autosparse_fx.load_state_dict(run.model, other)
    assert_equal_states(before, state_of(run.model))
    autosparse_fx.load_state_dict(run.model, own)
