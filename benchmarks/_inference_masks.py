"""How the zeros of the inference benchmark are spread over the layers."""

import csv
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

DISTRIBUTIONS = ("uniform", "erk", "str")
# The overall sparsity, in per cent, of the ResNet-50 that STR's authors published nearest to each.
STR_MODELS = {0.8: "81.27", 0.9: "90.23", 0.95: "95.15"}
STR_FILE = Path("str-budgets") / "STR_Budgets_ResNet50.csv"


class NotAvailable(Exception):
    """Why a distribution cannot be had for a network."""


def uniform(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    return dict.fromkeys(weights, sparsity)


def erdos_renyi_kernel(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """Densities proportional to the sum of a weight's dimensions over their product, at most 1 (arXiv:1911.11134)."""
    raw = {name: sum(w.shape) / math.prod(w.shape) for name, w in weights.items()}
    dense: set[str] = set()
    while True:
        kept = (1 - sparsity) * sum(w.numel() for w in weights.values()) - sum(weights[name].numel() for name in dense)
        scale = kept / sum(raw[name] * w.numel() for name, w in weights.items() if name not in dense)
        too_dense = {name for name in weights if name not in dense and scale * raw[name] > 1}
        if not too_dense:
            return {name: 0.0 if name in dense else 1 - scale * raw[name] for name in weights}
        dense |= too_dense


def str_budget(model: str, sparsity: float, data_dir: Path) -> dict[str, float]:
    """The sparsities of the layers of a ResNet-50 that STR trained on ImageNet, first convolution and head included."""
    if model != "resnet50":
        raise NotAvailable("STR's sparsities are those of resnet50")
    if sparsity not in STR_MODELS:
        raise NotAvailable(f"STR's sparsities are known at {', '.join(map(str, STR_MODELS))} only")
    path = data_dir / STR_FILE
    if not path.is_file():
        raise NotAvailable(f"{path} is not there: --data-dir or AUTOSPARSE_DATA names the folder of the data sets")
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    column = rows[1].index(STR_MODELS[sparsity])
    layers = {row[0].rpartition(" - ")[2]: row[column] for row in rows if row[0].startswith("Layer ")}
    return {f"{name}.weight": float(percent) / 100 for name, percent in layers.items()}


def layer_sparsities(
    distribution: str, model: str, weights: Mapping[str, Tensor], sparsity: float, data_dir: Path
) -> dict[str, float]:
    """The share of zeros of every masked weight."""
    if distribution == "uniform":
        return uniform(weights, sparsity)
    if distribution == "erk":
        return erdos_renyi_kernel(weights, sparsity)
    return str_budget(model, sparsity, data_dir)


@torch.no_grad()
def prune_(weight: Tensor, sparsity: float) -> None:
    """Zero the smallest weights, and scale the others so that the norm stays: activations keep their size."""
    norm = weight.norm()
    smallest = weight.abs().flatten().topk(round(sparsity * weight.numel()), largest=False, sorted=False).indices
    weight.view(-1)[smallest] = 0.0
    weight.mul_(norm / weight.norm())
