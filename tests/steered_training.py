"""Trainings that are steered, and whether they reached their target."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn

import autosparse_fx
from autosparse_fx import AutoSparse, GradientAnnealing
from autosparse_fx.steering import MAX_CUT

POINT = 0.01


LOGIT_OF_MAX_CUT = math.log(MAX_CUT / (1 - MAX_CUT))


def sgd(parameters: Any, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-4)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=3e-3)


def train(
    model: nn.Module,
    config: AutoSparse,
    make_optimizer: Callable[[Any], torch.optim.Optimizer] = sgd,
    steps: int = 120,
    batches: Iterator[tuple[Tensor, Tensor]] | None = None,
    shape: tuple[int, ...] = (16,),
    after_step: Callable[[GradientAnnealing], object] | None = None,
) -> nn.Module:
    autosparse_fx.sparsify(model, config)
    optimizer = make_optimizer(model.parameters())
    annealer = GradientAnnealing(model, steps, optimizer)
    callback = None if after_step is None else lambda: after_step(annealer)
    losses = reference.train(model, optimizer, batches or reference.classification_batches(steps, shape), callback)
    assert annealer.steps == steps and all(map(math.isfinite, losses))
    for name, logit in autosparse_fx.thresholds(model).items():
        assert bool(logit.isfinite().all()), name
    return model


def assert_target(model: nn.Module, target: float, tolerance: float = 0.5 * POINT) -> None:
    assert reference.total_sparsity(model) == pytest.approx(target, abs=tolerance)
    assert autosparse_fx.sparsity(model) == pytest.approx(target, abs=tolerance)


def multiply(model: nn.Module, factors: dict[str, float]) -> nn.Module:
    with torch.no_grad():
        for name, factor in factors.items():
            model.get_parameter(name).mul_(factor)
    return model


def offsets_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers() if name.endswith("_offset")}
