"""Whole trainings that are steered: nothing runs away, and they resume."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import reference
import torch
from steered_training import LOGIT_OF_MAX_CUT, POINT, adam, assert_target, multiply, sgd, train
from torch import Tensor, nn

import autosparse_fx
from autosparse_fx import AutoSparse, GradientAnnealing
from autosparse_fx.attach import masked_modules
from autosparse_fx.steering import masked_fraction, steered_groups

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


def sparse_for_longer() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = reference.mlp()
    train(model, AutoSparse(target_sparsity=0.9), lambda p: sgd(p, lr=0.05), steps=60)
    return model, sgd(model.parameters(), lr=0.05)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_second_training_of_a_sparse_model_goes_on_from_its_sparsity(resumed: bool) -> None:
    model, optimizer = sparse_for_longer()
    annealer = GradientAnnealing(model, 60, optimizer)
    lowest = 1.0
    for step, (x, y) in enumerate(reference.classification_batches(60)):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        lowest = min(lowest, autosparse_fx.sparsity(model))
        if resumed and step == 30:
            state = annealer.state_dict()
            annealer = GradientAnnealing(model, 60, optimizer)
            annealer.load_state_dict(state)
    assert lowest > 0.85
    assert annealer.scheduled_sparsity == pytest.approx(0.9)
    assert_target(model, 0.9)


def first_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """The sparsity after each step."""
    found = []
    for x, y in reference.classification_batches(steps):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(autosparse_fx.sparsity(model))
    return found


@pytest.mark.parametrize("loaded", [False, True])
def test_a_long_second_training_holds_the_sparsity_before_its_first_shift_too(loaded: bool) -> None:
    model, optimizer = sparse_for_longer()
    if loaded:
        state = model.state_dict()
        model = autosparse_fx.sparsify(reference.mlp(), AutoSparse(target_sparsity=0.9))
        model.load_state_dict(state)
        optimizer = sgd(model.parameters(), lr=0.05)
    GradientAnnealing(model, 2000, optimizer)  # which shifts every 20 steps
    found = first_steps(model, optimizer, 45)
    assert min(found) > 0.85 and found[19] == pytest.approx(found[0], abs=POINT)


def test_a_first_training_follows_the_ramp_wherever_it_begins() -> None:
    model = autosparse_fx.sparsify(reference.mlp(), AutoSparse(target_sparsity=0.9, threshold_init=-2.0))
    optimizer = sgd(model.parameters(), lr=0.05)
    annealer = GradientAnnealing(model, 2000, optimizer)
    found = first_steps(model, optimizer, 20)
    assert found[0] > 0.4 and found[19] == pytest.approx(annealer.scheduled_sparsity, abs=POINT) and found[19] < 0.1


def test_what_is_masked_is_found_whatever_the_default_device() -> None:
    model, _ = sparse_for_longer()
    ((_, weights),) = steered_groups(m for _, m in masked_modules(model)).items()
    with torch.device("meta"):
        assert masked_fraction(weights) == pytest.approx(autosparse_fx.sparsity(model), abs=1e-6)
    assert masked_fraction([]) == 0.0


def test_a_state_of_before_floors_resumes_on_the_ramp() -> None:
    model = autosparse_fx.sparsify(reference.mlp(), AutoSparse(target_sparsity=0.9))
    annealer = GradientAnnealing(model, 100)
    state = annealer.state_dict()
    assert state.pop("floors") is None
    annealer.load_state_dict({**state, "steps": 10})
    assert annealer.scheduled_sparsity == pytest.approx(0.9 * (1 - (1 - 0.1 / annealer._config.ramp_end) ** 3))


def test_steering_does_not_depend_on_the_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model = reference.ConvNet(4)
        train(model, AutoSparse(target_sparsity=0.8), lambda p: sgd(p, lr=0.05), steps=20, shape=(1, 8, 8))
        assert_target(model, 0.8)
        assert {logit.dtype for logit in autosparse_fx.thresholds(model).values()} == {torch.float32}
        autosparse_fx.finalize(model, reach_target=True)
        assert autosparse_fx.sparsity(model) == pytest.approx(0.8, abs=POINT / 2)
    finally:
        torch.set_default_dtype(torch.float32)
