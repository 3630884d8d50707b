"""Tensors without their zeros: the values that are not zero, beside one bit for every element."""

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor

# What safetensors itself has a name for, in every version that the package accepts. The rest is stored as bytes.
NATIVE = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_AS_BYTES = (
    *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
    *("uint16", "uint32", "uint64", "complex32", "complex64", "complex128"),
)
# Every dtype that a file may name.
DTYPES: dict[str, torch.dtype] = {
    **{str(dtype).removeprefix("torch."): dtype for dtype in NATIVE},
    **{name: getattr(torch, name) for name in _AS_BYTES if hasattr(torch, name)},
}
Read = Callable[[str, list[int], str], Tensor]  # a part by its name, shape and safetensors dtype
_ENTRY_BYTES = 192  # what another part adds to the header of a file: name, offsets and checksum
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(tensor: Tensor) -> dict[str, Tensor]:
    """Return what to store of a contiguous CPU tensor, so that every bit comes back: the smallest of

    * ``values``: all of it.
    * ``bitmap`` and ``values``: a bit for every element, and the elements whose bits are not all zero.
    * with ``signs`` besides, for weights that were multiplied by a mask, where half of the zeros are -0.0: -0.0 is left
      out as well, and every element that is left out has its sign there.

    Bit ``i`` is bit ``i % 8``, from the lowest, of byte ``i // 8``.
    """
    size, elements = tensor.dtype.itemsize, tensor.numel()
    words = _words(tensor)
    nonzero = (words != 0).any(1)
    best = {"values": _as_stored(tensor)}
    bytes_of_best = elements * size
    for kept, signed in ((nonzero, False), (nonzero & ~_negative_zero(words), True)):
        count = int(kept.count_nonzero())
        needed = count * size + _bytes_of_bits(elements) + _ENTRY_BYTES
        needed += _bytes_of_bits(elements - count) + _ENTRY_BYTES if signed else 0
        if needed < bytes_of_best:
            values = words.masked_select(kept[:, None]).view(tensor.dtype)
            best, bytes_of_best = {"bitmap": _to_bits(kept), "values": _as_stored(values)}, needed
            if signed:
                best["signs"] = _to_bits(nonzero.masked_select(~kept))
    return best


def unpack(parts: Collection[str], read: Read, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the tensor that :func:`pack` was given.

    Nothing is read or allocated before what is stored says how large it is: a bit stands for one element, so that a
    tensor is at most 128 times as large (complex128) as its bitmap, whatever ``shape`` claims.

    Args:
        parts: the names of what is stored.
        read: gives a part, in memory of its own; raises unless it is stored with just this shape and dtype.
        shape: that of the tensor.
        dtype: that of the tensor.

    Raises:
        ValueError: if the parts do not fit each other, or ``read`` raises it.
    """
    elements = math.prod(shape)
    if "bitmap" not in parts:
        values = read("values", *_stored_form(shape, dtype))
        return values if values.dtype == dtype else _flat(values).view(dtype).view(list(shape))
    kept = _from_bits(read("bitmap", [_bytes_of_bits(elements)], "U8"), elements)
    left_out = elements - int(kept.count_nonzero())
    signs = None
    if "signs" in parts:
        signs = _from_bits(read("signs", [_bytes_of_bits(left_out)], "U8"), left_out)
    values = read("values", *_stored_form([elements - left_out], dtype))
    tensor = torch.zeros(elements * dtype.itemsize, dtype=torch.uint8).view(dtype)
    words = _words(tensor)
    words.masked_scatter_(kept[:, None], _flat(values).view(words.dtype))
    if signs is not None:
        negative = torch.zeros_like(kept).masked_scatter_(~kept, signs)
        words.masked_fill_(negative[:, None], _sign(words.dtype))
    return tensor.view(list(shape))


def bitwise_copy(tensor: Tensor) -> Tensor:
    """Return a copy of a contiguous tensor; clone() would make 1 of any byte that is not 0 in a bool tensor."""
    return _flat(tensor).view(torch.uint8).clone().view(tensor.dtype).view(tensor.shape)


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    return _flat(tensor).view(torch.uint8).numpy().data


def _stored_form(shape: Sequence[int], dtype: torch.dtype) -> tuple[list[int], str]:
    """Return the shape and the safetensors dtype in which values are stored."""
    return ([*shape], NATIVE[dtype]) if dtype in NATIVE else ([*shape, dtype.itemsize], "U8")


def _as_stored(tensor: Tensor) -> Tensor:
    if tensor.dtype in NATIVE:
        return tensor
    return _flat(tensor).view(torch.uint8).view(*tensor.shape, tensor.dtype.itemsize)


def _flat(tensor: Tensor) -> Tensor:
    """As reshape(-1), but with stride 1 also for a single element, which may have any stride."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _words(tensor: Tensor) -> Tensor:
    """Return the bits of a contiguous tensor as a row of integers for each element."""
    size = tensor.dtype.itemsize
    return _flat(tensor).view(_WORDS[min(size, 8)]).view(tensor.numel(), max(size // 8, 1))


def _sign(words: torch.dtype) -> int:
    """Return what -0.0 is as an integer: the highest bit alone."""
    return 128 if words == torch.uint8 else torch.iinfo(words).min


def _negative_zero(words: Tensor) -> Tensor:
    if words.shape[1] > 1:  # the two halves of a complex128
        return torch.zeros(len(words), dtype=torch.bool)
    return (words == _sign(words.dtype)).view(-1)


def _to_bits(flags: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(flags.numpy(), bitorder="little"))


def _from_bits(bits: Tensor, elements: int) -> Tensor:
    flags = torch.from_numpy(np.unpackbits(bits.numpy(), bitorder="little")).bool()
    if flags[elements:].any():
        raise ValueError(f"a bitmap of {elements} bits goes on behind them")
    return flags[:elements]


def _bytes_of_bits(elements: int) -> int:
    return -(-elements // 8)
