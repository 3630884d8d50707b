"""Measure what masking costs: a sparse training step against the dense one, and other systems beside it.

    python benchmarks/train_step.py --model resnet50                  (float32)
    python benchmarks/train_step.py --model vit_b_16 --amp            (bfloat16 autocast)
    python benchmarks/train_step.py --table                           (only print what the stored results say)

A step is forward, backward, optimizer, and for the sparse variants annealing. Steering moves the thresholds only every
20 steps, which no median would show: it is timed apart, and given as its share of a step when spread over them. The
variants alternate in one process (A B C A B C), so that whatever else the machine does hits all of them, and a ratio is
the median of the ratios within the rounds. Saved bytes are what autograd keeps between forward and backward,
parameters, buffers and inputs not counted. Cold compile time is the first step with empty caches, warm the first step
after a reset with full ones; of several (``--compile-rounds``, in which the variants take turns too) the medians.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

import autosparse_fx
from _step_models import BATCHES, build, parametrized, pquant
from _step_profile import keep_heap, print_profiles, profiled
from autosparse_fx import AutoSparse
from autosparse_fx.annealing import MAX_STEPS_BETWEEN_SHIFTS

RESULTS = Path(__file__).resolve().parent / "results" / "train_step"
TARGET, TOTAL_STEPS = 0.9, 10_000


@dataclass
class Variant:
    """One way to train: how the model is prepared, and what compiles it."""

    prepare: Callable[[nn.Module], nn.Module]
    backend: str | None
    options: dict[str, Any] | None = None
    against: str = "dense, compiled"


def sparse(model: nn.Module) -> nn.Module:
    return autosparse_fx.sparsify(model, AutoSparse(target_sparsity=TARGET))


def variants(mode: str) -> dict[str, Variant]:
    one_line = {"target_sparsity": TARGET, "total_steps": TOTAL_STEPS}
    options = None if mode == "default" else {"mode": mode}
    dense_options = None if mode == "default" else dict(torch._inductor.list_mode_options(mode))
    found = {
        "dense, compiled": Variant(lambda m: m, "inductor", dense_options),
        "sparse, compiled": Variant(sparse, "autosparse", options),
        "sparse, one line": Variant(lambda m: m, "autosparse", {**one_line, **(options or {})}),
        "sparse, masks kept": Variant(sparse, "autosparse", {**(options or {}), "recompute_masks": False}),
        "STR by parametrize, compiled": Variant(parametrized, "inductor", dense_options),
        "dense, eager": Variant(lambda m: m, None),
        "sparse, eager": Variant(sparse, None, against="dense, eager"),
        "STR by parametrize, eager": Variant(parametrized, None, against="dense, eager"),
    }
    if (prepare := pquant()) is not None:
        found["PQuantML, eager"] = Variant(prepare, None, against="dense, eager")
        found["PQuantML, compiled"] = Variant(prepare, "inductor", dense_options)
    return found


class Trained:
    """One variant of one network, ready to step."""

    def __init__(self, variant: Variant, model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace) -> None:
        self.variant, self.x, self.y, self.amp = variant, x, y, args.amp
        self.device = x.device
        self.model = variant.prepare(model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.001, momentum=0.9, weight_decay=1e-4)
        self.annealer: autosparse_fx.GradientAnnealing | None = None
        if variant.prepare is sparse:
            self.annealer = autosparse_fx.GradientAnnealing(self.model, TOTAL_STEPS, optimizer=self.optimizer)
        self.call: Callable[[Tensor], Tensor] = (
            self.model
            if variant.backend is None
            else torch.compile(self.model, backend=variant.backend, options=variant.options)
        )

    def loss(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return nn.functional.cross_entropy(self.call(self.x), self.y)

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed(self) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        self.step()
        synchronize(self.device)
        return time.perf_counter() - start

    def timed_shift(self) -> float:
        """Seconds of one shift of all thresholds."""
        assert self.annealer is not None
        synchronize(self.device)
        start = time.perf_counter()
        self.annealer._shift()
        synchronize(self.device)
        return time.perf_counter() - start

    def saved_bytes(self) -> int:
        """What one forward pass keeps besides parameters, buffers and inputs."""
        free = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers(), self.x)}
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in free:
                kept[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = self.loss()
        loss.backward()
        self.optimizer.zero_grad()
        return sum(kept.values())

    def peak_bytes(self) -> int:
        """The most memory that a step has in use, above what is in use before it."""
        synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.step()
        synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compile_seconds(trained: Trained, *, warm: bool) -> dict[str, float]:
    """The first step with empty caches, and once more with full ones."""
    if trained.variant.backend is None:
        trained.step()
        return {}
    with fresh_cache():
        found = {"cold": trained.timed()}
        if warm:
            torch._dynamo.reset()
            found["warm"] = trained.timed()
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(args.device)
    torch.manual_seed(0)
    model, x, y = build(args.model, args.batch_size, device)
    if args.channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    chosen = {name: v for name, v in variants(args.mode).items() if not args.variant or name in args.variant}
    torch._inductor.config.cpp.enable_kernel_profile = args.profile
    with fresh_cache():  # what Inductor does once per process
        torch.compile(nn.Linear(2, 2).to(device))(torch.randn(2, 2, device=device)).sum().backward()
    made: dict[str, Trained] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, variant in chosen.items():
        made[name] = Trained(variant, copy.deepcopy(model), x, y, args)
    compiled: dict[str, list[dict[str, float]]] = {name: [] for name in made}
    for _ in range(args.compile_rounds):
        torch._dynamo.reset()
        for name, trained in made.items():
            compiled[name].append(compile_seconds(trained, warm=args.warm))
            print(f"{name}: first step {compiled[name][-1] or 'eager'}", flush=True)
    for name, taken in compiled.items():
        of_rounds = {key: [seconds[key] for seconds in taken] for key in taken[0]}
        found[name] = {"compile": {key: statistics.median(values) for key, values in of_rounds.items()}}
        found[name]["compile_of_rounds"] = of_rounds
    for name, trained in made.items():
        trained.step()
        found[name]["saved_bytes"] = trained.saved_bytes()
        if device.type == "cuda":
            found[name]["peak_bytes"] = trained.peak_bytes()
        trained.step()
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(args.rounds):
        for name, trained in made.items():
            seconds[name].append(statistics.median(trained.timed() for _ in range(args.steps)))
    for name, trained in made.items():
        against = trained.variant.against
        found[name]["seconds"] = statistics.median(seconds[name])
        if trained.annealer is not None:
            shift = statistics.median(trained.timed_shift() for _ in range(5))
            found[name]["steering_share"] = shift / MAX_STEPS_BETWEEN_SHIFTS / found[name]["seconds"]
        if against in seconds:
            ratios = [own / other for own, other in zip(seconds[name], seconds[against], strict=True)]
            found[name] |= {"against": against, "step_ratio": statistics.median(ratios), "ratios": ratios}
        if args.profile:
            found[name]["profile"] = profiled(trained.step)
    return {
        "model": args.model,
        "batch_size": args.batch_size,
        "dtype": "bfloat16 autocast" if args.amp else "float32",
        "channels_last": args.channels_last,
        "mode": args.mode,
        "heap kept": args.keep_heap,
        "rounds": args.rounds,
        "variants": found,
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
    }


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def print_table(results: dict[str, Any]) -> None:
    print(
        f"\n{results['model']}, batch {results['batch_size']}, {results['dtype']}, mode {results['mode']}, "
        f"{'heap kept, ' if results.get('heap kept') else ''}torch "
        f"{results['versions']['torch']}, {results['machine']['device']}, {results['machine']['threads']} threads\n"
    )
    columns = ["variant", "step, ms", "against", "step ratio", "saved bytes ratio", "peak memory ratio"]
    columns += ["cold compile, s", "ratio", "warm, s"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for name, found in results["variants"].items():
        other = results["variants"].get(found.get("against"), {})
        cold, warm, base = *map(found["compile"].get, ("cold", "warm")), other.get("compile", {}).get("cold")
        cells = [name, f"{1000 * found['seconds']:.1f}", *[""] * (len(columns) - 2)]
        if other and other is not found:
            cells[2:4] = [found["against"], f"{found['step_ratio']:.3f}"]
            cells[4] = f"{found['saved_bytes'] / max(1, other['saved_bytes']):.3f}"
            cells[5] = f"{found['peak_bytes'] / other['peak_bytes']:.3f}" if "peak_bytes" in found else ""
            cells[7] = f"{cold / base:.2f}" if cold and base else ""
        cells[6], cells[8] = (f"{seconds:.1f}" if seconds else "" for seconds in (cold, warm))
        print(f"| {' | '.join(cells)} |")
    for name, found in results["variants"].items():
        if "steering_share" in found:
            print(f"\n{name}: steering adds {found['steering_share']:.2%} of a step")
    if profiles := {name: found["profile"] for name, found in results["variants"].items() if "profile" in found}:
        print_profiles(profiles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(BATCHES), default="resnet50")
    parser.add_argument("--batch-size", type=int, help="(default: 8, 16, 4 and 1 of 256 tokens, by model)")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--mode", default="default", help="of torch.compile (default: %(default)s)")
    parser.add_argument("--variant", action="append", help="only these (default: all that are installed)")
    parser.add_argument("--rounds", type=int, default=9, help="of every variant in turn (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1, help="per variant and round (default: %(default)s)")
    parser.add_argument("--compile-rounds", type=int, default=1, help="first steps of every variant in turn")
    parser.add_argument("--warm", action="store_true", help="measure compiling with full caches as well")
    parser.add_argument("--keep-heap", action="store_true", help="glibc: no page faults for what was freed before")
    parser.add_argument("--profile", action="store_true", help="say where the time of a step goes (CPU)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="print the tables of the stored results, measure nothing")
    args = parser.parse_args()
    if args.table:
        for path in sorted(args.results.glob("*.json")):
            print_table(json.loads(path.read_text()))
        return
    if args.compile_rounds < 1:
        parser.error("--compile-rounds must be at least 1")
    if unknown := set(args.variant or ()) - set(variants(args.mode)):
        parser.error(f"--variant {sorted(unknown)}: there are {', '.join(variants(args.mode))}")
    args.batch_size = args.batch_size or BATCHES[args.model]
    if args.keep_heap:
        keep_heap()
    results = measure(args)
    print_table(results)
    args.results.mkdir(parents=True, exist_ok=True)
    name = f"{args.model}-{'bf16' if args.amp else 'fp32'}-{args.device}" + (
        f"-{args.mode}" if args.mode != "default" else ""
    )
    name += "-heap" if args.keep_heap else ""
    (args.results / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
