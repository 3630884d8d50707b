"""What a half-trained one-line model holds: saved, loaded, reported, finalized, taken over, copied and dropped."""

import copy
import gc
import subprocess
import sys
import warnings
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from hidden.one_line import Run, assert_equal_states, assert_same, masked_output, net, one_line, sgd, start, state_of
from torch import nn
from torch.optim import SGD, Adagrad, AdamW

import autosparse_fx
from autosparse_fx import AutoSparse, GradientAnnealing
from autosparse_fx.hidden import masks

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
OPEN = AutoSparse(target_sparsity=None, threshold_init=-2.5)


def adamw(model: nn.Module) -> AdamW:
    return AdamW(model.parameters(), lr=0.01)


# Saving and loading.


def checkpoint(run: Run) -> dict[str, Any]:
    return {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "autosparse": autosparse_fx.state_dict(run.model),
    }


def resume(run: Run, saved: dict[str, Any]) -> None:
    run.model.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(saved["optimizer"])
    autosparse_fx.load_state_dict(run.model, saved["autosparse"])


@pytest.mark.usefixtures("eager_graphs")
@pytest.mark.parametrize("when", ["before_the_first_call", "after_it", "after_a_step", "into_itself"])
@pytest.mark.parametrize("config", [AutoSparse(), AutoSparse(granularity="channel", rules={"2.*": {}, "*s": None})])
def test_a_resumed_training_is_the_uninterrupted_one(when: str, config: AutoSparse, tmp_path: Path) -> None:
    run = start(net(), adamw, prepared=False, config=config)
    run.steps(12)  # all batches once
    torch.save(checkpoint(run), tmp_path / "saved.pt")
    run.steps(8)
    expected, losses = state_of(run.model), run.losses[12:]

    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    if when == "into_itself":
        again = run
    else:
        torch.manual_seed(1)
        again = start(net(), adamw, prepared=False, config=config)
        if when == "after_it":
            again.compiled(X)
        elif when == "after_a_step":
            again.steps(12)
    resume(again, saved)
    again.batches = start(nn.Linear(2, 2), adamw, prepared=False).batches
    again.losses = []
    again.steps(8)
    assert again.losses == losses
    assert_equal_states(state_of(again.model), expected)


