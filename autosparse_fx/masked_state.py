"""What a masked module holds beside its weights, and how that is moved, saved and loaded.

Beside a weight ``<name>``: ``<name>_threshold``, a float32 parameter of shape ``[1]`` or ``[C]`` (a deviation that
starts at 0), and ``<name>_offset``, a persistent float32 buffer of the same shape (where the logit starts, and what
steering moves). Beside all of them alpha, one 0-d float32 buffer for the whole model, which is not saved.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autosparse_fx.initial import initial_logit
from autosparse_fx.moved import is_meta, moved
from autosparse_fx.plan import ModuleState, Slot

MASKED_NAMES = "autosparse_masked"  # in the metadata of a module's state_dict: which of its weights were masked
SCALE = "autosparse_scale"  # and the threshold_scale that its thresholds are for
MASK_DTYPES = (torch.float32, torch.float64)
ALPHA = "autosparse_alpha"  # the non-persistent buffer, shared by all masked modules of a model on one device


def saved_thresholds(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The thresholds in a state dict, by the names of their weights; none in that of a dense or finalized model."""
    names = [key.removesuffix("_threshold") for key in state_dict if key.endswith("_threshold")]
    return {name: state_dict[f"{name}_threshold"] for name in names if f"{name}_offset" in state_dict}


def tells_scale(state_dict: Mapping[str, Any]) -> bool:
    """Whether a state dict has the ``threshold_scale`` of its training, in the metadata that ``torch.save`` keeps."""
    return any(SCALE in metadata for metadata in getattr(state_dict, "_metadata", {}).values())


