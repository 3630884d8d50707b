"""How a module comes to read masked weights: its class becomes a subclass with a property for each masked name.

The parameters stay where they were, under their own names. Beside a weight ``<name>`` its module holds
``<name>_threshold`` (a float32 parameter of shape ``[1]`` or ``[C]``, a deviation that starts at 0) and
``<name>_offset`` (a persistent float32 buffer of the same shape, where the logit starts and what steering moves). The
logit is ``s = offset + scale * threshold``. Reading ``module.<name>`` gives ``threshold_mask(weight, s, alpha)``, so
that eager code, Dynamo, export and make_fx all see one ``threshold_mask`` node, whatever the module does with it.
"""

import copyreg
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from autosparse_fx import dtensors
from autosparse_fx._compat import eager
from autosparse_fx.initial import initial_logit
from autosparse_fx.moved import is_meta, moved
from autosparse_fx.ops import threshold_mask
from autosparse_fx.plan import ModuleState, Slot
from autosparse_fx.reads import masked_once, masking_once, masking_once_outside_graphs
from autosparse_fx.refusals import (
    describe,
    guarded_reset,
    refuse_assignment,
    refuse_late_dtensor,
    refuse_lookup,
    refuse_second_owner,
    refuse_symbolic_trace,
)

MASKED_NAMES = "autosparse_masked"  # in the metadata of a module's state_dict: which of its weights were masked
SCALE = "autosparse_scale"  # and the threshold_scale that its thresholds are for
MASK_DTYPES = (torch.float32, torch.float64)
ALPHA = "autosparse_alpha"  # the non-persistent buffer, shared by all masked modules of a model on one device


class MaskedModule(nn.Module):
    """Marker and shared behaviour of the classes that :func:`masked_class` makes; mixed in before the original."""

    _autosparse: ModuleState
    _autosparse_base: type[nn.Module]
    _autosparse_slots: tuple[Slot, ...]
    _autosparse_scale: float

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__ and reduced[1] == (type(self),):  # type: ignore[attr-defined]
            cls = type(self)
            if "_autosparse_slots" in cls.__dict__:  # not a class that FSDP or parametrize derived from ours
                make = (cls._autosparse_base, cls._autosparse_slots, cls._autosparse_scale)
                return (_new_masked_module, make, *reduced[2:])
        return reduced

    def __delattr__(self, name: str) -> None:
        if any(slot.name == name for slot in self._autosparse_slots):
            raise RuntimeError(
                f"{describe(self, name)} is masked by autosparse_fx and cannot be removed, parametrized, normalised, "
                "pruned or flattened (FSDP1): do that before sparsify, or finalize the model first; to shard a "
                "prepared model use FSDP2 (fully_shard)"
            )
        super().__delattr__(name)

    def __setattr__(self, name: str, value: object) -> None:
        if not self._assigns_dtensor(name, value):
            super().__setattr__(name, value)  # type: ignore[arg-type]

    def _assigns_dtensor(self, name: str, value: object) -> bool:
        """Refuse what no masked weight can become; what FSDP2 assigns goes the short way that it takes elsewhere."""
        if name not in self._parameters or all(slot.name != name for slot in self._autosparse_slots):
            return False
        if dtensors.is_dtensor(value):
            self._parameters[name] = value  # type: ignore[assignment]
            return True
        if value is not None and not isinstance(value, nn.Parameter) and self._autosparse.plan.scope.depth == 0:
            refuse_assignment(self, name, value)
        return False

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        for slot in self._autosparse_slots:
            if name == slot.name and dtensors.is_dtensor(param) and not dtensors.is_dtensor(mask_state(self, slot)[1]):
                refuse_late_dtensor(self, slot, "cannot become a DTensor after sparsify")
            if name in (f"{slot.name}_orig", f"{slot.threshold}_orig"):
                refuse_second_owner(self, slot)
        super().register_parameter(name, param)

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "autosparse_fx does not support torch.nn.DataParallel, whose replicas hold no parameters: "
            "use torch.nn.parallel.DistributedDataParallel"
        )

    @property
    def _distribute_module_applied(self) -> bool:
        """What ``parallelize_module`` asks first, before it reads weights, and sets at last. 2.11-2.15."""
        for slot in self._autosparse_slots:
            if eager.is_asked_by_distributed_tensors() and not dtensors.is_dtensor(mask_state(self, slot)[1]):
                refuse_late_dtensor(self, slot, "cannot become a DTensor after sparsify")
        return bool(self.__dict__.get("_distribute_module_applied", False))

    @_distribute_module_applied.setter
    def _distribute_module_applied(self, value: bool) -> None:
        self.__dict__["_distribute_module_applied"] = value

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


