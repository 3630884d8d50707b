"""Weights and thresholds for the tests of the ops."""

import torch
from torch import Tensor

from autosparse_fx.ops import threshold_mask

MASK = torch.ops.autosparse.threshold_mask.default


ANNEAL = torch.ops.autosparse.anneal_gradient.default


THRESHOLDS = ["layer", "axis0", "axis1"]


def make_threshold(kind: str, weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    if kind == "layer":
        return torch.full((1,), -0.4, dtype=dtype)
    axis = int(kind[-1])
    shape = [weight.shape[axis] if d == axis else 1 for d in range(weight.dim())]
    return torch.linspace(-2, 1, weight.shape[axis], dtype=dtype).view(shape)


def run_op(weight: Tensor, s: Tensor, alpha: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    w, s = weight.detach().requires_grad_(), s.detach().requires_grad_()
    value = threshold_mask(w, s, alpha)
    dw, ds = torch.autograd.grad(value, (w, s), grad)
    return value.detach(), dw, ds
