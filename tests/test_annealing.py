"""GradientAnnealing: counts optimizer steps, lowers alpha, lives with its optimizer, and resumes."""

import gc
import json
import math
import warnings
import weakref
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


def sparse_mlp(**config: Any) -> nn.Sequential:
    return autosparse_fx.sparsify(reference.mlp(), AutoSparse(**config))


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, **options)


def alphas(model: nn.Module) -> list[Tensor]:
    return [m._buffers["autosparse_alpha"] for m in model.modules() if "autosparse_alpha" in m._buffers]


def alpha_of(model: nn.Module) -> float:
    (value,) = {float(alpha) for alpha in alphas(model)}
    return value


def backward(model: nn.Module, seed: int = 0) -> Tensor:
    ((x, y),) = reference.classification_batches(1, seed=seed)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach()


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    backward(model)
    optimizer.step()
    optimizer.zero_grad()


def float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


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


# what counts as a step


def test_batches_of_gradient_accumulation_do_not_count() -> None:
    model = sparse_mlp()
    optimizer = sgd(model)
    annealer = GradientAnnealing(model, 10, optimizer)
    for step in range(3):
        for micro in range(4):
            backward(model, seed=micro)
            assert annealer.steps == step
        optimizer.step()
        optimizer.zero_grad()
        assert annealer.steps == step + 1


def test_a_step_that_the_gradient_scaler_skips_does_not_count() -> None:
    model = sparse_mlp(decay="linear", alpha=1.0)
    optimizer = sgd(model)
    annealer = GradientAnnealing(model, 10, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    counted = []
    for overflow in (False, True, True, False):
        optimizer.zero_grad()
        ((x, y),) = reference.classification_batches(1)
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if overflow:
            model[0]._parameters["weight"].grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        counted.append((annealer.steps, alpha_of(model)))
    assert [steps for steps, _ in counted] == [1, 1, 1, 2]
    assert [alpha for _, alpha in counted] == [float32(a) for a in (0.9, 0.9, 0.9, 0.8)]


def test_zero_grad_and_closures_do_not_count() -> None:
    model = sparse_mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    annealer = GradientAnnealing(model, 10, optimizer)
    closures = 0

    def closure() -> Tensor:
        nonlocal closures
        closures += 1
        optimizer.zero_grad()
        return backward(model)

    optimizer.step(closure)
    assert closures > 1
    assert annealer.steps == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.01, foreach=True),
        lambda p: torch.optim.SGD(p, lr=0.01, foreach=False),
        lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        lambda p: torch.optim.RMSprop(p, lr=0.01),
    ],
    ids=["sgd-foreach", "sgd-loop", "adamw-foreach", "adamw-fused", "rmsprop"],
)
@pytest.mark.parametrize("by_hook", [True, False])
def test_every_optimizer_counts_by_hook_or_by_step(make: Callable[[Any], torch.optim.Optimizer], by_hook: bool) -> None:
    model = sparse_mlp()
    optimizer = make(model.parameters())
    annealer = GradientAnnealing(model, 10, optimizer if by_hook else None)
    for _ in range(3):
        one_step(model, optimizer)
        if not by_hook:
            annealer.step()
    assert annealer.steps == 3


def test_hook_and_step_train_alike() -> None:
    def run(by_hook: bool) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model = sparse_mlp()
        optimizer = sgd(model, momentum=0.9)
        annealer = GradientAnnealing(model, 30, optimizer if by_hook else None)
        reference.train(model, optimizer, reference.classification_batches(30), None if by_hook else annealer.step)
        return model.state_dict()

    hooked, stepped = run(True), run(False)
    for name in hooked:
        assert torch.equal(hooked[name], stepped[name]), name


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


# misuse


@pytest.mark.parametrize("total_steps", [0, -1, 1.5, True, "10", None], ids=repr)
def test_total_steps_that_is_no_positive_number_is_refused(total_steps: Any) -> None:
    with pytest.raises(
        ValueError, match=f"total_steps must be a positive number of optimizer steps, got {total_steps!r}"
    ):
        GradientAnnealing(sparse_mlp(), total_steps)


def test_total_steps_may_be_any_kind_of_integer() -> None:
    annealer = GradientAnnealing(sparse_mlp(), np.int64(10))
    state = json.loads(json.dumps(annealer.state_dict()))
    assert (state["steps"], state["total_steps"]) == (0, 10)


def test_a_model_that_is_not_sparse_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Sequential is not sparse: call autosparse_fx.sparsify"):
        GradientAnnealing(reference.mlp(), 10)


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


def test_stepping_before_the_optimizer_warns_once() -> None:
    model = sparse_mlp()
    optimizer = sgd(model)
    annealer = GradientAnnealing(model, 10)
    with pytest.warns(UserWarning, match=r"no weight has changed.*after optimizer.step\(\)") as caught:
        annealer.step()
        annealer.step()
        one_step(model, optimizer)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_an_optimizer_of_another_model_is_not_taken_for_this_ones() -> None:
    other = sparse_mlp()
    optimizer = sgd(other)
    annealer = GradientAnnealing(other, 10)
    one_step(other, optimizer)
    annealer.step()
    later = GradientAnnealing(sparse_mlp(), 10)
    with pytest.warns(UserWarning, match="no weight has changed") as caught:
        later.step()
        later.step()
    assert len(caught) == 1


