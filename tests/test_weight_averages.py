"""Averages of weights (torch.optim.swa_utils): finalized they have exact zeros, and the target sparsity."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn

import autosparse_fx
from autosparse_fx import AutoSparse, GradientAnnealing, finalize, sparsify

STEPS, TARGET = 200, 0.9
AVERAGES: dict[str, Callable[..., AveragedModel]] = {
    "ema": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.98)),
    "slow ema": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.995)),
    "ema of buffers too": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.98), use_buffers=True),
    "swa": lambda m: AveragedModel(m, multi_avg_fn=get_swa_multi_avg_fn()),
}


def trained(average: str, make: Callable[[], nn.Module] = reference.mlp, **config: Any) -> tuple[nn.Module, Any]:
    shape = (1, 8, 8) if make is reference.ConvNet else (16,)
    model = sparsify(make(), AutoSparse(target_sparsity=TARGET, **config))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    GradientAnnealing(model, STEPS, optimizer)
    averaged = AVERAGES[average](model)
    reference.train(
        model, optimizer, reference.classification_batches(STEPS, shape), lambda: averaged.update_parameters(model)
    )
    return model, averaged


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("average", AVERAGES)
def test_finalized_average_has_exact_zeros_at_the_target(average: str, granularity: str) -> None:
    model, averaged = trained(average, granularity=granularity)
    before = reference.total_sparsity(model), copy.deepcopy(model.state_dict())
    finalize(averaged, reach_target=True)
    weights = [m.weight for m in averaged.module if isinstance(m, nn.Linear)]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert zeros == pytest.approx(TARGET, abs=0.005)
    assert list(averaged.module.state_dict()) == list(reference.mlp().state_dict())
    ((x, y),) = reference.classification_batches(1)
    loss = F.cross_entropy(averaged(x), y)
    if average != "slow ema":  # which half remembers how the weights were initialised
        assert loss < 0.3
    assert before[0] == reference.total_sparsity(model)  # the model itself is as it was
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before[1].items())


def test_average_that_is_not_steered_may_miss_the_target_and_says_so() -> None:
    _, averaged = trained("slow ema")
    assert abs(autosparse_fx.sparsity(averaged) - TARGET) > 0.005
    with pytest.warns(UserWarning, match=r"instead of the target 0\.9000"):
        finalize(averaged)


def test_batch_norm_of_an_average_is_updated_before_it_is_finalized() -> None:
    _, averaged = trained("ema", reference.ConvNet)
    update_bn(reference.classification_batches(20, (1, 8, 8)), averaged)
    averaged.eval()
    finalize(averaged, reach_target=True)
    ((x, y),) = reference.classification_batches(1, (1, 8, 8), batch=256)
    assert (averaged(x).argmax(1) == y).float().mean() > 0.9


# finalize(..., reach_target=True) by itself.


def test_training_that_ends_early_reaches_the_target_all_the_same() -> None:
    model = sparsify(reference.mlp(), AutoSparse(target_sparsity=TARGET))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    GradientAnnealing(model, STEPS, optimizer)
    reference.train(model, optimizer, reference.classification_batches(STEPS // 4))
    assert reference.total_sparsity(model) < 0.85
    finalize(model, reach_target=True)
    assert autosparse_fx.report(model).sparsity == pytest.approx(TARGET, abs=0.005)


def test_each_target_is_reached_apart() -> None:
    model = sparsify(reference.mlp(), AutoSparse(0.9, rules={"4.weight": {"target_sparsity": 0.5}}))
    finalize(model, reach_target=True)
    zeros = [float((model[i].weight == 0).float().mean()) for i in (0, 2, 4)]
    assert zeros[2] == pytest.approx(0.5, abs=0.005)
    assert (zeros[0] * 1024 + zeros[1] * 4096) / 5120 == pytest.approx(0.9, abs=0.005)


def test_a_model_without_a_target_has_none_to_reach() -> None:
    model = sparsify(reference.mlp(), AutoSparse(target_sparsity=None))
    with pytest.raises(ValueError, match="reach_target needs a target"):
        finalize(model, reach_target=True)
    assert hasattr(model[0], "weight_threshold")


def test_a_target_out_of_reach_is_refused_and_changes_nothing() -> None:
    model = sparsify(reference.mlp(), AutoSparse(0.9))
    with torch.no_grad():
        model[2]._parameters["weight"].fill_(2.0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"finalize: target_sparsity=0\.9 cannot be reached"):
        finalize(model, reach_target=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_target_out_of_reach_leaves_the_groups_that_could_reach_theirs() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    sparsify(model, AutoSparse(target_sparsity=0.5, rules={"1.*": {"target_sparsity": 0.9}}))
    with torch.no_grad():
        model[1]._parameters["weight"].fill_(3.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="cannot be reached"):
        finalize(model, reach_target=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
