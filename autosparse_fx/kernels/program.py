"""Programs: what the C++ of ``sparse_program.cpp`` runs, laid out here as one tensor of bytes.

The structures mirror those of the C++, field by field, eight bytes each.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field

import numpy as np
import torch
from torch import Tensor

CACHE_BYTES = 32 * 1024  # of the first-level cache, for the packed channels of a tile
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
        is_direct: read the source where it lies instead of packing it; for 1x1 and sources in the arena.
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
    is_direct: bool = False


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
class _Grid:
    """The columns that a step computes, and where the taps of its kernel lie in the packed planes."""

    is_plain: bool
    pitch: int
    columns: int
    phases: list[tuple[int, int]]
    reach: tuple[int, int]  # rows and columns that taps go beyond a pixel's own

    @staticmethod
    def of(window: Window, kernel: tuple[int, int]) -> "_Grid":
        (height, width), (out_height, out_width) = window.in_size, window.out_size
        is_plain = kernel == (1, 1) and window.stride == (1, 1) and window.padding == (0, 0)
        if is_plain:
            assert (height, width) == (out_height, out_width)
            return _Grid(True, out_width, out_height * out_width, [(0, 0)], (0, 0))
        taps_y = [k * window.dilation[0] for k in range(kernel[0])]
        taps_x = [k * window.dilation[1] for k in range(kernel[1])]
        phases = sorted({(y % window.stride[0], x % window.stride[1]) for y in taps_y for x in taps_x})
        reach = taps_y[-1] // window.stride[0], taps_x[-1] // window.stride[1]
        pitch = out_width + reach[1]
        return _Grid(False, pitch, (out_height - 1) * pitch + out_width, phases, reach)


def _tile_vectors(columns: int, machine: Machine) -> int:
    vectors = -(-columns // machine.vector_length)
    tiles = -(-vectors // machine.most_vectors)
    return -(-vectors // tiles)


class _StepWriter:
    """Lays out one step in a blob."""

    def __init__(self, step: Step, row_stride: int, machine: Machine, tokens: int) -> None:
        self.step, self.machine = step, machine
        rows, group_channels, *kernel = step.weight.shape
        self.rows, self.group_channels, self.kernel = rows, group_channels, (kernel[0], kernel[1])
        self.grid = _Grid.of(step.window, self.kernel)
        columns = tokens or self.grid.columns
        self.vectors = step.vectors or _tile_vectors(columns, machine)
        width = self.vectors * machine.vector_length
        if self.grid.is_plain:
            self.phase_rows, self.phase_stride = 0, 0
            self.channel_stride = width
            if step.is_direct:
                self.channel_stride = row_stride
        else:
            touched = -(-(width + self.grid.pitch - 1) // self.grid.pitch)
            self.phase_rows = touched + self.grid.reach[0]
            self.phase_stride = self.phase_rows * self.grid.pitch
            self.channel_stride = _round_up(
                self.phase_stride * len(self.grid.phases) + self.grid.reach[1], machine.vector_length
            )
        read = width if self.grid.is_plain else self.channel_stride
        fitting = max(1, CACHE_BYTES // (4 * read))
        wanted = min(group_channels, step.block_channels or fitting)
        self.block_channels = -(-group_channels // -(-group_channels // wanted))

    def write(self, blob: _Blob) -> list[int | float]:
        """Append the step's data, and return the fields of the C++ struct."""
        step, window, grid = self.step, self.step.window, self.grid
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
            *window.padding,
            # Where columns and pixels are the same there is nothing to drop.
            window.out_size[1] if grid.is_plain else grid.pitch,
            grid.columns,
            self.vectors,
            int(step.is_direct),
            int(grid.is_plain),
            self.channel_stride,
            self.phase_rows,
            self.phase_stride,
            blob.add(np.array(grid.phases, np.int64)),
            len(grid.phases),
            blob.add(step.bias.numpy().astype(np.float32)),
            blob.add(np.array(blocks, np.int64)),
            len(blocks),
            blob.add(cost),
            self.block_channels,
        ]

    def _blocks(self, blob: _Blob) -> list[list[int]]:
        blocks = []
        rows = self.rows // self.step.groups
        for group in range(self.step.groups):
            weight = self.step.weight[group * rows : (group + 1) * rows]
            base = group * self.group_channels
            for start in range(0, self.group_channels, self.block_channels):
                stop = min(start + self.block_channels, self.group_channels)
                starts, entries = self._entries(weight[:, start:stop], base + start)
                is_first, is_last = start == 0, stop == self.group_channels
                row0 = group * rows
                blocks.append(
                    [row0, row0 + rows, base + start, base + stop, int(is_first), int(is_last)]
                    + [blob.add(starts), blob.add(entries)]
                )
        return blocks

    def _entries(self, weight: Tensor, channel0: int) -> tuple[np.ndarray, np.ndarray]:
        row, channel, y, x = (i.numpy() for i in weight.nonzero(as_tuple=True))
        window, grid = self.step.window, self.grid
        if self.step.is_direct:
            channel = channel + channel0
        y, x = y * window.dilation[0], x * window.dilation[1]
        number = np.zeros((window.stride[0], window.stride[1]), np.int64)
        for index, phase in enumerate(grid.phases):
            number[phase] = index
        phase = number[y % window.stride[0], x % window.stride[1]]
        offset = channel * self.channel_stride + phase * self.phase_stride
        offset = offset + y // window.stride[0] * grid.pitch + x // window.stride[1]
        entries = np.empty(len(row), np.dtype([("offset", np.int32), ("value", np.float32)]))
        entries["offset"], entries["value"] = offset * 4, weight[weight != 0].numpy()
        starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=weight.shape[0]))]).astype(np.int32)
        return starts, entries