def logit(module: MaskedModule, slot: Slot) -> Tensor:
    """Return ``s = offset + scale * threshold``, shaped ``[1]``, or ``[C, 1, ...]`` for per-channel thresholds."""
    threshold, offset = mask_state(module, slot)
    if type(threshold) is not nn.Parameter:
        return _logit(module, slot, dtensors.with_summed_gradient(threshold), offset)
    return _logit(module, slot, threshold, offset)


def full_logit(module: MaskedModule, slot: Slot) -> Tensor:
    """:func:`logit`, without gradients and gathered from where it is sharded: then every rank must call this."""
    threshold, offset = mask_state(module, slot)
    return _logit(module, slot, dtensors.full_tensor(threshold.detach()), dtensors.full_tensor(offset))


def _logit(module: MaskedModule, slot: Slot, threshold: Tensor, offset: Tensor) -> Tensor:
    s: Tensor = offset + module._autosparse_scale * threshold
    if s.shape[0] != 1:
        dims = stored_weight(module, slot).dim()
        s = s.view([-1 if d == slot.axis else 1 for d in range(dims)])
    return s


def stored_weight(module: MaskedModule, slot: Slot) -> nn.Parameter:
    """Return the dense parameter behind ``module.<name>``."""
    parameter: Any = module._parameters[slot.name]
    return parameter  # type: ignore[no-any-return]


def mask_state(module: MaskedModule, slot: Slot) -> tuple[nn.Parameter, Tensor]:
    """Return the threshold parameter and the offset buffer of one weight."""
    threshold: Any = module._parameters[slot.threshold]
    offset: Any = module._buffers[slot.offset]
    return threshold, offset


def alpha_of(module: MaskedModule) -> Tensor:
    """Return the 0-d float32 buffer that holds alpha."""
    alpha: Any = module._buffers[ALPHA]
    return alpha  # type: ignore[no-any-return]


def masked_weight(module: MaskedModule, slot: Slot) -> Tensor:
    """Return what ``module.<name>`` reads: the masked weight, or the parameter itmodule where it must be dense."""
    weight = stored_weight(module, slot)
    if (
        module._parameters.get(slot.threshold) is None
        or module._autosparse.plan.scope.depth > 0
        or (type(weight) is not nn.Parameter and _is_sharded_by_fsdp(module, slot))
    ):
        return weight
    if torch.compiler.is_compiling():
        return threshold_mask(weight, logit(module, slot), alpha_of(module))
    if eager.is_symbolically_traced(module, slot.name):
        refuse_symbolic_trace(module, slot)
    return masked_once(weight, lambda: _mask(module, slot, weight))


def _is_sharded_by_fsdp(module: MaskedModule, slot: Slot) -> bool:
    """Whether FSDP2 holds this weight sharded at the moment, between two forwards: it reads it then, as it is.

    What it gathers has the mesh of the offset, which it leaves alone: none, or that of tensor parallelism within it.
    """
    weight, (_, offset) = stored_weight(module, slot), mask_state(module, slot)
    if not dtensors.is_dtensor(weight):
        return False
    same = dtensors.is_dtensor(offset) and offset.device_mesh == weight.device_mesh
    if not same and not eager.is_managed_by_fsdp(module):
        refuse_late_dtensor(module, slot, "became a DTensor after sparsify, but its threshold did not")
    return not same


def _mask(module: MaskedModule, slot: Slot, weight: Tensor) -> Tensor:
    masked = threshold_mask(weight, logit(module, slot), alpha_of(module))
    if weight.requires_grad and not masked.requires_grad and not eager.functorch_is_active():
        # As the parameter does without gradients too: torch chooses kernels by it. A view, because autocast would take
        # anything else for a parameter, and keep its cast as long as the context lasts.
        masked = masked.requires_grad_().view_as(masked)
    return masked


