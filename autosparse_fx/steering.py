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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
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
AT_A_TIME = 2**23  # margins that are in memory at once: of all layers in ordinary shifts, of a few in exact ones


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
        parameter, sample = _read(weight, SAMPLE)
        if sample.values.numel():
            fractions.append((sample.margin() <= 0).float().mean())
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
    """Shift the offsets of ``weights`` so that the fraction ``sparsity`` of all their elements is masked, or as many as
    can be.

    Args:
        weights: all on one device.
        sparsity: in [0, 1].
        max_layer_sparsity: no layer is shifted beyond it.
        ramping: whether the sparsity still rises. Then no layer runs ahead of the others, more than halfway from
            ``sparsity`` to 1, unless it has to: nearly emptied while its weights still look as they were initialised,
            it would keep almost nothing of its scale, and behind a batch norm its gradients explode.
        exact: take a far larger sample.
    """
    limit = EXACT_SAMPLE if exact else SAMPLE
    samples, numels = [], []
    norms = []  # or, where nothing was gathered, what they are of
    for weight in weights:
        parameter, sample = _read(weight, limit)
        is_gathered = is_dtensor(stored_weight(weight.module, weight.slot))
        # A copy frees what was gathered.
        samples.append(replace(sample, values=sample.values.clone()) if is_gathered else sample)
        numels.append(parameter.numel())
        norms.append(torch.linalg.vector_norm(parameter) if is_gathered else parameter)
    finite = torch.isfinite(torch.nn.utils.get_total_norm(norms))
    margins = _Margins(samples)
    numel = torch.tensor(numels, dtype=torch.float32).to(margins.device, non_blocking=True)
    caps = [_most_zeros(n, max_layer_sparsity) / max(1, n) for n in numels]
    cap = torch.tensor(caps, dtype=torch.float32).to(margins.device, non_blocking=True)
    if ramping:
        ahead = torch.minimum(cap, torch.full_like(cap, (1 + sparsity) / 2))
        enough = (torch.minimum(margins.within_reach, ahead) * numel).sum() >= sparsity * numel.sum()
        cap = torch.where(enough, ahead, cap)

    d, layer_d, reached = _common_shift(margins, numel, cap, sparsity)
    finite = finite & torch.isfinite(d)
    shifts = torch.minimum(d, layer_d)
    for i, (weight, sample) in enumerate(zip(weights, samples, strict=True)):
        new_cut = torch.clamp(sample.log_cut + shifts[i], max=math.log(MAX_CUT))
        change = torch.where(finite, logit_of_log(new_cut) - logit_of_log(sample.log_cut), 0.0)
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
    above = numel = 0
    for weight in weights:  # one at a time: where they are sharded each is gathered whole
        values = full_tensor(stored_weight(weight.module, weight.slot).detach())
        above, numel = above + int((values.abs() > MAX_CUT).sum()), numel + values.numel()
    return (
        f"target_sparsity={target} cannot be reached over {len(weights)} weights ('{weights[0].name}', ...): "
        f"{above / max(1, numel):.1%} of their elements are above {MAX_CUT}, where no cut sigmoid(s) reaches, and of "
        "each layer only max_layer_sparsity may be zero; scale the weights down, use weight decay or a lower learning "
        "rate, leave layers dense with rules={...: None}, or lower the target"
    )


