"""How a step packs the channels of its source for a tile: where each tap of the kernel finds its columns.

There are two ways, in each of which the columns that a tap reads are side by side:

- ``gathered``: a row of columns per tap. All of them are aligned.
- ``grid``: a row per column of the kernel, with those rows of the image that the taps further down read. For a
  3x3 kernel that is a third of the packing where the image is narrow, but most taps are not aligned.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from autosparse_fx.kernels.steps import Window, round_up


@dataclass(frozen=True)
class Packing:
    """The floats that one channel becomes.

    Attributes:
        offsets: int ``[taps]``, where the columns of each tap begin.
        floats: of the channel.
        picks: int ``[rows, 2]``, for each packed row how far from a pixel it begins, in y and x.
        row_floats: of a packed row.
        more_columns: how many columns beyond the tile's a packed row has.
    """

    offsets: np.ndarray
    floats: int
    picks: np.ndarray
    row_floats: int
    more_columns: int = 0


def taps_of(window: Window, kernel: tuple[int, int]) -> list[tuple[int, int]]:
    """How far each tap is from the first, in rows and columns of the image."""
    (dy, dx), (rows, columns) = window.dilation, kernel
    return [(y * dy, x * dx) for y, x in itertools.product(range(rows), range(columns))]


def gathered(window: Window, kernel: tuple[int, int], width: int) -> Packing:
    """A row per tap, ``width`` columns of a tile each."""
    picks = np.array(taps_of(window, kernel)) - window.padding
    return Packing(width * np.arange(len(picks)), width * len(picks), picks, width)


def grid(window: Window, kernel: tuple[int, int], width: int, vector_length: int) -> Packing:
    """A row per column of the kernel and phase of the stride in y, with what the taps further down read."""
    taps, stride, out_width = taps_of(window, kernel), window.stride[0], window.out_size[1]
    rows = sorted({(y % stride, x) for y, x in taps})
    more = taps[-1][0] // stride * out_width
    row_floats = round_up(width + more, vector_length)
    offsets = [rows.index((y % stride, x)) * row_floats + y // stride * out_width for y, x in taps]
    return Packing(np.array(offsets), row_floats * len(rows), np.array(rows) - window.padding, row_floats, more)
