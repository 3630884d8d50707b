"""Memory that the processor may execute: where programs with machine code live."""

import mmap
from collections.abc import Callable

import torch
from torch import Tensor

# Lets the processor execute so many bytes at an address, and nobody write to them; 0, or the system's error number.
Seal = Callable[[int, int], int]


def executable(data: Tensor, home: int, seal: Seal) -> Tensor:
    """A copy of ``data``, uint8, that can be executed and not be written to. It lives as long as its tensor.

    Args:
        home: where in the copy to leave its own address, int64: a copy of the copy can be told by it.

    Raises:
        OSError: where the system does not let programs execute memory that they wrote.
    """
    size = -(-data.numel() // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)[: data.numel()]
    tensor.copy_(data)
    tensor[home : home + 8] = torch.tensor([tensor.data_ptr()]).view(torch.uint8)
    error = seal(tensor.data_ptr(), size)
    if error:
        raise OSError(error, "no memory can be made executable")
    return tensor
