"""Models, optimizers and steps for the tests of GradientAnnealing."""

import math
from typing import Any

import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autosparse_fx
from autosparse_fx import AutoSparse


def sparse_mlp(**config: Any) -> nn.Sequential:
    return autosparse_fx.sparsify(reference.mlp(), AutoSparse(**config))


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, **options)


def alphas(model: nn.Module) -> list[Tensor]:
    return [m._buffers["autosparse_alpha"] for m in model.modules() if "autosparse_alpha" in m._buffers]


def alpha_of(model: nn.Module) -> float:
    (value,) = {float(alpha) for alpha in alphas(model)}
    return value


def backward(model: nn.Module, seed: int = 0) -> Tensor:
    ((x, y),) = reference.classification_batches(1, seed=seed)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach()


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    backward(model)
    optimizer.step()
    optimizer.zero_grad()


def scaled_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, *, overflow: bool
) -> None:
    """One step with a ``GradScaler``, which skips it where the gradient of the first weight overflows."""
    optimizer.zero_grad()
    ((x, y),) = reference.classification_batches(1)
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    if overflow:
        model[0]._parameters["weight"].grad[0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()


def float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))
