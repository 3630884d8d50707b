"""GradientAnnealing: lowers alpha, lives with its optimizer, and resumes."""

import gc
import json
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from annealers import alpha_of, alphas, backward, float32, one_step, sgd, sparse_mlp
from torch import nn

import autosparse_fx
from autosparse_fx import AutoSparse, GradientAnnealing

SHAPES: dict[str, Callable[[float], float]] = {
    "fixed": lambda t: 1.0,
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "sigmoid": lambda t: 1 - 1 / (1 + math.exp(6 - 12 * t)),
    "sigmoid_cosine": lambda t: max((1 + math.cos(math.pi * t)) / 2, 1 - 1 / (1 + math.exp(6 - 12 * t))),
}


@pytest.mark.parametrize("decay", SHAPES)
def test_alpha_follows_the_decay_per_optimizer_step_and_ends_at_exactly_zero(decay: str) -> None:
    model = sparse_mlp(alpha=0.6, decay=decay, alpha_end=0.7)
    optimizer = sgd(model)
    annealer = GradientAnnealing(model, 20, optimizer)
    for step in range(20):
        expected = 0.6 * SHAPES[decay](step / 20) if step < 14 else 0.0
        assert annealer.steps == step
        assert annealer.alpha == pytest.approx(expected, rel=1e-12)
        assert alpha_of(model) == pytest.approx(expected, rel=1e-6)
        assert (alpha_of(model) == 0) == (step >= 14)
        one_step(model, optimizer)
    assert annealer.steps == 20 and alpha_of(model) == 0.0


def test_alpha_starts_where_the_configuration_says_before_any_annealer() -> None:
    assert alpha_of(sparse_mlp(alpha=0.3)) == float32(0.3)


def test_a_fixed_alpha_that_ends_with_the_training_is_zero_after_the_last_step() -> None:
    model = sparse_mlp(alpha=1.0, decay="fixed", alpha_end=1.0)
    optimizer = sgd(model)
    GradientAnnealing(model, 3, optimizer)
    seen = []
    for _ in range(3):
        seen.append(alpha_of(model))
        one_step(model, optimizer)
    assert seen == [1.0, 1.0, 1.0]
    assert alpha_of(model) == 0.0


