"""One shift of all thresholds: steer itself against sorting, and what cannot be steered."""

import copy
import math
import re
from typing import Any

import numpy as np
import pytest
import reference
import torch
from steered_training import POINT, adam, assert_target, multiply, offsets_of, sgd
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import autosparse_fx
from autosparse_fx import AutoSparse, GradientAnnealing
from autosparse_fx.steering import SteeredWeight, steer

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
    assert bool(steer(steered(model), sparsity, 0.99, exact=True).reached)

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
    assert bool(steer(steered(model), sparsity, 0.99, exact=False).reached)
    assert reference.total_sparsity(model) == pytest.approx(sparsity, abs=0.3 * POINT)


def test_the_same_sample_is_taken_every_time() -> None:
    """A shift that has nothing to correct moves nothing: thresholds do not jitter with the sampling error."""
    model = autosparse_fx.sparsify(nn.Linear(640, 500, bias=False))
    assert bool(steer(steered(model), 0.9, 0.99, exact=False).reached)
    assert_target(model, 0.9, 0.3 * POINT)
    before = autosparse_fx.thresholds(model)["weight"]
    assert bool(steer(steered(model), 0.9, 0.99, exact=False).reached)
    torch.testing.assert_close(autosparse_fx.thresholds(model)["weight"], before, rtol=0, atol=1e-4)


def test_no_layer_is_shifted_beyond_its_bound_and_the_others_make_up_for_it() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    multiply(model, {"0.weight": 1e-2, "2.weight": 3.0})
    autosparse_fx.sparsify(model, AutoSparse(threshold_init=-5.0))
    assert bool(steer(steered(model), 0.8, 0.95, exact=True).reached)
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
    assert bool(steer(steered(model), sparsity, bound, exact=True).reached)
    assert_target(model, sparsity)
    assert all(layer <= bound for layer in reference.layer_sparsities(model).values())


@pytest.mark.parametrize("threshold_init", ["auto", -20.0])
def test_layers_that_are_zero_are_never_shifted_upwards(threshold_init: float | str) -> None:
    model = multiply(reference.mlp(32, 64), {"2.weight": 0.0})
    autosparse_fx.sparsify(model, AutoSparse(threshold_init=threshold_init))
    before = float(autosparse_fx.thresholds(model)["2.weight"])
    assert bool(steer(steered(model), 0.9, 0.99, exact=True).reached)
    assert float(autosparse_fx.thresholds(model)["2.weight"]) <= before
    assert_target(model, 0.9)


def test_zeros_inside_a_layer_count_towards_the_target() -> None:
    model = reference.mlp(32, 64)
    with torch.no_grad():
        model[2].weight[:32] = 0
    autosparse_fx.sparsify(model)
    assert bool(steer(steered(model), 0.7, 0.99, exact=True).reached)
    assert_target(model, 0.7, 0.1 * POINT)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_a_weight_without_elements_does_not_disturb_the_others() -> None:
    model = autosparse_fx.sparsify(nn.Sequential(nn.Linear(64, 64), nn.Linear(0, 3)))
    assert bool(steer(steered(model), 0.8, 0.99, exact=True).reached)
    assert reference.layer_sparsities(nn.Sequential(model[0]))["0.weight"] == pytest.approx(0.8, abs=0.1 * POINT)


def test_low_precision_weights_are_steered_within_their_resolution() -> None:
    model = autosparse_fx.sparsify(nn.Linear(256, 256).to(torch.bfloat16))
    assert bool(steer(steered(model), 0.9, 0.99, exact=True).reached)
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
    assert bool(steer(steered(model), 0.9, 0.99, exact=False).reached)
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
    shift = steer(steered(model), 0.5, 0.99, exact=False)
    for flag in shift:
        assert flag.shape == () and flag.dtype == torch.bool and not bool(flag)
    for name, offset in offsets.items():
        assert torch.equal(model.get_buffer(name), offset), name


