"""GradientAnnealing: what it refuses, and what it warns of."""

import json
import math
import re
import warnings
from typing import Any

import numpy as np
import pytest
import reference
import torch
from annealers import alpha_of, backward, float32, one_step, sgd, sparse_mlp
from torch import nn

import autosparse_fx
from autosparse_fx import AutoSparse, GradientAnnealing

# misuse


WHOLE = "total_steps must be a positive whole number of optimizer steps, got"


@pytest.mark.parametrize(
    ("total_steps", "end"),
    [
        *((value, repr(value)) for value in (0, -1, -1.5, True, "10", None, math.inf, math.nan, [10])),
        *((value, f"{value}: pass int({value})") for value in (1.5, 10000.0)),
        (torch.optim.SGD([nn.Parameter(torch.ones(1))]), "a value of type SGD"),
    ],
    ids=repr,
)
def test_total_steps_that_is_no_positive_whole_number_is_refused(total_steps: Any, end: str) -> None:
    with pytest.raises(ValueError, match=f"^{WHOLE} {re.escape(end)}$"):
        GradientAnnealing(sparse_mlp(), total_steps)


@pytest.mark.parametrize("total_steps", [np.int64(10), torch.tensor(10)])
def test_total_steps_may_be_any_kind_of_integer(total_steps: Any) -> None:
    annealer = GradientAnnealing(sparse_mlp(), total_steps)
    state = json.loads(json.dumps(annealer.state_dict()))
    assert (state["steps"], state["total_steps"]) == (0, 10)
    assert type(annealer.total_steps) is int


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_clear_momentum_that_is_no_bool_is_refused(value: Any) -> None:
    model = sparse_mlp()
    with pytest.raises(TypeError, match=f"^clear_momentum must be True or False, got {value!r}$"):
        GradientAnnealing(model, 10, sgd(model), clear_momentum=value)


def test_a_model_that_is_not_sparse_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Sequential is not sparse: call autosparse_fx.sparsify"):
        GradientAnnealing(reference.mlp(), 10)


def test_a_part_without_masks_is_not_sparse() -> None:
    """An encoder of transformers has a class of ours whether or not its layers are masked."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1)
    model = autosparse_fx.sparsify(nn.Sequential(encoder, nn.Linear(8, 4)), AutoSparse(rules={"0.*": None}))
    with pytest.raises(ValueError, match="TransformerEncoder is not sparse"):
        GradientAnnealing(model[0], 10)
    GradientAnnealing(autosparse_fx.sparsify(model[0], AutoSparse(target_sparsity=0.5)), 10)


def test_a_target_that_no_mask_can_reach_is_refused_at_once() -> None:
    model = autosparse_fx.sparsify(nn.Sequential(nn.Linear(2, 1)))
    with pytest.raises(ValueError, match=r"0\.8 cannot be reached .* 1 of them in '0\.weight'"):
        GradientAnnealing(model, 10)
    GradientAnnealing(autosparse_fx.sparsify(nn.Linear(2, 1), AutoSparse(target_sparsity=0.5)), 10)
    zeros = nn.Linear(2, 1)
    nn.init.zeros_(zeros.weight)
    GradientAnnealing(autosparse_fx.sparsify(zeros), 10)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_zeros_that_no_gradient_reaches_are_told(alpha: float) -> None:
    model = reference.mlp()
    nn.init.zeros_(model[4].weight)
    autosparse_fx.sparsify(model, AutoSparse(target_sparsity=0.5, alpha=alpha))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            GradientAnnealing(model, 10)
    assert [("4.weight is all zeros" in str(w.message)) for w in caught] == ([True] if alpha == 0 else [])


def test_a_refused_annealer_leaves_the_one_before_it_at_work() -> None:
    model = sparse_mlp()
    optimizer = sgd(model)
    annealer = GradientAnnealing(model, 10, optimizer)
    with pytest.raises(ValueError, match="total_steps"):
        GradientAnnealing(model, 0, optimizer)
    one_step(model, optimizer)
    assert annealer.steps == 1


def test_parts_with_different_configurations_are_refused() -> None:
    model = nn.Sequential(sparse_mlp(alpha=0.5), sparse_mlp(alpha=0.6))
    with pytest.raises(ValueError, match=r"different configurations.*sparsify the whole model once"):
        GradientAnnealing(model, 10)


def test_parts_with_the_same_configuration_are_annealed_together() -> None:
    model = nn.Sequential(
        autosparse_fx.sparsify(nn.Linear(16, 16), AutoSparse(decay="linear", alpha=1.0)),
        autosparse_fx.sparsify(nn.Linear(16, 4), AutoSparse(decay="linear", alpha=1.0)),
    )
    optimizer = sgd(model)
    GradientAnnealing(model, 10, optimizer)
    one_step(model, optimizer)
    assert alpha_of(model) == float32(0.9)


def test_step_of_an_annealer_that_counts_by_itself_is_refused() -> None:
    model = sparse_mlp()
    annealer = GradientAnnealing(model, 10, sgd(model))
    with pytest.raises(RuntimeError, match=r"counts its optimizer's steps by itself.*do not call step"):
        annealer.step()
    assert annealer.steps == 0


def messages_of_two_steps(model: nn.Module, *optimizers: torch.optim.Optimizer, by_hook: bool = True) -> list[str]:
    """What the annealer of the first of the optimizers says in two steps of all of them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        annealer = GradientAnnealing(model, 10, optimizers[0] if by_hook else None)
        for _ in range(2):
            backward(model)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if not by_hook:
                annealer.step()
    return sorted(str(w.message) for w in caught)


