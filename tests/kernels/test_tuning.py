"""Layouts of steps: all compute the same, the fastest is measured once per machine, and has to beat the default."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernels.compare import Net, assert_close, machine, run_guarded

from autosparse_fx._compat import inductor
from autosparse_fx.kernels import tuning
from autosparse_fx.kernels.library import library
from autosparse_fx.kernels.program import assemble
from autosparse_fx.kernels.step_writer import StepWriter
from autosparse_fx.kernels.steps import Buffer, Layout
from autosparse_fx.kernels.tuning import Task, tuned_layouts


def net(is_tokens: bool) -> Net:
    made = Net(is_tokens=is_tokens)
    if is_tokens:
        made.layer(made.layer(made.input(24, 1), 40, activation="gelu"), 16)
        return made
    first = made.layer(made.input(12, 9), 40, 3, padding=1, activation="relu")
    made.layer(made.layer(first, 100, 3, padding=1), 30, residual=-1)
    return made


def task(made: Net, batch: int) -> Task:
    last = len(made.sizes) - 1
    kinds = {0: "input", last: "output"}
    buffers = [
        Buffer(kinds.get(n, "arena"), channels, 0 if made.is_tokens else size[0] * size[1])
        for n, (channels, size) in enumerate(made.sizes)
    ]
    return Task(made.steps, buffers, batch, 2, made.is_tokens)


@pytest.mark.parametrize("is_tokens", [False, True])
def test_all_layouts_compute_the_same(is_tokens: bool) -> None:
    made = net(is_tokens)
    work = task(made, batch=300 if is_tokens else 5)
    inputs, outputs = made.random_inputs(work.batch), [len(made.sizes) - 1]
    expected = made.expected(inputs, outputs)
    coded = (False, True) if machine().runs_code else (False,)
    for layout in itertools.starmap(Layout, itertools.product(coded, tuning.WIDTHS, tuning.BLOCKS)):
        program = work.assemble(library(), [layout] * len(made.steps))
        shapes = [made.shape(number, work.batch) for number in outputs]
        for found, wanted in zip(run_guarded(program, inputs, shapes), expected, strict=True):
            assert_close(found, wanted)


def test_a_layout_is_what_it_says() -> None:
    step = replace(net(False).steps[1], layout=Layout(False, 4, 0.5))
    whole, half = (StepWriter(replace(step, layout=Layout(False, 4, share)), machine()) for share in (1.0, 0.5))
    assert not half.is_coded and half.vectors == whole.vectors <= 4
    assert half.block_channels < whole.block_channels


def test_every_step_is_timed() -> None:
    work = task(net(False), batch=4)
    program = work.assemble(library(), [Layout()] * len(work.steps))
    x, y = torch.randn(4, 12, 81), torch.empty(4, 30, 81)
    seconds = torch.zeros(len(work.steps), dtype=torch.float64)
    library().run(program.data, [x], [y], seconds)
    assert (seconds > 0).all()


def test_what_was_measured_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(inductor, "inductor_cache_dir", lambda: tmp_path)
    work, random = task(net(False), batch=4), torch.get_rng_state()
    found = tuned_layouts(work, library())
    assert torch.equal(torch.get_rng_state(), random)  # as where it is remembered
    assert len(found) == len(work.steps) and all(isinstance(layout, Layout) for layout in found)

    def again(*_: object) -> list[Layout]:
        raise AssertionError("measured again")

    monkeypatch.setattr(tuning, "_tune", again)
    assert tuned_layouts(work, library()) == found
    alike = [replace(step, weight=step.weight.roll(1, 0)) for step in work.steps]
    assert tuned_layouts(replace(work, steps=alike), library()) == found
    denser = [replace(step, weight=torch.ones_like(step.weight)) for step in work.steps]
    for other in (
        replace(work, batch=5),
        replace(work, steps=[work.steps[0], work.steps[2], work.steps[1]]),
        replace(work, steps=denser),
    ):
        with pytest.raises(AssertionError, match="measured again"):
            tuned_layouts(other, library())


def test_layouts_that_are_slower_than_the_default_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    work = task(net(False), batch=4)
    default = assemble(work.steps, work.buffers, machine(), images=work.images).data.numel()

    def seconds(_: object, program: object) -> torch.Tensor:
        is_default = program.data.numel() == default  # type: ignore[attr-defined]
        return torch.full((len(work.steps),), 1.0 if is_default else 2.0, dtype=torch.float64)

    monkeypatch.setattr(tuning._Clock, "seconds", seconds)
    assert tuning._tune(work, library()) == [Layout()] * len(work.steps)
