"""The example for several processes: kill -9 of one of them, and the run ends where the unbroken one ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills with SIGKILL"),
    pytest.mark.slow,
]

SCRIPT = Path(__file__).parents[2] / "examples" / "train_distributed.py"
TINY = ("--epochs", "5", "--target-sparsity", "0.8", "--checkpoint-every", "3")  # 55 steps


class Run:
    """The example under torchrun, on the CPU, in a folder of its own."""

    def __init__(self, folder: Path, *options: str, processes: int = 2, restarts: int = 0) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.output = folder / "output.txt"
        self.command = [
            sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(processes), "--max-restarts", str(restarts), str(SCRIPT), *TINY,
            "--checkpoint", str(folder / "run"), "--json", str(folder / "results.json"),
            "--save-model", str(folder / "model.pt"), *options,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                self.command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_for_checkpoint(self, step: int) -> None:
        """Of this step, or a later one."""
        deadline = time.monotonic() + 120
        latest = self.folder / "run" / "latest"
        while not latest.exists() or int(latest.read_text().removeprefix("step-")) < step:
            assert self.process.poll() is None and time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.001)

    def kill_rank(self, rank: int) -> None:
        (process,) = re.findall(rf"rank {rank} of \d+: process (\d+)", self.output.read_text())
        os.kill(int(process), signal.SIGKILL)

    def results(self) -> dict[str, Any]:
        assert self.process.wait(timeout=240) == 0, self.output.read_text()
        found: dict[str, Any] = json.loads((self.folder / "results.json").read_text())
        return found

    def weights(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = torch.load(self.folder / "model.pt", weights_only=True)
        return found

    def stop(self) -> None:
        """All of it: torchrun ends its processes when it is asked to end, but not when it is killed."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("unbroken") / "fsdp", "--strategy", "fsdp")
    try:
        results = run.results()
    finally:
        run.stop()
    assert results["steps"] == 55 and results["resumed_at"] == [] and results["accuracy"] > 0.85
    assert results["sparsity"] == pytest.approx(0.8, abs=0.005)
    zeros = {name: int((t == 0).sum()) for name, t in run.weights().items()}
    assert all(zeros[layer["name"]] == layer["zeros"] for layer in results["layers"])
    return run


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_killed_rank_is_restarted_and_ends_where_the_unbroken_run_ends(
    unbroken: Run, tmp_path: Path, strategy: str
) -> None:
    """To the last bit, and DDP as FSDP2: two ranks add their gradients in one order only.

    But DDP keeps rank 0's statistics of batch norm, where FSDP2 leaves each rank its own.
    """
    run = Run(tmp_path / strategy, "--strategy", strategy, restarts=2)
    try:
        run.wait_for_checkpoint(15)
        run.kill_rank(1)
        resumed_at = run.results()["resumed_at"]
        assert len(resumed_at) == 1, run.output.read_text()
        assert 15 <= resumed_at[0] < 55 and resumed_at[0] % 3 == 0
        assert len(re.findall(r"rank 1 of 2: process", run.output.read_text())) == 2
        found, expected = run.results(), unbroken.results()
        same = ["recipe", "steps", "sparsity", "layers", *(["epochs", "accuracy"] if strategy == "fsdp" else [])]
        assert {part: found[part] for part in same} == {part: expected[part] for part in same}
        assert [e["loss"] for e in found["epochs"]] == [e["loss"] for e in expected["epochs"]]
        for name, t in unbroken.weights().items():
            assert torch.equal(run.weights()[name], t) or (strategy == "ddp" and "running" in name), name
        assert len(list((tmp_path / strategy / "run").glob("step-*"))) == 1
    finally:
        run.stop()


def test_run_goes_on_with_another_number_of_processes_and_strategy(tmp_path: Path) -> None:
    first = Run(tmp_path / "run", "--strategy", "fsdp")
    try:
        first.wait_for_checkpoint(15)
        first.kill_rank(0)
        assert first.process.wait(timeout=60) != 0  # no restarts
    finally:
        first.stop()
    second = Run(tmp_path / "run", "--strategy", "ddp", processes=1)
    try:
        results = second.results()
    finally:
        second.stop()
    # Batch norm sees whole batches from there on, so this is another training than that of two.
    assert results["processes"] == 1 and len(results["resumed_at"]) == 1
    assert results["accuracy"] > 0.85 and results["sparsity"] == pytest.approx(0.8, abs=0.005)


def test_another_recipe_is_refused(unbroken: Run) -> None:
    before = (unbroken.folder / "results.json").read_text()
    again = Run(unbroken.folder, "--lr", "0.3", processes=1)
    assert again.process.wait(timeout=120) != 0
    assert "was written by another recipe" in again.output.read_text()
    assert (unbroken.folder / "results.json").read_text() == before


def test_started_without_torchrun_it_says_so() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and "start this script with torchrun" in done.stderr