IN_A_FRESH_PROCESS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
import autosparse_fx
from hidden.one_line import net, start, state_of
saved = torch.load(sys.argv[2], weights_only=True)
run = start(net(), prepared=False)
run.model.load_state_dict(saved["model"])
run.optimizer.load_state_dict(saved["optimizer"])
autosparse_fx.load_state_dict(run.model, saved["autosparse"])
run.steps(8)
torch.save(state_of(run.model), sys.argv[2] + ".out")
"""


def test_a_fresh_process_goes_on_to_the_last_bit(tmp_path: Path) -> None:
    run = start(net(), prepared=False)
    run.steps(12)
    path = tmp_path / "saved.pt"
    torch.save(checkpoint(run), path)
    run.steps(8)
    tests = str(Path(__file__).parent.parent)
    subprocess.run([sys.executable, "-c", IN_A_FRESH_PROCESS, tests, str(path)], check=True, timeout=300)
    assert_equal_states(torch.load(f"{path}.out", weights_only=True), state_of(run.model))


@pytest.mark.usefixtures("eager_graphs")
def test_the_saved_state_is_a_copy_of_nothing_but_plain_values() -> None:
    run = start(net(), prepared=False)
    run.steps(5)
    state = autosparse_fx.state_dict(run.compiled)
    assert list(state) == ["0.weight", "2.weight"]
    assert {entry["steps"] for entry in state.values()} == {5}
    assert state.keys() == autosparse_fx.state_dict(run.model).keys()
    fresh = net()
    autosparse_fx.load_state_dict(fresh, state)
    for name, s in autosparse_fx.thresholds(run.model).items():
        assert torch.equal(autosparse_fx.thresholds(fresh)[name], s)
    (plan,) = {masks.hidden_mask(p).plan for name, p in fresh.named_parameters() if name in state}
    assert [len(columns.names) for columns in plan.history._columns] == [2] * 5  # as they were noted
    run.steps(5)  # what was loaded shares no memory with what was saved
    for entry, name in zip(state.values(), state, strict=True):
        loaded = masks.hidden_mask(dict(fresh.named_parameters())[name])
        assert loaded is not None and loaded.steps == 5
        assert loaded.threshold.data_ptr() != entry["threshold"].data_ptr()


# Looking at it.


@pytest.mark.usefixtures("eager_graphs")
def test_reports_find_the_hidden_thresholds_also_through_the_wrapper() -> None:
    config = AutoSparse(target_sparsity=0.9, rules={"2.weight": None})
    run = start(net(), prepared=False, config=config)
    assert not autosparse_fx.thresholds(run.model)
    run.steps(20)
    for model in (run.model, run.compiled):
        (s,) = autosparse_fx.thresholds(model).values()
        zeros = int((run.model[0].weight.abs() <= torch.sigmoid(s)).sum())
        report = autosparse_fx.report(model)
        (layer,) = report.layers
        assert (layer.zeros, layer.numel, layer.target) == (zeros, 512, 0.9)
        assert autosparse_fx.sparsity(model) == report.sparsity == pytest.approx(0.9, abs=0.005)
        (reason,) = (why for name, (_, why) in report.skipped.items() if name.endswith("2.weight"))
        assert reason == "left dense by the rule '2.weight'"


# finalize.


@pytest.mark.parametrize("through", ["model", "wrapper"])
def test_finalize_leaves_the_compiled_output_as_it_is(through: str) -> None:
    run = start(reference.ConvNet(8), prepared=False, config=AutoSparse(target_sparsity=0.9), shape=(1, 8, 8))
    model, x = run.model, torch.randn(5, 1, 8, 8)
    run.steps(20)
    run.compiled.eval()
    with torch.no_grad():
        out = run.compiled(x)
    parameters = list(model.parameters())
    given = model if through == "model" else run.compiled
    assert autosparse_fx.finalize(given) is given
    with torch.no_grad():
        torch.testing.assert_close(run.compiled(x), out, rtol=1e-5, atol=1e-6)  # on other kernels
        torch.testing.assert_close(model(x), out, rtol=1e-4, atol=1e-5)
        zeros = sum(int((m.weight == 0).sum()) for m in (model.conv1, model.conv2, model.fc))
        assert zeros / sum(m.weight.numel() for m in (model.conv1, model.conv2, model.fc)) == pytest.approx(
            0.9, abs=0.005
        )
        wider = torch.cat((x, x, x))  # a new graph, compiled with the old options
        torch.testing.assert_close(run.compiled(wider), model(wider), rtol=1e-4, atol=1e-5)
    assert not autosparse_fx.thresholds(model)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    with pytest.raises(ValueError, match="not sparse"):
        autosparse_fx.finalize(model)


@pytest.mark.usefixtures("eager_graphs")
def test_a_finalized_model_trains_on_as_the_dense_model_that_it_is() -> None:
    run = start(net(), prepared=False)
    run.steps(20)
    autosparse_fx.finalize(run.model)
    dense = copy.deepcopy(run.model)
    torch._dynamo.reset()
    after = torch.compile(run.model, backend="autosparse")
    for model, call in ((run.model, after), (dense, dense)):
        optimizer = sgd(model)
        for _ in range(3):
            call(X).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_equal_states(state_of(run.model), state_of(dense))
    # The old options do not mask it a second time, and do not train it dense either.
    with pytest.raises(RuntimeError, match=r"'0\.weight' .* was finalized(?s:.)*without options"):
        run.steps(1)
    torch.testing.assert_close(run.compiled(X), run.model(X))
    assert not autosparse_fx.thresholds(run.model)


@pytest.mark.usefixtures("eager_graphs")
def test_finalize_before_the_target_is_reached_warns() -> None:
    run = start(net(), prepared=False)
    run.steps(3)
    with pytest.warns(UserWarning, match="instead of the target"):
        autosparse_fx.finalize(run.model)


# sparsify.


@pytest.mark.usefixtures("eager_graphs")
@pytest.mark.parametrize("given", [True, False])
def test_sparsify_takes_the_training_over(given: bool) -> None:
    config = AutoSparse(target_sparsity=0.9, granularity="channel", alpha=0.6)
    model = net()
    whole = start(copy.deepcopy(model), lambda m: SGD(m.parameters(), lr=0.1), prepared=True, config=config)
    run = start(model, lambda m: SGD(m.parameters(), lr=0.1), prepared=False, config=config)
    run.steps(8)
    before, x = autosparse_fx.thresholds(model), torch.randn(5, 16)
    with torch.no_grad():
        out = run.compiled(x)
    assert autosparse_fx.sparsify(model, *([config] if given else [])) is model
    assert all(torch.equal(s, before[name]) for name, s in autosparse_fx.thresholds(model).items())
    with torch.no_grad():
        assert torch.equal(model(x), out)
    assert not list(masks.hidden_masks(model))
    whole.steps(8)
    assert whole.annealer is not None
    assert float(model[0].autosparse_alpha) == pytest.approx(whole.annealer.alpha)

    optimizer = SGD(model.parameters(), lr=0.1)
    annealer = GradientAnnealing(model, 20, optimizer)
    annealer.load_state_dict({"steps": 8, "total_steps": 20})
    torch._dynamo.reset()
    rest = Run(model, torch.compile(model, backend="autosparse"), optimizer, annealer, run.batches, run.losses)
    rest.steps(12)
    whole.steps(12)
    assert_same(rest, whole)


@pytest.mark.usefixtures("eager_graphs")
def test_sparsify_with_another_configuration_is_refused() -> None:
    run = start(net(), prepared=False)
    run.steps(2)
    before = state_of(run.model)
    with pytest.raises(ValueError, match=r"'0\.weight' is being made sparse already"):
        autosparse_fx.sparsify(run.model, AutoSparse(target_sparsity=0.5))
    assert_equal_states(before, state_of(run.model))
    run.steps(2)


# Copies, and the end.


@pytest.mark.usefixtures("eager_graphs")
def test_a_copy_trains_by_itself() -> None:
    run = start(net(), prepared=False)
    run.steps(5)
    other = start(copy.deepcopy(run.model), prepared=False)
    autosparse_fx.load_state_dict(other.model, autosparse_fx.state_dict(run.model))
    before = state_of(run.model)
    assert_equal_states(before, state_of(other.model))
    with torch.no_grad():
        assert torch.equal(run.compiled(X), other.compiled(X))
        torch.testing.assert_close(other.compiled(X), masked_output(other.model, X))
    other.steps(5)
    assert_equal_states(before, state_of(run.model))
    after = state_of(other.model)
    assert not torch.equal(after["0.weight threshold"], before["0.weight threshold"])
    run.steps(5)
    assert_equal_states(after, state_of(other.model))


@pytest.mark.usefixtures("eager_graphs")
@pytest.mark.parametrize("reset", [True, False])
def test_nothing_is_left_of_a_model_that_was_dropped(reset: bool) -> None:
    gc.collect()
    registry = masks.registry
    tables = (registry.masks, registry.missed, registry.dense, registry.seen, registry.plans)
    before = [len(table) for table in tables]
    run = start(net(), prepared=False, config=AutoSparse(rules={"2.weight": None}))
    run.steps(5)
    autosparse_fx.report(run.model)
    assert len(registry.masks) == before[0] + 1
    alive = weakref.ref(run.model), weakref.ref(run.optimizer), weakref.ref(run.model[0].weight)
    del run
    if reset:
        torch._dynamo.reset()
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3
    assert [len(table) for table in tables] == before


def test_nothing_is_left_under_inductor_either() -> None:
    gc.collect()
    before = len(masks.registry.masks)
    run = start(net(), prepared=False)
    run.steps(3)
    alive = weakref.ref(run.model[0].weight)
    assert len(masks.registry.masks) == before + 2
    del run
    torch._dynamo.reset()
    gc.collect()
    assert alive() is None and len(masks.registry.masks) == before


def test_a_model_that_is_used_once_more_after_its_optimizer_is_gone() -> None:
    model = net()
    compiled = one_line(model, 10)
    optimizer = sgd(model)
    compiled(X).sum().backward()
    optimizer.step()
    state = state_of(model)
    del optimizer
    gc.collect()
    assert_equal_states(state, state_of(model))
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), masked_output(model, X))


@pytest.mark.parametrize("optimizer", [partial(SGD, momentum=0.9), AdamW, Adagrad])
def test_a_resumed_optimizer_without_the_state_of_the_thresholds_is_a_warning(optimizer: Any) -> None:
    def training() -> tuple[nn.Module, Any, torch.optim.Optimizer]:
        model = net()
        return model, one_line(model, 100, AutoSparse(target_sparsity=None)), optimizer(model.parameters(), lr=0.01)

    def step(compiled: Any, stepped: torch.optim.Optimizer) -> None:
        compiled(torch.randn(4, 16)).square().mean().backward()
        stepped.step()
        stepped.zero_grad()

    model, compiled, first = training()
    for _ in range(2):
        step(compiled, first)  # a warning is an error here
    saved = autosparse_fx.state_dict(model)
    _, compiled, second = training()
    second.load_state_dict(first.state_dict())
    with pytest.warns(UserWarning, match=r"has trained weight '0\.weight' before.*autosparse_fx\.load_state_dict"):
        step(compiled, second)
    model, compiled, third = training()
    third.load_state_dict(first.state_dict())
    autosparse_fx.load_state_dict(model, saved)
    step(compiled, third)


def test_another_optimizer_may_tune_a_model_that_was_trained_in_one_line() -> None:
    run = start(net(), prepared=False)
    run.steps(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "finalize:", UserWarning)
        autosparse_fx.finalize(run.model)
    fine = SGD(run.model.parameters(), lr=0.01)
    for _ in range(25):  # a warning is an error here, while the optimizer of the training is alive
        run.model(torch.randn(4, 16)).square().mean().backward()
        fine.step()
        fine.zero_grad()
    assert run.optimizer is not None
