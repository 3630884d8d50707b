"""Steering: the target is reached exactly, whatever the network, and nothing runs away."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autosparse_fx
from autosparse_fx import AutoSparse, GradientAnnealing
from autosparse_fx.steering import MAX_CUT, SteeredWeight, scheduled_sparsity, steer

POINT = 0.01
LOGIT_OF_MAX_CUT = math.log(MAX_CUT / (1 - MAX_CUT))


def sgd(parameters: Any, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-4)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=3e-3)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.05)


def train(
    model: nn.Module,
    config: AutoSparse,
    make_optimizer: Callable[[Any], torch.optim.Optimizer] = sgd,
    steps: int = 120,
    batches: Iterator[tuple[Tensor, Tensor]] | None = None,
    shape: tuple[int, ...] = (16,),
    after_step: Callable[[GradientAnnealing], object] | None = None,
) -> nn.Module:
    autosparse_fx.sparsify(model, config)
    optimizer = make_optimizer(model.parameters())
    annealer = GradientAnnealing(model, steps, optimizer)
    callback = None if after_step is None else lambda: after_step(annealer)
    losses = reference.train(model, optimizer, batches or reference.classification_batches(steps, shape), callback)
    assert annealer.steps == steps and all(map(math.isfinite, losses))
    for name, logit in autosparse_fx.thresholds(model).items():
        assert bool(logit.isfinite().all()), name
    return model


def assert_target(model: nn.Module, target: float, tolerance: float = 0.5 * POINT) -> None:
    assert reference.total_sparsity(model) == pytest.approx(target, abs=tolerance)
    assert autosparse_fx.sparsity(model) == pytest.approx(target, abs=tolerance)


def multiply(model: nn.Module, factors: dict[str, float]) -> nn.Module:
    with torch.no_grad():
        for name, factor in factors.items():
            model.get_parameter(name).mul_(factor)
    return model


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


def test_a_fixed_initial_logit_is_as_good_a_start() -> None:
    model = train(reference.mlp(), AutoSparse(target_sparsity=0.9, threshold_init=-5.0))
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


def offsets_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers() if name.endswith("_offset")}


# nothing runs away


@pytest.mark.parametrize(
    "make_optimizer", [lambda p: sgd(p, lr=0.3), lambda p: torch.optim.Adam(p, lr=0.02)], ids=["sgd", "adam"]
)
def test_nothing_runs_away_over_hundreds_of_aggressive_steps(
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
) -> None:
    """Batch norm lets the weights grow without limit, and the cuts with them."""
    highest, emptiest = [], []

    def look(annealer: GradientAnnealing) -> None:
        if annealer.steps % 10 == 0:
            highest.append(max(float(logit.max()) for logit in autosparse_fx.thresholds(model).values()))
            emptiest.append(max(reference.layer_sparsities(model).values()))

    model = reference.ConvNet(8)
    train(model, AutoSparse(target_sparsity=0.9), make_optimizer, steps=400, shape=(1, 8, 8), after_step=look)
    assert max(highest) < LOGIT_OF_MAX_CUT + 0.2
    assert max(emptiest) < 1.0
    assert max(reference.layer_sparsities(model).values()) <= 0.99 + 1e-6
    assert_target(model, 0.9)


def test_an_error_made_once_is_gone_at_the_next_shift() -> None:
    model = autosparse_fx.sparsify(reference.mlp(), AutoSparse(target_sparsity=0.8, ramp_end=0.01))
    optimizer = sgd(model.parameters(), lr=0.01)
    GradientAnnealing(model, 50, optimizer)
    batches = reference.classification_batches(50)
    for disturbance in (3.0, -3.0, 8.0, -8.0):
        with torch.no_grad():
            for i in (0, 2, 4):
                model[i]._buffers["weight_offset"].add_(disturbance)
        assert abs(reference.total_sparsity(model) - 0.8) > 0.1
        reference.train(model, optimizer, (next(batches) for _ in range(1)))
        assert_target(model, 0.8)


# steer itself, against sorting


def steered(model: nn.Module) -> list[SteeredWeight]:
    return [
        SteeredWeight(f"{name}.{slot.name}", module, slot, [module._buffers[slot.offset]])
        for name, module in model.named_modules()
        for slot in getattr(module, "_autosparse_slots", ())
    ]


def log_sigmoid(s: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -s)


def margins(model: nn.Module) -> np.ndarray:
    """``log|w| - log g(s)`` of every masked weight, in float64."""
    parts = []
    for _, _, weight, s in reference.masked_parameters(model):
        with np.errstate(divide="ignore"):
            magnitude = np.log(np.abs(weight.detach().double().numpy()))
        parts.append((magnitude - log_sigmoid(s.double().numpy())).ravel())
    return np.concatenate(parts)


@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_the_shift_is_the_quantile_of_all_margins(granularity: str, sparsity: float) -> None:
    model = reference.mlp(32, 64)
    for i in (0, 2, 4):
        nn.init.normal_(model[i].weight, std=0.1)
    autosparse_fx.sparsify(model, AutoSparse(granularity=granularity))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("_threshold"):
                p.normal_()
    before = {name: s.double().numpy() for name, _, _, s in reference.masked_parameters(model)}
    expected = np.sort(margins(model))
    assert bool(steer(steered(model), sparsity, 0.99, exact=True))

    shifts = np.concatenate(
        [
            (log_sigmoid(s.double().numpy()) - log_sigmoid(before[name])).ravel()
            for name, _, _, s in reference.masked_parameters(model)
        ]
    )
    assert np.ptp(shifts) < 1e-4
    rank = sparsity * len(expected)
    assert expected[int(rank) - 2] - 1e-4 <= shifts.mean() <= expected[int(rank) + 2] + 1e-4
    assert reference.total_sparsity(model) * len(expected) == pytest.approx(rank, abs=2)


def test_steering_is_idempotent() -> None:
    model = autosparse_fx.sparsify(reference.mlp())
    steer(steered(model), 0.8, 0.99, exact=True)
    before = offsets_of(model)
    steer(steered(model), 0.8, 0.99, exact=True)
    for name, offset in before.items():
        torch.testing.assert_close(model.get_buffer(name), offset, rtol=0, atol=0.02)
    assert_target(model, 0.8, 0.05 * POINT)


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_a_sample_of_a_large_layer_is_steered_to_within_its_sampling_error(
    granularity: str, memory_format: torch.memory_format, sparsity: float
) -> None:
    model = nn.Conv2d(125, 320, 3, bias=False).to(memory_format=memory_format)
    with torch.no_grad():
        model.weight.mul_(torch.linspace(0.1, 3, 320).view(-1, 1, 1, 1))
    autosparse_fx.sparsify(model, AutoSparse(granularity=granularity))
    if granularity == "channel":
        with torch.no_grad():
            model._parameters["weight_threshold"].normal_()
    assert bool(steer(steered(model), sparsity, 0.99, exact=False))
    assert reference.total_sparsity(model) == pytest.approx(sparsity, abs=0.3 * POINT)


def test_the_same_sample_is_taken_every_time() -> None:
    """A shift that has nothing to correct moves nothing: thresholds do not jitter with the sampling error."""
    model = autosparse_fx.sparsify(nn.Linear(640, 500, bias=False))
    assert bool(steer(steered(model), 0.9, 0.99, exact=False))
    assert_target(model, 0.9, 0.3 * POINT)
    before = autosparse_fx.thresholds(model)["weight"]
    assert bool(steer(steered(model), 0.9, 0.99, exact=False))
    torch.testing.assert_close(autosparse_fx.thresholds(model)["weight"], before, rtol=0, atol=1e-4)


def test_no_layer_is_shifted_beyond_its_bound_and_the_others_make_up_for_it() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    multiply(model, {"0.weight": 1e-2, "2.weight": 3.0})
    autosparse_fx.sparsify(model, AutoSparse(threshold_init=-5.0))
    assert bool(steer(steered(model), 0.8, 0.95, exact=True))
    layers = reference.layer_sparsities(model)
    assert layers["0.weight"] == pytest.approx(0.95, abs=0.5 * POINT) and layers["0.weight"] <= 0.95
    assert all(sparsity <= 0.95 for sparsity in layers.values())
    assert_target(model, 0.8)


@pytest.mark.parametrize("decades", [0, 8, 30])
@pytest.mark.parametrize(("sparsity", "bound"), [(0.8, 0.81), (0.5, 0.51), (0.98, 0.985)])
def test_a_tight_bound_is_met_however_small_the_smallest_weight(sparsity: float, bound: float, decades: int) -> None:
    """Masked weights that are left to weight decay become as small as floating point allows."""
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128), nn.Linear(128, 128))
    with torch.no_grad():
        for layer in model:
            layer.weight.view(-1)[:8] *= 10.0**-decades
    autosparse_fx.sparsify(model)
    assert bool(steer(steered(model), sparsity, bound, exact=True))
    assert_target(model, sparsity)
    assert all(layer <= bound for layer in reference.layer_sparsities(model).values())


@pytest.mark.parametrize("threshold_init", ["auto", -20.0])
def test_layers_that_are_zero_are_never_shifted_upwards(threshold_init: float | str) -> None:
    model = multiply(reference.mlp(32, 64), {"2.weight": 0.0})
    autosparse_fx.sparsify(model, AutoSparse(threshold_init=threshold_init))
    before = float(autosparse_fx.thresholds(model)["2.weight"])
    assert bool(steer(steered(model), 0.9, 0.99, exact=True))
    assert float(autosparse_fx.thresholds(model)["2.weight"]) <= before
    assert_target(model, 0.9)


def test_zeros_inside_a_layer_count_towards_the_target() -> None:
    model = reference.mlp(32, 64)
    with torch.no_grad():
        model[2].weight[:32] = 0
    autosparse_fx.sparsify(model)
    assert bool(steer(steered(model), 0.7, 0.99, exact=True))
    assert_target(model, 0.7, 0.1 * POINT)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_a_weight_without_elements_does_not_disturb_the_others() -> None:
    model = autosparse_fx.sparsify(nn.Sequential(nn.Linear(64, 64), nn.Linear(0, 3)))
    assert bool(steer(steered(model), 0.8, 0.99, exact=True))
    assert reference.layer_sparsities(nn.Sequential(model[0]))["0.weight"] == pytest.approx(0.8, abs=0.1 * POINT)


def test_low_precision_weights_are_steered_within_their_resolution() -> None:
    model = autosparse_fx.sparsify(nn.Linear(256, 256).to(torch.bfloat16))
    assert bool(steer(steered(model), 0.9, 0.99, exact=True))
    assert_target(model, 0.9)


def test_steering_touches_neither_weights_nor_thresholds_nor_the_optimizer() -> None:
    model = autosparse_fx.sparsify(reference.mlp())
    optimizer = adam(model.parameters())
    reference.train(model, optimizer, reference.classification_batches(3))
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    versions = {name: p._version for name, p in model.named_parameters()}
    addresses = {name: b.data_ptr() for name, b in model.named_buffers()}
    state = copy.deepcopy(optimizer.state_dict())
    offsets = offsets_of(model)
    assert bool(steer(steered(model), 0.9, 0.99, exact=False))
    for name, p in model.named_parameters():
        assert torch.equal(p, parameters[name]) and p._version == versions[name], name
    for name, offset in offsets.items():
        assert not torch.equal(model.get_buffer(name), offset), name
    assert {name: b.data_ptr() for name, b in model.named_buffers()} == addresses
    again = optimizer.state_dict()
    assert again["param_groups"] == state["param_groups"]
    for index, values in state["state"].items():
        for key, value in values.items():
            assert torch.equal(again["state"][index][key], value)


# what cannot be steered


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_raises_by_name_and_moves_nothing(value: float) -> None:
    model = autosparse_fx.sparsify(reference.mlp())
    optimizer = sgd(model.parameters())
    GradientAnnealing(model, 50, optimizer)
    reference.train(model, optimizer, reference.classification_batches(2))
    with torch.no_grad():
        model[2]._parameters["weight"][3, 4] = value
    offsets = offsets_of(model)
    with pytest.raises(RuntimeError, match=r"weight '2.weight' \[64, 64\] holds NaN or infinite values.*checkpoint"):
        optimizer.step()
    for name, offset in offsets.items():
        assert torch.equal(model.get_buffer(name), offset), name
    assert not bool(model[2].weight[3, 4].isfinite())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_steer_reports_weights_that_are_not_finite_and_moves_nothing(value: float) -> None:
    model = autosparse_fx.sparsify(reference.mlp())
    with torch.no_grad():
        model[0]._parameters["weight"][0, 0] = value
    offsets = offsets_of(model)
    finite = steer(steered(model), 0.5, 0.99, exact=False)
    assert finite.shape == () and finite.dtype == torch.bool and not bool(finite)
    for name, offset in offsets.items():
        assert torch.equal(model.get_buffer(name), offset), name


@pytest.mark.parametrize("above", [1.0, 0.5])
def test_a_target_out_of_reach_raises_with_the_cure_and_moves_nothing(above: float) -> None:
    model = autosparse_fx.sparsify(reference.mlp())
    with torch.no_grad():
        for i in (0, 2, 4):
            weight = model[i]._parameters["weight"]
            weight.view(-1)[: int(above * weight.numel())] = 3.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    GradientAnnealing(model, 10, optimizer)
    offsets = {}
    with pytest.raises(
        RuntimeError, match=r"target_sparsity=0.8 cannot be reached over 3 weights \('0.weight'.*above 1.*rules"
    ):
        for _ in range(10):
            offsets = offsets_of(model)
            optimizer.step()
    for name, offset in offsets.items():
        assert torch.equal(model.get_buffer(name), offset), name
        assert bool(offset.isfinite().all())


# resuming


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_a_resumed_training_is_the_uninterrupted_one_to_the_last_bit(granularity: str) -> None:
    config = AutoSparse(target_sparsity=0.9, granularity=granularity)
    steps = 60

    def build() -> tuple[nn.Module, torch.optim.Optimizer, GradientAnnealing]:
        torch.manual_seed(3)
        model = autosparse_fx.sparsify(reference.mlp(), config)
        optimizer = adam(model.parameters())
        return model, optimizer, GradientAnnealing(model, steps, optimizer)

    model, optimizer, annealer = build()
    batches = list(reference.classification_batches(steps))
    reference.train(model, optimizer, iter(batches[:25]))
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), annealer.state_dict()])
    reference.train(model, optimizer, iter(batches[25:]))

    torch.manual_seed(99)
    resumed = autosparse_fx.sparsify(reference.mlp(), config)
    resumed_optimizer = adam(resumed.parameters())
    resumed_annealer = GradientAnnealing(resumed, steps, resumed_optimizer)
    for target, state in zip((resumed, resumed_optimizer, resumed_annealer), saved, strict=True):
        target.load_state_dict(state)
    reference.train(resumed, resumed_optimizer, iter(batches[25:]))

    expected = model.state_dict()
    assert set(resumed.state_dict()) == set(expected)
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert_target(resumed, 0.9, 0.1 * POINT)


@pytest.mark.parametrize("zeroed", [[], ["head.weight", "head.bias"]], ids=["ordinary", "zero head"])
def test_resuming_is_the_same_whether_the_model_is_loaded_before_or_after_its_annealer(zeroed: list[str]) -> None:
    def build() -> nn.Module:
        torch.manual_seed(3)
        return autosparse_fx.sparsify(multiply(reference.Residual(), dict.fromkeys(zeroed, 0.0)))

    model = build()
    optimizer = adam(model.parameters())
    GradientAnnealing(model, 60, optimizer)
    reference.train(model, optimizer, reference.classification_batches(25))
    saved = copy.deepcopy(model.state_dict())

    resumed = build()
    resumed.load_state_dict(saved)
    GradientAnnealing(resumed, 60, adam(resumed.parameters()))
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, saved[name]), name


def test_a_second_annealer_leaves_trained_thresholds_where_they_are() -> None:
    model = autosparse_fx.sparsify(multiply(reference.Residual(), {"head.weight": 0.0}))
    optimizer = adam(model.parameters())
    GradientAnnealing(model, 60, optimizer)
    reference.train(model, optimizer, reference.classification_batches(25))
    before = copy.deepcopy(model.state_dict())
    GradientAnnealing(model, 30, optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


# end to end


def test_digits_train_to_ninety_percent_zeros_without_loss_worth_naming() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held_out, training = order[:450], order[450:]
    epochs, size = 20, 64
    steps = epochs * (len(training) // size)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        for _ in range(epochs):
            shuffled = training[torch.randperm(len(training), generator=generator)]
            for start in range(0, len(shuffled) - size + 1, size):
                index = shuffled[start : start + size]
                yield x[index], y[index]

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model.eval()(x[held_out]).argmax(1) == y[held_out]).float().mean())

    def run(config: AutoSparse | None) -> nn.Module:
        torch.manual_seed(0)
        model = reference.ConvNet(16, outputs=10)
        if config is not None:
            autosparse_fx.sparsify(model, config)
        optimizer = sgd(model.parameters())
        if config is not None:
            GradientAnnealing(model, steps, optimizer)
        reference.train(model, optimizer, batches())
        return model

    dense, sparse = run(None), run(AutoSparse(target_sparsity=0.9))
    assert_target(sparse, 0.9, 0.5 * POINT)
    assert accuracy(dense) > 0.97
    assert accuracy(sparse) > accuracy(dense) - 0.01

    expected = sparse.eval()(x[held_out]).detach()
    finalized = autosparse_fx.finalize(sparse)
    assert torch.equal(finalized(x[held_out]), expected)
    assert set(finalized.state_dict()) == set(dense.state_dict())
    zeros = sum(int((m.weight == 0).sum()) for m in (finalized.conv1, finalized.conv2, finalized.fc))
    numel = sum(m.weight.numel() for m in (finalized.conv1, finalized.conv2, finalized.fc))
    assert zeros / numel == pytest.approx(0.9, abs=0.5 * POINT)
