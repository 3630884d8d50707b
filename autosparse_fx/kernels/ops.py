"""The operators of sparse inference: what a layer computes, and the program that several layers become.

``autosparse::sparse_conv`` and ``autosparse::sparse_linear`` say what is computed, in any graph and on any device, with
PyTorch's dense operators. ``autosparse::run_program`` computes it (see ``program.py``).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from autosparse_fx.kernels.library import library

_library = torch.library.Library("autosparse", "FRAGMENT")
_library.define(
    "sparse_conv(Tensor x, Tensor weight, Tensor bias, Tensor? residual, int[] stride, int[] padding, int[] dilation, "
    "int groups, str activation, float[] constants) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "sparse_linear(Tensor x, Tensor weight, Tensor bias, str activation, float[] constants) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "run_program(Tensor program, Tensor[] inputs, int[] any_layout, int[] shapes) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)


def activate(x: Tensor, activation: str, constants: Sequence[float]) -> Tensor:
    """Apply the activation of that name.

    Args:
        constants: the bounds of "clamp", the slope of "leaky_relu", and of "elu" the factors of ``expm1(x)`` where x is
            negative and of x elsewhere; empty for the others.
    """
    functions: dict[str, Callable[..., Tensor]] = {
        "none": lambda x: x.clone(),
        "clamp": torch.clamp,
        "leaky_relu": F.leaky_relu,
        "elu": lambda x, negative, positive: torch.where(x > 0, positive * x, negative * x.expm1()),
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
        "gelu": F.gelu,
        "silu": F.silu,
        "hardswish": F.hardswish,
        "hardsigmoid": F.hardsigmoid,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "mish": F.mish,
    }
    return functions[activation](x, *constants)


def _sparse_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    constants: list[float],
) -> Tensor:
    y = torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)
    if residual is not None:
        y = y + residual
    return activate(y, activation, constants).contiguous()


def _sparse_linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str, constants: list[float]) -> Tensor:
    return activate(F.linear(x, weight, bias), activation, constants).contiguous()


def _shapes(flat: Sequence[int]) -> list[list[int]]:
    """``[2, 8, 8, 1, 5]`` is two dimensions, 8 and 8, and one, 5."""
    shapes, at = [], 0
    while at < len(flat):
        count = flat[at]
        shapes.append(list(flat[at + 1 : at + 1 + count]))
        at += 1 + count
    return shapes


def flatten_shapes(shapes: Sequence[Sequence[int]]) -> list[int]:
    """What the operator ``run_program`` takes for the shapes of its outputs, without their batch dimension."""
    return [number for shape in shapes for number in (len(shape), *shape)]


def _empty_outputs(inputs: Sequence[Tensor], shapes: Sequence[int]) -> list[Tensor]:
    batch = inputs[0].shape[0]
    return [inputs[0].new_empty([batch, *shape]) for shape in _shapes(shapes)]


def _run_program(program: Tensor, inputs: list[Tensor], any_layout: list[int], shapes: list[int]) -> list[Tensor]:
    outputs = _empty_outputs(inputs, shapes)
    library().run(program, [_readable(x, number in any_layout) for number, x in enumerate(inputs)], outputs)
    return outputs


def _readable(x: Tensor, in_any_layout: bool) -> Tensor:
    return x if in_any_layout and x.dim() > 2 and x.movedim(1, -1).is_contiguous() else x.contiguous()


_library.impl("sparse_conv", _sparse_conv, "CompositeExplicitAutograd")
_library.impl("sparse_linear", _sparse_linear, "CompositeExplicitAutograd")
_library.impl("run_program", _run_program, "CPU")
torch.library.register_fake("autosparse::sparse_conv", _sparse_conv, lib=_library)
torch.library.register_fake("autosparse::sparse_linear", _sparse_linear, lib=_library)
torch.library.register_fake(
    "autosparse::run_program", lambda program, inputs, any_layout, shapes: _empty_outputs(inputs, shapes), lib=_library
)
