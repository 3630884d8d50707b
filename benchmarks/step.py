"""Measure what masking costs: the compiled sparse training step against the dense one, and the annealer's share.

    python benchmarks/step.py --arch resnet18 --batch-size 16

Dense and sparse steps alternate in one process (A B A B), so that whatever else the machine does hits both; the figures
are medians. The annealer, steering included, is timed apart and spread over the steps between two shifts.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

import autosparse_fx
from autosparse_fx import AutoSparse
from autosparse_fx.annealing import MAX_STEPS_BETWEEN_SHIFTS


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def training_step(model: nn.Module, backend: str, images: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    forward = torch.compile(model, backend=backend)

    def step() -> None:
        nn.functional.cross_entropy(forward(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="resnet18", help="a torchvision classifier (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=224, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="of a dense and a sparse step (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()

    device = torch.device(args.device)
    torch.manual_seed(0)
    dense = torchvision.models.get_model(args.arch, weights=None).to(device)
    sparse = autosparse_fx.sparsify(copy.deepcopy(dense), AutoSparse(target_sparsity=0.9))
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
    labels = torch.randint(0, 1000, (args.batch_size,), device=device)
    steps = {
        "dense": training_step(dense, "inductor", images, labels),
        "sparse": training_step(sparse, "autosparse", images, labels),
    }
    annealer = autosparse_fx.GradientAnnealing(sparse, total_steps=10_000)
    cold = {name: timed(step, device) for name, step in steps.items()}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    anneal, shift = [], []
    for _ in range(args.rounds):
        for name, step in steps.items():
            seconds[name].append(timed(step, device))
        anneal.append(timed(annealer.step, device))
        shift.append(timed(annealer._steer, device))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    overhead = statistics.median(anneal) + statistics.median(shift) / MAX_STEPS_BETWEEN_SHIFTS
    results = {
        "arch": args.arch,
        "batch_size": args.batch_size,
        "step_ratio": median["sparse"] / median["dense"],
        "annealer_share": overhead / median["sparse"],
        "cold_ratio": cold["sparse"] / cold["dense"],
        "dense_seconds": median["dense"],
        "sparse_seconds": median["sparse"],
        "shift_seconds": statistics.median(shift),
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
    }
    print(
        f"{args.arch}, batch {args.batch_size}: sparse step / dense step {results['step_ratio']:.3f}, annealer and "
        f"steering {results['annealer_share']:.2%} of a step, first step (compile) {results['cold_ratio']:.2f}x"
    )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