class MaskedState(nn.Module):
    """A module with masks, as far as it is state."""

    _autosparse: ModuleState
    _autosparse_base: type[nn.Module]
    _autosparse_slots: tuple[Slot, ...]
    _autosparse_scale: float

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move thresholds, offsets and alpha along, but keep them in float32 and shared where they were shared."""
        held = {id(t) for t in _own_state(self)}
        was_meta = [slot for slot in self._autosparse_slots if is_meta(self._parameters.get(slot.threshold))]

        def keep_float32(t: Tensor) -> Tensor:
            return moved(t, fn(t)) if id(t) in held else fn(t)

        super()._apply(keep_float32, recurse)
        for slot in was_meta:
            if not is_meta(self._parameters[slot.threshold]):
                reset_mask(self, slot)
                alpha_of(self).fill_(self._autosparse.plan.config.alpha)
                weight = self._autosparse.weights[slot.name]
                weight.provisional = weight.config.threshold_init == "auto"  # nothing is in these weights yet
        return self

    def _leave_meta(self) -> None:
        """Make real what loading with ``assign=True`` leaves on the meta device: alpha, and after a dense state all."""
        for slot in self._autosparse_slots:
            weight, (threshold, offset), alpha = stored_weight(self, slot), mask_state(self, slot), alpha_of(self)
            if weight.is_meta:
                continue
            if threshold.is_meta:
                made = torch.zeros_like(threshold, device=weight.device)
                self._parameters[slot.threshold] = nn.Parameter(made, threshold.requires_grad)
            if offset.is_meta:
                self._buffers[slot.offset] = torch.zeros_like(offset, device=weight.device)
            if alpha.is_meta:
                value = self._autosparse.plan.config.alpha
                self._buffers[ALPHA] = moved(alpha, torch.full_like(alpha, value, device=weight.device))

    def _keep_float32(self) -> None:
        """Undo what loading a state of lower precision with ``assign=True`` does to thresholds and offsets."""
        for slot in self._autosparse_slots:
            threshold, offset = mask_state(self, slot)
            if threshold.dtype not in MASK_DTYPES:
                self._parameters[slot.threshold] = nn.Parameter(threshold.detach().float(), threshold.requires_grad)
            if offset.dtype not in MASK_DTYPES:
                self._buffers[slot.offset] = offset.float()

    def _rescale(self, slots: list[Slot], ratio: float, *, is_shared: bool) -> None:
        """Have thresholds mean what they did under another ``threshold_scale``."""
        for slot in slots:
            threshold, _ = mask_state(self, slot)
            if is_shared:  # the parameters are tensors of the state that was loaded
                self._parameters[slot.threshold] = nn.Parameter(threshold.detach() * ratio, threshold.requires_grad)
            else:
                with torch.no_grad():
                    threshold.mul_(ratio)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata[MASKED_NAMES] = [slot.name for slot in self._autosparse_slots]
            metadata[SCALE] = self._autosparse_scale

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        dense = []
        for slot in self._autosparse_slots:
            found = [key for key in (slot.threshold, slot.offset) if prefix + key in state_dict]
            if not found and slot.name in local_metadata.get(MASKED_NAMES, ()):
                if strict:
                    error_msgs.append(
                        f"{prefix}{slot.threshold} and {prefix}{slot.offset} are missing although the state_dict is of "
                        "a sparse model: save the whole model.state_dict()"
                    )
            elif prefix + slot.name in state_dict and not found:
                dense.append(slot)
            elif len(found) == 2:
                self._autosparse.weights[slot.name].provisional = False  # what is loaded stays
                self._autosparse.plan.was_trained = True
            elif len(found) == 1:
                (lost,) = {slot.threshold, slot.offset} - set(found)
                error_msgs.append(
                    f"{prefix}{lost} is missing although {prefix}{found[0]} is there: a sparse state_dict has both, "
                    "a dense one has neither; save the whole model.state_dict()"
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._leave_meta()
        self._keep_float32()
        if (ratio := local_metadata.get(SCALE, self._autosparse_scale) / self._autosparse_scale) != 1:
            loaded = [slot for slot in self._autosparse_slots if prefix + slot.threshold in state_dict]
            self._rescale(loaded, ratio, is_shared=local_metadata.get("assign_to_params_buffers", False))
        for slot in dense:
            for key in (slot.threshold, slot.offset):
                if prefix + key in missing_keys:
                    missing_keys.remove(prefix + key)
            reset_mask(self, slot)
        plan = self._autosparse.plan
        if dense and not plan.warned_of_dense_checkpoint:
            plan.warned_of_dense_checkpoint = True
            warnings.warn(
                f"this state_dict has no thresholds for {prefix}{dense[0].name} (a dense checkpoint?): they start "
                "from their initial values, here and wherever else they are missing",
                stacklevel=2,
            )


def stored_weight(module: MaskedState, slot: Slot) -> nn.Parameter:
    """Return the dense parameter behind ``module.<name>``."""
    parameter: Any = module._parameters[slot.name]
    return parameter  # type: ignore[no-any-return]


def mask_state(module: MaskedState, slot: Slot) -> tuple[nn.Parameter, Tensor]:
    """Return the threshold parameter and the offset buffer of one weight."""
    threshold: Any = module._parameters[slot.threshold]
    offset: Any = module._buffers[slot.offset]
    return threshold, offset


def alpha_of(module: MaskedState) -> Tensor:
    """Return the 0-d float32 buffer that holds alpha."""
    alpha: Any = module._buffers[ALPHA]
    return alpha  # type: ignore[no-any-return]


def reset_mask(module: MaskedState, slot: Slot) -> None:
    """Set threshold, offset and alpha of one weight to their initial values, in place."""
    weight = module._autosparse.weights[slot.name]
    threshold, offset = mask_state(module, slot)
    if threshold.is_meta:
        return
    with torch.no_grad():
        threshold.zero_()
        init = weight.config.threshold_init
        logit, weight.provisional = initial_logit(stored_weight(module, slot), init, slot.axis)
        offset.fill_(logit)


def _own_state(module: MaskedState) -> Iterator[Tensor]:
    for slot in module._autosparse_slots:
        threshold, offset = module._parameters.get(slot.threshold), module._buffers.get(slot.offset)
        if threshold is not None and offset is not None:
            yield from (t for t in (threshold, threshold.grad, offset) if t is not None)
    alpha = module._buffers.get(ALPHA)
    if alpha is not None:
        yield alpha