@dataclass(frozen=True)
class _Sample:
    """Elements of a weight at equal distances, a view of it where it can be, with what their margins are computed from.

    Attributes:
        values: as they are stored.
        log_cut: the logs of the cuts of the weight, ``[1]`` or ``[C]``.
        channels: how many elements the weight has, the distance, how many elements of a channel lie side by side, and
            C; None where there is one cut.
    """

    values: Tensor
    log_cut: Tensor
    channels: tuple[int, int, int, int] | None = None

    def margin(self) -> Tensor:
        """``log|w| - log g(s)`` of each element, float32."""
        cut = self.log_cut
        if self.channels is not None:
            numel, step, inner, count = self.channels
            cut = cut[torch.arange(0, numel, step, device=cut.device) // inner % count]
        return self.values.float().abs().log() - cut


class _Margins:
    """The margins of all weights, a part of them at a time: kept where they are few, else computed at every look.

    Attributes:
        zeros, within_reach: the fraction of each weight that is zero, and that a cut can reach, ``[weights]``.
        low, high: below and above all finite margins, 0-d.
        any: whether there are any, 0-d.
    """

    def __init__(self, samples: list[_Sample]) -> None:
        self.device = samples[0].values.device
        self._parts: list[list[_Sample]] = [[]]
        for sample in samples:
            if sum(s.values.numel() for s in self._parts[-1]) + sample.values.numel() > AT_A_TIME and self._parts[-1]:
                self._parts.append([])
            self._parts[-1].append(sample)
        self._kept: tuple[Tensor, Tensor] | None = None
        sizes = torch.tensor([max(1, s.values.numel()) for s in samples], dtype=torch.float32)
        self._sizes = sizes.to(self.device, non_blocking=True)
        lows, highs, zeros, within = [], [], [], []
        for margin, layer, count in self._looks():
            usable = torch.isfinite(margin)
            lows.append(torch.where(usable, margin, math.inf).min())
            highs.append(torch.where(usable, margin, -math.inf).max())
            none = torch.zeros(count, dtype=torch.float32, device=self.device)
            zeros.append(none.index_add(0, layer, (margin == -math.inf).float()))
            within.append(none.index_add(0, layer, (margin < math.inf).float()))
        self.zeros, self.within_reach = torch.cat(zeros) / self._sizes, torch.cat(within) / self._sizes
        self.low, self.high = torch.stack(lows).min() - 1e-3, torch.stack(highs).max() + 1e-3
        self.any = self.low < self.high

    def at_or_below(self, low: Tensor, high: Tensor) -> Tensor:
        """The fraction of each weight's margins at or below each of the BINS + 1 edges between ``low`` and ``high``."""
        counts = []
        for margin, layer, count in self._looks():
            position = torch.ceil((margin - low) / (high - low) * BINS).clamp(0, BINS + 1)
            position = torch.nan_to_num(position, nan=BINS + 1.0)
            index = layer * (BINS + 2) + position.long()
            histogram = torch.zeros(count * (BINS + 2), dtype=torch.int64, device=self.device)
            counts.append(histogram.index_add_(0, index, torch.ones_like(index)).view(count, -1))
        return torch.cat(counts).cumsum(1)[:, : BINS + 1].float() / self._sizes[:, None]

    def _looks(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """For each part its margins, the number of the weight in the part for each, and how many weights it has."""
        for part in self._parts:
            looked = self._kept if self._kept is not None else self._look(part)
            if len(self._parts) == 1:
                self._kept = looked
            yield *looked, len(part)

    def _look(self, part: list[_Sample]) -> tuple[Tensor, Tensor]:
        margins = []
        for sample in part:
            margin = sample.margin()
            margins.append(torch.where(sample.values.abs() > MAX_CUT, math.inf, margin))
        sizes = [sample.values.numel() for sample in part]
        repeats = torch.tensor(sizes).to(self.device, non_blocking=True)
        numbers = torch.arange(len(part), device=self.device)
        return torch.cat(margins), torch.repeat_interleave(numbers, repeats, output_size=sum(sizes))


def _common_shift(margins: _Margins, numel: Tensor, cap: Tensor, sparsity: float) -> tuple[Tensor, Tensor, Tensor]:
    """Solve for the common shift; return it, the bound on the shift of each layer, and whether they are enough.

    A histogram of the margins, then one of the bin in which the solution lies: a resolution of one in 4096 squared.
    """
    total, zeros = numel.sum(), margins.zeros
    d = low = margins.low
    high = margins.high
    layer_d = torch.full_like(cap, math.inf)
    for refining in (False, True):
        fraction = margins.at_or_below(low, high)  # [layers, BINS + 1], at the edges of the bins
        held = torch.maximum(torch.minimum(fraction, cap[:, None]), zeros[:, None])
        reached = (held * (numel / total)[:, None]).sum(0)
        edge = low + (high - low) * torch.arange(BINS + 1, device=margins.device) / BINS
        if not refining:
            # The largest edge at which a layer is still within its bound; a layer of zeros only stays where it is.
            within = (fraction <= cap[:, None]).sum(1) - 1
            bounded = fraction[:, -1] > cap
            layer_d = torch.where(bounded, edge[within.clamp(min=0)], layer_d)
            layer_d = torch.where(zeros >= cap, 0.0, layer_d)
            is_enough = reached[-1] >= sparsity - TOLERANCE
        at = torch.searchsorted(reached, torch.full_like(reached[:1], sparsity)).clamp(1, BINS)  # [1]: 0-d would wait
        below, above = reached[at - 1], reached[at]
        part = ((sparsity - below) / (above - below).clamp(min=1e-12)).clamp(0, 1)
        low, high = edge[at - 1], edge[at]
        d = low + part * (high - low)
    d = torch.where(margins.any, d, 0.0)  # where there are only zeros none is to be made
    return d.squeeze(0), layer_d, is_enough


def _read(weight: SteeredWeight, limit: int) -> tuple[Tensor, _Sample]:
    """The whole weight, and a sample of about ``limit`` elements."""
    parameter = full_tensor(stored_weight(weight.module, weight.slot).detach())
    log_cut = F.logsigmoid(full_logit(weight.module, weight.slot).float()).reshape(-1)
    return parameter, _sample(parameter, log_cut, weight.slot.axis, limit)


def _sample(parameter: Tensor, log_cut: Tensor, axis: int, limit: int) -> _Sample:
    """About ``limit`` elements at equal distances.

    The distance has no common divisor with the number of elements, so every channel and kernel position is met alike.
    """
    order = sorted(range(parameter.dim()), key=lambda d: parameter.stride()[d], reverse=True)
    dense = parameter.permute(order)
    numel = parameter.numel()
    flat = dense.reshape(-1)  # a view, whatever the memory format
    step = max(1, numel // limit)
    while math.gcd(step, numel) > 1:
        step -= 1
    if log_cut.numel() == 1:
        return _Sample(flat[::step], log_cut)
    inner = math.prod(dense.shape[order.index(axis) + 1 :])
    return _Sample(flat[::step], log_cut, (numel, step, inner, parameter.shape[axis]))


def logit_of_log(log_g: Tensor) -> Tensor:
    """``logit(exp(x))`` for x < 0, accurate however small ``exp(x)`` is."""
    return log_g - torch.log(-torch.expm1(log_g))
