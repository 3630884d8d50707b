"""Machine code whose instructions are the pattern of a weight, for x86-64 with AVX-512.

A function computes one vector of columns for a group of rows, one register per row: a vector of the input is loaded
once for all rows that multiply by it. That is a fraction of the loads of a loop over entries, whose vectors of the
input come from the second-level cache, and there is no loop to leave. In C, with arguments as on POSIX systems::

    void f(const float* x, const float* weights, float* sums, const float* bias)

It adds to ``sums``, or starts from ``bias``. ``x`` and ``weights`` point ``X_BIAS`` and ``WEIGHT_BIAS`` bytes too far:
from there displacements of one signed byte, which count whole operands, reach furthest.
"""

import numpy as np

MOST_ROWS = 28  # accumulators; four of the 32 registers are left for vectors of the input
X_BIAS, WEIGHT_BIAS = 128 * 64, 128 * 4

# It pays for rows of so many entries, where so many multiply-adds share a vector of the input, in tiles of so many
# vectors: the first of them waits for instructions that come from memory.
_ENTRIES_PER_ROW, _SHARED, _VECTORS = 20, 2.5, 6

_X_REGISTER = 28
_RCX, _RDX, _RSI, _RDI = 1, 2, 6, 7  # x is in RDI, and so on
# Opcode maps and prefixes of the EVEX encoding (Intel's manual, volume 2, 2.7).
_MAP_0F, _MAP_0F38 = 1, 2
_NO_PREFIX, _PREFIX_66 = 0, 1
_LONGEST = 10
_RETURN = bytes([0xC3])


def gains(density: float, depth: int, vectors: int) -> bool:
    """Whether the pattern of a weight should be machine code.

    Args:
        density: the share of the weights that are not zero.
        depth: multiply-adds per output of the dense layer.
        vectors: width of the tiles.
    """
    reached = 1 - (1 - density) ** MOST_ROWS  # of the input's vectors, by any of the rows
    shared = MOST_ROWS * density / max(reached, 1e-9)
    return vectors >= _VECTORS and shared >= _SHARED and density * depth >= _ENTRIES_PER_ROW


def _evex(
    opcode: int,
    register: np.ndarray,
    base: int,
    *,
    opcode_map: int,
    prefix: int,
    source: int = 0,
    broadcast: bool = False,
) -> np.ndarray:
    """Instructions on 512 bits up to their ModRM byte, which says displacement of 32 bits: uint8 ``[count, 6]``."""
    register = register.astype(np.uint8)
    out = np.empty((len(register), 6), np.uint8)
    out[:, 0] = 0x62
    # The upper bits of register numbers are stored inverted; the base needs none.
    out[:, 1] = (~register >> 3 & 1) << 7 | 1 << 6 | 1 << 5 | (~register >> 4 & 1) << 4 | opcode_map
    out[:, 2] = (~source & 15) << 3 | 1 << 2 | prefix
    out[:, 3] = 0b10 << 5 | broadcast << 4 | (~source >> 4 & 1) << 3
    out[:, 4] = opcode
    out[:, 5] = 0b10 << 6 | (register & 7) << 3 | base
    return out


def _with_short_displacement(start: np.ndarray, displacement: np.ndarray) -> np.ndarray:
    """uint8 ``[count, 7]``; ``displacement`` counts operands, from -128 to 127."""
    start = start.copy()
    start[:, 5] -= 1 << 6
    return np.concatenate([start, displacement.astype(np.int8).view(np.uint8)[:, None]], axis=1)


def _with_displacement(start: np.ndarray, displacement: np.ndarray) -> np.ndarray:
    """uint8 ``[count, 10]``; ``displacement`` counts bytes."""
    return np.concatenate([start, displacement.astype("<i4").view(np.uint8).reshape(-1, 4)], axis=1)


def _add(register: int, value: np.ndarray) -> np.ndarray:
    """``add register, value``: uint8 ``[count, 7]``."""
    start = np.broadcast_to(np.array([0x48, 0x81, 0xC0 | register], np.uint8), (len(value), 3))
    return np.concatenate([start, value.astype("<i4").view(np.uint8).reshape(-1, 4)], axis=1)


def group_code(rows: np.ndarray, offsets: np.ndarray, row_count: int, sums_stride: int, *, is_first: bool) -> bytes:
    """The function for a group of rows.

    Args:
        rows, offsets: int64 ``[entries]``, sorted by offset: the row in the group of each weight that is not zero, and
            where the vector that it multiplies by starts in the input, in bytes.
        row_count: at most ``MOST_ROWS``.
        sums_stride: bytes from the sums of one row to the next.
        is_first: start from the bias instead of the sums.
    """
    all_rows = np.arange(row_count)
    if is_first:
        load = _evex(0x18, all_rows, _RCX, opcode_map=_MAP_0F38, prefix=_PREFIX_66)
        head = _with_displacement(load, 4 * all_rows)
    else:
        load = _evex(0x10, all_rows, _RDX, opcode_map=_MAP_0F, prefix=_NO_PREFIX)
        head = _with_displacement(load, sums_stride * all_rows)
    store = _evex(0x11, all_rows, _RDX, opcode_map=_MAP_0F, prefix=_NO_PREFIX)
    tail = _with_displacement(store, sums_stride * all_rows)
    return head.tobytes() + _multiply(rows, offsets) + tail.tobytes() + _RETURN


def _multiply(rows: np.ndarray, offsets: np.ndarray) -> bytes:
    count = len(rows)
    if count == 0:
        return b""
    number = np.arange(count)
    loads = np.flatnonzero(np.diff(offsets, prepend=-1))  # the first entry of each vector of the input
    steps = number[256::256]  # entries before which the pointer to the weights moves on

    multiply = _evex(0xB8, rows, _RSI, opcode_map=_MAP_0F38, prefix=_PREFIX_66, source=_X_REGISTER, broadcast=True)
    fmas = _with_short_displacement(multiply, number % 256 - 128)
    load = _evex(0x10, np.full(len(loads), _X_REGISTER), _RDI, opcode_map=_MAP_0F, prefix=_NO_PREFIX)
    weight_steps = _add(_RSI, np.full(len(steps), 1024))
    wanted = offsets[loads]
    parts = [(fmas, number, 3), (weight_steps, steps, 0)]
    if np.any(wanted % 64):
        parts.append((_with_displacement(load, wanted - X_BIAS), loads, 2))
    else:
        page, within = np.divmod(wanted // 64, 256)
        moves = np.diff(page, prepend=0)
        moved = np.flatnonzero(moves)
        parts.append((_with_short_displacement(load, within - 128), loads, 2))
        parts.append((_add(_RDI, moves[moved] * 256 * 64), loads[moved], 1))
    return _in_order(parts)


def _in_order(parts: list[tuple[np.ndarray, np.ndarray, int]]) -> bytes:
    """Instructions of several kinds, each with the entries that they precede (or are), and the order among kinds."""
    key = np.concatenate([4 * entries + kind for _, entries, kind in parts])
    lengths = np.concatenate([np.full(len(code), code.shape[1]) for code, _, _ in parts])
    padded = np.concatenate([np.pad(code, ((0, 0), (0, _LONGEST - code.shape[1]))) for code, _, _ in parts])
    order = np.argsort(key)
    used = np.arange(_LONGEST) < lengths[order][:, None]
    return bytes(padded[order][used].tobytes())
