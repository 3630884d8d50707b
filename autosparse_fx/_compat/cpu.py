"""What PyTorch knows of the processor, some of it by private functions. 2.11-2.15."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def constant_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Callable[[], Tensor]:
    """A 2-d convolution as Inductor runs it where the weight is a constant: oneDNN has it in a layout of its own, into
    which it brings any other weight at every call."""
    mkldnn = torch.ops.mkldnn
    supports: dict[torch.dtype, Callable[[], bool]] = {
        torch.float32: torch.backends.mkldnn.is_available,
        torch.bfloat16: mkldnn._is_mkldnn_bf16_supported,
        torch.float16: mkldnn._is_mkldnn_fp16_supported,
    }
    if x.dtype not in supports or not (torch.backends.mkldnn.is_available() and supports[x.dtype]()):
        return lambda: F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    window = list(padding), list(stride), list(dilation), groups
    packed = mkldnn._reorder_convolution_weight(weight, *window, list(x.shape))
    return lambda: mkldnn._convolution_pointwise(x, packed, bias, *window, "none", [], "")


def has_bf16_matrices() -> bool:
    """Whether the processor multiplies tiles of bfloat16 (AMX)."""
    return bool(torch.cpu._is_amx_tile_supported())


def has_bf16_vectors() -> bool:
    """Whether the processor multiplies vectors of bfloat16 (AVX-512)."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def has_avx512() -> bool:
    """Whether the processor has vectors of 16 floats."""
    return bool(torch.cpu._is_avx512_supported())


def halves_avx512() -> bool:
    """Whether the processor takes such vectors in two halves, as AMD's Zen 4 does."""
    has = torch.cpu.get_capabilities()
    # Only AMD has SSE4a. Of its processors with AVX-512, those since Zen 5 have the other two.
    return bool(has.get("sse4a")) and not (has.get("avx512_vp2intersect") or has.get("avx_vnni"))
