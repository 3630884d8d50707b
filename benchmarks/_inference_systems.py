"""One system of the inference benchmark in a process of its own: loads a network, then runs bursts when asked to.

Started by inference.py, with any Python that has the system. It imports nothing but that system (and NumPy), because
the systems need different versions of the same packages. Requests and answers are lines of JSON.
"""

import contextlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import numpy as np

LEAST_FORWARDS, WARM_SECONDS = 3, 1.0

Forward = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Job:
    """What a system runs: the network as files, and an input."""

    model: str
    weights: str
    onnx: str
    input: str
    batch: int
    threads: int

    def array(self) -> np.ndarray:
        found: np.ndarray = np.load(self.input)
        return found


def _torch_forward(job: Job, *, backend: str, bfloat16: bool = False, mode: str | None = None) -> Forward:
    import torch

    from _inference_models import load

    torch.set_num_threads(job.threads)
    torch.set_grad_enabled(False)
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    model, x = load(job.model, Path(job.weights)).to(dtype), torch.from_numpy(job.array()).to(dtype)
    compiled = torch.compile(model, backend=backend, mode=mode)

    def forward() -> np.ndarray:
        y: np.ndarray = compiled(x).float().numpy()
        return y

    return forward


def autosparse(job: Job, *, mode: str | None = None, bfloat16: bool = False) -> Forward:
    return _torch_forward(job, backend="autosparse", mode=mode, bfloat16=bfloat16)


def inductor(job: Job, *, bfloat16: bool = False) -> Forward:
    import torch._inductor.config

    torch._inductor.config.freezing = True
    return _torch_forward(job, backend="inductor", bfloat16=bfloat16)


def onnxruntime(job: Job) -> Forward:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = job.threads
    # Threads spin between operators, as they do by default, but not between forwards, where others are measured.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(job.onnx, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: job.array()}
    return lambda: session.run(None, feed)[0]


def openvino(job: Job, *, precision: str = "f32") -> Forward:
    import openvino as ov

    options = {
        "INFERENCE_NUM_THREADS": job.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    request = ov.Core().compile_model(job.onnx, "CPU", options).create_infer_request()
    x = job.array()
    return lambda: request.infer([x], share_inputs=True, share_outputs=True)[0]


def deepsparse(job: Job) -> Forward:
    os.environ["NM_DISABLE_ANALYTICS"] = "1"
    from deepsparse import compile_model

    engine, x = compile_model(job.onnx, batch_size=job.batch, num_cores=job.threads), job.array()
    return lambda: engine.run([x])[0]


@dataclass(frozen=True)
class System:
    """How a system loads a network, what it reads, and what may be expected of it."""

    load: Callable[[Job], Forward]
    packages: tuple[str, ...]
    reads_onnx: bool = False
    low_precision: bool = False
    required: bool = False


SYSTEMS = {
    "autosparse": System(autosparse, ("torch", "autosparse-fx"), required=True),
    "autosparse-tuned": System(lambda job: autosparse(job, mode="max-autotune"), ("torch", "autosparse-fx")),
    "autosparse-bf16": System(
        lambda job: autosparse(job, bfloat16=True), ("torch", "autosparse-fx"), low_precision=True
    ),
    "autosparse-bf16-tuned": System(
        lambda job: autosparse(job, mode="max-autotune", bfloat16=True),
        ("torch", "autosparse-fx"),
        low_precision=True,
    ),
    "inductor": System(inductor, ("torch",), required=True),
    "inductor-bf16": System(lambda job: inductor(job, bfloat16=True), ("torch",), low_precision=True),
    "onnxruntime": System(onnxruntime, ("onnxruntime",), reads_onnx=True),
    "openvino": System(openvino, ("openvino",), reads_onnx=True),
    "openvino-bf16": System(
        lambda job: openvino(job, precision="bf16"), ("openvino",), reads_onnx=True, low_precision=True
    ),
    "deepsparse": System(deepsparse, ("deepsparse",), reads_onnx=True),
}


class Server:
    """Answers requests with a loaded system."""

    def __init__(self, name: str) -> None:
        self.system = SYSTEMS[name]
        self._forward: Forward | None = None
        self._rested_at = 0.0

    def load(self, job: dict[str, Any], output: str) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            self._forward = self.system.load(Job(**job))
        except ImportError as error:
            return {"skipped": f"cannot be imported: {error}"}
        np.save(output, self._forward())
        seconds = time.perf_counter() - start
        self.burst(WARM_SECONDS)
        versions = {"python": platform.python_version()}
        return {"load_seconds": seconds, "versions": versions | {name: version(name) for name in self.system.packages}}

    def burst(self, seconds: float) -> dict[str, Any]:
        """Run forwards for about this long; the first, which finds the caches of another system, is not counted."""
        assert self._forward is not None
        idle = time.process_time() - self._rested_at
        self._forward()
        taken: list[float] = []
        while len(taken) < LEAST_FORWARDS or sum(taken) < seconds:
            start = time.perf_counter()
            self._forward()
            taken.append(time.perf_counter() - start)
        self._rested_at = time.process_time()
        return {"seconds": statistics.median(taken), "forwards": len(taken), "idle_cpu_seconds": idle}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"load": self.load, "burst": self.burst}[request.pop("do")](**request)
        except Exception as error:
            import traceback

            traceback.print_exc()
            return {"failed": f"{type(error).__name__}: {error}"[:500]}


def private_stdout() -> TextIO:
    """Keep the pipe for answers alone: what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def main() -> None:
    answers, server = private_stdout(), Server(sys.argv[1])
    with contextlib.suppress(BrokenPipeError):
        for line in sys.stdin:
            answers.write(json.dumps(server.answer(json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
