"""What gives AutoSparse's "2x fewer training FLOPs, 7x fewer inference FLOPs" for ResNet-50 at 80 % sparsity?

    python benchmarks/paper_flops.py [--budgets STR_Budgets_ResNet50.csv]

The abstract of arXiv:2304.06941 states the two factors. How the zeros were spread over the layers, how the sparsity
rose, and how FLOPs were counted was not seen, so this is a reconstruction with assumptions, not a claim:

* counted as in the sparse-training literature: multiply-accumulates of convolutions and the linear layer, and the
  average pool, at 224x224; per step forward + gradient of activations + gradient of weights, where the last is dense
  while alpha > 0 and as sparse as the weights after;
* the zeros are spread by one number p: the density of a layer is proportional to (uses of each of its weights)^-p,
  and 1 at most. p = 0 spreads them evenly; larger p saves where weights are used most, in the early layers;
* the sparsity rises as `AutoSparse` makes it by default: cubic, over the first 60 % of the training; alpha is 0 after
  90 %.

With `--budgets`, the per-layer sparsities of ResNet-50 models trained by STR (the file of that name in the repository
RAIVNLab/STR) are counted in the same way.
"""

import argparse
import csv
from collections.abc import Mapping
from pathlib import Path

import torch
import torchvision

from autosparse_fx import AutoSparse
from autosparse_fx.flops import ModelFlops, count_flops
from autosparse_fx.flops.training import training_flops
from autosparse_fx.steering import scheduled_sparsity

TARGET, INFERENCE = 0.8, 1 / 7
STEPS = 1000


class ResNet50:
    def __init__(self) -> None:
        model = torchvision.models.resnet50()
        self.flops: ModelFlops = count_flops(model, torch.rand(1, 3, 224, 224))
        layers = self.flops.by_layer()
        self.macs = {name: int(layer.forward) for name, layer in layers.items()}
        self.numel = {name: p.numel() for name, p in model.named_parameters() if name in layers}

    def spread(self, p: float) -> dict[str, float]:
        """Sparsities of 80 % in total, with densities proportional to ``uses ** -p``."""
        low, high = 0.0, 1e9
        for _ in range(200):
            scale = (low + high) / 2
            density = {name: min(1.0, scale * self._uses(name) ** -p) for name in self.macs}
            kept = sum(density[name] * n for name, n in self.numel.items()) / sum(self.numel.values())
            low, high = (scale, high) if kept < 1 - TARGET else (low, scale)
        return {name: 1 - d for name, d in density.items()}

    def _uses(self, name: str) -> float:
        return self.macs[name] / self.numel[name]

    def inference(self, sparsities: Mapping[str, float]) -> float:
        """Fraction of the dense multiply-accumulates, average pool included."""
        dense = self.flops.dense.forward + self.flops.pooling
        return self.flops.evaluate(self.flops.sparse.forward + self.flops.pooling, sparsities) / int(dense)

    def sparsity(self, sparsities: Mapping[str, float]) -> float:
        return sum(sparsities[name] * n for name, n in self.numel.items()) / sum(self.numel.values())

    def training(self, sparsities: Mapping[str, float], config: AutoSparse) -> dict[str, float]:
        """Fraction of dense training, of this method and of others."""
        steps = list(range(1, STEPS + 1))
        progress = [scheduled_sparsity(1.0, config.ramp_end, step / STEPS) for step in steps]
        alphas = [0.0 if step / STEPS >= config.alpha_end else 1.0 for step in steps]
        history = [{name: s * p for name, s in sparsities.items()} for p in progress]
        cost = training_flops(self.flops, steps, alphas, history)
        return {"AutoSparse": cost.fraction, **cost.other_fractions}


def main() -> None:
    parser = argparse.ArgumentParser(description="Reconstruct the FLOPs factors of the AutoSparse paper.")
    parser.add_argument("--budgets", type=Path, help="STR_Budgets_ResNet50.csv")
    args = parser.parse_args()
    network, config = ResNet50(), AutoSparse()

    print("| zeros spread by | sparsity | inference | training | STR | RigL | GMP | MEST |\n" + "| --- " * 8 + "|")

    def row(label: str, sparsities: Mapping[str, float]) -> None:
        cost = network.training(sparsities, config)
        inference = network.inference(sparsities)
        others = " | ".join(f"{cost[name]:.3f}" for name in ("STR", "RigL", "GMP", "MEST"))
        print(
            f"| {label} | {network.sparsity(sparsities):.4f} | {inference:.4f} ({1 / inference:.1f}x) | "
            f"{cost['AutoSparse']:.3f} ({1 / cost['AutoSparse']:.2f}x) | {others} |"
        )

    row("p = 0 (evenly)", network.spread(0))
    low, high = 0.0, 2.0
    for _ in range(50):
        p = (low + high) / 2
        low, high = (p, high) if network.inference(network.spread(p)) > INFERENCE else (low, p)
    found = network.spread(p)
    row(f"p = {p:.3f}", found)
    if args.budgets is not None:
        rows = list(csv.reader(args.budgets.open(encoding="utf-8-sig")))
        layers = [line for line in rows if line[0].startswith("Layer ")]
        for column in range(3, len(rows[1])):
            known = {f"{line[0].split(' - ')[1]}.weight": float(line[column]) / 100 for line in layers}
            row(f"STR's {rows[1][column]} % model", known)

    print(f"\nSparsity by stage at p = {p:.3f}:")
    for stage in ("conv1", "layer1", "layer2", "layer3", "layer4", "fc"):
        names = [name for name in network.numel if name.split(".")[0] == stage]
        zeros = sum(found[name] * network.numel[name] for name in names)
        print(f"  {stage}: {zeros / sum(network.numel[name] for name in names):.3f}")


if __name__ == "__main__":
    main()
