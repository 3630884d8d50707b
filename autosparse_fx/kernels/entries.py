"""Entries: the weights of a block that are not zero, each with where its columns are, in as few bytes as hold them.

A layer of few columns, as in decoding, takes the time that reading its weights takes. There an entry tells how many
channels it is from the one before it in its row, in one byte, where no two are further apart; and its value in
bfloat16, where that holds all values exactly, as it does those of a model in bfloat16.
"""

from dataclasses import dataclass

import numpy as np

# With the bits that program.h has for them.
GAPS, BFLOAT16 = 1, 2
MOST_GAP = 255


@dataclass(frozen=True)
class Entries:
    """Arrays of one element for each entry.

    Attributes:
        positions: uint16, where its columns begin in the packed block, in floats; with GAPS uint8, in channels from the
            entry before it in its row, or from the first channel of the block.
        values: float32; with BFLOAT16 uint16, the upper half of their bits.
        format: GAPS and BFLOAT16, added up.
    """

    positions: np.ndarray
    values: np.ndarray
    format: int = 0


def entries(offsets: np.ndarray, values: np.ndarray) -> Entries:
    """The entries of any block: where the columns of each begin in the packed block, and float32 values."""
    return Entries(offsets.astype(np.uint16), values)


def compact(starts: np.ndarray, channels: np.ndarray, values: np.ndarray, lanes: int) -> Entries:
    """The entries of a block of few columns.

    Args:
        starts: int ``[rows + 1]``, where the entries of each row begin.
        channels: of each entry, ascending in each row.
        values: float32.
        lanes: floats of a packed channel.
    """
    positions, form = (channels * lanes).astype(np.uint16), 0
    before = np.concatenate([[0], channels[:-1]])[: len(channels)]
    before[starts[:-1][np.diff(starts) > 0]] = 0
    gaps = channels - before
    if gaps.max(initial=0) <= MOST_GAP:
        positions, form = gaps.astype(np.uint8), form | GAPS
    bits = values.view(np.uint32)
    if not (bits & 0xFFFF).any():
        values, form = (bits >> 16).astype(np.uint16), form | BFLOAT16
    return Entries(positions, values, form)


def lanes_of(tokens: int, vector_length: int) -> int:
    """The floats of a packed channel, where so many tokens are few; 0 where they are not, or may be any number."""
    if not 0 < 2 * tokens <= vector_length:
        return 0
    return next(lanes for lanes in (1, 4, 8) if tokens <= lanes)


def bytes_of_entry(tokens: int, vector_length: int, *, is_bfloat16: bool) -> int:
    """What an entry of a layer for so many tokens most probably takes."""
    if lanes_of(tokens, vector_length) == 0:
        return 6
    return 3 if is_bfloat16 else 5
