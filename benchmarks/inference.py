"""Measure what sparsity gains at inference: finalised sparse networks, beside dense compilers and other runtimes.

    python benchmarks/inference.py                                      (everything; hours)
    python benchmarks/inference.py --model resnet50 --batch 1,8 --sparsity 0.9 --distribution uniform
    python benchmarks/inference.py --table                              (only print what the stored results say)
    python benchmarks/inference.py --plot speedup.png                   (only draw it)

All systems run the same network with the same zeros. Each lives in a process of its own. All are loaded and warmed,
and then take turns (A B C A B C): one runs a burst of forwards while the others wait on a pipe. A system's time in a
round is the median of its burst; its speed-up over `inductor` (Inductor with freezing, float32) is the median of the
ratios within the rounds. The latency between two cores is logged with every round, because virtual machines move, and
interleaving does not cancel that: it slows code that shares data between threads, and not code that does not. So is the
CPU time that a waiting process used, which should be about 0.

With `--runs 5` all of that is done five times, in new processes. What is stored is the run whose speed-up of
`autosparse` is the median, with the speed-ups of all runs; the tables show their medians.

Every output is compared with what eager PyTorch computes in float32. More than 1e-5 (largest error over largest output)
by `autosparse` makes the script fail.

The other runtimes are optional; a missing one is skipped, with the reason. They are best installed apart, since
DeepSparse needs Python 3.11 or older and packages of its time:

    python -m venv peers && peers/bin/pip install onnxruntime openvino
    python3.11 -m venv old && old/bin/pip install deepsparse==1.8.0
    pip install onnx                                                    (beside PyTorch: writes the file that they read)
    python benchmarks/inference.py --peer-python onnxruntime=peers/bin/python --peer-python openvino=peers/bin/python \\
        --peer-python deepsparse=old/bin/python

The sparsities of a ResNet-50 trained by STR (`--distribution str`) are in budgets/STR_Budgets_ResNet50.csv of the
repository RAIVNLab/STR; put it into the folder str-budgets of --data-dir.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import _inference_tables
from _core_latency import CoreLatency
from _inference_masks import DISTRIBUTIONS, NotAvailable, layer_sparsities
from _inference_models import BUILDERS, build_sparse, example_input, export_onnx, maskable
from _inference_process import SystemProcess
from _inference_systems import SYSTEMS
from _inference_tables import BASELINE, median_run, summarized
from train_step import cpu_name

RESULTS = Path(__file__).resolve().parent / "results" / "inference"
TOLERANCE = 1e-5
CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")


def cpu_features() -> list[str]:
    """The vector extensions that decide between float32 and bfloat16."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    found = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    return [feature for feature in CPU_FEATURES if feature in found]


