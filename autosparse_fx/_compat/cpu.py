"""What PyTorch knows of the processor, and tells by private functions. 2.11-2.15."""

import torch


def has_bf16_matrices() -> bool:
    """Whether the processor multiplies tiles of bfloat16 (AMX)."""
    return bool(torch.cpu._is_amx_tile_supported())


def has_bf16_vectors() -> bool:
    """Whether the processor multiplies vectors of bfloat16 (AVX-512)."""
    return bool(torch.cpu._is_avx512_bf16_supported())
