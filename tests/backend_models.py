"""Models for the tests of the backend and of tracing."""

import reference
import torch
from torch import nn

from autosparse_fx import AutoSparse, sparsify

MASK = torch.ops.autosparse.threshold_mask.default


X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


def sparse_mlp() -> nn.Sequential:
    return sparsify(reference.mlp(), AutoSparse(alpha=0.5, threshold_init=-2.5))