@pytest.mark.parametrize("by_hook", [True, False])
def test_an_optimizer_made_before_sparsify_is_warned_of_its_missing_thresholds(by_hook: bool) -> None:
    model = reference.mlp()
    optimizer = sgd(model)
    autosparse_fx.sparsify(model)
    (message,) = messages_of_two_steps(model, optimizer, by_hook=by_hook)
    assert "none of the thresholds" in message and "0.weight_threshold" in message
    assert "masked weights" not in message
    assert "model.parameters() after sparsify" in message


def test_an_optimizer_that_lacks_weights_and_thresholds_is_warned_of_both_by_name() -> None:
    model = sparse_mlp()
    held = [p for name, p in model.named_parameters() if not name.startswith("2.")]
    messages = messages_of_two_steps(model, torch.optim.SGD(held, lr=0.1))
    assert len(messages) == 2
    assert "not all of the masked weights" in messages[0] and "2.weight will not" in messages[0]
    assert "not all of the thresholds" in messages[1] and "2.weight_threshold will not" in messages[1]
    assert not any("0.weight" in message for message in messages)


def test_what_a_second_optimizer_holds_is_not_missed() -> None:
    model = sparse_mlp()
    thresholds = [p for name, p in model.named_parameters() if name.endswith("_threshold")]
    others = [p for name, p in model.named_parameters() if not name.endswith("_threshold")]
    assert messages_of_two_steps(model, torch.optim.SGD(others, lr=0.1), torch.optim.SGD(thresholds, lr=0.1)) == []


def test_what_is_no_optimizer_is_refused() -> None:
    model = sparse_mlp()
    scheduler = torch.optim.lr_scheduler.StepLR(sgd(model), 1)
    with pytest.raises(TypeError, match="StepLR"):
        GradientAnnealing(model, 10, scheduler)  # type: ignore[arg-type]


@pytest.mark.parametrize("groups", ["plain", "split", "param_groups", "frozen"])
def test_an_optimizer_that_holds_all_that_is_trained_is_not_warned_of(groups: str) -> None:
    model = sparse_mlp()
    parameters = list(model.parameters())
    if groups == "frozen":
        for p in (model[0]._parameters["weight"], model[0]._parameters["weight_threshold"]):
            p.requires_grad_(False)
        optimizer = torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.1)
    elif groups == "split":
        optimizer = torch.optim.SGD([{"params": parameters[:3]}, {"params": parameters[3:]}], lr=0.1)
    elif groups == "param_groups":
        optimizer = torch.optim.SGD(autosparse_fx.param_groups(model), lr=0.1)
    else:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
    assert messages_of_two_steps(model, optimizer) == []