def _entries_per_row(weight: Tensor) -> np.ndarray:
    counts: np.ndarray = weight.flatten(1).count_nonzero(1).numpy()
    return counts


def assemble(steps: Sequence[Step], buffers: Sequence[Buffer], machine: Machine, *, is_tokens: bool = False) -> Tensor:
    """Lay out a program for ``machine``.

    Args:
        steps: in the order in which they run.
        buffers: what the numbers in the steps mean.
        machine: what the C++ was compiled for.
        is_tokens: inputs and outputs are ``[tokens, channels]``, worked on in chunks of tokens, and every step is 1x1.

    Returns:
        uint8 ``[bytes]``, all that a run needs besides inputs, outputs and their batch size.
    """
    blob = _Blob()
    header_size = 8 * 6
    blob.add(np.zeros(header_size, np.uint8))
    chunk = machine.most_vectors * machine.vector_length if is_tokens else 0
    strides = [_row_stride(b, machine, chunk) for b in buffers]
    positions, arena_bytes = _place(steps, buffers, strides)
    written = []
    for step in steps:
        fields = _StepWriter(step, strides[step.source], machine, chunk).write(blob)
        written.append(b"".join(np.array([f], np.float64 if isinstance(f, float) else np.int64).tobytes() for f in fields))
    rows = [
        [BUFFER_KINDS.index(b.kind), position, *stride_fields(b, stride, is_tokens), b.channels]
        for b, position, stride in zip(buffers, positions, strides, strict=True)
    ]
    steps_at = blob.add(np.frombuffer(b"".join(written), np.uint8))
    buffers_at = blob.add(np.array(rows, np.int64))
    header = np.array([steps_at, len(steps), buffers_at, arena_bytes, int(is_tokens), chunk], np.int64)
    data = bytearray(b"".join(blob.pieces))
    data[:header_size] = header.tobytes()
    return torch.frombuffer(data, dtype=torch.uint8)


def _row_stride(buffer: Buffer, machine: Machine, chunk: int) -> int:
    if buffer.kind != "arena":
        return buffer.columns
    return chunk or _round_up(buffer.columns, machine.vector_length)


def stride_fields(buffer: Buffer, row_stride: int, is_tokens: bool) -> tuple[int, int, int]:
    """Floats between channels, between columns, and between images (or tokens)."""
    if buffer.kind == "arena":
        return row_stride, 1, 0
    if is_tokens:
        return 1, buffer.channels, buffer.channels
    return row_stride, 1, buffer.channels * buffer.columns


def _place(steps: Sequence[Step], buffers: Sequence[Buffer], strides: Sequence[int]) -> tuple[list[int], int]:
    """Give every buffer of the arena a place that nothing else has while it lives; first fit."""
    lives: dict[int, list[int]] = {}
    for time, step in enumerate(steps):
        for number in (step.source, step.target, step.residual):
            if number >= 0 and buffers[number].kind == "arena":
                lives.setdefault(number, [time, time])[1] = time
    positions = [b.index for b in buffers]
    placed: list[tuple[int, int, list[int]]] = []
    slack = 4096  # a tile's last vectors reach beyond the last row
    for number, life in sorted(lives.items(), key=lambda item: item[1][0]):
        size = _round_up(4 * buffers[number].channels * strides[number], 64) + slack
        at = 0
        for start, stop, other in sorted(placed, key=lambda p: p[:2]):
            if life[0] <= other[1] and other[0] <= life[1] and at < stop and start < at + size:
                at = stop
        positions[number] = at
        placed.append((at, at + size, life))
    return positions, max((stop for _, stop, _ in placed), default=0)


def program_entries(step: Step) -> int:
    """The multiply-adds per column that a step makes: its weights that are not zero."""
    return int(step.weight.count_nonzero())


__all__ = ["ACTIVATIONS", "Buffer", "Machine", "Step", "Window", "assemble", "astuple", "program_entries"]
