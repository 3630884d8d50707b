"""dense_weights: weights as they are stored, to be written, tied, resized and replaced; masks follow."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autosparse_fx.attach import attach, detach_weight, masked_modules
from autosparse_fx.dtensors import full_tensor
from autosparse_fx.initial import new_mask, threshold_shape
from autosparse_fx.masked import MaskedModule
from autosparse_fx.masked_state import alpha_of, mask_state, stored_weight
from autosparse_fx.plan import MaskedWeight, Slot
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
    at the same name is masked in its place.

    A model that is not sparse passes through unchanged.
    """
    modules = masked_modules(model)
    plans = {id(m._autosparse.plan): m._autosparse.plan for _, m in modules}
    before = {
        f"{prefix}.{slot.name}" if prefix else slot.name: (module, slot)
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


def _reconcile(model: nn.Module, before: dict[str, tuple[Any, Slot]]) -> None:
    """Bring masks in line with weights that were tied, untied, resized or replaced inside ``dense_weights``."""
    aliases = {name: candidate for candidate in collect(model) for name in candidate.names}
    held_before = Counter(id(source._autosparse.weights[slot.name]) for source, slot in before.values())
    taken: set[int] = set()
    done: set[int] = set()
    for name, (source, slot) in before.items():
        candidate = aliases.get(name)
        if candidate is None or id(candidate) in done or not isinstance(source, MaskedModule):
            continue  # gone, seen already, or finalized inside the context
        done.add(id(candidate))
        if candidate.axis is None and not _still_multiplied(source._autosparse.weights[slot.name], candidate):
            for module, held in candidate.holders:
                if isinstance(module, MaskedModule) and held in module._autosparse.weights:
                    detach_weight(module, held)
            continue
        axis = slot.axis if candidate.axis is None else candidate.axis
        state = source._autosparse
        weight = state.weights[slot.name]
        threshold, offset = _state_for(candidate, source, slot)
        if id(threshold) in taken or id(offset) in taken:
            threshold, offset = nn.Parameter(threshold.detach().clone(), threshold.requires_grad), offset.clone()
            weight = replace(weight, name=name)
        if threshold.shape != threshold_shape(candidate.parameter, axis, weight.config):
            threshold, offset = _resized(candidate.parameter, axis, weight, threshold, offset)
        # There may be more of them outside of `model`.
        weight.held_by += len(candidate.holders) - held_before.get(id(weight), weight.held_by)
        taken |= {id(threshold), id(offset)}
        alpha = alpha_of(source)
        for module, held in candidate.holders:
            attach(module, Slot(held, axis), weight, state.plan, threshold, offset, alpha)


def _state_for(candidate: Candidate, source: MaskedModule, slot: Slot) -> tuple[nn.Parameter, Tensor]:
    """Threshold and offset for a weight that stands where ``source`` had one."""
    if any(module is source for module, _ in candidate.holders):
        return mask_state(source, slot)
    for module, held in candidate.holders:
        if isinstance(module, MaskedModule) and held in module._autosparse.weights:  # of another model
            threshold, offset = mask_state(module, next(own for own in module._autosparse_slots if own.name == held))
            threshold.data.mul_(module._autosparse_scale / source._autosparse_scale)
            detach_weight(module, held)
            return threshold, offset
    if candidate.parameter is not stored_weight(source, slot):
        _rescale(source, slot, candidate.parameter)
    return mask_state(source, slot)


@torch.no_grad()
def _rescale(module: MaskedModule, slot: Slot, other: Tensor) -> None:
    """Have the cut of one weight mean to another, in standard deviations, what it means to the weight; in place."""
    threshold, offset = mask_state(module, slot)
    stds = [float(full_tensor(w.detach()).float().std()) for w in (other, stored_weight(module, slot)) if w.numel() > 1]
    if len(stds) < 2 or not all(math.isfinite(std) and std > 0 for std in stds):
        return
    log_cut = F.logsigmoid(offset + module._autosparse_scale * threshold)
    moved = torch.clamp(log_cut + math.log(stds[0] / stds[1]), max=math.log(MAX_CUT))
    offset.data.add_(logit_of_log(moved) - logit_of_log(log_cut))


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
