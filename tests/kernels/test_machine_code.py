"""Patterns as machine code: what it says, when it is used, and where it lives."""

import gc
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from kernels.compare import Net, assert_close, machine, sparse, threads
from torch import Tensor

from autosparse_fx.kernels.library import HOME, KernelLibrary, library
from autosparse_fx.kernels.machine_code import MOST_ROWS, WEIGHT_BIAS, X_BIAS, group_code
from autosparse_fx.kernels.program import Buffer, Step, Window, assemble
from autosparse_fx.kernels.step_writer import StepWriter
from autosparse_fx.kernels.steps import Layout

needs_code = pytest.mark.skipif(
    not Path("/proc/cpuinfo").exists() or "avx512f" not in Path("/proc/cpuinfo").read_text(), reason="needs AVX-512"
)


# What it says, as a disassembler reads it.


def listing(code: bytes, folder: Path) -> list[str]:
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump")
    (folder / "code").write_bytes(code)
    command = ["objdump", "-D", "-b", "binary", "-m", "i386:x86-64", "--no-show-raw-insn", "-M", "intel"]
    text = subprocess.run([*command, str(folder / "code")], capture_output=True, text=True, check=True).stdout
    return [re.sub(r"\s+", " ", line.split(":\t")[1]).strip() for line in text.splitlines() if ":\t" in line]


def displacement(text: str) -> int:
    found = re.search(r"\[r\w+([+-]0x[0-9a-f]+)?\]", text)
    assert found is not None, text
    return int(found[1] or "0", 16)


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("row_count, depth", [(1, 1), (28, 400), (5, 3), (17, 90)])
def test_instructions_compute_the_rows(
    row_count: int, depth: int, aligned: bool, is_first: bool, tmp_path: Path
) -> None:
    """The code is run by hand: each instruction that the disassembler names, on numbers."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((row_count, depth)) * (rng.random((row_count, depth)) < 0.3)
    weight[:, depth // 2] = 0  # nobody reads this row of the input
    channel, row = np.nonzero(weight.T)
    stride = 512 if aligned else 484
    code = group_code(row, channel * stride, row_count, 320, is_first=is_first)

    values, x = weight[row, channel], rng.standard_normal(depth)
    sums, bias = rng.standard_normal(row_count), rng.standard_normal(row_count)
    registers = np.full(32, np.nan)
    moved = {"rdi": X_BIAS, "rsi": WEIGHT_BIAS}
    stored = {}
    lines = listing(code, tmp_path)
    assert lines[-1] == "ret" and len(lines) == len([line for line in lines if "(bad)" not in line])
    for line in lines[:-1]:
        name, operands = line.split(" ", 1)
        if name == "add":
            register, number = operands.split(",")
            moved[register] += int(number, 16)
        elif name == "vbroadcastss":
            registers[int(operands[3:].split(",")[0])] = bias[displacement(line) // 4]
        elif name == "vfmadd231ps":
            to, factor = (int(r) for r in re.findall(r"zmm(\d+)", operands))
            assert re.search(r"1to16|BCST", operands) and "[rsi" in operands
            registers[to] += registers[factor] * values[(moved["rsi"] + displacement(line)) // 4]
        elif "[rdi" in operands:
            at = moved["rdi"] + displacement(line)
            assert name == "vmovups" and at % stride == 0 and at // stride != depth // 2
            registers[int(operands[3:].split(",")[0])] = x[at // stride]
        elif operands.startswith("zmm"):
            registers[int(operands[3:].split(",")[0])] = sums[displacement(line) // 320]
        else:
            stored[displacement(line) // 320] = registers[int(operands.rsplit("zmm", 1)[1])]
    expected = weight @ x + (bias if is_first else sums)
    np.testing.assert_allclose([stored[m] for m in range(row_count)], expected)


# When it is used.


def is_coded(rows: int, channels: int, density: float, size: int) -> bool:
    weight = sparse(rows, channels, 1, 1, density=density)
    step = Step(0, 1, weight, torch.zeros(rows), Window((size, size), (size, size)))
    return StepWriter(step, machine(), 0).is_coded


@needs_code
def test_layers_that_gain() -> None:
    assert is_coded(256, 256, 0.2, 14)
    assert is_coded(256, 1024, 0.1, 28)


@pytest.mark.parametrize(
    "rows, channels, density, size",
    [
        (256, 32, 0.2, 28),  # too few entries in a row
        (256, 1024, 0.02, 28),  # rows hardly share vectors of the input
        (512, 512, 0.2, 7),  # tiles too narrow
        (256, 256, 0.0, 14),
    ],
)
def test_layers_that_do_not_gain(rows: int, channels: int, density: float, size: int) -> None:
    assert not is_coded(rows, channels, density, size)


# Where it lives.


def coded() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A program, its input, room for its output, and what that should be."""
    weight, x = sparse(256, 256, 1, 1), torch.randn(2, 256, 196)
    step = Step(0, 1, weight, torch.zeros(256), Window((14, 14), (14, 14)), layout=Layout(True))
    buffers = [Buffer("input", 256, 196), Buffer("output", 256, 196)]
    expected = torch.einsum("mc,bcp->bmp", weight[:, :, 0, 0].double(), x.double())
    return assemble([step], buffers, machine()).data, x, torch.empty(2, 256, 196), expected


def protection(program: Tensor) -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= program.data_ptr() < stop:
            return line.split()[1]
    raise AssertionError("not mapped")


@needs_code
def test_program_can_be_executed_but_not_written_to() -> None:
    program, x, y, expected = coded()
    assert protection(program).startswith("r-x")
    library().run(program, [x], [y])
    assert_close(y, expected)


@needs_code
def test_memory_is_given_back() -> None:
    program, *_ = coded()
    address = program.data_ptr()
    del program
    gc.collect()
    mapped = [line.split()[0].split("-")[0] for line in Path("/proc/self/maps").read_text().splitlines()]
    assert f"{address:x}" not in [start.lstrip("0") for start in mapped]


@needs_code
def test_copy_runs_and_never_from_memory_that_cannot_be_executed() -> None:
    program, x, y, expected = coded()
    for copy in (program.clone(), program.clone()):
        assert protection(copy)[2] != "x"
        y.fill_(torch.nan)
        library().run(copy, [x], [y])
        assert_close(y, expected)
    assert len([home for home in library()._homes.values() if torch.equal(home[HOME + 8 :], copy[HOME + 8 :])]) == 1


def test_system_that_refuses_gets_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KernelLibrary, "_seal", lambda self, address, size: 13)
    refused = KernelLibrary()
    assert not refused.machine.runs_code
    weight = sparse(256, 256, 1, 1)
    step = Step(0, 1, weight, torch.zeros(256), Window((14, 14), (14, 14)))
    assert not StepWriter(step, refused.machine, 0).is_coded


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, MOST_ROWS, MOST_ROWS + 1, 200])
def test_threads_share_whole_groups_of_rows(rows: int, count: int) -> None:
    net = Net()
    x = net.layer(net.input(40, 5), rows, activation="relu")
    with threads(count):
        net.check([net.layer(x, rows, 3, padding=1)], batch=1)
