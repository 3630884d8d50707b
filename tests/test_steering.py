"""Steering to the target: the schedule, and that it is reached."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from steered_training import LOGIT_OF_MAX_CUT, POINT, adam, assert_target, multiply, offsets_of, sgd, train
from torch import nn

import autosparse_fx
from autosparse_fx import AutoSparse, GradientAnnealing
from autosparse_fx.config import LOGITS
from autosparse_fx.steering import MAX_CUT, scheduled_sparsity


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.05)


# the schedule


@pytest.mark.parametrize(("target", "ramp_end"), [(0.9, 0.6), (0.5, 1.0), (0.98, 0.1)])
def test_the_schedule_is_a_cubic_ramp_that_holds_the_target_from_its_end(target: float, ramp_end: float) -> None:
    assert scheduled_sparsity(target, ramp_end, 0.0) == 0.0
    assert scheduled_sparsity(target, ramp_end, ramp_end / 2) == pytest.approx(target * 7 / 8)
    for progress in (ramp_end, (1 + ramp_end) / 2, 1.0):
        assert scheduled_sparsity(target, ramp_end, progress) == pytest.approx(target, rel=1e-12)
    values = [scheduled_sparsity(target, ramp_end, i / 100) for i in range(101)]
    assert values == sorted(values) and max(values) <= target


def test_the_sparsity_follows_the_schedule_during_the_training() -> None:
    deviations = []

    def look(annealer: GradientAnnealing) -> None:
        expected = 0.9 * (1 - max(0.0, 1 - (annealer.steps / 100) / 0.6) ** 3)
        assert annealer.scheduled_sparsity == pytest.approx(expected)
        deviations.append(abs(reference.total_sparsity(model) - expected))

    model = reference.mlp()
    train(model, AutoSparse(target_sparsity=0.9), steps=100, after_step=look)
    assert len(deviations) == 100
    assert max(deviations) < 0.5 * POINT


def test_a_long_training_is_steered_every_twenty_steps_and_at_its_end() -> None:
    model = autosparse_fx.sparsify(nn.Linear(8, 8), AutoSparse(target_sparsity=0.5, ramp_end=1.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    annealer = GradientAnnealing(model, 2010, optimizer)
    offset, moved = model._buffers["weight_offset"].clone(), []
    for _ in range(2010):
        optimizer.step()
        if not torch.equal(model._buffers["weight_offset"], offset):
            moved.append(annealer.steps)
            offset = model._buffers["weight_offset"].clone()
    assert set(moved) <= {*range(20, 2001, 20), 2010}
    assert len(moved) > 20


def test_the_last_step_is_steered_whatever_the_interval() -> None:
    model = autosparse_fx.sparsify(reference.mlp(), AutoSparse(target_sparsity=0.8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    GradientAnnealing(model, 251, optimizer)
    for step in range(1, 252):
        if step in (249, 251):
            with torch.no_grad():
                model[2]._buffers["weight_offset"].sub_(3.0)
        optimizer.step()
        if step >= 248:
            assert (abs(reference.total_sparsity(model) - 0.8) > 0.1) == (step == 249), step
    assert_target(model, 0.8, 0.1 * POINT)


# the target is reached


@pytest.mark.parametrize("target", [0.5, 0.9])
def test_a_convolutional_net_with_batch_norm_reaches_its_target_under_sgd(target: float) -> None:
    model = train(reference.ConvNet(8), AutoSparse(target_sparsity=target), shape=(1, 8, 8))
    assert_target(model, target, 0.1 * POINT)
    layers = reference.layer_sparsities(model)
    assert max(layers.values()) - min(layers.values()) > POINT


@pytest.mark.parametrize("make_optimizer", [sgd, adam, adamw])
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_an_ordinary_net_reaches_its_target_under_every_optimizer(
    make_optimizer: Callable[[Any], torch.optim.Optimizer], granularity: str
) -> None:
    model = train(reference.mlp(), AutoSparse(target_sparsity=0.9, granularity=granularity), make_optimizer)
    assert_target(model, 0.9, 0.1 * POINT)


@pytest.mark.parametrize("make_optimizer", [sgd, adam])
@pytest.mark.parametrize(
    "zeroed",
    [["head.weight", "head.bias"], ["branch.2.weight"], ["branch.2.weight", "head.weight", "head.bias"]],
    ids=str,
)
def test_zero_initialised_layers_do_not_keep_the_net_from_its_target(
    zeroed: list[str], make_optimizer: Callable[[Any], torch.optim.Optimizer]
) -> None:
    model = multiply(reference.Residual(), dict.fromkeys(zeroed, 0.0))
    train(model, AutoSparse(target_sparsity=0.9), make_optimizer)
    assert_target(model, 0.9)
    assert all(sparsity < 1 for sparsity in reference.layer_sparsities(model).values())


@pytest.mark.parametrize("make_optimizer", [sgd, adam])
def test_a_branch_that_stays_zero_counts_as_the_zeros_that_it_is(
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
) -> None:
    model = multiply(reference.Residual(), {f"branch.{i}.{p}": 0.0 for i in (0, 2) for p in ("weight", "bias")})
    before = {name: p.clone() for name, p in model.named_parameters() if name.startswith("branch")}
    train(model, AutoSparse(target_sparsity=0.95), make_optimizer)
    assert_target(model, 0.95)
    assert torch.equal(model.branch[0]._parameters["weight"], before["branch.0.weight"])
    assert max(float(logit.max()) for logit in autosparse_fx.thresholds(model).values()) < LOGIT_OF_MAX_CUT + 0.5


def test_a_target_of_weights_that_stay_zero_is_met_by_them() -> None:
    model = multiply(reference.mlp(), {"4.weight": 0.0})
    autosparse_fx.sparsify(model, AutoSparse(target_sparsity=0.5, rules={"4.weight": {"target_sparsity": 0.4}}))
    model[4].weight_offset.fill_(-3.0)
    optimizer = torch.optim.SGD([*model[0].parameters(), *model[2].parameters()], lr=0.0)
    GradientAnnealing(model, 10, optimizer)
    before = model[4].weight_offset.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(10):
            optimizer.step()
    assert torch.equal(model[4].weight_offset, before)
    assert reference.layer_sparsities(model)["4.weight"] == 1


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_weights_above_one_do_not_keep_the_net_from_its_target(granularity: str) -> None:
    model = multiply(reference.ConvNet(8), {"conv1.weight": 4.0, "conv2.weight": 10.0})
    assert float(model.conv2.weight.detach().abs().max()) > 1 and float(model.conv1.weight.detach().abs().max()) > 1
    train(model, AutoSparse(target_sparsity=0.8, granularity=granularity), shape=(1, 8, 8))
    assert_target(model, 0.8)
    cuts = torch.cat([logit.sigmoid() for logit in autosparse_fx.thresholds(model).values()])
    assert float(cuts.max()) < MAX_CUT + 0.01


def test_a_layer_out_of_reach_leaves_the_whole_target_to_the_others() -> None:
    model = multiply(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), {"0.weight": 0.0})
    with torch.no_grad():
        model[0].weight.add_(3.0)
    autosparse_fx.sparsify(model, AutoSparse(target_sparsity=0.45))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    GradientAnnealing(model, 20, optimizer)
    for _ in range(20):
        optimizer.step()
    assert reference.layer_sparsities(model) == pytest.approx({"0.weight": 0.0, "1.weight": 0.9}, abs=0.2 * POINT)


@pytest.mark.parametrize("target", [0.5, 0.9])
def test_tiny_layers_keep_at_least_one_weight(target: float) -> None:
    model = nn.Sequential(
        nn.Linear(16, 3),
        nn.Linear(3, 1),
        nn.Linear(1, 1, bias=False),
        nn.Linear(1, 2),
        nn.Linear(2, 64),
        nn.Linear(64, 4),
    )
    train(model, AutoSparse(target_sparsity=target), lambda p: sgd(p, lr=0.01))
    assert_target(model, target, 1.5 / sum(numel for _, numel in reference.zero_counts(model).values()))
    for name, (zeros, numel) in reference.zero_counts(model).items():
        assert zeros < numel, name


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_channels_last_weights_reach_the_target(granularity: str) -> None:
    model = reference.ConvNet(8).to(memory_format=torch.channels_last)
    train(model, AutoSparse(target_sparsity=0.9, granularity=granularity), shape=(1, 8, 8))
    assert model.conv2._parameters["weight"].is_contiguous(memory_format=torch.channels_last)
    assert_target(model, 0.9, 0.1 * POINT)


def test_transposed_convolutions_per_channel_reach_the_target() -> None:
    model = nn.Sequential(
        nn.ConvTranspose2d(1, 12, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(864, 4),
    )
    train(model, AutoSparse(target_sparsity=0.85, granularity="channel"), shape=(1, 8, 8))
    assert autosparse_fx.thresholds(model)["0.weight"].shape == (12,)
    assert_target(model, 0.85, 0.1 * POINT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_models_of_other_dtypes_reach_the_target(dtype: torch.dtype) -> None:
    model = reference.mlp().to(dtype)
    batches = ((x.to(dtype), y) for x, y in reference.classification_batches(120))
    train(model, AutoSparse(target_sparsity=0.9), batches=batches)
    assert_target(model, 0.9)


@pytest.mark.parametrize(
    "factors",
    [
        {"conv1.weight": 0.1, "conv2.weight": 3.0},
        {"fc.weight": 0.1},
        {"conv1.weight": 1e-3, "conv2.weight": 3.0, "fc.weight": 1e-2},
    ],
    ids=["differing", "small head", "extreme"],
)
def test_layers_of_very_different_scale_reach_the_target_and_none_is_emptied(factors: dict[str, float]) -> None:
    """A layer that starts small outgrows its cut in a few steps, and may not push the whole sparsity on the others."""
    model = multiply(reference.ConvNet(8), factors)
    train(model, AutoSparse(target_sparsity=0.9), shape=(1, 8, 8))
    assert_target(model, 0.9)
    assert max(reference.layer_sparsities(model).values()) <= 0.99


@pytest.mark.filterwarnings("ignore:weight '0.weight' begins with only zeros")
@pytest.mark.parametrize("logit", [-5.0, *LOGITS])
def test_a_fixed_initial_logit_is_as_good_a_start(logit: float) -> None:
    model = train(reference.mlp(), AutoSparse(target_sparsity=0.9, threshold_init=logit))
    assert_target(model, 0.9, 0.1 * POINT)


@pytest.mark.parametrize("make_optimizer", [sgd, adam])
def test_at_98_percent_every_layer_keeps_its_minimum(make_optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
    model = train(reference.mlp(32, 128), AutoSparse(target_sparsity=0.98), make_optimizer, shape=(32,))
    assert_target(model, 0.98, 0.2 * POINT)
    for name, (zeros, numel) in reference.zero_counts(model).items():
        assert numel - zeros >= 0.01 * numel, name


def test_the_minimum_of_every_layer_is_an_option() -> None:
    config = AutoSparse(target_sparsity=0.8, max_layer_sparsity=0.81)
    model = train(reference.mlp(32, 128), config, shape=(32,))
    assert_target(model, 0.8)
    assert max(reference.layer_sparsities(model).values()) <= 0.81 + 1e-3


def test_tied_weights_are_steered_and_counted_once() -> None:
    model = multiply(reference.Tied(), {"embed.weight": 0.02})
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(50, (16, 12), generator=generator)
    batches = ((ids, ids.roll(1, 1)) for _ in range(120))
    autosparse_fx.sparsify(model, AutoSparse(target_sparsity=0.9))
    optimizer = adam(model.parameters())
    GradientAnnealing(model, 120, optimizer)
    for x, y in batches:
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    zeros = int((model.head.weight == 0).sum()) + int((model.mid.weight == 0).sum())
    assert zeros / (50 * 32 + 32 * 32) == pytest.approx(0.9, abs=0.1 * POINT)
    assert torch.equal(model.head.weight, model.embed.weight)


def test_rules_steer_each_target_by_itself() -> None:
    rules = {"0.weight": {"target_sparsity": 0.5}, "4.weight": None}
    model = train(reference.mlp(), AutoSparse(target_sparsity=0.95, rules=rules))
    layers = reference.layer_sparsities(model)
    assert set(layers) == {"0.weight", "2.weight"}
    assert layers["0.weight"] == pytest.approx(0.5, abs=0.2 * POINT)
    assert layers["2.weight"] == pytest.approx(0.95, abs=0.2 * POINT)
    assert bool((model[4].weight != 0).all())


def test_rules_with_the_same_target_share_it() -> None:
    rules = {"0.weight": {"target_sparsity": 0.6}, "4.weight": {"target_sparsity": 0.6}}
    model = train(reference.mlp(), AutoSparse(target_sparsity=0.9, rules=rules))
    counts = reference.zero_counts(model)
    zeros, numel = (sum(counts[name][i] for name in ("0.weight", "4.weight")) for i in (0, 1))
    assert zeros / numel == pytest.approx(0.6, abs=0.3 * POINT)
    assert counts["2.weight"][0] / counts["2.weight"][1] == pytest.approx(0.9, abs=0.2 * POINT)


def test_a_rule_sets_a_target_where_the_model_has_none() -> None:
    model = reference.mlp()
    config = AutoSparse(target_sparsity=None, rules={"2.weight": {"target_sparsity": 0.7}})
    autosparse_fx.sparsify(model, config)
    offsets = offsets_of(model)
    train(model, config)
    assert reference.layer_sparsities(model)["2.weight"] == pytest.approx(0.7, abs=0.2 * POINT)
    assert torch.equal(model[0]._buffers["weight_offset"], offsets["0.weight_offset"])


def test_a_rule_of_the_open_loop_takes_a_weight_out_of_the_target() -> None:
    model = reference.mlp()
    config = AutoSparse(target_sparsity=0.9, rules={"0.weight": {"target_sparsity": None}})
    autosparse_fx.sparsify(model, config)
    offset = model[0]._buffers["weight_offset"].clone()
    train(model, config)
    assert torch.equal(model[0]._buffers["weight_offset"], offset)
    counts = reference.zero_counts(model)
    zeros, numel = (sum(counts[name][i] for name in ("2.weight", "4.weight")) for i in (0, 1))
    assert zeros / numel == pytest.approx(0.9, abs=0.2 * POINT)


def test_the_open_loop_moves_no_offset_and_learns_its_thresholds() -> None:
    model = autosparse_fx.sparsify(reference.mlp(), AutoSparse(target_sparsity=None, threshold_init=-3.0))
    offsets = offsets_of(model)
    optimizer = sgd(model.parameters())
    annealer = GradientAnnealing(model, 40, optimizer)
    assert annealer.scheduled_sparsity is None
    reference.train(model, optimizer, reference.classification_batches(40))
    for name, before in offsets.items():
        assert torch.equal(model.get_buffer(name), before), name
    for i in (0, 2, 4):
        assert bool((model[i]._parameters["weight_threshold"] != 0).all())
