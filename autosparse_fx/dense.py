"""dense_weights: weights as they are stored, to be written, tied, resized and replaced; masks follow."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autosparse_fx.arguments import check_module
from autosparse_fx.attach import attach, detach_weight, masked_modules
from autosparse_fx.dtensors import full_tensor
from autosparse_fx.initial import new_mask, threshold_shape
from autosparse_fx.masked import MaskedModule
from autosparse_fx.masked_state import alpha_of, mask_state, stored_weight
from autosparse_fx.plan import MaskedWeight, Plan, Slot
from autosparse_fx.selection import Candidate, collect, is_embedding
from autosparse_fx.steering import MAX_CUT, logit_of_log

__all__ = ["dense_weights"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@contextlib.contextmanager
def dense_weights(model: ModuleT) -> Iterator[ModuleT]:
    """Within this context every masked name of ``model`` reads as the stored parameter, and can be written.

    For everything that initialises, ties or resizes weights: ``torch.nn.init``, ``reset_parameters()``, ``.data``,
    Hugging Face's ``tie_weights`` and ``resize_token_embeddings``. (Not for fusing batch norms, which scales weights
    and not their cuts: finalize first.) On leaving, weights that were tied share one threshold, those that were untied
    have their own, per-channel thresholds follow a changed number of channels, and a module that replaced a masked one
    at the same name is masked in its place, by the same cut in standard deviations of its own weights; one that came
    from elsewhere in the model, or from another sparse one, brings its threshold. What ``reset_parameters()``
    initialised begins with a new threshold.

    A model that is not sparse passes through unchanged.
    """
    check_module(model, "dense_weights")
    modules = masked_modules(model)
    plans = {id(m._autosparse.plan): m._autosparse.plan for _, m in modules}
    before = {
        f"{prefix}.{slot.name}" if prefix else slot.name: (module, slot, module._autosparse.weights[slot.name])
        for prefix, module in modules
        for slot in module._autosparse_slots
    }
    for plan in plans.values():
        plan.scope.enter()
    try:
        yield model
    finally:
        for plan in plans.values():
            plan.scope.leave()
        if before and not any(plan.scope.depth for plan in plans.values()):
            _reconcile(model, before)


@dataclass(eq=False)
class _Mask:
    """A mask as it is before any is changed."""

    module: MaskedModule
    slot: Slot
    plan: Plan
    weight: MaskedWeight
    threshold: nn.Parameter
    offset: Tensor
    alpha: Tensor
    scale: float

    @classmethod
    def of(cls, module: MaskedModule, slot: Slot) -> "_Mask":
        state = module._autosparse
        threshold, offset = mask_state(module, slot)
        scale = module._autosparse_scale
        return cls(module, slot, state.plan, state.weights[slot.name], threshold, offset, alpha_of(module), scale)


def _reconcile(model: nn.Module, before: Mapping[str, tuple[nn.Module, Slot, MaskedWeight]]) -> None:
    """Bring masks in line with weights that were tied, untied, resized or replaced inside ``dense_weights``.

    Args:
        before: the masks that there were, by the names of their weights.
    """
    held_before = Counter(id(weight) for _, _, weight in before.values())
    masks = {
        name: _Mask.of(module, slot)
        for name, (module, slot, _) in before.items()
        if isinstance(module, MaskedModule) and slot in module._autosparse_slots  # or finalized inside the context
    }
    aliases = {name: candidate for candidate in collect(model) for name in candidate.names}
    known = {(id(mask.module), mask.slot.name): mask for mask in masks.values()}
    present = {id(module) for candidate in aliases.values() for module, _ in candidate.holders}
    arrived = [
        _Mask.of(module, slot)
        for module in {id(m): m for candidate in aliases.values() for m, _ in candidate.holders}.values()
        if isinstance(module, MaskedModule)
        for slot in module._autosparse_slots
        if (id(module), slot.name) not in known
    ]
    known.update({(id(mask.module), mask.slot.name): mask for mask in arrived})
    in_use = {id(mask.threshold) for mask in known.values() if id(mask.module) in present}
    taken: set[int] = set()
    done: set[int] = set()
    for name, mask in masks.items():
        candidate = aliases.get(name)
        if candidate is None or id(candidate) in done:
            continue  # gone, or seen already
        done.add(id(candidate))
        if candidate.axis is None and not _still_multiplied(mask.weight, candidate):
            for module, held in candidate.holders:
                if isinstance(module, MaskedModule) and held in module._autosparse.weights:
                    detach_weight(module, held)
            continue
        axis = mask.slot.axis if candidate.axis is None else candidate.axis
        weight = mask.weight
        stayed = any(module is mask.module for module, _ in candidate.holders)
        if stayed:
            threshold, offset = mask.threshold, mask.offset
        else:
            weight = replace(weight, name=name, held_by=len(candidate.holders))
            own = next((known[key] for m, held in candidate.holders if (key := (id(m), held)) in known), None)
            is_in_use = id(mask.threshold) in in_use
            threshold, offset = _state_in_place_of(mask, own, candidate.parameter, is_in_use=is_in_use)
        if id(threshold) in taken or id(offset) in taken:
            threshold, offset = nn.Parameter(threshold.detach().clone(), threshold.requires_grad), offset.clone()
            weight = replace(weight, name=name, held_by=len(candidate.holders))
        elif stayed:  # there may be more of them outside of `model`
            weight.held_by += len(candidate.holders) - held_before.get(id(weight), weight.held_by)
        if threshold.shape != threshold_shape(candidate.parameter, axis, weight.config):
            threshold, offset = _resized(candidate.parameter, axis, weight, threshold, offset)
        taken |= {id(threshold), id(offset)}
        for module, held in candidate.holders:
            attach(module, Slot(held, axis), weight, mask.plan, threshold, offset, mask.alpha)


def _state_in_place_of(
    mask: _Mask, own: _Mask | None, parameter: nn.Parameter, *, is_in_use: bool
) -> tuple[nn.Parameter, Tensor]:
    """Threshold and offset of a weight that now stands where another one was masked by ``mask``.

    Args:
        own: the mask that it brings, having stood elsewhere in the model, or in another sparse one.
        is_in_use: whether the threshold of ``mask`` is still that of another weight.
    """
    if own is not None:
        if own.scale == mask.scale:
            return own.threshold, own.offset
        scaled = own.threshold.detach() * (own.scale / mask.scale)
        return nn.Parameter(scaled, own.threshold.requires_grad), own.offset
    threshold = mask.threshold
    if is_in_use:
        threshold = nn.Parameter(threshold.detach().clone(), threshold.requires_grad)
    return threshold, _rescaled(mask, parameter)


@torch.no_grad()
def _rescaled(mask: _Mask, other: Tensor) -> Tensor:
    """The offset with which a cut means to another weight, in standard deviations, what it means to its own."""
    weight: Tensor = stored_weight(mask.module, mask.slot)
    if weight.is_meta or other.is_meta:
        return mask.offset.clone()
    weight, other = (full_tensor(w.detach()).to(weight.device).float() for w in (weight, other))
    if weight.dim() == other.dim():  # what both of them have: a copy that has grown is cut as it was
        common = tuple(slice(min(sizes)) for sizes in zip(weight.shape, other.shape, strict=True))
        weight, other = weight[common], other[common]
    stds = [float(w.std()) if w.numel() > 1 else math.nan for w in (other, weight)]
    if torch.equal(weight, other) or not all(math.isfinite(std) and std > 0 for std in stds):
        return mask.offset.clone()
    log_cut = F.logsigmoid(mask.offset + mask.scale * mask.threshold)
    moved = torch.clamp(log_cut + math.log(stds[0] / stds[1]), max=math.log(MAX_CUT))
    return mask.offset + logit_of_log(moved) - logit_of_log(log_cut)


def _still_multiplied(weight: MaskedWeight, candidate: Candidate) -> bool:
    """Whether a weight that no known layer class multiplies by (now) is one that was found by its use."""
    return weight.found_by_use and (weight.was_embedding or not is_embedding(candidate))


def _resized(
    parameter: nn.Parameter, axis: int, weight: MaskedWeight, threshold: Tensor, offset: Tensor
) -> tuple[nn.Parameter, Tensor]:
    """Per-channel thresholds for a new number of channels: the first ones keep theirs."""
    new_threshold, new_offset = new_mask(parameter, axis, weight)
    kept = min(len(threshold), len(new_threshold))
    with torch.no_grad():
        new_threshold[:kept] = threshold[:kept]
        new_offset[:kept] = offset[:kept]
    return new_threshold, new_offset
