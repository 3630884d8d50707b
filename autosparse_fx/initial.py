"""Where a threshold starts."""

import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from autosparse_fx.config import AutoSparse
from autosparse_fx.dtensors import full_tensor, placed_beside
from autosparse_fx.plan import MaskedWeight

# "auto" starts at a cut of min(AUTO_CUT * sqrt(fan_in), AUTO_CUT_MAX) standard deviations of the layer's own weights,
# so that the mask exists from the first step on and takes nothing that matters (mostly about 1 % of them). Common
# shifts keep the proportions of the cuts, so where they start is where learning how to spread the zeros over the
# layers starts, and Adam, whose steps are small, moves little from it. The square root makes one cut for all layers of
# a network that is initialised as PyTorch does it, std = 1 / sqrt(3 fan_in): global magnitude pruning, in which layers
# with few inputs per output (a first convolution) stay nearly dense. One cut in standard deviations for all would make
# all layers equally sparse instead.
AUTO_CUT = 0.0016
AUTO_CUT_MAX = 0.25
_CUT_BOUNDS = (1e-6, 0.5)


def initial_logit(weight: Tensor, threshold_init: float | str, axis: int) -> tuple[float, bool]:
    """Return the logit that a threshold starts at, and whether it is provisional.

    Provisional is the ``"auto"`` logit of a weight whose values say nothing yet (on the meta device, constant, or not
    finite): its scale is then taken to be that of PyTorch's default initialisation, ``std = 1 / sqrt(3 fan_in)``.
    """
    if threshold_init != "auto":
        return float(threshold_init), False
    fan_in = max(1, weight.numel() // max(1, weight.shape[axis]))
    unknown = weight.is_meta or weight.numel() < 2
    std = math.nan if unknown else float(full_tensor(weight.detach()).float().std())
    provisional = not (math.isfinite(std) and std > 0)
    if provisional:
        std = 1 / math.sqrt(3 * fan_in)
    cut = min(AUTO_CUT * math.sqrt(fan_in), AUTO_CUT_MAX) * std
    cut = min(max(cut, _CUT_BOUNDS[0]), _CUT_BOUNDS[1])
    return math.log(cut / (1 - cut)), provisional


def warn_of_only_zeros(begun: Iterable[tuple[MaskedWeight, Tensor]], stacklevel: int) -> None:
    """Warn of weights that the logit that was asked for masks entirely: mostly it is a cut, taken for a logit."""
    masked = {
        weight.name: weight.config.threshold_init
        for weight, parameter in begun
        if not isinstance(weight.config.threshold_init, str) and _is_below(parameter, weight.config.threshold_init)
    }
    if not masked:
        return
    name, logit = next(iter(masked.items()))
    others = f" ({len(masked)} such weights in all)" if len(masked) > 1 else ""
    meant = f", and {math.log(logit / (1 - logit)):.3g} has the cut {logit}" if 0 < logit < 1 else ""
    warnings.warn(
        f"weight '{name}' begins with only zeros{others}: threshold_init={logit} is a logit, whose cut "
        f"sigmoid({logit}) = {_cut(logit):.3g} is above all of it{meant}; 'auto' takes a cut that fits the weights",
        stacklevel=stacklevel + 1,
    )


def _cut(logit: float) -> float:
    return float(torch.sigmoid(torch.tensor(logit)))


def _is_below(parameter: Tensor, logit: float) -> bool:
    if parameter.is_meta or not parameter.numel():
        return False
    return 0 < float(full_tensor(parameter.detach()).abs().amax()) <= _cut(logit)


def threshold_shape(parameter: Tensor, axis: int, config: AutoSparse) -> torch.Size:
    """``[1]``, or ``[C]`` for a threshold per output channel."""
    return torch.Size([parameter.shape[axis] if config.granularity == "channel" else 1])


def new_mask(parameter: Tensor, axis: int, weight: MaskedWeight) -> tuple[nn.Parameter, Tensor]:
    """Return a threshold (zeros) and an offset (the initial logit) for ``parameter``, both float32.

    The threshold of a frozen parameter is frozen.
    """
    logit, weight.provisional = initial_logit(parameter, weight.config.threshold_init, axis)
    shape = threshold_shape(parameter, axis, weight.config)
    offset = torch.full(shape, logit, dtype=torch.float32, device=parameter.device)
    offset = placed_beside(offset, parameter, axis)
    return nn.Parameter(torch.zeros_like(offset), requires_grad=parameter.requires_grad), offset
