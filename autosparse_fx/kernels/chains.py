"""Which steps of a program take turns tile by tile, so that the next finds in the cache what one leaves."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from autosparse_fx.kernels.step_writer import StepWriter
from autosparse_fx.kernels.steps import Buffer

STAYS = 512 * 1024  # bytes that a thread may find again in its second-level cache when the next step asks for them


@dataclass(frozen=True)
class Chain:
    """Steps in a row that are worked on tile by tile, each reading the one before.

    Attributes:
        first, length: which steps.
        window: the number of the one that reads other tiles than its own, so that those before it are ahead; or -1.
        reads: int64 ``[tiles, 2]``, which tiles of the step before it each of its own reads: from, and to before.
    """

    first: int
    length: int
    window: int = -1
    reads: np.ndarray | None = None


def find_chains(writers: Sequence[StepWriter], buffers: Sequence[Buffer]) -> list[Chain]:
    """Which steps take turns.

    Where one looks through a window at what those before it leave, threads share its tiles, and each computes all that
    its own read. So nobody else may read that, and no second one may stand in the same chain.
    """
    readers = _readers(writers, buffers)
    links = [""] + [_link(before, after) for before, after in itertools.pairwise(writers)] + [""]
    handed = [0, *(buffers[w.step.target].channels * buffers[w.step.target].columns for w in writers)]
    for number, link in enumerate(links):
        if link == "window" and (4 * handed[number] < STAYS or readers[writers[number - 1].step.target] != [number]):
            links[number] = ""
    chains, chain, is_ours = [], Chain(0, 1), True
    for number in range(1, len(writers)):
        is_ours = is_ours and readers[writers[number - 1].step.target] == [number]
        may_look = is_ours and chain.window < 0
        looks_next = links[number + 1] == "window" and handed[number + 1] > handed[number]
        if links[number] == "window" and may_look:
            reads = _read_tiles(writers[number - 1], writers[number])
            chain = Chain(chain.first, chain.length + 1, number, reads)
        elif links[number] == "direct" and (may_look or not looks_next):
            chain = replace(chain, length=chain.length + 1)
        else:
            chains.append(chain)
            chain, is_ours = Chain(number, 1), True
    return [*chains, chain]


def _readers(writers: Sequence[StepWriter], buffers: Sequence[Buffer]) -> list[list[int]]:
    """The steps that read each buffer; -1 for whoever reads the outputs."""
    readers: list[list[int]] = [[-1] if buffer.kind == "output" else [] for buffer in buffers]
    for number, writer in enumerate(writers):
        for buffer in (writer.step.source, writer.step.residual):
            if buffer >= 0:
                readers[buffer].append(number)
    return readers


def _link(before: StepWriter, after: StepWriter) -> str:
    """How a step reads the one before it: "direct" in the same tiles, through a "window", or not so that they chain."""
    if after.step.source != before.step.target:
        return ""
    if after.mode in ("direct", "plain"):
        return "direct" if after.mode == "direct" else ""
    return "" if before.images or after.images else "window"


def _read_tiles(before: StepWriter, after: StepWriter) -> np.ndarray:
    (height, width), stride = after.window.in_size, after.window.stride[0]
    away = after.packing.picks[:, 0]
    first = np.arange(0, after.columns, after.width)
    last = np.minimum(first + after.width, after.columns) - 1 + after.packing.more_columns
    top = np.clip(first // after.window.out_size[1] * stride + away.min(), 0, height - 1)
    bottom = np.clip(last // after.window.out_size[1] * stride + away.max(), 0, height - 1)
    return np.stack([top * width // before.width, -(-(bottom + 1) * width // before.width)], 1)


def ring_columns(writers: Sequence[StepWriter], buffers: Sequence[Buffer], chains: Sequence[Chain]) -> dict[int, int]:
    """The buffers that only their chain uses, with the columns that it needs at a time."""
    readers, rings = _readers(writers, buffers), {}
    for chain in chains:
        for number in range(chain.first, chain.first + chain.length - 1):
            writer, tiles = writers[number], 1
            if chain.window == number + 1 and chain.reads is not None:
                tiles = int((chain.reads[:, 1] - chain.reads[:, 0]).max())
            if readers[writer.step.target] == [number + 1]:
                rings[writer.step.target] = tiles * writer.width
    return rings