class Case:
    """One network with its zeros, as files that every system can read."""

    def __init__(self, name: str, batch: int, sparsity: float, distribution: str, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        weights = maskable(BUILDERS[name]())
        sparsities = layer_sparsities(distribution, name, weights, sparsity, args.data_dir)
        self.name, self.batch, self.threads = name, batch, args.threads
        self.model = build_sparse(name, sparsities)
        self.x = example_input(name, batch)
        with torch.no_grad():
            self.expected: np.ndarray = self.model(self.x).numpy()
        self.facts: dict[str, Any] = {
            "model": name,
            "batch": batch,
            "sparsity": sparsity,
            "distribution": distribution,
            **measured_sparsity(self.model, sparsities),
        }

    def write(self, folder: Path, *, onnx: bool) -> dict[str, Any]:
        """Write the files; return the job as the systems take it."""
        paths = {"weights": folder / "weights.pt", "onnx": folder / "model.onnx", "input": folder / "input.npy"}
        torch.save(self.model.state_dict(), paths["weights"])
        np.save(paths["input"], self.x.numpy())
        if onnx:
            export_onnx(self.model, self.x, paths["onnx"])
        files = {key: str(path) for key, path in paths.items()}
        return {"model": self.name, "batch": self.batch, "threads": self.threads, **files}

    def error(self, output: np.ndarray) -> float:
        return float(np.abs(output - self.expected).max() / np.abs(self.expected).max())


def measured_sparsity(model: nn.Module, sparsities: Mapping[str, float]) -> dict[str, float]:
    masked = [model.get_parameter(name) for name in sparsities]
    zeros = sum(int((weight == 0).sum()) for weight in masked)
    return {
        "zeros_of_masked": zeros / sum(weight.numel() for weight in masked),
        "zeros_of_all": zeros / sum(parameter.numel() for parameter in model.parameters()),
    }


@contextlib.contextmanager
def loaded(
    case: Case, folder: Path, args: argparse.Namespace
) -> Iterator[tuple[dict[str, SystemProcess], dict[str, dict[str, Any]]]]:
    """The systems that run, ready for bursts, and what is known of each so far: errors, or why it is skipped."""
    skipped: dict[str, dict[str, Any]] = {}
    exported = any(SYSTEMS[name].reads_onnx for name in args.systems)
    try:
        job = case.write(folder, onnx=exported)
    except (ImportError, torch.onnx.OnnxExporterError) as error:
        reason = f"no ONNX file: {str(error).splitlines()[0]}"
        skipped = {name: {"skipped": reason} for name in args.systems if SYSTEMS[name].reads_onnx}
        job = case.write(folder, onnx=False)
    running: dict[str, SystemProcess] = {}
    found = dict(skipped)
    with contextlib.ExitStack() as stack:
        for name in (name for name in args.systems if name not in skipped):
            process = stack.enter_context(SystemProcess(name, args.interpreters.get(name), folder, args.threads))
            output = folder / f"{name}.npy"
            found[name] = process.ask(do="load", job=job, output=str(output))
            if "skipped" not in found[name]:
                running[name] = process
                found[name]["error"] = case.error(np.load(output))
        for name in args.systems:
            print(f"  {name}: {found[name].get('skipped') or described(found[name])}", flush=True)
        yield running, found


def described(system: Mapping[str, Any]) -> str:
    return f"loaded in {system['load_seconds']:.1f} s, error {system['error']:.1e}"


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    latency = CoreLatency()
    between_cores: list[float | None] = []
    with tempfile.TemporaryDirectory() as folder, loaded(case, Path(folder), args) as (running, found):
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
        for _ in range(args.rounds):
            between_cores.append(latency.nanoseconds())
            for name in list(rounds):
                burst = running[name].rested_burst(args.burst_seconds)
                rounds[name].append(burst)
                if "skipped" in burst:
                    found[name] = burst
                    del rounds[name]
    for name, bursts in rounds.items():
        found[name] |= {key: [burst[key] for burst in bursts] for key in bursts[0]}
    return summarized(
        {
            **case.facts,
            "threads": args.threads,
            "rounds": args.rounds,
            "systems": {name: found[name] for name in args.systems},
            "core_to_core_ns": between_cores,
            "core_to_core_cores": [latency.cores[0], latency.cores[-1]] if latency.reason is None else None,
            "core_to_core_missing": latency.reason,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "machine": {"device": cpu_name(), "cores": os.cpu_count(), "features": cpu_features()},
        }
    )


def wrong(result: Mapping[str, Any]) -> bool:
    error = result["systems"].get("autosparse", {}).get("error", 0.0)
    return not error <= TOLERANCE


def measure_all(args: argparse.Namespace) -> bool:
    """Measure what is not stored yet; return whether all outputs were right."""
    right = True
    args.results.mkdir(parents=True, exist_ok=True)
    for name, batch, distribution, sparsity in product(args.model, args.batch, args.distribution, args.sparsity):
        label = f"{name}-b{batch}-{distribution}-{sparsity:g}"
        path = args.results / f"{label}.json"
        if path.exists() and not args.again:
            print(f"{label}: stored")
            continue
        try:
            case = Case(name, batch, sparsity, distribution, args)
        except NotAvailable as reason:
            print(f"{label}: skipped: {reason}")
            continue
        print(label, flush=True)
        results = [measure(case, args) for _ in range(args.runs)]
        result = median_run(results)
        path.write_text(json.dumps(result, indent=1) + "\n")
        for line in _inference_tables.lines(result):
            print(f"  {line}")
        if any(map(wrong, results)):
            print(f"  WRONG: the error of autosparse is above {TOLERANCE}")
            right = False
    return right


def stored(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def interpreters(named: list[str]) -> dict[str, str]:
    """The Python of each system; one for `openvino` is for `openvino-bf16` too."""
    found: dict[str, str] = {}
    for item in named:
        family, separator, python = item.partition("=")
        systems = [name for name in SYSTEMS if name == family or name.startswith(f"{family}-")]
        if not separator or not systems:
            raise SystemExit(f"--peer-python {item}: write SYSTEM=PATH, with one of {', '.join(SYSTEMS)}")
        if shutil.which(python) is None:
            raise SystemExit(f"--peer-python {item}: {python} cannot be run")
        found |= dict.fromkeys(systems, python)
    return found


def among(known: Mapping[str, Any] | tuple[str, ...]) -> Any:
    """An argument type: names separated by commas."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; choose from {', '.join(known)}")
        return names

    return parse


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Lists are separated by commas.")
    parser.add_argument("--model", type=among(BUILDERS), default=list(BUILDERS), help=", ".join(BUILDERS))
    parser.add_argument("--batch", type=lambda s: [int(n) for n in s.split(",")], default=[1, 8], help="(default: 1,8)")
    parser.add_argument(
        "--sparsity", type=lambda s: [float(n) for n in s.split(",")], default=[0.8, 0.9, 0.95],
        help="(default: 0.8,0.9,0.95)",
    )  # fmt: skip
    parser.add_argument(
        "--distribution", type=among(DISTRIBUTIONS), default=list(DISTRIBUTIONS), help=", ".join(DISTRIBUTIONS)
    )
    parser.add_argument("--systems", type=among(SYSTEMS), default=list(SYSTEMS), help=", ".join(SYSTEMS))
    parser.add_argument(
        "--peer-python", action="append", default=[], metavar="SYSTEM=PATH", help="the Python that has this system"
    )
    parser.add_argument(
        "--runs", type=int, default=1, help="of everything, each in new processes (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=9, help="(default: %(default)s)")
    parser.add_argument(
        "--burst-seconds", type=float, default=0.3, help="of forwards, at least 3, per round (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=available_cores(), help="(default: all cores, %(default)s)")
    parser.add_argument(
        "--data-dir", type=Path, default=Path(os.environ.get("AUTOSPARSE_DATA", "data")),
        help="folder of the data sets (default: environment variable AUTOSPARSE_DATA, or 'data')",
    )  # fmt: skip
    parser.add_argument("--again", action="store_true", help="measure what is stored already, too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="print the tables of the stored results, measure nothing")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the stored results, measure nothing")
    args = parser.parse_args()
    args.interpreters = interpreters(args.peer_python)
    return args


def main() -> None:
    args = parse_arguments()
    if args.table:
        _inference_tables.print_tables(stored(args.results))
    if args.plot:
        _inference_tables.draw(stored(args.results), args.plot)
    if args.table or args.plot:
        return
    if BASELINE not in args.systems:
        print(f"without {BASELINE} among the systems there are times, but no speed-ups")
    if not measure_all(args):
        sys.exit(1)


if __name__ == "__main__":
    main()
