"""Where a program keeps what its steps hand to each other, and which of them take turns tile by tile."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from autosparse_fx.kernels.step_writer import StepWriter
from autosparse_fx.kernels.steps import Buffer, Machine, Step, round_up

STAYS = 512 * 1024  # bytes that a thread may find again in its second-level cache when the next step asks for them


def tiled_buffers(writers: Sequence[StepWriter], buffers: Sequence[Buffer]) -> dict[int, int]:
    """The buffers that can hold tile after tile, with the width of those tiles.

    That is how 1x1 layers like their source; everyone else who touches the buffer must have the same tiles.
    """
    uses: dict[int, set[tuple[int, int, bool]]] = {}
    for writer in writers:
        step, tiles = writer.step, (writer.width, writer.images)
        if not writer.picks_pixels:
            uses.setdefault(step.source, set()).add((*tiles, writer.mode == "plain"))
        for number in (step.target, step.residual):
            uses.setdefault(number, set()).add((*tiles, True))
    return {
        number: next(iter(widths))[0]
        for number, widths in uses.items()
        if number >= 0 and buffers[number].kind == "arena" and len(widths) == 1 and next(iter(widths))[-1]
    }


def images_in_buffers(writers: Sequence[StepWriter]) -> dict[int, tuple[int, bool]]:
    """How many images each buffer of the arena holds, and whether their columns are side by side.

    Where they are not, steps that take one image at a time write what steps that take several read.
    """
    images: dict[int, tuple[int, bool]] = {}
    for writer in writers:
        step = writer.step
        images[step.target] = max(1, writer.images), writer.images > 0
        for number in (step.source, step.residual):
            if number in images:
                images[number] = max(images[number][0], writer.images), images[number][1]
    return images


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


@dataclass(frozen=True)
class Layout:
    """Floats between channels, between columns, and between images (or tokens), and what tiles are apart besides their
    width; the columns of a ring, or 0; and all floats of an image.
    """

    row_stride: int
    column_stride: int
    unit_stride: int
    tile_step: int
    ring: int
    floats: int


def layout_of(
    buffer: Buffer,
    tile_width: int,
    ring: int,
    machine: Machine,
    is_tokens: bool,
    images: int = 1,
    side_by_side: bool = False,
) -> Layout:
    if is_tokens and not tile_width:
        assert buffer.kind != "arena"
        return Layout(1, buffer.channels, buffer.channels, 0, 0, 0)
    if buffer.kind != "arena":
        return Layout(buffer.columns, 1, buffer.channels * buffer.columns, 0, 0, 0)
    columns = machine.most_vectors * machine.vector_length if is_tokens else buffer.columns
    if side_by_side:
        columns *= images
    row_stride = tile_width or round_up(columns, machine.vector_length)
    floats = max(-(-columns // row_stride) * row_stride, ring) * buffer.channels  # of all columns
    step = row_stride * (buffer.channels - 1) if tile_width else 0
    if side_by_side:
        return Layout(row_stride, 1, buffer.columns, step, ring, floats)
    return Layout(row_stride, 1, floats if images > 1 else 0, step, ring, images * floats)


def place(
    steps: Sequence[Step],
    chains: Sequence[Chain],
    buffers: Sequence[Buffer],
    layouts: Sequence[Layout],
    joint_from: int,
) -> tuple[list[int], int]:
    """Give every buffer of the arena a place that nothing else has while it lives; first fit.

    The steps before ``joint_from`` run once per image: what they leave for those behind lives from their first on.
    """
    times = [time for time, chain in enumerate(chains) for _ in range(chain.length)]
    joint_time = times[joint_from] if joint_from < len(steps) else times[-1] + 1
    uses: dict[int, list[int]] = {}
    for time, step in zip(times, steps, strict=True):
        for number in (step.source, step.target, step.residual):
            if number >= 0 and buffers[number].kind == "arena":
                uses.setdefault(number, []).append(time)
    same = _in_place(steps, times, uses, layouts)
    lives: dict[int, tuple[int, int]] = {}
    for number, when in uses.items():
        first, last = lives.get(same.get(number, number), (when[0], 0))
        is_left = when[0] < joint_time <= when[-1]
        lives[same.get(number, number)] = min(first, 0 if is_left else when[0]), max(last, when[-1])
    positions = [b.index for b in buffers]
    placed: list[tuple[int, int, tuple[int, int]]] = []
    slack = 4096  # a tile's last vectors reach beyond the last row
    for number, life in sorted(lives.items(), key=lambda item: item[1]):
        size = round_up(4 * layouts[number].floats, 64) + slack
        at = 0
        for start, stop, other in sorted(placed):
            if life[0] <= other[1] and other[0] <= life[1] and at < stop and start < at + size:
                at = stop
        positions[number] = at
        placed.append((at, at + size, life))
    for number, owner in same.items():
        positions[number] = positions[owner]
    return positions, max((stop for _, stop, _ in placed), default=0)


def _in_place(
    steps: Sequence[Step], times: Sequence[int], uses: dict[int, list[int]], layouts: Sequence[Layout]
) -> dict[int, int]:
    """The targets that may overwrite the residual that is added to them, with the buffer that holds both.

    That is a third less traffic, and half the memory to keep in a cache. Both must be in the same tiles, and this must
    be the last use of the residual.
    """
    same: dict[int, int] = {}
    for time, step in zip(times, steps, strict=True):
        residual, target = step.residual, step.target
        if residual in uses and target in uses and residual != step.source:
            is_tiled = layouts[residual].tile_step > 0 and layouts[residual] == layouts[target]
            is_last = uses[residual][-1] == time and uses[residual].count(time) == 1
            if is_tiled and is_last:
                same[target] = same.get(residual, residual)
    return same
