"""Steering: one common shift of all thresholds that puts the sparsity exactly where it should be.

Why this is stable. Every weight has a margin ``m = log|w| - log g(s)``; it is masked when ``m <= 0``. Adding ``d`` to
every ``log g`` masks exactly those with ``m <= d``, so the S-quantile of all margins is the one shift that makes the
fraction S of them zero. The controller computes that quantile from the weights and thresholds as they are, and
remembers nothing: no gain to tune, no integral to wind up, and an error made once is gone at the next shift. What the
gradients do in between moves thresholds against each other (that is how the sparsity is spread over the layers) but
not their common level. Three bounds keep a single layer from running away: no layer is shifted beyond
``max_layer_sparsity`` (nor, while the sparsity rises, far ahead of the others), no cut beyond ``MAX_CUT`` (on the flat
end of the sigmoid a threshold gets no gradient and never returns; weights that batch norm lets grow without limit would
take it there), and a layer that is zero by itself (zero-initialised, say) is never shifted upwards. Log space, because
the cut is a scale, and because a weight above 1 has no logit.

Everything is done with tensors on the model's device and without waiting for it; the histogram is taken over a sample
of each layer, so the cost does not grow with the model. It is the same sample every time: at 98 % sparsity the sampling
error of one layer is some per cent of the weights that are left, and with a new sample at every shift the masks would
jitter by as much. Towards the end of the training, from where alpha is 0, the shifts are rarer and exact, so that the
last one finds nothing to correct that the network could not adapt to any more.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from autosparse_fx.dtensors import full_tensor, is_dtensor, placed_like
from autosparse_fx.masked import MaskedModule, full_logit
from autosparse_fx.masked_state import mask_state, stored_weight
from autosparse_fx.plan import Slot

MAX_CUT = 0.95
BINS = 4096
TOLERANCE = 0.005  # of a reached sparsity, as a fraction: within it a target counts as reached
SAMPLE = 2**16  # weights per layer in an ordinary shift: 0.1 points of standard error for one layer, less in total
EXACT_SAMPLE = 2**22  # in an exact one


class Shift(NamedTuple):
    """How a shift went: 0-d bool tensors on the weights' device.

    Attributes:
        finite: nothing moved where it was not.
        reached: whether the sparsity is what was asked for.
    """

    finite: Tensor
    reached: Tensor


@dataclass(eq=False)
class SteeredWeight:
    """One masked weight: a module that holds it, and the offsets to move (several where tied copies are unshared)."""

    name: str
    module: MaskedModule
    slot: Slot
    offsets: list[Tensor]


def steered_groups(modules: Iterable[MaskedModule]) -> dict[tuple[float, torch.device], list[SteeredWeight]]:
    """The masked weights that share a target (and a device), each tensor once."""
    groups: dict[tuple[float, torch.device], dict[int, SteeredWeight]] = {}
    for module in modules:
        for slot in module._autosparse_slots:
            weight = module._autosparse.weights[slot.name]
            if weight.config.target_sparsity is None or not stored_weight(module, slot).numel():
                continue
            _, offset = mask_state(module, slot)
            group = groups.setdefault((weight.config.target_sparsity, offset.device), {})
            steered = group.setdefault(id(stored_weight(module, slot)), SteeredWeight(weight.name, module, slot, []))
            if not any(offset is other for other in steered.offsets):
                steered.offsets.append(offset)
    return {key: list(group.values()) for key, group in groups.items()}


def scheduled_sparsity(target: float, ramp_end: float, progress: float) -> float:
    """The sparsity to hold after the fraction ``progress`` of the training: a cubic ramp from 0 (Zhu and Gupta,
    arXiv:1710.01878, equation 1) that reaches ``target`` at ``ramp_end``."""
    left = max(0.0, 1 - progress / ramp_end)
    return target * (1 - left**3)


@torch.no_grad()
def masked_fraction(weights: list[SteeredWeight]) -> float:
    """The fraction of all elements of ``weights`` that is masked now, judged by the sample of an ordinary shift."""
    fractions, numels = [], []
    for weight in weights:
        parameter, _, sample, cut = _read(weight, SAMPLE)
        if sample.numel():
            fractions.append((sample.abs().log() <= cut).float().mean())
            numels.append(parameter.numel())
    shares = [float(fraction) * numel for fraction, numel in zip(fractions, numels, strict=True)]  # of any device
    return sum(shares) / max(1, sum(numels))


@torch.no_grad()
def steer(
    weights: list[SteeredWeight],
    sparsity: float,
    max_layer_sparsity: float,
    *,
    ramping: bool = False,
    exact: bool,
) -> Shift:
    """Shift the offsets of ``weights`` so that the fraction ``sparsity`` of all their elements is masked.

    Args:
        weights: all on one device.
        sparsity: in [0, 1].
        max_layer_sparsity: no layer is shifted beyond it.
        ramping: whether the sparsity still rises. Then no layer runs ahead of the others, more than halfway from
            ``sparsity`` to 1, unless it has to: nearly emptied while its weights still look as they were initialised,
            it would keep almost nothing of its scale, and behind a batch norm its gradients explode.
        exact: take a far larger sample.

    Where that cannot be reached, as many are masked as can be.
    """
    limit = EXACT_SAMPLE if exact else SAMPLE
    samples, log_cuts, cuts, numels, sizes = [], [], [], [], []
    norms = []  # or, where nothing was gathered, what they are of
    for weight in weights:
        parameter, log_cut, sample, sample_cut = _read(weight, limit)
        is_gathered = is_dtensor(stored_weight(weight.module, weight.slot))
        samples.append(sample.float().clone() if is_gathered else sample.float())  # frees what was gathered
        cuts.append(sample_cut)
        log_cuts.append(log_cut)
        numels.append(parameter.numel())
        sizes.append(sample.numel())
        norms.append(torch.linalg.vector_norm(parameter) if is_gathered else parameter)
    finite = torch.isfinite(torch.nn.utils.get_total_norm(norms))
    device = samples[0].device
    size = torch.tensor(sizes, dtype=torch.float32).to(device, non_blocking=True)
    numel = torch.tensor(numels, dtype=torch.float32).to(device, non_blocking=True)
    caps = [_most_zeros(n, max_layer_sparsity) / max(1, n) for n in numels]
    cap = torch.tensor(caps, dtype=torch.float32).to(device, non_blocking=True)

    magnitude = torch.cat(samples).abs()
    layer = torch.repeat_interleave(torch.arange(len(sizes), device=device), size.long(), output_size=sum(sizes))
    size = size.clamp(min=1)  # a weight without elements has no fractions
    margin = magnitude.log() - torch.cat(cuts)
    margin = torch.where(magnitude > MAX_CUT, math.inf, margin)
    zeros = torch.zeros_like(size).index_add_(0, layer, (magnitude == 0).float()) / size
    if ramping:
        within_reach = torch.zeros_like(size).index_add_(0, layer, (margin < math.inf).float()) / size
        ahead = torch.minimum(cap, torch.full_like(cap, (1 + sparsity) / 2))
        enough = (torch.minimum(within_reach, ahead) * numel).sum() >= sparsity * numel.sum()
        cap = torch.where(enough, ahead, cap)

    d, layer_d, reached = _common_shift(margin, layer, size, numel, cap, zeros, sparsity)
    finite = finite & torch.isfinite(d)
    shifts = torch.minimum(d, layer_d)
    for i, (weight, log_cut) in enumerate(zip(weights, log_cuts, strict=True)):
        new_cut = torch.clamp(log_cut + shifts[i], max=math.log(MAX_CUT))
        change = torch.where(finite, logit_of_log(new_cut) - logit_of_log(log_cut), 0.0)
        for offset in weight.offsets:
            offset.data.add_(placed_like(change, offset))  # no write that autograd sees: a graph may still need it
    return Shift(finite, finite & reached)


def refuse_unreachable(weights: list[SteeredWeight], target: float, max_layer_sparsity: float) -> None:
    """Raise where so many weights must stay that the target cannot be reached.

    Raises:
        ValueError: naming the weight that holds most of them.
    """
    parameters = [stored_weight(weight.module, weight.slot) for weight in weights]
    numels = [parameter.numel() for parameter in parameters]
    caps = [_most_zeros(numel, max_layer_sparsity) for numel in numels]
    if sum(caps) >= (target - TOLERANCE) * sum(numels) or any(parameter.is_meta for parameter in parameters):
        return
    values = [full_tensor(parameter.detach()) for parameter in parameters]
    caps = [max(cap, v.numel() - int(v.count_nonzero())) for cap, v in zip(caps, values, strict=True)]
    if sum(caps) >= (target - TOLERANCE) * sum(numels):
        return
    kept, name = max((numel - cap, weight.name) for numel, cap, weight in zip(numels, caps, weights, strict=True))
    raise ValueError(
        f"target_sparsity={target} cannot be reached over {len(weights)} weights of {sum(numels)} elements: "
        f"max_layer_sparsity={max_layer_sparsity} and one element for each weight leave {sum(numels) - sum(caps)}, "
        f"{kept} of them in '{name}': lower the target, raise max_layer_sparsity, or leave small weights dense with "
        "rules={...: None}"
    )


def _most_zeros(numel: int, max_layer_sparsity: float) -> int:
    return max(0, min(math.floor(max_layer_sparsity * numel), numel - 1))


def explain_divergence(weights: list[SteeredWeight]) -> str:
    """What to say where the shift of ``weights`` was not finite."""
    for weight in weights:
        values = full_tensor(stored_weight(weight.module, weight.slot).detach())
        if not bool(torch.isfinite(values).all()):
            return (
                f"weight '{weight.name}' {list(values.shape)} holds NaN or infinite values, so its sparsity cannot be "
                "steered: the training has diverged (lower the learning rate, clip gradients, or use GradScaler with "
                "fp16), and the last checkpoint before it is the one to resume from"
            )
        if not bool(torch.isfinite(full_logit(weight.module, weight.slot)).all()):
            return (
                f"the threshold of weight '{weight.name}' is NaN or infinite, so its sparsity cannot be steered: the "
                "training has diverged, or the checkpoint that was loaded is damaged"
            )
    return "the weights cannot be steered: the training has diverged"


def explain_out_of_reach(weights: list[SteeredWeight], target: float) -> str:
    """What to say where ``weights`` cannot have the sparsity that the shift was for."""
    values = [full_tensor(stored_weight(weight.module, weight.slot).detach()) for weight in weights]
    above, numel = sum(int((v.abs() > MAX_CUT).sum()) for v in values), sum(v.numel() for v in values)
    return (
        f"target_sparsity={target} cannot be reached over {len(weights)} weights ('{weights[0].name}', ...): "
        f"{above / max(1, numel):.1%} of their elements are above {MAX_CUT}, where no cut sigmoid(s) reaches, and of "
        "each layer only max_layer_sparsity may be zero; scale the weights down, use weight decay or a lower learning "
        "rate, leave layers dense with rules={...: None}, or lower the target"
    )


def _common_shift(
    margin: Tensor, layer: Tensor, size: Tensor, numel: Tensor, cap: Tensor, zeros: Tensor, sparsity: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve for the common shift; return it, the bound on the shift of each layer, and whether they are enough.

    A histogram of the margins, then one of the bin in which the solution lies: a resolution of one in 4096 squared.
    """
    total = numel.sum()
    usable = torch.isfinite(margin)
    low = torch.where(usable, margin, math.inf).min() - 1e-3
    high = torch.where(usable, margin, -math.inf).max() + 1e-3
    d = low
    layer_d = torch.full_like(size, math.inf)
    for refining in (False, True):
        fraction = _cumulative(margin, layer, size, low, high)  # [layers, BINS + 1], at the edges of the bins
        held = torch.maximum(torch.minimum(fraction, cap[:, None]), zeros[:, None])
        reached = (held * (numel / total)[:, None]).sum(0)
        edge = low + (high - low) * torch.arange(BINS + 1, device=margin.device) / BINS
        if not refining:
            # The largest edge at which a layer is still within its bound; a layer of zeros only stays where it is.
            within = (fraction <= cap[:, None]).sum(1) - 1
            bounded = fraction[:, -1] > cap
            layer_d = torch.where(bounded, edge[within.clamp(min=0)], layer_d)
            layer_d = torch.where(zeros >= cap, 0.0, layer_d)
            is_enough = reached[-1] >= sparsity - TOLERANCE
        at = torch.searchsorted(reached, torch.full_like(reached[:1], sparsity))[0].clamp(1, BINS)
        below, above = reached[at - 1], reached[at]
        part = ((sparsity - below) / (above - below).clamp(min=1e-12)).clamp(0, 1)
        low, high = edge[at - 1], edge[at]
        d = low + part * (high - low)
    d = torch.where(usable.any(), d, 0.0)  # where there are only zeros none is to be made
    return d, layer_d, is_enough


