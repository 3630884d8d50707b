"""Lays out one step: how it reads its source, and its weights that are not zero, in blocks of channels."""

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from autosparse_fx.kernels.machine_code import MOST_ROWS, gains, group_code
from autosparse_fx.kernels.packing import gathered, grid
from autosparse_fx.kernels.steps import ACTIVATIONS, JOINT_COLUMNS, MODES, Machine, Step

# For the packed channels of a tile. Taps of a grid are not aligned, which costs more from the second-level cache.
CACHE_BYTES = {"grid": 32 * 1024} | dict.fromkeys(("plain", "direct", "gathered", "depthwise"), 64 * 1024)
GATHER_ROWS = 96  # of a weight, from which packing a row per tap pays whatever the width of the image
CODE_TILE = 16
OFFSETS = 2**16  # floats of packed channels that the offset of an entry reaches
CODE_ENTRIES = 1000  # of a group of rows in a block, so that its instructions stay in the cache
_ALIGNMENT = 64


@dataclass
class Blob:
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


def _tile_vectors(columns: int, machine: Machine, most: int, out_width: int = 0) -> int:
    """As few tiles as there can be, all of about the same width; or of whole rows of an image, which windows like."""
    vectors = -(-columns // machine.vector_length)
    tiles = -(-vectors // most)
    if out_width and tiles > 1:
        for whole in range(most, most * 3 // 4, -1):
            if whole * machine.vector_length % out_width == 0 and vectors % whole == 0:
                return whole
    return -(-vectors // tiles)


class StepWriter:
    """Lays out one step in a blob.

    Args:
        tokens: the most that are worked on at a time, or 0 for images.
        images: the most that are worked on side by side, or 0 where each is worked on by itself.
        is_narrow: its tiles are no wider than those of steps without machine code.
    """

    def __init__(
        self, step: Step, machine: Machine, tokens: int = 0, images: int = 0, *, is_narrow: bool = False
    ) -> None:
        self.machine, self.tokens, self.images = machine, tokens, images
        self.step, self.window = step, step.window
        self.rows, self.group_channels, *kernel = step.weight.shape
        self.kernel = kernel[0], kernel[1]
        height, out_width = self.window.out_size
        self.columns = height * out_width
        self.depth = self.group_channels * self.kernel[0] * self.kernel[1]
        self.density = float(step.weight.count_nonzero()) / max(1, step.weight.numel())
        columns = tokens or self.columns * max(1, images)
        narrow = _tile_vectors(columns, machine, machine.most_vectors)
        layout = step.layout
        by_code = gains(self.density, self.depth, narrow) if layout.is_coded is None else layout.is_coded
        may_be_coded = machine.runs_code and by_code
        widest = CODE_TILE if may_be_coded and not tokens else machine.most_vectors
        if not may_be_coded:
            widest = max(1, min(widest, OFFSETS // (math.prod(kernel) * machine.vector_length)))
        self.mode = step.mode or self._default_mode(widest * machine.vector_length)
        self.is_coded = may_be_coded and self.mode != "depthwise"
        if self.mode == "depthwise":
            widest = machine.most_vectors
        most = min(widest, layout.most_vectors or (machine.most_vectors if is_narrow else widest))
        rows = out_width if most == machine.most_vectors and not tokens and not images else 0
        self.vectors = step.vectors or _tile_vectors(columns, machine, most, rows)
        width = self.width = self.vectors * machine.vector_length
        if self.mode == "grid":
            self.packing = grid(self.window, self.kernel, width, machine.vector_length)
        else:
            self.packing = gathered(self.window, self.kernel, width)
        wanted = step.block_channels or max(1, round(layout.block_share * self._default_block_channels()))
        if not self.is_coded and self.mode != "depthwise":
            if self.packing.floats > OFFSETS:
                raise ValueError(f"a window of {' x '.join(map(str, kernel))} is too large for sparse kernels")
            wanted = min(wanted, OFFSETS // self.packing.floats)
        # As few blocks as that allows, all of about the same size.
        self.block_channels = -(-self.group_channels // -(-self.group_channels // min(self.group_channels, wanted)))

    def narrowed(self) -> "StepWriter":
        """The same step with narrow tiles."""
        return StepWriter(self.step, self.machine, self.tokens, self.images, is_narrow=True)

    @property
    def may_be_joint(self) -> bool:
        """Whether images can and should be worked on side by side: theirs alone would fill few vectors."""
        return self.columns <= JOINT_COLUMNS and self.mode in ("plain", "gathered", "depthwise")

    @property
    def picks_pixels(self) -> bool:
        """Whether the pixels that are read are single ones of any layout, and of any tiles."""
        return self.mode == "gathered" and self.kernel == (1, 1)

    @property
    def reads_any_layout(self) -> bool:
        """Whether the source may be in the channels-last format."""
        return self.mode == "plain" or self.picks_pixels

    def read_tiles(self) -> None:
        """Read the source where it lies, which is in tiles."""
        assert self.mode == "plain"
        self.mode = "direct"

    def _default_mode(self, width: int) -> str:
        """How the source is read by a tile of ``width`` columns."""
        window, groups = self.window, self.step.groups
        if self.kernel == (1, 1) and window.stride == (1, 1) and window.padding == (0, 0):
            return "plain"
        if groups > 1 and self.group_channels == 1:
            return "depthwise"
        if groups == 1 and (self.rows >= GATHER_ROWS or self.kernel == (1, 1)):
            return "gathered"
        # In a grid is all that lies between the taps: of images wider than the tile most of it is read by none, and of
        # images side by side it is the next one's.
        packed = grid(window, self.kernel, width, self.machine.vector_length)
        return "gathered" if self.images or packed.floats > gathered(window, self.kernel, width).floats else "grid"

    def _default_block_channels(self) -> int:
        if self.is_coded:
            entries_per_channel = MOST_ROWS * self.density * len(self.packing.offsets)
            return max(1, round(CODE_ENTRIES / max(1.0, entries_per_channel)))
        return max(1, CACHE_BYTES[self.mode] // (4 * self.packing.floats))

    def write(self, blob: Blob) -> list[int | float]:
        """Append the step's data, and return the fields of the C++ struct, but for those about its chain."""
        step, window, packing = self.step, self.window, self.packing
        blocks = [] if self.mode == "depthwise" else self._blocks(blob)
        cost = np.concatenate([[0], np.cumsum(_entries_per_row(step.weight) + 1)]).astype(np.int64)
        if self.is_coded:  # threads share rows by whole groups: where the cost jumps
            starts = np.array([start for start, _ in self._groups()])
            cost[:-1] = cost[starts[np.searchsorted(starts, np.arange(self.rows), "right") - 1]]
        return [
            step.source,
            step.target,
            step.residual,
            ACTIVATIONS.index(step.activation),
            *step.constants,
            self.rows,
            *window.in_size,
            *window.out_size,
            *window.stride,
            self.columns,
            self.vectors,
            MODES[self.mode],
            packing.floats,
            blob.add(packing.picks.astype(np.int64)),
            len(packing.picks),
            packing.row_floats,
            packing.more_columns,
            blob.add(step.bias.numpy().astype(np.float32)),
            blob.add(step.weight.numpy()) if self.mode == "depthwise" else 0,
            self.rows // step.groups,
            blob.add(np.array(blocks, np.int64)),
            len(blocks),
            blob.add(cost),
            self.block_channels,
            int(self.images > 0),
        ]

    def _blocks(self, blob: Blob) -> list[list[int]]:
        blocks = []
        rows = self.rows // self.step.groups
        for group in range(self.step.groups):
            weight = self.step.weight[group * rows : (group + 1) * rows]
            base = group * self.group_channels
            for start in range(0, self.group_channels, self.block_channels):
                stop = min(start + self.block_channels, self.group_channels)
                is_first, is_last = start == 0, stop == self.group_channels
                row0 = group * rows
                positions = self._pattern(blob, weight[:, start:stop], row0, is_first)
                blocks.append([row0, row0 + rows, base + start, base + stop, int(is_first), int(is_last), *positions])
        return blocks

    def _pattern(self, blob: Blob, weight: Tensor, row0: int, is_first: bool) -> tuple[int, int, int, int, int]:
        """The last fields of a block: where its pattern is."""
        row, channel, y, x = (i.numpy() for i in weight.nonzero(as_tuple=True))
        tap = y * self.kernel[1] + x
        offset, value = channel * self.packing.floats + self.packing.offsets[tap], weight[weight != 0].numpy()
        starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=weight.shape[0]))])
        if not self.is_coded:
            return blob.add(starts.astype(np.int32)), blob.add(offset.astype(np.uint16)), blob.add(value), 0, 0
        groups = []
        for first, stop in self._groups():
            if not row0 <= first < row0 + len(weight):
                continue
            mine = np.arange(starts[first - row0], starts[stop - row0])
            mine = mine[np.argsort(offset[mine], kind="stable")]
            at, stride = 4 * offset[mine], 4 * self.width  # in bytes
            code = group_code(row[mine] - (first - row0), at, stop - first, stride, is_first=is_first)
            groups.append([first, stop, blob.add(np.frombuffer(code, np.uint8)), blob.add(value[mine])])
        return 0, 0, 0, blob.add(np.array(groups, np.int64)), len(groups)

    def _groups(self) -> list[tuple[int, int]]:
        """Rows that share machine code, of about the same number."""
        rows = self.rows // self.step.groups
        count = -(-rows // MOST_ROWS)
        cuts = [rows * k // count for k in range(count + 1)]
        return [
            (group * rows + start, group * rows + stop)
            for group in range(self.step.groups)
            for start, stop in itertools.pairwise(cuts)
        ]


def _entries_per_row(weight: Tensor) -> np.ndarray:
    counts: np.ndarray = weight.flatten(1).count_nonzero(1).numpy()
    return counts
