"""Programs: what the C++ of ``sparse_program.cpp`` runs, laid out here as one tensor of bytes.

The structures mirror those of the C++, field by field, eight bytes each.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field

import numpy as np
import torch
from torch import Tensor

# For the packed channels of a tile. Taps of a grid are not aligned, which costs more from the second-level cache.
CACHE_BYTES = {"grid": 32 * 1024, "planes": 0} | dict.fromkeys(("plain", "direct", "gathered", "strided"), 64 * 1024)
GATHER_ROWS = 96  # of a weight, from which packing a row per tap pays
MODES = ("plain", "direct", "grid", "gathered", "planes", "strided")
ACTIVATIONS = ("none", "relu", "clamp", "gelu", "gelu_tanh", "silu", "hardswish", "sigmoid")
BUFFER_KINDS = ("arena", "input", "output")
_ALIGNMENT = 64


@dataclass(frozen=True)
class Buffer:
    """A tensor that steps read and write: ``channels`` rows of ``columns`` pixels, or of tokens.

    Attributes:
        kind: "arena" (memory of the program itself), "input" or "output".
        index: which input or output.
        channels, columns: the size for one image; for tokens ``columns`` is not used.
    """

    kind: str
    channels: int
    columns: int
    index: int = 0


@dataclass(frozen=True)
class Window:
    """How a convolution looks at its input: sizes, strides, padding and dilation in (y, x) order."""

    in_size: tuple[int, int]
    out_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Step:
    """``target = activation(convolution(source, weight) + bias + residual)``, with numbers of buffers.

    Attributes:
        weight: ``[rows, channels / groups, height, width]``, float32; its zeros cost nothing.
        bias: ``[rows]``, float32.
        clamp: bounds, of the activation "clamp".
        vectors, block_channels: the tile's width and the channels that are packed at a time; 0 is the default.
        mode: how columns are read, one of MODES; "" is the default.
    """

    source: int
    target: int
    weight: Tensor
    bias: Tensor
    window: Window
    groups: int = 1
    residual: int = -1
    activation: str = "none"
    clamp: tuple[float, float] = (0.0, 0.0)
    vectors: int = 0
    block_channels: int = 0
    mode: str = ""


@dataclass
class _Blob:
    """Bytes that grow, in aligned pieces."""

    pieces: list[bytes] = field(default_factory=list)
    size: int = 0

    def add(self, array: np.ndarray) -> int:
        at = self.size
        data = array.tobytes()
        padding = -len(data) % _ALIGNMENT
        self.pieces.append(data + b"\0" * padding)
        self.size += len(data) + padding
        return at


def _round_up(value: int, to: int) -> int:
    return -(-value // to) * to


@dataclass(frozen=True)
class Machine:
    """What the C++ was compiled for: floats in a vector, and vectors across the widest tile."""

    vector_length: int
    most_vectors: int


@dataclass(frozen=True)
class _Planes:
    """The zero-padded planes that hold one channel, one per phase of the stride, and where taps start in them."""

    phases: list[tuple[int, int]]
    reach: tuple[int, int]  # rows and columns that taps go beyond a pixel's own
    pitch: int
    rows: int

    @property
    def stride(self) -> int:
        return self.rows * self.pitch

    def tap(self, y: int, x: int, window: Window) -> int:
        y, x = y * window.dilation[0], x * window.dilation[1]
        phase = self.phases.index((y % window.stride[0], x % window.stride[1]))
        return phase * self.stride + y // window.stride[0] * self.pitch + x // window.stride[1]

    @staticmethod
    def of(window: Window, kernel: tuple[int, int], touched_rows: int) -> "_Planes":
        """For a tile that touches so many rows of the output."""
        taps_y = [k * window.dilation[0] for k in range(kernel[0])]
        taps_x = [k * window.dilation[1] for k in range(kernel[1])]
        phases = sorted({(y % window.stride[0], x % window.stride[1]) for y in taps_y for x in taps_x})
        reach = taps_y[-1] // window.stride[0], taps_x[-1] // window.stride[1]
        return _Planes(phases, reach, window.out_size[1] + reach[1], touched_rows + reach[0])


def _tile_vectors(columns: int, machine: Machine) -> int:
    vectors = -(-columns // machine.vector_length)
    tiles = -(-vectors // machine.most_vectors)
    return -(-vectors // tiles)


class _StepWriter:
    """Lays out one step in a blob."""

    def __init__(self, step: Step, machine: Machine, tokens: int) -> None:
        self.step, self.window = step, step.window
        self.rows, self.group_channels, *kernel = step.weight.shape
        self.kernel = kernel[0], kernel[1]
        self.mode = step.mode or self._default_mode()
        height, out_width = self.window.out_size
        pitch = _Planes.of(self.window, self.kernel, 1).pitch
        self.pitch = pitch if self.mode in ("grid", "planes") else out_width
        self.columns = (height - 1) * self.pitch + out_width
        self.vectors = step.vectors or _tile_vectors(tokens or self.columns, machine)
        width = self.width = self.vectors * machine.vector_length
        touched = height if self.mode == "planes" else -(-(width + self.pitch - 1) // self.pitch)
        self.planes = _Planes.of(self.window, self.kernel, min(touched, height))
        taps = [self.planes.tap(y, x, self.window) for y in range(self.kernel[0]) for x in range(self.kernel[1])]
        self.taps = taps
        if self.mode in ("grid", "planes"):
            floats = len(self.planes.phases) * self.planes.stride + self.planes.reach[1]
            self.channel_stride = _round_up(floats, machine.vector_length)
        else:
            self.channel_stride = width * len(taps)
        wanted = step.block_channels or max(1, CACHE_BYTES[self.mode] // (4 * self.channel_stride))
        if self.mode == "planes":
            wanted = self.group_channels  # sums between blocks are kept for one tile, and this has several
        # As few blocks as that allows, all of about the same size.
        self.block_channels = -(-self.group_channels // -(-self.group_channels // min(self.group_channels, wanted)))

    def read_tiles(self) -> None:
        """Read the source where it lies, which is in tiles."""
        assert self.mode == "plain"
        self.mode = "direct"

    def _default_mode(self) -> str:
        window = self.window
        if self.kernel == (1, 1) and window.stride == (1, 1) and window.padding == (0, 0):
            return "plain"
        if self.step.groups > 1:
            return "planes"
        if self.kernel == (1, 1) and window.padding == (0, 0):
            return "strided"
        return "gathered" if self.rows >= GATHER_ROWS else "grid"

    def write(self, blob: _Blob, chain: int) -> list[int | float]:
        """Append the step's data, and return the fields of the C++ struct."""
        step, window, planes = self.step, self.window, self.planes
        blocks = self._blocks(blob)
        cost = np.concatenate([[0], np.cumsum(_entries_per_row(step.weight) + 1)]).astype(np.int64)
        return [
            step.source,
            step.target,
            step.residual,
            ACTIVATIONS.index(step.activation),
            *step.clamp,
            self.rows,
            *window.in_size,
            *window.out_size,
            *window.stride,
            self.pitch,
            self.columns,
            self.vectors,
            MODES.index(self.mode),
            self.channel_stride,
            planes.pitch,
            planes.rows,
            planes.stride,
            blob.add(np.array([self._phase(*phase) for phase in planes.phases], np.int64)),
            len(planes.phases),
            blob.add(np.array(self.taps, np.int64)),
            len(self.taps),
            blob.add(step.bias.numpy().astype(np.float32)),
            blob.add(np.array(blocks, np.int64)),
            len(blocks),
            blob.add(cost),
            self.block_channels,
            chain,
        ]

    def _phase(self, y: int, x: int) -> tuple[int, int, int, int]:
        window, width = self.window, self.planes.pitch
        start, step = x - window.padding[1], window.stride[1]
        first = min(width, max(0, -(start // step)))
        stop = min(width, max(first, -((start - window.in_size[1]) // step)))
        return y - window.padding[0], start, first, stop

    def _blocks(self, blob: _Blob) -> list[list[int]]:
        blocks = []
        rows = self.rows // self.step.groups
        for group in range(self.step.groups):
            weight = self.step.weight[group * rows : (group + 1) * rows]
            base = group * self.group_channels
            for start in range(0, self.group_channels, self.block_channels):
                stop = min(start + self.block_channels, self.group_channels)
                starts, entries = self._entries(weight[:, start:stop])
                is_first, is_last = start == 0, stop == self.group_channels
                row0 = group * rows
                rows_and_channels = row0, row0 + rows, base + start, base + stop
                blocks.append([*rows_and_channels, int(is_first), int(is_last), blob.add(starts), blob.add(entries)])
        return blocks

    def _entries(self, weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
        row, channel, y, x = (i.numpy() for i in weight.nonzero(as_tuple=True))
        tap = y * self.kernel[1] + x
        within = np.array(self.taps)[tap] if self.mode in ("grid", "planes") else tap * self.width
        offset = channel * self.channel_stride + within
        entries = np.empty(len(row), np.dtype([("offset", np.int32), ("value", np.float32)]))
        entries["offset"], entries["value"] = offset * 4, weight[weight != 0].numpy()
        starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=weight.shape[0]))]).astype(np.int32)
        return starts, entries


def _entries_per_row(weight: Tensor) -> np.ndarray:
    counts: np.ndarray = weight.flatten(1).count_nonzero(1).numpy()
    return counts


@dataclass(frozen=True)
class Program:
    """Steps laid out for a machine.

    Attributes:
        data: uint8 ``[bytes]``, all that a run needs besides its inputs and outputs.
        any_layout: the numbers of the inputs that may be in the channels-last format.
    """

    data: Tensor
    any_layout: list[int]


def assemble(steps: Sequence[Step], buffers: Sequence[Buffer], machine: Machine, *, is_tokens: bool = False) -> Program:
    """Lay out a program for ``machine``.

    Args:
        steps: in the order in which they run.
        buffers: what the numbers in the steps mean.
        machine: what the C++ was compiled for.
        is_tokens: inputs and outputs are ``[tokens, channels]``, worked on in chunks of tokens, and every step is 1x1.

    Raises:
        ValueError: for a residual in a program of tokens.
    """
    if is_tokens and any(step.residual >= 0 for step in steps):
        raise ValueError("programs of tokens add no residuals")
    blob = _Blob()
    header_size = 8 * 6
    blob.add(np.zeros(header_size, np.uint8))
    chunk = machine.most_vectors * machine.vector_length if is_tokens else 0
    writers = [_StepWriter(step, machine, chunk) for step in steps]
    tiled = _tiled_buffers(writers, buffers)
    for writer in writers:
        if writer.mode == "plain" and writer.step.source in tiled:
            writer.read_tiles()
    chains = _chains(writers)
    local = _local_buffers(steps, chains)
    layouts = [_layout(b, tiled.get(n, 0), n in local, machine, is_tokens) for n, b in enumerate(buffers)]
    positions, arena_bytes = _place(steps, chains, buffers, layouts)
    written = []
    for writer, chain in zip(writers, chains, strict=True):
        written.append(b"".join(map(_eight_bytes, writer.write(blob, chain))))
    rows = [
        [BUFFER_KINDS.index(b.kind), position, *astuple(layout)[:5]]
        for b, position, layout in zip(buffers, positions, layouts, strict=True)
    ]
    steps_at = blob.add(np.frombuffer(b"".join(written), np.uint8))
    buffers_at = blob.add(np.array(rows, np.int64))
    header = np.array([steps_at, len(steps), buffers_at, arena_bytes, int(is_tokens), chunk], np.int64)
    data = bytearray(b"".join(blob.pieces))
    data[:header_size] = header.tobytes()
    return Program(torch.frombuffer(data, dtype=torch.uint8), _read_in_any_layout(writers, buffers))


def _eight_bytes(number: int | float) -> bytes:
    return np.array([number], np.float64 if isinstance(number, float) else np.int64).tobytes()


def _read_in_any_layout(writers: Sequence[_StepWriter], buffers: Sequence[Buffer]) -> list[int]:
    strict = {w.step.source for w in writers if w.mode not in ("plain", "strided")} | {w.step.residual for w in writers}
    return [b.index for number, b in enumerate(buffers) if b.kind == "input" and number not in strict]


def _tiled_buffers(writers: Sequence[_StepWriter], buffers: Sequence[Buffer]) -> dict[int, int]:
    """The buffers that can hold tile after tile, with the width of those tiles.

    That is how 1x1 layers like their source; everyone else who touches the buffer must have the same tiles.
    """
    uses: dict[int, set[tuple[int, bool]]] = {}
    for writer in writers:
        step, width = writer.step, writer.width
        if writer.mode != "strided":
            uses.setdefault(step.source, set()).add((width, writer.mode == "plain"))
        for number in (step.target, step.residual):
            uses.setdefault(number, set()).add((width, writer.mode not in ("grid", "planes")))
    return {
        number: next(iter(widths))[0]
        for number, widths in uses.items()
        if number >= 0 and buffers[number].kind == "arena" and len(widths) == 1 and next(iter(widths))[1]
    }


def _chains(writers: Sequence[_StepWriter]) -> list[int]:
    """For each step how many, itself included, can be worked on tile by tile: each reads in tiles the one before."""
    chains = [1] * len(writers)
    for number in range(len(writers) - 2, -1, -1):
        after = writers[number + 1]
        if after.mode == "direct" and after.step.source == writers[number].step.target:
            chains[number] += chains[number + 1]
    return chains


@dataclass(frozen=True)
class _Layout:
    """Floats between channels, between columns, and between images (or tokens); what tiles are apart besides their
    width, and where one thread works on the whole image; and all of an image.
    """

    row_stride: int
    column_stride: int
    unit_stride: int
    tile_step: int
    alone_tile_step: int
    floats: int


def _layout(buffer: Buffer, tile_width: int, is_local: bool, machine: Machine, is_tokens: bool) -> _Layout:
    if tile_width:
        columns = machine.most_vectors * machine.vector_length if is_tokens else buffer.columns
        tiles = -(-columns // tile_width)
        step = tile_width * (buffer.channels - 1)
        return _Layout(tile_width, 1, 0, step, -tile_width if is_local else step, tiles * (tile_width + step))
    if is_tokens:
        assert buffer.kind != "arena"
        return _Layout(1, buffer.channels, buffer.channels, 0, 0, 0)
    stride = buffer.columns if buffer.kind != "arena" else _round_up(buffer.columns, machine.vector_length)
    return _Layout(stride, 1, buffer.channels * stride, 0, 0, buffer.channels * stride)


def _local_buffers(steps: Sequence[Step], chains: Sequence[int]) -> set[int]:
    """The buffers whose tiles only the next step of a chain reads."""
    readers: dict[int, list[int]] = {}
    for number, step in enumerate(steps):
        for buffer in (step.source, step.residual):
            readers.setdefault(buffer, []).append(number)
    return {
        step.target
        for number, step in enumerate(steps)
        if chains[number] > 1 and readers.get(step.target) == [number + 1]
    }


def _place(
    steps: Sequence[Step], chains: Sequence[int], buffers: Sequence[Buffer], layouts: Sequence[_Layout]
) -> tuple[list[int], int]:
    """Give every buffer of the arena a place that nothing else has while it lives; first fit."""
    times = [0]
    for chain in chains[:-1]:
        times.append(times[-1] + (chain == 1))  # the steps of a chain take turns
    uses: dict[int, list[int]] = {}
    for time, step in zip(times, steps, strict=True):
        for number in (step.source, step.target, step.residual):
            if number >= 0 and buffers[number].kind == "arena":
                uses.setdefault(number, []).append(time)
    same = _in_place(steps, times, uses, layouts)
    lives: dict[int, tuple[int, int]] = {}
    for number, when in uses.items():
        first, last = lives.get(same.get(number, number), (when[0], 0))
        lives[same.get(number, number)] = min(first, when[0]), max(last, when[-1])
    positions = [b.index for b in buffers]
    placed: list[tuple[int, int, tuple[int, int]]] = []
    slack = 4096  # a tile's last vectors reach beyond the last row
    for number, life in sorted(lives.items(), key=lambda item: item[1]):
        size = _round_up(4 * layouts[number].floats, 64) + slack
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
    steps: Sequence[Step], times: Sequence[int], uses: dict[int, list[int]], layouts: Sequence[_Layout]
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
