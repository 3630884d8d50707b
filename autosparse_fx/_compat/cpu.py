"""What PyTorch knows of the processor, some of it by private functions. 2.11-2.15."""

import torch


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
