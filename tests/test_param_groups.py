"""param_groups: thresholds apart from everything else, at rates of their own."""

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from torch import nn

import autosparse_fx
from autosparse_fx import AutoSparse, GradientAnnealing, param_groups


def names_of(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for p in parameters}


def assert_a_partition(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters()}


def test_the_groups_are_disjoint_and_complete_and_the_second_holds_the_thresholds() -> None:
    model = autosparse_fx.sparsify(reference.ConvNet(), AutoSparse(rules={"conv1.weight": None}))
    groups = param_groups(model)
    assert_a_partition(model, groups)
    others, thresholds = (names_of(model, group["params"]) for group in groups)
    assert thresholds == {"conv2.weight_threshold", "fc.weight_threshold"}
    assert {"conv1.weight", "conv2.weight", "bn1.weight", "bn1.bias", "fc.weight", "fc.bias"} <= others


def test_tied_weights_have_one_threshold_in_one_group() -> None:
    model = autosparse_fx.sparsify(reference.Tied())
    groups = param_groups(model, lr=0.1)
    assert_a_partition(model, groups)
    assert len(groups[1]["params"]) == 2


def test_the_thresholds_keep_the_order_of_the_model() -> None:
    model = autosparse_fx.sparsify(reference.mlp())
    groups = param_groups(model)
    expected = [p for name, p in model.named_parameters() if name.endswith("_threshold")]
    assert [id(p) for p in groups[1]["params"]] == [id(p) for p in expected]
    again = param_groups(model)
    assert [[id(p) for p in g["params"]] for g in again] == [[id(p) for p in g["params"]] for g in groups]


@pytest.mark.parametrize(
    ("given", "others", "thresholds"),
    [
        ({}, {}, {"weight_decay": 0.0}),
        ({"lr": 0.1}, {"lr": 0.1}, {"lr": 0.1, "weight_decay": 0.0}),
        ({"threshold_lr": 0.5}, {}, {"lr": 0.5, "weight_decay": 0.0}),
        ({"lr": 0.1, "threshold_lr": 0.0}, {"lr": 0.1}, {"lr": 0.0, "weight_decay": 0.0}),
        ({"weight_decay": 5e-4}, {"weight_decay": 5e-4}, {"weight_decay": 0.0}),
        (
            {"lr": 0.1, "weight_decay": 5e-4, "threshold_lr": 0.01, "threshold_weight_decay": 1e-3},
            {"lr": 0.1, "weight_decay": 5e-4},
            {"lr": 0.01, "weight_decay": 1e-3},
        ),
        ({"weight_decay": 0.0}, {"weight_decay": 0.0}, {"weight_decay": 0.0}),
    ],
    ids=str,
)
def test_the_rates_are_as_given_and_the_optimizers_own_otherwise(
    given: dict[str, float], others: dict[str, float], thresholds: dict[str, float]
) -> None:
    groups = param_groups(autosparse_fx.sparsify(reference.mlp()), **given)
    assert [{key: value for key, value in group.items() if key != "params"} for group in groups] == [others, thresholds]
    optimizer = torch.optim.SGD(groups, lr=0.3, weight_decay=1e-2)
    first, second = optimizer.param_groups
    assert first["lr"] == others.get("lr", 0.3) and first["weight_decay"] == others.get("weight_decay", 1e-2)
    assert second["lr"] == thresholds.get("lr", 0.3) and second["weight_decay"] == thresholds["weight_decay"]


def test_a_rate_of_zero_keeps_the_thresholds_where_they_are() -> None:
    model = autosparse_fx.sparsify(reference.mlp())
    optimizer = torch.optim.SGD(param_groups(model, lr=0.05, threshold_lr=0.0), momentum=0.9)
    reference.train(model, optimizer, reference.classification_batches(5))
    for i in (0, 2, 4):
        assert bool((model[i]._parameters["weight_threshold"] == 0).all())


def test_the_decay_of_a_threshold_pulls_it_back_to_its_start() -> None:
    model = autosparse_fx.sparsify(reference.mlp(), AutoSparse(threshold_init=-4.0))
    threshold = model[0]._parameters["weight_threshold"]
    with torch.no_grad():
        threshold.fill_(2.0)
    optimizer = torch.optim.SGD(param_groups(model, lr=0.1, threshold_weight_decay=1.0))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert threshold.item() == pytest.approx(1.8)
    assert autosparse_fx.thresholds(model)["0.weight"].item() == pytest.approx(-4.0 + 0.1 * 1.8)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: torch.optim.SGD(param_groups(model, lr=0.05, weight_decay=1e-4), momentum=0.9),
        lambda model: torch.optim.SGD(param_groups(model, lr=0.05, threshold_lr=1.0), momentum=0.9),
        lambda model: torch.optim.AdamW(param_groups(model, lr=3e-3, weight_decay=0.05, threshold_lr=3e-2)),
    ],
    ids=["sgd", "sgd-fast-thresholds", "adamw"],
)
def test_training_with_groups_reaches_the_target(make: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    model = autosparse_fx.sparsify(reference.mlp(), AutoSparse(target_sparsity=0.9))
    optimizer = make(model)
    GradientAnnealing(model, 120, optimizer)
    reference.train(model, optimizer, reference.classification_batches(120))
    assert reference.total_sparsity(model) == pytest.approx(0.9, abs=0.005)
    assert all(bool((model[i]._parameters["weight_threshold"] != 0).all()) for i in (0, 2, 4))


def test_a_model_that_is_not_sparse_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Sequential is not sparse: call autosparse_fx.sparsify\(model\) first"):
        param_groups(reference.mlp())


def test_rates_go_by_name_only() -> None:
    with pytest.raises(TypeError):
        param_groups(autosparse_fx.sparsify(reference.mlp()), 0.1)  # type: ignore[misc]
