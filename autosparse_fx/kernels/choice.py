"""Which layers gain from sparse kernels: an estimate in vector instructions, layer by layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from autosparse_fx.kernels.library import library
from autosparse_fx.kernels.machine_code import gains

# Cycles per vector of output columns, as seen on machines with AVX-512: a multiply-add of a dense kernel that runs near
# the peak; one of a sparse kernel, whose operand comes from a cache, in a 1x1 layer or another; taking a vector of the
# input into the packed block; and giving one of the output back. autosparse_fx.advise measures instead.
DENSE, SPARSE_PLAIN, SPARSE_WINDOW, PACK, STORE = 0.55, 0.9, 1.5, 2.0, 3.0
CODE_PLAIN, CODE_WINDOW = 0.62, 0.8  # of a sparse kernel whose pattern is machine code
CODE_LOAD = 0.03  # over the density: loading the vectors of the input, which rows share
LANES, TILE = 16, 8  # columns are computed in vectors of this size, and tiles of so many
MARGIN = 0.75  # of the dense estimate, below which a layer becomes sparse
CLOSE = 1.4  # of the dense estimate, up to which it stays among sparse layers rather than have its tensors converted
PROGRAM = 300_000  # cycles: what calling a program, and handing its inputs and outputs over, costs about
WORTHWHILE = 64 * 1024  # multiply-adds of the dense layer, below which nothing is gained that could be measured

CHOICE = "autosparse_choice"  # where the node of a convolution or product keeps whether it runs sparse


@dataclass(frozen=True)
class Choice:
    """Whether a layer runs sparse, and why."""

    is_sparse: bool
    reason: str
    is_supported: bool = True  # False where there is no sparse kernel, however many zeros there were
    saved: float = 0.0  # cycles of one thread that a call gains if it runs sparse, as estimated
    is_close: bool = False  # machine code is about as fast as the dense kernel, or faster


def lacking(*tensors: Tensor) -> str:
    """Why there are no sparse kernels for these tensors; empty where there are."""
    for tensor in tensors:
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            return f"{tensor.dtype} on {tensor.device.type} (sparse kernels compute in float32 on the CPU)"
    return ""


def choose(
    *, entries: int, rows: int, depth: int, channels: int, columns: int, units: int = 1, is_plain: bool
) -> Choice:
    """Choose for one layer, of one image or of one chunk of tokens.

    Args:
        entries: weights that are not zero.
        rows, depth: of the weight as a matrix, output channels and multiply-adds per output.
        channels: of the input.
        columns: output pixels, or tokens.
        units: images, or chunks of tokens.
        is_plain: a linear layer, or a 1x1 convolution without stride and padding.
    """
    if rows * depth * columns < WORTHWHILE:
        return Choice(False, "too small to gain anything")
    dense = rows * depth * DENSE + rows
    whole_vectors = LANES * -(-columns // LANES) / columns

    def cost(plain: float, window: float) -> float:
        return (entries * (plain if is_plain else window) + channels * PACK + rows * STORE) * whole_vectors

    sparse = cost(SPARSE_PLAIN, SPARSE_WINDOW)
    density = entries / (rows * depth)
    load = CODE_LOAD / max(density, 1e-3)
    coded = cost(CODE_PLAIN + load, CODE_WINDOW + load)
    vectors = min(-(-columns // LANES), TILE)
    # The library is compiled when it is first asked for, which takes a while: not for layers that stay dense anyway.
    may_be_coded = gains(density, depth, vectors)
    if coded < MARGIN * dense and may_be_coded and library().machine.runs_code:
        sparse = coded
    gain = f"estimated {dense / sparse:.1f}x"
    is_sparse, is_close = sparse < MARGIN * dense, coded < CLOSE * dense and may_be_coded
    saved = (dense - (sparse if is_sparse else coded)) * columns / LANES * units
    return Choice(is_sparse, gain, saved=saved, is_close=is_close)
