"""Autotuning: how each step of a program is laid out, measured in the program itself on this machine.

A step can be laid out in several ways (``Layout`` of ``steps.py``), and which is fastest depends on caches that it
shares with its neighbours. So whole programs are timed, step by step, with one layout for all steps; then every step
gets the one that it was fastest with, among those of one tile width for all steps on images of one size, because only
steps with equal tiles hand them to each other in the cache. What comes out has to beat the default.

What was found is remembered (see ``store.py``).
"""

import hashlib
import itertools
import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor

from autosparse_fx.kernels.library import KernelLibrary
from autosparse_fx.kernels.program import Program, assemble
from autosparse_fx.kernels.steps import Buffer, Layout, Step
from autosparse_fx.kernels.store import remembered

log = logging.getLogger(__name__)

RUNS, ROUNDS = 8, 7  # of each candidate; of the comparison with the default
WIDTHS = (4, 6, 8, 12, 16)  # vectors across a tile, at most
BLOCKS = (0.5, 1.0, 2.0)  # channels that are packed at a time, relative to the default


@dataclass(frozen=True)
class Task:
    """A program to be tuned: the arguments of :func:`~autosparse_fx.kernels.program.assemble`, and the batch size."""

    steps: Sequence[Step]
    buffers: Sequence[Buffer]
    batch: int
    images: int
    is_tokens: bool
    tokens: int = 0

    def assemble(self, kernels: KernelLibrary, layouts: Sequence[Layout]) -> Program:
        steps = [replace(step, layout=layout) for step, layout in zip(self.steps, layouts, strict=True)]
        return assemble(
            steps, self.buffers, kernels.machine, is_tokens=self.is_tokens, images=self.images, tokens=self.tokens
        )


def tuned_layouts(task: Task, kernels: KernelLibrary) -> list[Layout]:
    """Return the layouts of the steps that are fastest here."""
    found = remembered("layouts", _key(task, kernels), lambda: [astuple(layout) for layout in _tune(task, kernels)])
    return [Layout(*values) for values in found]


def _tune(task: Task, kernels: KernelLibrary) -> list[Layout]:
    start = time.perf_counter()
    clock = _Clock(task, kernels)
    default = [Layout()] * len(task.steps)
    best: list[dict[int, tuple[float, Layout]]] = [{} for _ in task.steps]  # of each step, by width
    for is_coded, share, width in itertools.product((False, True), BLOCKS, WIDTHS):
        if is_coded and not kernels.machine.runs_code:
            continue
        layout = Layout(is_coded, width, share)
        if is_coded or width <= kernels.machine.most_vectors:  # wider tiles need machine code, and are not made without
            seconds = clock.seconds(task.assemble(kernels, [layout] * len(task.steps)))
        for fastest, taken in zip(best, seconds.tolist(), strict=True):
            if width not in fastest or taken < fastest[width][0]:
                fastest[width] = taken, layout
    chosen = list(default)
    for size in {step.window.out_size for step in task.steps}:
        members = [number for number, step in enumerate(task.steps) if step.window.out_size == size]
        width = min(WIDTHS, key=lambda w: sum(best[number][w][0] for number in members))
        for number in members:
            chosen[number] = best[number][width][1]
    programs = [task.assemble(kernels, layouts) for layouts in (default, chosen)]
    rounds = [[clock.seconds(program).sum().item() for program in programs] for _ in range(ROUNDS)]
    before, after = (statistics.median(times) for times in zip(*rounds, strict=True))
    log.info(
        "a sparse program of %d steps takes %.3f ms by default, and %.3f ms tuned in %.1f s",
        *(len(task.steps), 1000 * before, 1000 * after, time.perf_counter() - start),
    )
    return chosen if after < before else default


class _Clock:
    """Runs programs of one task on random inputs."""

    def __init__(self, task: Task, kernels: KernelLibrary) -> None:
        self._kernels = kernels
        self._steps = len(task.steps)
        self._inputs, self._outputs = (self._tensors(task, kind) for kind in ("input", "output"))

    @staticmethod
    def _tensors(task: Task, kind: str) -> list[Tensor]:
        buffers = sorted((b for b in task.buffers if b.kind == kind), key=lambda b: b.index)
        columns = [[] if task.is_tokens else [b.columns] for b in buffers]
        shapes = [(task.batch, b.channels, *size) for b, size in zip(buffers, columns, strict=True)]
        generator = torch.Generator()  # of its own: only the first run on a machine measures, and all draw the same
        return [torch.randn(shape, dtype=torch.float32, generator=generator) for shape in shapes]

    def seconds(self, program: Program) -> Tensor:
        """What each step takes, float64 ``[steps]``: the medians of several runs."""
        taken = torch.zeros(RUNS + 1, self._steps, dtype=torch.float64)
        for seconds in taken:
            self._kernels.run(program.data, self._inputs, self._outputs, seconds)
        return taken[1:].median(0).values


def _key(task: Task, kernels: KernelLibrary) -> bytes:
    """What the fastest layouts depend on, besides the machine: how many weights are zero, and not which.

    So the blocks of a transformer are tuned once, and so is a network whose training goes on.
    """
    sizes = (kernels.machine, WIDTHS, BLOCKS, task.batch, task.images, task.is_tokens, task.tokens, task.buffers)
    found = hashlib.sha256(repr(sizes).encode())
    for step in task.steps:
        links = (step.source, step.target, step.residual, step.groups, step.activation, step.window, step.weight.shape)
        found.update(repr(links).encode())
        found.update(f"{step.weight.count_nonzero() / max(1, step.weight.numel()):.2f}".encode())
    return found.digest()