def masked_value(module: MaskedModule, slot: Slot) -> Tensor:
    """Return the whole masked weight, gathered where it is sharded: then every rank must call this."""
    weight = dtensors.full_tensor(stored_weight(module, slot))
    return threshold_mask(weight, full_logit(module, slot), alpha_of(module))


def reset_mask(module: MaskedModule, slot: Slot) -> None:
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


def _own_state(module: MaskedModule) -> Iterator[Tensor]:
    for slot in module._autosparse_slots:
        threshold, offset = module._parameters.get(slot.threshold), module._buffers.get(slot.offset)
        if threshold is not None and offset is not None:
            yield from (t for t in (threshold, threshold.grad, offset) if t is not None)
    alpha = module._buffers.get(ALPHA)
    if alpha is not None:
        yield alpha


class _MaskedRNN(MaskedModule):
    """A recurrent layer, which hands a list of its weights to one fused kernel, and caches that list."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: object) -> None:
        pass  # derived from the parameters at every read

    def __setattr__(self, name: str, value: object) -> None:
        if not self._assigns_dtensor(name, value):
            nn.Module.__setattr__(self, name, value)  # type: ignore[arg-type]  # not RNNBase's: it updates the list

    def _weights_have_changed(self) -> bool:
        return False

    def flatten_parameters(self) -> None:
        pass  # it would flatten the masked copies


def _property(slot: Slot) -> property:
    def read(self: MaskedModule) -> Tensor:
        reader = None if torch.compiler.is_compiling() else eager.reader()
        if reader == "weight_norm":
            refuse_second_owner(self, slot)
        try:
            if reader == "get_parameter" and masked_weight(self, slot) is not self._parameters[slot.name]:
                refuse_lookup(self, slot)
            return masked_weight(self, slot)  # not by way of a variable: Dynamo would call the node by its name
        except AttributeError as error:  # nn.Module.__getattr__ would answer with the dense parameter
            raise RuntimeError(f"autosparse_fx could not mask {describe(self, slot.name)}: {error}") from error

    def write(self: MaskedModule, value: object) -> None:
        refuse_assignment(self, slot.name, value)

    return property(read, write, doc=f"The masked {slot.name}; the stored one is in parameters().")


_classes: dict[tuple[type[nn.Module], tuple[Slot, ...], float], type[MaskedModule]] = {}


def masked_class(base: type[nn.Module], slots: tuple[Slot, ...], scale: float) -> type[MaskedModule]:
    """Return the subclass of ``base`` that reads the names in ``slots`` masked; one for all modules alike, so that
    they share compiled code."""
    key = (base, slots, scale)
    if key not in _classes:
        _classes[key] = _make_masked_class(*key)
    return _classes[key]


def _make_masked_class(base: type[nn.Module], slots: tuple[Slot, ...], scale: float) -> type[MaskedModule]:
    mixin = _MaskedRNN if issubclass(base, nn.RNNBase) and slots else MaskedModule
    namespace: dict[str, Any] = {slot.name: _property(slot) for slot in slots}
    namespace |= {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__jit_unused_properties__": [
            *getattr(base, "__jit_unused_properties__", []),
            *namespace,
            *(["_flat_weights"] if mixin is _MaskedRNN else []),
        ],
        "_autosparse_base": base,
        "_autosparse_slots": slots,
        "_autosparse_scale": scale,
        "forward": (masking_once_outside_graphs if mixin is _MaskedRNN else masking_once)(base.forward),
    }
    for reset in ("reset_parameters", "_reset_parameters"):  # the second is that of nn.MultiheadAttention
        if slots and hasattr(base, reset):
            namespace[reset] = guarded_reset(reset)
    metaclass: Any = type(base)
    return metaclass(base.__name__, (mixin, base), namespace)  # type: ignore[no-any-return]


def _new_masked_module(base: type[nn.Module], slots: tuple[Slot, ...], scale: float) -> nn.Module:
    cls = masked_class(base, slots, scale)
    return cls.__new__(cls)