def _cumulative(margin: Tensor, layer: Tensor, size: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The fraction of each layer's margins at or below each of the BINS + 1 edges between ``low`` and ``high``."""
    position = torch.ceil((margin - low) / (high - low) * BINS).clamp(0, BINS + 1)
    position = torch.nan_to_num(position, nan=BINS + 1.0)
    index = layer * (BINS + 2) + position.long()
    counts = torch.zeros(len(size) * (BINS + 2), dtype=torch.int64, device=margin.device)
    counts.index_add_(0, index, torch.ones_like(index))
    return counts.view(len(size), -1).cumsum(1)[:, : BINS + 1].float() / size[:, None]


def _read(weight: SteeredWeight, limit: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The whole weight and the logs of its cuts, and a sample of about ``limit`` elements with those of theirs."""
    parameter = full_tensor(stored_weight(weight.module, weight.slot).detach())
    log_cut = F.logsigmoid(full_logit(weight.module, weight.slot).float()).reshape(-1)
    return parameter, log_cut, *_sample(parameter, log_cut, weight.slot.axis, limit)


def _sample(parameter: Tensor, log_cut: Tensor, axis: int, limit: int) -> tuple[Tensor, Tensor]:
    """Return about ``limit`` elements at equal distances, with the log of the cut that applies to each.

    The distance has no common divisor with the number of elements, so every channel and kernel position is met alike.
    """
    order = sorted(range(parameter.dim()), key=lambda d: parameter.stride()[d], reverse=True)
    dense = parameter.permute(order)
    numel = parameter.numel()
    flat = dense.reshape(-1)  # a view, whatever the memory format
    step = max(1, numel // limit)
    while math.gcd(step, numel) > 1:
        step -= 1
    sample = flat[::step]
    if log_cut.numel() == 1:
        return sample, log_cut.expand(sample.numel())
    inner = math.prod(dense.shape[order.index(axis) + 1 :])
    channel = torch.arange(0, numel, step, device=flat.device) // inner % parameter.shape[axis]
    return sample, log_cut[channel]


def logit_of_log(log_g: Tensor) -> Tensor:
    """``logit(exp(x))`` for x < 0, accurate however small ``exp(x)`` is."""
    return log_g - torch.log(-torch.expm1(log_g))