@pytest.mark.parametrize("above", [1.0, 0.5])
def test_a_target_out_of_reach_warns_once_with_the_cure_and_as_much_is_masked_as_can_be(above: float) -> None:
    model = autosparse_fx.sparsify(reference.mlp())
    with torch.no_grad():
        for i in (0, 2, 4):
            weight = model[i]._parameters["weight"]
            weight.view(-1)[: int(above * weight.numel())] = 3.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    annealer = GradientAnnealing(model, 10, optimizer)
    with pytest.warns(UserWarning) as warned:
        for _ in range(10):
            optimizer.step()
    (message,) = [str(w.message) for w in warned]
    assert re.match(
        rf"target_sparsity=0.8 cannot be reached over 3 weights \('0.weight'.* {above:.1%} .*rules", message
    )
    assert annealer.steps == 10 and annealer.alpha == 0
    assert abs(autosparse_fx.sparsity(model) - min(1 - above, 0.99)) < 0.01
    assert all(bool(offset.isfinite().all()) for offset in offsets_of(model).values())


def test_a_target_that_comes_within_reach_again_is_reached() -> None:
    model = autosparse_fx.sparsify(reference.mlp(), AutoSparse(target_sparsity=0.8))
    with torch.no_grad():
        for i in (0, 2, 4):
            model[i]._parameters["weight"].mul_(1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    GradientAnnealing(model, 10, optimizer)
    with pytest.warns(UserWarning, match="cannot be reached"):
        for _ in range(9):
            optimizer.step()
    with torch.no_grad():
        for i in (0, 2, 4):
            model[i]._parameters["weight"].div_(1000)
    optimizer.step()
    assert autosparse_fx.sparsity(model) == pytest.approx(0.8, abs=0.005)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_margins_a_part_at_a_time_give_the_same_shift(
    granularity: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = autosparse_fx.sparsify(reference.mlp(32, 64), AutoSparse(granularity=granularity))
    parts = copy.deepcopy(model)
    assert bool(steer(steered(model), 0.8, 0.99, ramping=not exact, exact=exact).reached)
    monkeypatch.setattr("autosparse_fx.steering.AT_A_TIME", 3000)
    assert bool(steer(steered(parts), 0.8, 0.99, ramping=not exact, exact=exact).reached)
    for name, offset in offsets_of(model).items():
        torch.testing.assert_close(parts.get_buffer(name), offset, rtol=1e-6, atol=0)
        assert bool((offset != 0).any())


def test_weights_without_elements_are_not_steered() -> None:
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    model[1].weight = nn.Parameter(torch.empty(0, 8))
    autosparse_fx.sparsify(model, AutoSparse(rules={"1.weight": {"target_sparsity": 0.5}}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    GradientAnnealing(model, 2, optimizer)
    for _ in range(2):
        optimizer.step()
    assert autosparse_fx.sparsity(model) == pytest.approx(0.8, abs=0.02)


class Waits(TorchDispatchMode):
    """Counts what waits for the device: values that become numbers of Python."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_a_shift_waits_for_nothing(granularity: str) -> None:
    model = autosparse_fx.sparsify(reference.mlp(), AutoSparse(granularity=granularity))
    weights = steered(model)
    with Waits() as waits:
        shift = steer(weights, 0.5, 0.99, ramping=True, exact=False)
        assert waits.count == 0
        assert bool(shift.reached) and waits.count == 1


def test_what_is_warned_of_is_recorded_first() -> None:
    model = autosparse_fx.sparsify(reference.mlp())
    with torch.no_grad():
        model[0]._parameters["weight"].fill_(3.0)
        model[2]._parameters["weight"].fill_(3.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    annealer = GradientAnnealing(model, 10, optimizer)
    failed = 0
    for _ in range(10):  # warnings are errors here
        try:
            optimizer.step()
        except UserWarning:
            failed += 1
    assert failed == 1 and len(annealer.history.records) == annealer.steps == 10
    assert annealer.out_of_reach == {0.8}
