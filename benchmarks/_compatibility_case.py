"""A model to check, and what the families of models have in common."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn


class Case(NamedTuple):
    """A small model with nothing random left in it, in training mode, and one batch for it; the same at every call."""

    kind: str
    model: nn.Module
    inputs: dict[str, Any]
    loss: Callable[[Any], Tensor]  # of what the model returns
    reload: Callable[[nn.Module, Path], nn.Module]  # save a plain model in this folder, and load it


class Family(NamedTuple):
    """The models of one library."""

    package: str
    url: str
    models: Mapping[str, Callable[[], Case]]
    reasons: Mapping[str, str]  # why models fail that do, as far as it is known
