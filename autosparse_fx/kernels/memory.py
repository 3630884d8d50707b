"""Where a program keeps what its steps hand to each other."""

from collections.abc import Sequence
from dataclasses import dataclass

from autosparse_fx.kernels.chains import Chain
from autosparse_fx.kernels.step_writer import StepWriter
from autosparse_fx.kernels.steps import Buffer, Machine, Step, round_up

SLACK = 4096  # bytes behind a buffer: a tile's last vectors reach beyond the last row


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
    tokens: int,
    images: int = 1,
    side_by_side: bool = False,
) -> Layout:
    if tokens and not tile_width:
        unit_stride = 0 if buffer.kind == "arena" else buffer.channels
        return Layout(1, buffer.channels, unit_stride, 0, 0, tokens * buffer.channels)
    if buffer.kind != "arena":
        return Layout(buffer.columns, 1, buffer.channels * buffer.columns, 0, 0, 0)
    columns = tokens or buffer.columns
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
    for number, life in sorted(lives.items(), key=lambda item: item[1]):
        size = round_up(4 * layouts[number].floats, 64) + SLACK
        at = 0
        for start, stop, other in sorted(placed):
            if life[0] <= other[1] and other[0] <= life[1] and at < stop and start < at + size:
                at = stop
        positions[number] = at
        placed.append((at, at + size, life))
    for number, owner in same.items():
        positions[number] = positions[owner]
    return positions, max((stop for _, stop, _ in placed), default=0)


def place_rings(
    steps: Sequence[Step], chains: Sequence[Chain], buffers: Sequence[Buffer], layouts: Sequence[Layout]
) -> tuple[list[int], int]:
    """Give the rings of each chain places of their own, in memory that each thread has one of."""
    positions, most = [0] * len(buffers), 0
    for chain in chains:
        at = 0
        for step in steps[chain.first : chain.first + chain.length - 1]:
            if ring := layouts[step.target].ring:
                positions[step.target] = at
                at += round_up(4 * ring * buffers[step.target].channels, 64) + SLACK
        most = max(most, at)
    return positions, most


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
