"""Which layers gain from sparse kernels: an estimate in vector instructions, layer by layer."""

from dataclasses import dataclass

# Cycles per vector of output columns, seen on AVX-512 machines (benchmarks/kernels.py): a multiply-add of a dense
# kernel that runs at nine tenths of the peak; one of a sparse kernel, whose operand comes from the first-level cache,
# aligned or not; taking a vector of the input into the packed block; and giving one of the output back.
DENSE, SPARSE_PLAIN, SPARSE_WINDOW, PACK, STORE = 0.55, 0.9, 1.25, 2.0, 3.0
MARGIN = 0.9  # of the dense estimate, below which a layer becomes sparse
WORTHWHILE = 64 * 1024  # multiply-adds of the dense layer, below which nothing is gained that could be measured


@dataclass(frozen=True)
class Choice:
    """Whether a layer runs sparse, and why."""

    is_sparse: bool
    reason: str


def choose(*, entries: int, rows: int, depth: int, channels: int, columns: int, is_plain: bool) -> Choice:
    """Choose for one layer, of one image or of one chunk of tokens.

    Args:
        entries: weights that are not zero.
        rows, depth: of the weight as a matrix, output channels and multiply-adds per output.
        channels: of the input.
        columns: output pixels, or tokens.
        is_plain: a linear layer, or a 1x1 convolution without stride and padding.
    """
    sparsity = 1 - entries / max(1, rows * depth)
    if rows * depth * columns < WORTHWHILE:
        return Choice(False, f"too small to gain anything ({sparsity:.1%} zeros)")
    dense = rows * depth * DENSE + rows
    sparse = entries * (SPARSE_PLAIN if is_plain else SPARSE_WINDOW) + channels * PACK + rows * STORE
    gain = f"{sparsity:.1%} zeros, estimated {dense / sparse:.1f}x"
    return Choice(sparse < MARGIN * dense, gain)
