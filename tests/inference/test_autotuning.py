"""What ``max_autotune`` measures: the layouts of programs, and which layers run sparse at all."""

import copy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernels.graphs import prune
from kernels.models import Seen, assert_same, check, compiled, inputs_of, made
from torch import nn

from autosparse_fx import inference
from autosparse_fx._compat import inductor
from autosparse_fx.kernels import choice_tuning, timing
from autosparse_fx.kernels.steps import Layout
from autosparse_fx.kernels.tuning import Task

Functions = Mapping[float, Callable[..., Any]]


@pytest.fixture(autouse=True)
def tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Task]:
    """The programs whose layouts were asked for; nothing is remembered from before."""
    found: list[Task] = []

    def layouts(task: Task, kernels: object) -> list[Layout]:
        found.append(task)
        return [Layout(False, 4, 0.5)] * len(task.steps)

    monkeypatch.setattr(sys.modules["autosparse_fx.passes.fuse_sparse_programs"], "tuned_layouts", layouts)
    monkeypatch.setattr(inductor, "inductor_cache_dir", lambda: tmp_path)
    return found


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """The scales whose graphs were compared; they compute the same, and the last is taken for the fastest."""
    found: list[list[float]] = []

    def fastest(functions: Functions, inputs: list[Any]) -> float:
        found.append(list(functions))
        first, *others = (function(*inputs) for function in functions.values())
        for other in others:
            assert_same(other[0], first[0].double())
        return found[-1][-1]

    monkeypatch.setattr(choice_tuning, "_fastest", fastest)
    return found


@pytest.mark.parametrize("name", ["stack", "mlp"])
@pytest.mark.parametrize("asked", [{"mode": "max-autotune"}, {"options": {"max_autotune": True}}, {}])
def test_programs_are_tuned_where_autotuning_is_asked_for(
    name: str, asked: dict[str, Any], seen: Seen, tuned: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice_tuning, "_fastest", lambda functions, _: next(iter(functions)))
    model = made(name)
    check(compiled(model, **asked), model, inputs_of(name))
    assert seen.programs > 0 and len(tuned) == (seen.programs if asked else 0)


@pytest.mark.parametrize("name", ["stack", "mlp"])
def test_layers_run_dense_where_the_whole_graph_is_faster_so(
    name: str, seen: Seen, tuned: list[Task], compared: list[list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "SCALES", (1.0, 0.0))
    model, x = made(name), inputs_of(name)
    fast = compiled(model, mode="max-autotune")
    check(fast, model, x)
    assert compared == [[1.0, 0.0]]
    programs = seen.programs
    assert programs > 0  # ran to be compared
    check(fast, model, x)
    assert seen.programs == programs and not tuned
    torch._dynamo.reset()
    again = copy.deepcopy(model)
    check(compiled(again, mode="max-autotune"), again, x)
    assert len(compared) == 1 and seen.programs == programs  # remembered


def test_layers_run_sparse_where_the_whole_graph_is_faster_so(
    seen: Seen, compared: list[list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autosparse_fx.kernels.choice.MARGIN", 1e-6)  # by the estimate all stay dense
    monkeypatch.setattr(inference, "SCALES", (1.0, 0.0, 1e9))
    model, x = made("mlp"), inputs_of("mlp")
    fast = compiled(model, mode="max-autotune")
    check(fast, model, x)
    assert compared == [[1.0, 1e9]]  # with 0.0 there is nothing new to compare
    programs = seen.programs
    check(fast, model, x)
    assert seen.programs > programs


def test_dense_graph_that_was_faster_is_the_one_that_runs(
    seen: Seen, compared: list[list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its weights as constants, although less than half of them are zero."""
    monkeypatch.setattr(inference, "SCALES", (1.0, 0.0))
    model = nn.Sequential(prune(nn.Linear(64, 64)), nn.Linear(64, 256))
    check(compiled(model, mode="max-autotune"), model, torch.randn(40, 64))
    dense, kept = (len(list(graph.buffers())) for graph in seen.graphs[-2:])
    assert compared and dense == kept == 4


def test_dynamic_sizes_are_compiled_while_they_can_be_guarded(seen: Seen, compared: list[list[float]]) -> None:
    model = made("mlp")
    fast = compiled(model, mode="max-autotune", dynamic=True)
    for batch in (2, 3):
        check(fast, model, inputs_of("mlp", batch))
    assert not compared and seen.compilations == 1 and seen.programs > 0


def test_options_and_dtypes_that_count_no_zeros(seen: Seen, compared: list[list[float]]) -> None:
    model = prune(nn.Linear(64, 64))
    model.register_buffer("scale", torch.ones(64, 64).to(torch.float8_e4m3fn))
    forward = compiled(lambda x: model(x) @ model.scale.float(), mode="max-autotune")
    with torch.no_grad():
        forward(torch.randn(40, 64))
    for options in ({}, {"layout_optimization": True}, {}):
        torch._dynamo.reset()
        layer = prune(nn.Linear(64, 64))
        check(compiled(layer, options={"max_autotune": True, **options}), layer, torch.randn(40, 64))
    assert len(compared) == 3  # the last is remembered


def test_nothing_is_compared_without_zeros_or_without_being_asked(seen: Seen, compared: list[list[float]]) -> None:
    for sparsity, arguments in ((0.3, {"mode": "max-autotune"}), (0.9, {})):
        model = made("mlp", sparsity)
        check(compiled(model, **arguments), model, inputs_of("mlp"))
        torch._dynamo.reset()
    assert not compared


@pytest.mark.parametrize("other, expected", [(0.98, 1.0), (0.9, 0.0), (1.1, 1.0)])
def test_the_first_stays_unless_another_is_clearly_faster(
    other: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def taking(seconds: float) -> Callable[..., None]:
        def run(*_: object) -> None:
            now[0] += seconds

        return run

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert choice_tuning._fastest({1.0: taking(1.0), 0.0: taking(other)}, []) == expected
