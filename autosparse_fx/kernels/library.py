"""The compiled kernels: built by Inductor's C++ compiler, kept in its cache, called without the interpreter's lock."""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from autosparse_fx import _compat

SOURCE = Path(__file__).with_name("sparse_program.cpp")


class KernelLibrary:
    """The functions of ``sparse_program.cpp``."""

    def __init__(self) -> None:
        self._functions = _compat.compile_cpp(SOURCE.read_text())
        self._run = self._functions.run_sparse_program
        self._run.restype = None
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._run.argtypes = [pointer, pointer, pointer, pointer, number, number]
        # Floats in a vector register, and vector registers across the widest tile.
        self.vector_length = self._constant("vector_length")
        self.most_vectors = self._constant("most_vectors")

    def _constant(self, name: str) -> int:
        function = getattr(self._functions, name)
        function.restype = ctypes.c_int64
        return int(function())

    def run(self, program: Tensor, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Run an assembled program (see ``program.py``).

        Args:
            program: uint8.
            inputs: float32 ``[batch, ...]``, contiguous, or in the channels-last format where the program allows it.
            outputs: float32 ``[batch, ...]``, contiguous; written to.
        """
        pointers, results = ctypes.c_void_p * len(inputs), ctypes.c_void_p * len(outputs)
        self._run(
            program.data_ptr(),
            pointers(*(x.data_ptr() for x in inputs)),
            (ctypes.c_bool * len(inputs))(*(not x.is_contiguous() for x in inputs)),
            results(*(y.data_ptr() for y in outputs)),
            inputs[0].shape[0],
            torch.get_num_threads(),
        )


@cache
def library() -> KernelLibrary:
    """The kernels, compiled on the first call in a process where Inductor's cache does not have them.

    Raises:
        RuntimeError: (of Inductor) where there is no C++ compiler.
    """
    return KernelLibrary()