def test_stepping_in_order_does_not_warn() -> None:
    model = sparse_mlp()
    optimizer = sgd(model)
    annealer = GradientAnnealing(model, 10)
    for _ in range(10):
        one_step(model, optimizer)
        annealer.step()
    assert annealer.steps == 10


@pytest.mark.parametrize("by_hook", [True, False])
def test_stepping_past_the_end_warns_once_and_alpha_stays_zero(by_hook: bool) -> None:
    model = sparse_mlp(decay="fixed", alpha=1.0, alpha_end=1.0)
    optimizer = sgd(model)
    annealer = GradientAnnealing(model, 2, optimizer if by_hook else None)

    def step() -> None:
        one_step(model, optimizer)
        if not by_hook:
            annealer.step()

    step()
    step()
    offsets = {name: b.clone() for name, b in model.named_buffers() if name.endswith("_offset")}
    with pytest.warns(UserWarning, match="past the annealer's total_steps=2.*alpha stays 0") as caught:
        for _ in range(3):
            step()
    assert len(caught) == 1
    assert annealer.steps == 2 and annealer.alpha == 0.0 and alpha_of(model) == 0.0
    for name, buffer in model.named_buffers():
        if name.endswith("_offset"):
            assert torch.equal(buffer, offsets[name])


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


# step() by hand, where nothing was stepped


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_by_hand_after_one_that_the_gradient_scaler_skipped_does_not_count(fused: bool) -> None:
    """As with the optimizer's hook; a fused optimizer on the CPU is skipped by the scaler too, or counts by itself."""
    by_hook, by_hand = sparse_mlp(decay="linear", alpha=1.0), sparse_mlp(decay="linear", alpha=1.0)
    by_hand.load_state_dict(by_hook.state_dict())
    counted: list[list[tuple[int, float]]] = []
    for model in (by_hook, by_hand):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=fused)
        annealer = GradientAnnealing(model, 10, optimizer if model is by_hook else None)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        counted.append([])
        for overflow in (False, True, True, False, True, False):
            optimizer.zero_grad()
            ((x, y),) = reference.classification_batches(1)
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            if overflow:
                model[0]._parameters["weight"].grad[0, 0] = math.inf
            scaler.step(optimizer)
            scaler.update()
            if model is by_hand:
                annealer.step()
            counted[-1].append((annealer.steps, alpha_of(model)))
    assert counted[0] == counted[1]
    if not fused:
        assert [steps for steps, _ in counted[1]] == [1, 1, 1, 2, 2, 3]


def test_first_steps_that_the_gradient_scaler_skips_do_not_count_either() -> None:
    model = sparse_mlp()
    annealer = GradientAnnealing(model, 100)
    with pytest.warns(UserWarning, match=r"does not count \(which is right where GradScaler skipped"):
        for _ in range(15):
            annealer.step()
    assert annealer.steps == 0
    one_step(model, sgd(model))
    annealer.step()
    assert annealer.steps == 1


def test_step_by_hand_at_every_batch_of_gradient_accumulation_counts_the_optimizers_steps() -> None:
    model = sparse_mlp()
    optimizer = sgd(model)
    annealer = GradientAnnealing(model, 10)
    one_step(model, optimizer)
    annealer.step()
    for _ in range(3):
        for _ in range(3):
            backward(model)
            annealer.step()
        optimizer.step()
        annealer.step()
    assert annealer.steps == 4


@pytest.mark.parametrize("seen_before", [False, True])
@pytest.mark.filterwarnings("ignore:.*no weight has changed:UserWarning")
def test_an_optimizer_that_torch_does_not_see_counts_after_a_while_and_all_of_it(seen_before: bool) -> None:
    """One that is no torch.optim.Optimizer, and writes through .data."""
    model = sparse_mlp(target_sparsity=None)
    annealer = GradientAnnealing(model, 100)
    if seen_before:
        model.load_state_dict(model.state_dict())
    for step in range(1, 61):
        backward(model)
        for parameter in model.parameters():
            parameter.data.sub_(parameter.grad, alpha=0.01)
            parameter.grad = None
        annealer.step()
        held = 21 if seen_before else 20  # what loading wrote passes for the first step
        assert annealer.steps == (step if step > held else seen_before)
    assert alpha_of(model) == float32(annealer.alpha) < 0.75


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_step_by_hand_counts_when_the_optimizer_step_is_compiled() -> None:
    model = sparse_mlp()
    optimizer = sgd(model)
    step = torch.compile(optimizer.step, backend="eager")
    annealer = GradientAnnealing(model, 10)
    for _ in range(3):
        backward(model)
        step()
        annealer.step()
    assert annealer.steps == 3
