"""How a module comes to read masked weights: its class becomes a subclass with a property for each masked name.

The parameters stay where they were, under their own names. Beside a weight ``<name>`` its module holds
``<name>_threshold`` (a float32 parameter of shape ``[1]`` or ``[C]``, a deviation that starts at 0) and
``<name>_offset`` (a persistent float32 buffer of the same shape, where the logit starts and what steering moves). The
logit is ``s = offset + scale * threshold``. Reading ``module.<name>`` gives ``threshold_mask(weight, s, alpha)``, so
that eager code, Dynamo, export and make_fx all see one ``threshold_mask`` node, whatever the module does with it.
"""

import copyreg
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from autosparse_fx import dtensors
from autosparse_fx._compat import eager
from autosparse_fx.masked_state import MaskedState, alpha_of, mask_state, stored_weight
from autosparse_fx.ops import threshold_mask
from autosparse_fx.plan import Slot
from autosparse_fx.reads import masked_once, masking_once, masking_once_outside_graphs
from autosparse_fx.refusals import (
    describe,
    guarded_reset,
    refuse_assignment,
    refuse_copy,
    refuse_late_dtensor,
    refuse_lookup,
    refuse_second_owner,
    refuse_stateless_copy,
    refuse_symbolic_trace,
)


class MaskedModule(MaskedState):
    """Marker and shared behaviour of the classes that :func:`masked_class` makes; mixed in before the original."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "_autosparse_slots" in type(self).__dict__:  # type(layer)(...), which is to make a layer of the same kind
            self.__class__ = self._autosparse_base  # type: ignore[assignment]
            self.__init__(*args, **kwargs)  # type: ignore[misc]
        else:
            super().__init__(*args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass  # the classes made here are no new ones for a base that registers those that derive from it

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        cls = type(self)
        if not isinstance(reduced, tuple) or "_autosparse_slots" not in cls.__dict__:
            return reduced  # of a class that FSDP or parametrize derived from ours
        make = (cls._autosparse_base, cls._autosparse_slots, cls._autosparse_scale)
        if reduced[0] is copyreg.__newobj__ and reduced[1] == (cls,):  # type: ignore[attr-defined]
            return (_new_masked_module, make, *reduced[2:])
        if len(reduced) < 3 or not reduced[2]:
            refuse_stateless_copy(self)
        # The class has a way of its own to make one, which is to make a plain one.
        ways = [cls._autosparse_base if way is cls else way for way in (reduced[0], *reduced[1])]
        return (_masked_again, (*make, ways[0], tuple(ways[1:])), *reduced[2:])

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
        if name not in self.__dict__.get("_parameters", ()) or all(
            slot.name != name for slot in self._autosparse_slots
        ):
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


def masked_weight(module: MaskedModule, slot: Slot) -> Tensor:
    """Return what ``module.<name>`` reads: the masked weight, or the parameter itself where it must be dense."""
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


class _MaskedList(MaskedModule):
    """A ``ParameterList``, which would make parameters of their own of the masked weights in a slice of it."""

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, slice):
            return super().__getitem__(key)  # type: ignore[misc]
        values = [self[i] for i in range(*key.indices(len(self)))]  # type: ignore[arg-type]
        return super().__getitem__(key) if _are_stored(values) else values  # type: ignore[misc]


class _MaskedDict(MaskedModule):
    """A ``ParameterDict``, which would make such of the masked weights in a copy of it."""

    def copy(self) -> Any:
        values = dict(self.items())  # type: ignore[operator]
        return super().copy() if _are_stored(values.values()) else values  # type: ignore[misc]

    def __or__(self, other: Any) -> Any:
        own = self.copy()
        return {**own, **other} if isinstance(own, dict) else super().__or__(other)  # type: ignore[misc]

    def __ror__(self, other: Any) -> Any:
        own = self.copy()
        return {**other, **own} if isinstance(own, dict) else super().__ror__(other)  # type: ignore[misc]


def _are_stored(values: Iterable[Any]) -> bool:
    return all(isinstance(value, nn.Parameter) or not isinstance(value, Tensor) for value in values)


class _MaskedGraph(MaskedModule):
    """A GraphModule that holds masked weights itself."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # GraphModule makes a class of its own for each instance
        return cls._autosparse_base(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def __copy__(self) -> Any:
        refuse_copy(self)

    def __deepcopy__(self, memo: Any = None) -> Any:
        refuse_copy(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        refuse_copy(self)


_KINDS: dict[type[nn.Module], type[MaskedModule]] = {
    nn.RNNBase: _MaskedRNN,
    nn.ParameterList: _MaskedList,
    nn.ParameterDict: _MaskedDict,
    GraphModule: _MaskedGraph,
}


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


# As long as there are modules of them: a GraphModule has a class of its own, and code that makes modules may as well.
_classes: "WeakValueDictionary[tuple[type[nn.Module], tuple[Slot, ...], float], type[MaskedModule]]" = (
    WeakValueDictionary()
)


def masked_class(base: type[nn.Module], slots: tuple[Slot, ...], scale: float) -> type[MaskedModule]:
    """Return the subclass of ``base`` that reads the names in ``slots`` masked; one for all modules alike, so that
    they share compiled code."""
    key = (base, slots, scale)
    found = _classes.get(key)
    return _classes.setdefault(key, _make_masked_class(*key)) if found is None else found


def _make_masked_class(base: type[nn.Module], slots: tuple[Slot, ...], scale: float) -> type[MaskedModule]:
    mixin = MaskedModule
    if slots:
        mixin = next((kind for of, kind in _KINDS.items() if issubclass(base, of)), MaskedModule)
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


def _masked_again(
    base: type[nn.Module], slots: tuple[Slot, ...], scale: float, make: Callable[..., nn.Module], args: tuple[Any, ...]
) -> nn.Module:
    made: nn.Module = make(*args)
    made.__class__ = masked_class(base, slots, scale)
    return made


def _new_masked_module(base: type[nn.Module], slots: tuple[Slot, ...], scale: float) -> nn.Module:
    made: nn.Module = object.__new__(masked_class(base, slots, scale))
    return made
