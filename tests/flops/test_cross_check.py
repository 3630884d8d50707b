"""Dense totals against torch's own FlopCounterMode, and counts that were published."""

import csv
import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import _models
from autosparse_fx.flops import ModelFlops, count_flops

models = pytest.importorskip("torchvision.models")

# Input sizes as small as the model takes them. On the meta device nothing is computed, however large the model.
FAST = {
    "resnet18": (1, 3, 64, 64),
    "squeezenet1_0": (1, 3, 64, 64),
    "vgg11_bn": (1, 3, 64, 64),
    "alexnet": (1, 3, 64, 64),
    "resnext50_32x4d": (1, 3, 64, 64),
    "mobilenet_v2": (1, 3, 64, 64),
    "shufflenet_v2_x0_5": (1, 3, 64, 64),
    "vit_b_16": (1, 3, 224, 224),
}
SLOW = {
    "mobilenet_v3_small": (1, 3, 64, 64),
    "mnasnet0_5": (1, 3, 64, 64),
    "googlenet": (2, 3, 64, 64),
    "densenet121": (2, 3, 64, 64),
    "mobilenet_v3_large": (1, 3, 64, 64),
    "inception_v3": (2, 3, 299, 299),
    "swin_t": (1, 3, 64, 64),
    "swin_v2_t": (1, 3, 64, 64),
    "regnet_y_400mf": (1, 3, 64, 64),
    "convnext_tiny": (1, 3, 64, 64),
    "efficientnet_b0": (1, 3, 64, 64),
    "maxvit_t": (1, 3, 224, 224),
    "wide_resnet50_2": (1, 3, 64, 64),
    "lraspp_mobilenet_v3_large": (1, 3, 64, 64),
    "fcn_resnet50": (2, 3, 64, 64),
    "deeplabv3_resnet50": (2, 3, 64, 64),
    "r3d_18": (1, 3, 8, 32, 32),
    "mc3_18": (1, 3, 8, 32, 32),
    "s3d": (1, 3, 16, 224, 224),
    "mvit_v1_b": (1, 3, 16, 224, 224),
    "swin3d_t": (1, 3, 8, 64, 64),
}


def build(name: str) -> nn.Module:
    settings: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if ("resnet50" in name and name.startswith(("fcn", "deeplab"))) or name.startswith("lraspp"):
        settings = {"weights_backbone": None}
    with torch.device(
        "cpu" if name.startswith("regnet") else "meta"
    ):  # which computes with its weights while it is built
        model: nn.Module = models.get_model(name, weights=None, **settings)
    return model


def flop_counter(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """What FlopCounterMode counts: forward, and backward."""
    with FlopCounterMode(display=False) as forward:
        outputs = model(x)
    loss = torch.stack([t.sum() for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def grouped(model: nn.Module) -> bool:
    return any(getattr(module, "groups", 1) > 1 for module in model.modules())


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_totals_are_those_of_flop_counter_mode(name: str) -> None:
    """Backward too, but for models with grouped convolutions, of whose weight gradient it takes no notice."""
    model = build(name)
    x = torch.randn({**FAST, **SLOW}[name], device=next(model.parameters()).device)
    dense = count_flops(model, x).dense
    forward, backward = flop_counter(model, x)
    assert 2 * int(dense.forward) == forward > 0
    if grouped(model):
        assert 2 * int(dense.input_gradient + dense.weight_gradient) < backward
    else:
        assert 2 * int(dense.input_gradient + dense.weight_gradient) == backward


RESNET50 = {"pooling": 100_352, "fc": 2_048_000, "macs": 4_089_284_608, "weights": 25_502_912}
STR_MMACS = {"81.27": 705.4, "90.23": 342.7, "95.15": 162.3, "98.98": 47.4}


def budgets() -> dict[str, dict[str, float]]:
    """Published sparsities of ResNet-50's layers, by overall sparsity in per cent and name of the layer."""
    path = Path(os.environ.get("AUTOSPARSE_DATA", "data")) / "str-budgets" / "STR_Budgets_ResNet50.csv"
    if not path.is_file():
        pytest.skip(f"{path} is not there: AUTOSPARSE_DATA names the folder of the data sets")
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    columns = rows[1][3:]  # the overall sparsity of each model
    layers = {row[0].rpartition(" - ")[2]: row[3:] for row in rows if row[0].startswith("Layer")}
    return {
        overall: {f"{name}.weight": float(values[i]) / 100 for name, values in layers.items()}
        for i, overall in enumerate(columns)
    }


@functools.cache
def resnet50() -> tuple[nn.Module, ModelFlops]:
    model = build("resnet50")
    return model, count_flops(model, torch.randn(1, 3, 224, 224, device="meta"))


def test_resnet50() -> None:
    model, flops = resnet50()
    assert int(flops.pooling) == RESNET50["pooling"]
    assert int(flops.by_layer()["fc.weight"].forward) == RESNET50["fc"]
    assert int(flops.dense.forward + flops.pooling) == RESNET50["macs"]
    parameters = dict(model.named_parameters())
    assert sum(parameters[name].numel() for name in flops.weights) == RESNET50["weights"]


def test_sparse_resnet50_of_str() -> None:
    """As its authors count: MACs of convolutions and the head without zeros, and the average pool."""
    known = budgets()
    _, flops = resnet50()
    for overall, mmacs in STR_MMACS.items():
        sparsities = known[overall]
        assert set(sparsities) == set(flops.weights)
        macs = flops.evaluate(flops.sparse.forward + flops.pooling, sparsities)
        assert isinstance(macs, float)
        assert round(macs / 1e6, 1) == mmacs


def test_mobilenet_v1() -> None:
    with torch.device("meta"):
        model = _models.MobileNetV1(3, 224, 1000)
    flops = count_flops(model, torch.randn(1, 3, 224, 224, device="meta"))
    assert (int(flops.dense.forward), int(flops.pooling)) == (568_740_352, 0)
    parameters = dict(model.named_parameters())
    assert sum(parameters[name].numel() for name in flops.weights) == 4_209_088
