"""Where a threshold starts."""

import math

from torch import Tensor

# "auto" starts at a cut of this fraction of the standard deviation of the layer's weights. A normal layer has 1 % of
# its weights masked by it: the mask exists from the first step on, and takes nothing that matters.
AUTO_CUT_PER_STD = 0.0125
_CUT_BOUNDS = (1e-6, 0.5)


def initial_logit(weight: Tensor, threshold_init: float | str, axis: int) -> tuple[float, bool]:
    """Return the logit that a threshold starts at, and whether it is provisional.

    Provisional is the ``"auto"`` logit of a weight whose values say nothing yet (on the meta device, constant, or not
    finite): its scale is then taken to be that of PyTorch's default initialisation, ``std = 1 / sqrt(3 fan_in)``.
    """
    if threshold_init != "auto":
        return float(threshold_init), False
    std = math.nan if weight.is_meta or weight.numel() < 2 else float(weight.detach().float().std())
    provisional = not (math.isfinite(std) and std > 0)
    if provisional:
        fan_in = max(1, weight.numel() // max(1, weight.shape[axis]))
        std = 1 / math.sqrt(3 * fan_in)
    cut = min(max(AUTO_CUT_PER_STD * std, _CUT_BOUNDS[0]), _CUT_BOUNDS[1])
    return math.log(cut / (1 - cut)), provisional
