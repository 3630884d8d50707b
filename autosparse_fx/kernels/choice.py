"""Which layers gain from sparse kernels: an estimate in vector instructions, layer by layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from autosparse_fx._compat import cpu
from autosparse_fx.kernels.machine_code import gains
from autosparse_fx.kernels.step_writer import GATHER_ROWS, OFFSETS
from autosparse_fx.kernels.steps import JOINT_COLUMNS, MOST_IMAGES

LANES, TILE = 16, 8  # columns are computed in vectors of this size, and tiles of so many


@dataclass(frozen=True)
class Cycles:
    """What kernels take per vector of output columns. autosparse_fx.advise measures instead.

    Attributes:
        dense: a multiply-add of a dense kernel that runs near the peak.
        plain, window: one of a sparse kernel, whose operand comes from a cache, in a 1x1 layer or another.
        plain_code, window_code: the same, where the pattern is machine code.
        load: of machine code, for each weight, zero or not: the vectors of the input, which rows share.
        pack: taking a vector of the input into the packed block.
        store: giving one of the output back.
    """

    dense: float
    plain: float
    window: float
    plain_code: float
    window_code: float
    load: float
    pack: float
    store: float


WHOLE = Cycles(0.55, 0.9, 1.5, 0.62, 0.8, 0.03, 2.0, 3.0)  # AVX-512, as seen on an Intel Xeon and AMD's Zen 5
HALVED = Cycles(1.1, 1.7, 1.9, 1.0, 1.0, 0.08, 4.0, 6.0)  # AVX-512 in two halves, as seen on AMD's Zen 4
SHORT = Cycles(1.1, 2.0, 2.3, 1.0, 1.0, 0.08, 4.0, 6.0)  # two vectors of AVX2, as seen on AMD's Zen 4
# Products of bfloat16 take so much of the time of float32 ones where the processor multiplies matrices of them, or
# vectors. Elsewhere, and in float16, dense kernels are slower than in float32.
BF16_MATRICES, BF16_VECTORS = 0.22, 0.45
MARGIN = 0.75  # of the dense estimate, below which a layer becomes sparse by itself
CALL = 150_000  # cycles of all threads that calling a dense kernel costs about, which the layers of a program share
# Cycles: what calling a program costs about, and each element that convolutions take from others or give to others, in
# another layout, or products in another dtype.
PROGRAM, CONVERT, CAST = 300_000, 2.5, 1.2
# Cycles of all threads for each byte of a weight that is read, where that is all that a layer does: from memory (or a
# cache that all cores share), and of small weights from a core's own cache. As seen on AMD's Zen 4.
READ, READ_AGAIN, SMALL = 0.5, 0.1, 2**20
ENTRY_BYTES = 6
WORTHWHILE = 64 * 1024  # multiply-adds of the dense layer, below which nothing is gained that could be measured

MOST_TAPS = OFFSETS // LANES  # of a window

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of layers that can run sparse, in float32
CHOICE = "autosparse_choice"  # where the node of a convolution or product keeps whether it runs sparse
DENSE_SCALE = "autosparse_dense_scale"  # where a graph keeps how slow dense kernels are, relative to the estimate


@dataclass(frozen=True)
class Choice:
    """Whether a layer runs sparse, and why."""

    is_sparse: bool
    reason: str
    is_supported: bool = True  # False where there is no sparse kernel, however many zeros there were
    dense: float = 0.0  # cycles of one thread that a call takes on either kernel, as estimated
    sparse: float = 0.0
    gains_alone: bool = False  # whatever those around it do

    @property
    def saved(self) -> float:
        """What a call gains if it runs sparse."""
        return self.dense - self.sparse


def lacking(*tensors: Tensor) -> str:
    """Why there are no sparse kernels for these tensors; empty where there are."""
    for tensor in tensors:
        if tensor.dtype not in DTYPES or tensor.device.type != "cpu":
            return f"{tensor.dtype} on {tensor.device.type} (sparse kernels compute in float32 on the CPU)"
    return ""


def relative_time(dtype: torch.dtype) -> float:
    """About how long dense kernels take with this dtype on this machine, where float32 takes 1."""
    if dtype != torch.bfloat16:
        return 1.0
    return BF16_MATRICES if cpu.has_bf16_matrices() else BF16_VECTORS if cpu.has_bf16_vectors() else 1.0


def choose(
    *,
    entries: int,
    rows: int,
    depth: int,
    channels: int,
    columns: int,
    units: int = 1,
    is_plain: bool,
    runs_code: bool,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> Choice:
    """Choose for one layer, of one image or of one chunk of tokens.

    Args:
        entries: weights that are not zero.
        rows, depth: of the weight as a matrix, output channels and multiply-adds per output.
        channels: of the input.
        columns: output pixels, or tokens.
        units: images, or chunks of tokens.
        is_plain: a linear layer, or a 1x1 convolution without stride and padding.
        runs_code: whether patterns can be machine code.
        dtype: of the layer; the sparse kernel computes in float32 whatever it is.
        scale: how slow dense kernels are, relative to what is estimated here.
    """
    if rows * depth * columns < WORTHWHILE:
        return Choice(False, "too small to gain anything")
    if scale == 0:
        return Choice(False, "the graph was measured to be faster on dense kernels")
    vectors = columns / LANES * max(units, 1)
    cycles = SHORT if not cpu.has_avx512() else HALVED if cpu.halves_avx512() else WHOLE
    dense = scale * (rows * depth * cycles.dense * relative_time(dtype) + rows + CALL / vectors)
    may_be_joint = columns <= JOINT_COLUMNS and (rows >= GATHER_ROWS or depth == channels)
    whole_vectors, width = _tiles(columns, units if may_be_joint else 1)
    around = channels * cycles.pack + rows * cycles.store
    plain = (entries * (cycles.plain if is_plain else cycles.window) + around) * whole_vectors
    products = entries * (cycles.plain_code if is_plain else cycles.window_code)
    coded = (products + rows * depth * cycles.load + around) * whole_vectors
    has_zeros = entries < rows * depth
    sparse = coded if runs_code and gains(entries / (rows * depth), depth, width) else plain
    dense, sparse = dense * vectors, sparse * vectors
    if columns * units < LANES:  # few tokens
        dense = max(dense, scale * _reading(rows * depth * dtype.itemsize))
        sparse = max(sparse, _reading(entries * ENTRY_BYTES))
    gains_alone = has_zeros and sparse < MARGIN * dense
    return Choice(gains_alone, f"estimated {dense / sparse:.1f}x", True, dense, sparse, gains_alone)


def _reading(size: int) -> float:
    return size * (READ if size > SMALL else READ_AGAIN)


def _tiles(columns: int, units: int) -> tuple[float, int]:
    """How many columns the vectors hold for each that there is, and the vectors of a tile.

    Args:
        columns: of an image.
        units: images, which threads take side by side.
    """
    images = max(1, min(units // torch.get_num_threads(), MOST_IMAGES))
    vectors = -(-columns * images // LANES)
    return LANES * vectors / (columns * images), -(-vectors // -(-vectors // TILE))
