"""The compiled kernels: built by Inductor's C++ compiler, kept in its cache, called without the interpreter's lock."""

import ctypes
import hashlib
import re
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from autosparse_fx._compat import inductor
from autosparse_fx.kernels.executable import executable
from autosparse_fx.kernels.steps import Machine

HOME = 32  # where in a program its address stands, in bytes
SOURCE = Path(__file__).with_name("sparse_program.cpp")


def _source() -> str:
    """The C++ in one piece, with each of its own headers where it is included first."""
    seen: set[str] = set()

    def inline(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return ""
        seen.add(name)
        return expand(SOURCE.with_name(name).read_text().replace("#pragma once\n", ""))

    def expand(text: str) -> str:
        return re.sub(r'^#include "(\w+\.h)"$', inline, text, flags=re.MULTILINE)

    return expand(SOURCE.read_text())


class KernelLibrary:
    """The functions of ``sparse_program.cpp``."""

    def __init__(self) -> None:
        self._homes: dict[bytes, Tensor] = {}
        self._functions = inductor.compile_cpp(_source())
        self._run = self._functions.run_sparse_program
        self._run.restype = ctypes.c_bool
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._run.argtypes = [pointer, pointer, pointer, pointer, number, number, pointer]
        self._make_executable = self._functions.make_executable
        self._make_executable.restype = number
        self._make_executable.argtypes = [pointer, number]
        runs_code = bool(self._constant("runs_code")) and self._may_execute()
        self.machine = Machine(self._constant("vector_length"), self._constant("most_vectors"), runs_code)

    def _constant(self, name: str) -> int:
        function = getattr(self._functions, name)
        function.restype = ctypes.c_int64
        return int(function())

    def _may_execute(self) -> bool:
        try:
            executable(torch.zeros(HOME + 8, dtype=torch.uint8), HOME, self._seal)
        except OSError:
            return False
        return True

    def _seal(self, address: int, size: int) -> int:
        """Let the processor execute so many bytes, and nobody write to them; 0, or an error number of the system's."""
        return int(self._make_executable(address, size))

    def executable(self, program: Tensor) -> Tensor:
        """Bring a program with machine code to where it can run."""
        return executable(program, HOME, self._seal)

    def run(self, program: Tensor, inputs: list[Tensor], outputs: list[Tensor], seconds: Tensor | None = None) -> None:
        """Run an assembled program (see ``program.py``).

        Args:
            program: uint8.
            inputs: float32 ``[batch, ...]``, contiguous, or in the channels-last format where the program allows it.
            outputs: float32 ``[batch, ...]``, contiguous; written to.
            seconds: float64 ``[steps]``; what each step took one of the threads, waiting included, is added to it.
        """
        pointers, results = ctypes.c_void_p * len(inputs), ctypes.c_void_p * len(outputs)
        arguments = (
            pointers(*(x.data_ptr() for x in inputs)),
            (ctypes.c_bool * len(inputs))(*(not x.is_contiguous() for x in inputs)),
            results(*(y.data_ptr() for y in outputs)),
            inputs[0].shape[0],
            torch.get_num_threads(),
            None if seconds is None else seconds.data_ptr(),
        )
        if not self._run(program.data_ptr(), *arguments):
            self._run(self._at_home(program).data_ptr(), *arguments)

    def _at_home(self, copy: Tensor) -> Tensor:
        """A program that was copied, where it can be executed: one for all copies, kept as long as the process."""
        key = hashlib.sha256(copy[HOME + 8 :].numpy().tobytes()).digest()
        if key not in self._homes:
            self._homes[key] = self.executable(copy)
        return self._homes[key]


@cache
def library() -> KernelLibrary:
    """The kernels, compiled on the first call in a process where Inductor's cache does not have them.

    Raises:
        RuntimeError: (of Inductor) where there is no C++ compiler.
    """
    return KernelLibrary()
