"""Which names of a model are masked, and that they read as the definition says."""

import reference
import torch
from torch import nn


def masked_names(model: nn.Module) -> set[str]:
    return {name for name, *_ in reference.masked_parameters(model)}


def assert_masked(model: nn.Module) -> None:
    """Every masked name reads as the reference says."""
    for name, module, weight, s in reference.masked_parameters(model):
        read = getattr(module, name.rpartition(".")[2])
        assert torch.equal(read, reference.masked(weight, s, 0.0)), name
        assert (read == 0).any() and not torch.equal(read, weight), name
