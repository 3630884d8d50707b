"""Entries: what few columns are multiplied by, in as few bytes as hold it exactly."""

from itertools import chain, pairwise

import numpy as np
import pytest

from autosparse_fx.kernels.entries import BFLOAT16, GAPS, Entries, bytes_of_entry, compact, lanes_of


def read(made: Entries, starts: np.ndarray, lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """Channels and values, as the kernels read them."""
    channels, values = made.positions.astype(np.int64), made.values
    if made.format & GAPS:
        assert made.positions.dtype == np.uint8
        for start, stop in pairwise(starts):
            channels[start:stop] = np.cumsum(channels[start:stop])
    else:
        assert made.positions.dtype == np.uint16
        channels = channels // lanes
    if made.format & BFLOAT16:
        assert values.dtype == np.uint16
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return channels, values


def block(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.cumsum([0, *map(len, rows)]), np.array([*chain.from_iterable(rows)], np.int64)


@pytest.mark.parametrize("lanes", [1, 4, 8])
@pytest.mark.parametrize("value, is_bfloat16", [
    (0.5, True), (-3.0, True), (np.inf, True), (1e-40, False), (0.1, False), (1 + 2.0**-8, False), (1 + 2.0**-7, True),
])  # fmt: skip
@pytest.mark.parametrize("rows, are_gaps", [
    ([[0, 1, 256], [255], []], True),
    ([[], [0], [], [255, 510, 700], []], True),
    ([[3], [256]], False),
    ([[0, 256]], False),
    ([[5, 300], [4]], False),
    ([[], []], True),
])  # fmt: skip
def test_entries_say_what_they_were_given(
    rows: list[list[int]], are_gaps: bool, value: float, is_bfloat16: bool, lanes: int
) -> None:
    starts, channels = block(rows)
    values = np.full(len(channels), 2.0, np.float32)
    values[-1:] = value
    made = compact(starts, channels, values, lanes)
    assert bool(made.format & GAPS) == are_gaps
    assert bool(made.format & BFLOAT16) == (is_bfloat16 or len(values) == 0)
    found, same = read(made, starts, lanes)
    assert np.array_equal(found, channels) and np.array_equal(same, values)


def test_which_tokens_are_few() -> None:
    """Of half a vector at most, and of a number that is known."""
    assert [lanes_of(tokens, 16) for tokens in (0, 1, 2, 4, 5, 8, 9, 500)] == [0, 1, 4, 4, 8, 8, 0, 0]
    assert [lanes_of(tokens, 8) for tokens in (0, 1, 3, 4, 5)] == [0, 1, 4, 4, 0]
    assert lanes_of(1, 1) == 0


@pytest.mark.parametrize("tokens", [1, 8])
def test_estimated_bytes_are_those_of_most_entries(tokens: int) -> None:
    starts, channels = block([list(range(0, 600, 7))] * 4)
    for values, is_bfloat16 in ((np.full(len(channels), 0.1), False), (np.full(len(channels), 0.5), True)):
        made = compact(starts, channels, values.astype(np.float32), lanes_of(tokens, 16))
        taken = made.positions.itemsize + made.values.itemsize
        assert bytes_of_entry(tokens, 16, is_bfloat16=is_bfloat16) == taken
    assert bytes_of_entry(9, 16, is_bfloat16=True) == 6