def test_the_alpha_of_the_step_scales_the_gradient_of_masked_weights() -> None:
    model = autosparse_fx.sparsify(
        nn.Linear(8, 4, bias=False), AutoSparse(target_sparsity=None, threshold_init=-1.5, decay="linear", alpha=0.8)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    GradientAnnealing(model, 10, optimizer)
    x = torch.randn(3, 8)
    dense = x.sum(0).expand(4, 8)
    for step in range(10):
        model(x).sum().backward()
        alpha = 0.8 * (1 - step / 10) if step < 9 else 0.0
        weight = model._parameters["weight"]
        kept = model.weight.detach() != 0
        assert 0 < int(kept.sum()) < kept.numel()
        torch.testing.assert_close(weight.grad, torch.where(kept, dense, alpha * dense))
        optimizer.step()
        optimizer.zero_grad()


# life of the annealer


def test_the_annealer_lives_as_long_as_the_optimizer() -> None:
    model = sparse_mlp(decay="linear", alpha=1.0)
    optimizer = sgd(model)
    alive = weakref.ref(GradientAnnealing(model, 10, optimizer))
    gc.collect()
    one_step(model, optimizer)
    assert alpha_of(model) == float32(0.9)
    assert alive() is not None and alive().steps == 1
    del optimizer
    gc.collect()
    assert alive() is None
    assert alpha_of(model) == float32(0.9)


def test_an_annealer_without_optimizer_is_not_kept_alive() -> None:
    model = sparse_mlp()
    alive = weakref.ref(GradientAnnealing(model, 10))
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("same_optimizer", [True, False])
def test_a_new_annealer_replaces_the_one_before_it(same_optimizer: bool) -> None:
    model = sparse_mlp(decay="linear", alpha=1.0)
    first_optimizer = sgd(model)
    first = GradientAnnealing(model, 10, first_optimizer)
    one_step(model, first_optimizer)
    optimizer = first_optimizer if same_optimizer else sgd(model)
    second = GradientAnnealing(model, 20, optimizer)
    assert alpha_of(model) == 1.0
    one_step(model, optimizer)
    assert (first.steps, second.steps) == (1, 1)
    assert alpha_of(model) == float32(0.95)
    if not same_optimizer:
        one_step(model, first_optimizer)
        assert (first.steps, second.steps) == (1, 1)


def test_a_detached_annealer_stops_counting() -> None:
    model = sparse_mlp()
    optimizer = sgd(model)
    annealer = GradientAnnealing(model, 10, optimizer)
    annealer.detach()
    one_step(model, optimizer)
    assert annealer.steps == 0
    annealer.detach()


def test_annealers_of_two_models_do_not_disturb_each_other() -> None:
    one, two = sparse_mlp(), sparse_mlp()
    optimizers = sgd(one), sgd(two)
    annealers = [GradientAnnealing(m, 10, o) for m, o in zip((one, two), optimizers, strict=True)]
    one_step(one, optimizers[0])
    assert [a.steps for a in annealers] == [1, 0]
    assert alpha_of(two) == 0.75 != alpha_of(one)


def test_a_module_around_the_sparse_model_serves_as_well() -> None:
    model = sparse_mlp(decay="linear", alpha=1.0)
    wrapped = nn.ModuleDict({"inner": model})
    optimizer = sgd(wrapped)
    GradientAnnealing(wrapped, 10, optimizer)
    one_step(model, optimizer)
    assert alpha_of(model) == float32(0.9)


# state


@pytest.mark.parametrize("wrong", [{"steps": "3"}, {"steps": 11}, {"steps": -1}, {"steps": 2.5}, {"history": {}}])
def test_a_state_that_is_wrong_is_refused_and_changes_nothing(wrong: dict[str, Any]) -> None:
    model = sparse_mlp(decay="linear", alpha=1.0)
    annealer = GradientAnnealing(model, 10)
    state = annealer.state_dict()
    with pytest.raises(ValueError, match="annealer's state"):
        annealer.load_state_dict({**state, "steps": 7, **wrong})
    assert annealer.steps == 0 and annealer.alpha == 1.0
    assert annealer.state_dict() == state


def test_a_state_dict_round_trip_through_json_resumes_count_and_alpha() -> None:
    model = sparse_mlp(decay="linear", alpha=1.0)
    optimizer = sgd(model)
    annealer = GradientAnnealing(model, 10, optimizer)
    for _ in range(4):
        one_step(model, optimizer)
    state = json.loads(json.dumps(annealer.state_dict()))

    resumed_model = sparse_mlp(decay="linear", alpha=1.0)
    resumed = GradientAnnealing(resumed_model, 10, sgd(resumed_model))
    resumed.load_state_dict(state)
    assert resumed.steps == 4 and resumed.alpha == pytest.approx(0.6)
    assert alpha_of(resumed_model) == float32(0.6)
    assert resumed.state_dict() == annealer.state_dict()


def test_a_state_of_another_training_is_refused_and_changes_nothing() -> None:
    model = sparse_mlp(decay="linear", alpha=1.0)
    annealer = GradientAnnealing(model, 10, sgd(model))
    other = GradientAnnealing(sparse_mlp(), 20).state_dict()
    with pytest.raises(ValueError, match="total_steps=20, this annealer 10"):
        annealer.load_state_dict({**other, "steps": 5})
    assert annealer.steps == 0 and alpha_of(model) == 1.0


@pytest.mark.parametrize("lost", ["steps", "total_steps"])
def test_a_state_that_lacks_a_key_is_refused_by_name(lost: str) -> None:
    annealer = GradientAnnealing(sparse_mlp(), 10)
    state = {key: value for key, value in annealer.state_dict().items() if key != lost}
    with pytest.raises(ValueError, match=f"the annealer's state lacks {lost}:"):
        annealer.load_state_dict(state)


@pytest.mark.parametrize("state", [None, [1], "steps"])
def test_what_is_no_state_is_refused(state: Any) -> None:
    annealer = GradientAnnealing(sparse_mlp(), 10)
    with pytest.raises(TypeError, match=rf"what annealer\.state_dict\(\) returned, got {type(state).__name__}"):
        annealer.load_state_dict(state)


def test_alpha_is_in_no_state_dict_of_the_model() -> None:
    dense_keys = set(reference.mlp().state_dict())
    model = sparse_mlp()
    own = {f"{i}.weight_{kind}" for i in (0, 2, 4) for kind in ("threshold", "offset")}
    assert set(model.state_dict()) == dense_keys | own


def test_one_alpha_tensor_is_shared_by_all_layers_and_written_in_place() -> None:
    model = sparse_mlp()
    shared = alphas(model)
    assert len(shared) == 3 and len({id(a) for a in shared}) == 1
    alpha = shared[0]
    assert alpha.shape == () and alpha.dtype == torch.float32 and not alpha.requires_grad
    address, before = alpha.data_ptr(), float(alpha)
    optimizer = sgd(model)
    GradientAnnealing(model, 5, optimizer)
    for _ in range(5):
        one_step(model, optimizer)
    assert all(a is alpha for a in alphas(model))
    assert alpha.data_ptr() == address and float(alpha) == 0.0 != before


def test_writing_alpha_between_forward_and_backward_is_no_error_of_autograd() -> None:
    model = sparse_mlp()
    optimizer = sgd(model)
    GradientAnnealing(model, 10, optimizer)
    for _ in range(3):
        one_step(model, optimizer)
    ((x, y),) = reference.classification_batches(1)
    F.cross_entropy(model(x), y).backward()


@pytest.mark.parametrize(("target", "granularity"), [(0.8, "layer"), (None, "channel")])
def test_nothing_recompiles_over_a_whole_annealed_and_steered_training(target: float | None, granularity: str) -> None:
    model = autosparse_fx.sparsify(reference.ConvNet(4), AutoSparse(target_sparsity=target, granularity=granularity))
    optimizer = sgd(model, momentum=0.9)
    annealer = GradientAnnealing(model, 40, optimizer)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    batches = reference.classification_batches(40, (1, 8, 8))
    reference.train(compiled, optimizer, take(batches, 1))
    with torch.compiler.set_stance("fail_on_recompile"):
        reference.train(compiled, optimizer, batches)
    assert annealer.steps == 40 and alpha_of(model) == 0.0
    if target is not None:
        assert reference.total_sparsity(model) == pytest.approx(target, abs=0.005)


def take(batches: Iterator[Any], number: int) -> Iterator[Any]:
    return (next(batches) for _ in range(number))


# torch 2.11 scripts something of its own while it traces an optimizer.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_annealing_counts_when_the_optimizer_step_is_compiled() -> None:
    model = sparse_mlp(decay="linear", alpha=1.0)
    optimizer = sgd(model)
    annealer = GradientAnnealing(model, 10, optimizer)
    step = torch.compile(optimizer.step, backend="eager")
    for count in range(1, 4):
        backward(model)
        step()
        optimizer.zero_grad()
        assert annealer.steps == count
    assert alpha_of(model) == float32(0.7)


@pytest.mark.parametrize("target", [0.5, None])
def test_a_model_that_is_finalized_before_the_end_trains_on(target: float | None) -> None:
    """The annealer lives as long as its optimizer: it has nothing left to steer or to record, and says nothing."""
    model = autosparse_fx.sparsify(reference.mlp(), AutoSparse(target_sparsity=target))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    annealer = GradientAnnealing(model, 250, optimizer=optimizer)
    reference.train(model, optimizer, reference.classification_batches(7))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the target was missed
        autosparse_fx.finalize(model)
    recorded = len(annealer.history)
    reference.train(model, optimizer, reference.classification_batches(8))
    assert len(annealer.history) == recorded > 0
