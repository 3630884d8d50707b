"""What a program is made of: steps, the buffers that they read and write, and the machine that it is laid out for."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

# With the numbers that program.h has for them.
MODES = {"plain": 0, "direct": 1, "grid": 2, "gathered": 2, "depthwise": 3}
ACTIVATIONS = (
    *("none", "relu", "clamp", "leaky_relu", "elu", "gelu", "gelu_tanh", "silu"),
    *("hardswish", "hardsigmoid", "sigmoid", "tanh", "mish"),
)
BUFFER_KINDS = ("arena", "input", "output")
# Images of a thread that stand side by side in the tiles of the last steps, at most, and the columns of those that may.
MOST_IMAGES, JOINT_COLUMNS = 4, 64


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

    @classmethod
    def of(cls, in_size: Sequence[int], out_size: Sequence[int], *window: Sequence[int]) -> "Window":
        """Of a convolution in two dimensions, or in one: its input is an image of one row.

        Args:
            window: stride, padding and dilation.
        """
        alone = (1, 1, 1, 0, 1)  # what each is where there is but one row
        given = zip((in_size, out_size, *window), alone, strict=True)
        return cls(*((row, values[0]) if len(values) == 1 else (values[0], values[1]) for values, row in given))


@dataclass(frozen=True)
class Layout:
    """Ways to lay out a step, of which the fastest can be found by measuring (see ``tuning.py``).

    Attributes:
        is_coded: make the pattern of the weight machine code; None is the default.
        most_vectors: across a tile, at most; 0 is the default.
        block_share: of the channels that are packed at a time by default.
    """

    is_coded: bool | None = None
    most_vectors: int = 0
    block_share: float = 1.0


@dataclass(frozen=True)
class Step:
    """``target = activation(convolution(source, weight) + bias + residual)``, with numbers of buffers.

    Attributes:
        weight: ``[rows, channels / groups, height, width]``, float32; its zeros cost nothing.
        bias: ``[rows]``, float32.
        constants: of the activation (see ``ops.activate``); zeros where it has fewer.
        vectors, block_channels: the tile's width and the channels that are packed at a time; 0 is the default.
        mode: how columns are read, one of MODES; "" is the default.
        layout: choices between ways to lay the step out.
    """

    source: int
    target: int
    weight: Tensor
    bias: Tensor
    window: Window
    groups: int = 1
    residual: int = -1
    activation: str = "none"
    constants: tuple[float, float] = (0.0, 0.0)
    vectors: int = 0
    block_channels: int = 0
    mode: str = ""
    layout: Layout = Layout()


@dataclass(frozen=True)
class Machine:
    """What the C++ was compiled for.

    Attributes:
        vector_length: floats in a vector.
        most_vectors: across the widest tile.
        runs_code: whether programs may hold machine code.
    """

    vector_length: int
    most_vectors: int
    runs_code: bool = False


def as_kernel(weight: Tensor) -> Tensor:
    """``[rows, channels, height, width]`` from the weight of a product or a convolution in one or two dimensions."""
    return weight.reshape(*weight.shape[:2], *[1] * (4 - weight.dim()), *weight.shape[2:])


def round_up(value: int, to: int) -> int:
    return -(-value // to) * to
