"""Measure what sparsity costs in accuracy: sparse against dense, same recipe, same seeds, in pairs.

    python benchmarks/accuracy.py --data-dir data              (all groups; two runs at a time, one thread each)
    python benchmarks/accuracy.py --table                      (only print what the stored results say)

The learning rate of each optimizer is the best of three for the *dense* network with seed 0; every other run uses it.
A run whose result is in `benchmarks/results/accuracy/` is not made again, so that an interrupted benchmark continues.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
TRAINER = ROOT.parent / "examples" / "train_image_classifier.py"
SEEDS = 3
MORE_SEEDS = (
    6  # for the two lines that come closest to the limit that was set for them, and for what they are compared to
)

FASHION = ("--data", "fashion-mnist", "--batch-size", "128")
RECIPES = {
    "sgd": (*FASHION, "--optimizer", "sgd", "--momentum", "0.9", "--weight-decay", "5e-4"),
    "adamw": (*FASHION, "--optimizer", "adamw"),
}
LEARNING_RATES = {"sgd": ("0.05", "0.1", "0.2"), "adamw": ("1e-3", "2e-3", "4e-3")}
EPOCHS = {"convnet": 6, "convnet_wide": 12}  # of each network; the results of each are kept apart
CIFAR = ("--arch", "resnet20", "--epochs", "8", "--batch-size", "128", "--optimizer", "sgd", "--lr", "0.1")
COLUMNS = "| seeds | accuracy | difference to dense (points) | sparsity | off target at most |\n" + "| --- " * 6 + "|"


@dataclass(frozen=True)
class Variant:
    """One line of the table: a recipe, and how it is made sparse."""

    label: str
    recipe: str
    options: tuple[str, ...]
    seeds: int = SEEDS


def _target(fraction: str, *more: str) -> tuple[str, ...]:
    return ("--target-sparsity", fraction, *more)


DENSE = {
    "sgd": Variant("sgd, dense", "sgd", ("--dense",), MORE_SEEDS),
    "adamw": Variant("adamw, dense", "adamw", ("--dense",)),
}
STRAIGHT_THROUGH = ("--alpha", "1", "--decay", "fixed", "--alpha-end", "1")
GROUPS: dict[str, tuple[Variant, ...]] = {
    "sparsity": (
        DENSE["sgd"],
        Variant("sgd, default", "sgd", (), MORE_SEEDS),
        Variant("sgd, 90 %", "sgd", _target("0.9"), MORE_SEEDS),
        Variant("sgd, 95 %", "sgd", _target("0.95")),
        Variant("sgd, 98 %", "sgd", _target("0.98")),
        Variant("sgd, open loop", "sgd", _target("none")),
    ),
    "alpha": (
        Variant("sgd, 90 %, alpha 0 (STR)", "sgd", _target("0.9", "--alpha", "0")),
        Variant("sgd, 90 %, alpha 1 (straight-through)", "sgd", _target("0.9", *STRAIGHT_THROUGH)),
    ),
    "optimizers": (
        Variant("sgd, 90 %, param_groups", "sgd", _target("0.9", "--param-groups")),
        DENSE["adamw"],
        Variant("adamw, 90 %", "adamw", _target("0.9")),
    ),
}
CIFAR_VARIANTS = (
    Variant("resnet20, dense", "cifar10", ("--dense",)),
    Variant("resnet20, default", "cifar10", ()),
    Variant("resnet20, 90 %", "cifar10", _target("0.9")),
)


@dataclass(frozen=True)
class Run:
    name: str
    options: tuple[str, ...]


class Benchmark:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.network: str = args.network
        self.failed: list[str] = []

    def path(self, run: Run) -> Path:
        return self.args.results / f"{run.name}.json"

    def result(self, run: Run) -> dict[str, Any] | None:
        path = self.path(run)
        return json.loads(path.read_text()) if path.exists() else None

    def run_all(self, runs: Iterable[Run]) -> None:
        missing = [run for run in dict.fromkeys(runs) if not self.path(run).exists()]
        with ThreadPoolExecutor(self.args.jobs) as pool:
            list(pool.map(self._run, missing))

    def _run(self, run: Run) -> None:
        """Train in a process of its own, on one thread, and keep what the table needs."""
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "result.json"
            command = [sys.executable, str(TRAINER), *run.options, "--threads", "1", "--json", str(output)]
            if self.args.data_dir is not None:
                command += ["--data-dir", str(self.args.data_dir)]
            threads = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True)
            if done.returncode != 0:
                self.failed.append(run.name)
                print(
                    f"{run.name} failed with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}",
                    file=sys.stderr,
                )
                return
            result = json.loads(output.read_text())
        del result["history"]
        partial = self.path(run).with_suffix(".tmp")
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(result) + "\n")
        partial.replace(self.path(run))
        print(f"{run.name}: accuracy {result['accuracy']:.2%}, {result['seconds']:.0f} s", flush=True)

    def tuning_runs(self, recipe: str) -> list[Run]:
        return [self._fashion_run(DENSE[recipe], lr, seed=0) for lr in LEARNING_RATES[recipe]]

    def best_lr(self, recipe: str) -> str | None:
        """The learning rate with the best dense accuracy, once all three are known."""
        results = [self.result(run) for run in self.tuning_runs(recipe)]
        known = [result["accuracy"] for result in results if result is not None]
        if len(known) < len(results):
            return None
        return LEARNING_RATES[recipe][known.index(max(known))]

    def runs(self, variant: Variant) -> list[Run]:
        """The runs of a variant, one per seed; none while its learning rate is not known."""
        if variant.recipe == "cifar10":
            data = ("--data", self.args.cifar10_data, *CIFAR)
            return [Run(f"cifar10/{_slug(variant.label)}-seed0", (*data, *variant.options))]
        lr = self.best_lr(variant.recipe)
        return [] if lr is None else [self._fashion_run(variant, lr, seed=seed) for seed in range(variant.seeds)]

    def _fashion_run(self, variant: Variant, lr: str, *, seed: int) -> Run:
        options = (
            *RECIPES[variant.recipe],
            "--arch",
            self.network,
            "--epochs",
            str(EPOCHS[self.network]),
            "--lr",
            lr,
            "--seed",
            str(seed),
            *variant.options,
        )
        return Run(f"{self.network}/{_slug(variant.label)}-lr{lr}-seed{seed}", options)

    def print_tables(self) -> None:
        for recipe, rates in LEARNING_RATES.items():
            results = zip(rates, map(self.result, self.tuning_runs(recipe)), strict=True)
            known = [f"{lr}: {result['accuracy']:.2%}" for lr, result in results if result is not None]
            if known:
                print(f"Dense {self.network}, seed 0, by learning rate of {recipe}: {', '.join(known)}")
        print(f"\n| Fashion-MNIST, {self.network} {COLUMNS}")
        for variant in (variant for group in GROUPS.values() for variant in group):
            self._print_row(variant, DENSE[variant.recipe])
        cifar = [result for variant in CIFAR_VARIANTS for run in self.runs(variant) if (result := self.result(run))]
        if cifar:
            data = " or ".join(sorted({result["recipe"]["data"] for result in cifar}))
            print(f"\n| {data} {COLUMNS}")
            for variant in CIFAR_VARIANTS:
                self._print_row(variant, CIFAR_VARIANTS[0])
            for variant in CIFAR_VARIANTS[1:]:
                self._print_layers(variant)

    def _print_row(self, variant: Variant, dense: Variant) -> None:
        pairs = [
            (result, reference)
            for run, dense_run in zip(self.runs(variant), self.runs(dense), strict=False)  # by seed
            if (result := self.result(run)) is not None and (reference := self.result(dense_run)) is not None
        ]
        if not pairs:
            return
        accuracy = statistics.mean(result["accuracy"] for result, _ in pairs)
        columns = [variant.label, str(len(pairs)), f"{accuracy:.2%}", "", "", ""]
        if variant is not dense:
            differences = [100 * (result["accuracy"] - reference["accuracy"]) for result, reference in pairs]
            error = f" ± {statistics.stdev(differences) / len(pairs) ** 0.5:.2f}" if len(pairs) > 1 else ""
            sparsities = [result["sparsity"] for result, _ in pairs]
            columns[3:5] = [f"{statistics.mean(differences):+.2f}{error}", f"{statistics.mean(sparsities):.2%}"]
            target = pairs[0][0]["config"]["target_sparsity"]
            if target is not None:
                columns[5] = f"{100 * max(abs(s - target) for s in sparsities):.2f} points"
        print(f"| {' | '.join(columns)} |")

    def _print_layers(self, variant: Variant) -> None:
        result = self.result(self.runs(variant)[0])
        if result is not None:
            layers = ", ".join(f"{layer['name']} {layer['sparsity']:.1%}" for layer in result["layers"])
            print(f"\n{variant.label}, sparsity by layer: {layers}")


def _slug(label: str) -> str:
    for old, new in ((" %", ""), (" (STR)", ""), (" (straight-through)", ""), (",", ""), (" ", "-")):
        label = label.replace(old, new)
    return label


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of sparse against dense training.")
    parser.add_argument(
        "--group",
        action="append",
        choices=("tune", *GROUPS, "cifar10"),
        help="part of the grid, may be repeated (default: all but cifar10); the tuning and the dense runs that a part "
        "needs are made first",
    )
    parser.add_argument(
        "--network", choices=tuple(EPOCHS), default="convnet_wide", help="for Fashion-MNIST (default: %(default)s)"
    )
    parser.add_argument("--data-dir", type=Path, help="folder that holds the data sets; see the training example")
    parser.add_argument("--cifar10-data", choices=("cifar10", "cifar10-jpeg"), default="cifar10")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "accuracy", help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread (default: 2)")
    parser.add_argument("--table", action="store_true", help="print the tables of the stored results, train nothing")
    args = parser.parse_args()

    benchmark = Benchmark(args)
    if not args.table:
        groups = args.group or ["tune", *GROUPS]
        variants = [variant for group in groups for variant in GROUPS.get(group, ())]
        recipes = list(RECIPES) if "tune" in groups else list(dict.fromkeys(variant.recipe for variant in variants))
        benchmark.run_all(run for recipe in recipes for run in benchmark.tuning_runs(recipe))
        variants = [DENSE[recipe] for recipe in recipes if variants] + variants
        if "cifar10" in groups:
            variants += CIFAR_VARIANTS
        benchmark.run_all(run for variant in variants for run in benchmark.runs(variant))
    benchmark.print_tables()
    if benchmark.failed:
        sys.exit(f"failed: {', '.join(benchmark.failed)}")


if __name__ == "__main__":
    main()
