"""Which modules hold a parameter: asked of the garbage collector, because a graph knows tensors and not their owners.

Slow (a walk over all live objects), and used once per compiled graph at most.
"""

import gc
import weakref
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from autosparse_fx.dtensors import full_tensor
from autosparse_fx.selection import collect

_finalized = WeakIdKeyDictionary()  # parameters of finalized models, and whether they were masked in them
_no_owners: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


@dataclass(frozen=True)
class Place:
    """Where a parameter was found."""

    names: tuple[str, ...]  # relative to ``root``, and to modules inside that were compiled by themselves
    root: nn.Module  # the outermost module that holds it
    scope: nn.Module  # what was given to torch.compile: a part of ``root``, or all of it


def remember_finalized(parameters: Iterable[Tensor], masked: Collection[int]) -> None:
    """Note that these parameters, of which those with the ids ``masked`` were, are of a model that was sparse: to tune
    it further is no mistake."""
    for parameter in parameters:
        _finalized[parameter] = id(parameter) in masked or was_masked(parameter)


def was_masked(parameter: Tensor) -> bool:
    """Whether the parameter was masked in a model that was finalized."""
    return _finalized.get(parameter, False)  # type: ignore[no-any-return]


def holds_only_for_us(module: nn.Module) -> None:
    """Note that this module is a means of ours, and no part of the model that its parameters are of."""
    _no_owners.add(module)


def is_finalized(parameter: Tensor) -> bool:
    """Whether the parameter is of a model that was finalized."""
    return parameter in _finalized


def unprepared(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Those of the parameters that belong to no model that was prepared, the original or a copy of it: neither in the
    module that holds one nor in any around it is there a module that holds a masked weight, or did."""
    unknown = [parameter for parameter in parameters if parameter not in _finalized]
    ancestors = _Ancestry(unknown).ancestors if unknown else []
    roots = [root for root in ancestors if any("_autosparse" in vars(m) for m in root.modules())]
    prepared = {id(parameter) for root in roots for parameter in root.parameters()}
    return [parameter for parameter in unknown if id(parameter) not in prepared]


def holds_zeros(parameters: Sequence[Tensor]) -> bool:
    """Whether these weights, with those of all layers of the models that hold them, are a sparse model's: half of
    their elements or more are exactly zero. Tensors of nothing but zeros are not counted: layers are initialised so.

    A copy of a finalized model, saved and loaded or not, is known by nothing else.
    """
    counted = {id(p): p for p in parameters}
    for root in _Ancestry(parameters).outermost():
        counted.update((id(c.parameter), c.parameter) for c in collect(root) if c.axis is not None)
    return half_are_zeros(counted.values())


def half_are_zeros(tensors: Iterable[Tensor]) -> bool:
    """Whether half of all elements or more are exactly zero, tensors of nothing but zeros not counted."""
    zeros = total = 0
    with torch.no_grad():
        for tensor in map(full_tensor, tensors):
            found = tensor.numel() - int(torch.count_nonzero(tensor))
            if found < tensor.numel():
                zeros, total = zeros + found, total + tensor.numel()
    return total > 0 and 2 * zeros >= total


def places(parameters: Sequence[Tensor]) -> dict[int, Place]:
    """Return, by id, where each parameter is held, and every other parameter of the same models; those that no module
    holds are missing."""
    ancestry = _Ancestry(parameters)
    names: dict[int, list[str]] = {}
    roots: dict[int, nn.Module] = {}
    scopes: dict[int, nn.Module] = {}
    for root in ancestry.outermost():
        compiled = [module for module in root.modules() if ancestry.is_compiled(module)]
        for base in (root, *compiled):
            for name, parameter in base.named_parameters(remove_duplicate=False):
                names.setdefault(id(parameter), []).append(name.replace("_orig_mod.", ""))
                roots.setdefault(id(parameter), root)
                if base is not root or any(base is c for c in compiled):
                    scopes.setdefault(id(parameter), base)
    return {
        key: Place(tuple(dict.fromkeys(found)), roots[key], scopes.get(key, roots[key])) for key, found in names.items()
    }


def holders(parameters: Sequence[Tensor]) -> list[nn.Module]:
    """The live modules that hold one of these parameters themselves."""
    wanted = {id(p) for p in parameters}
    return [m for m in _live_modules() if any(id(p) in wanted for p in m._parameters.values())]


def _live_modules() -> list[nn.Module]:
    """By type and not by isinstance, which would wake lazily loaded proxies."""
    return [o for o in live_objects() if issubclass(type(o), nn.Module) and "_modules" in vars(o)]


class _Ancestry:
    """The live modules that hold some parameters, and all modules around those."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        wanted = {id(p) for p in parameters}
        modules = _live_modules()
        self._parents: dict[int, list[nn.Module]] = {}
        pending: list[nn.Module] = []
        for module in modules:
            if any(id(p) in wanted for p in module._parameters.values()) and module not in _no_owners:
                pending.append(module)
            for child in module._modules.values():
                self._parents.setdefault(id(child), []).append(module)
        found: dict[int, nn.Module] = {}
        while pending:
            module = pending.pop()
            if id(module) not in found:
                found[id(module)] = module
                pending.extend(self._parents.get(id(module), ()))
        self.ancestors = list(found.values())

    def outermost(self) -> list[nn.Module]:
        """The modules that no other module holds, without the wrappers of torch.compile and data parallelism."""
        found = []
        for module in self.ancestors:
            if not self._parents.get(id(module)):
                while (inner := _wrapped(module)) is not None:
                    module = inner
                found.append(module)
        return found

    def is_compiled(self, module: nn.Module) -> bool:
        """Whether the module was given to torch.compile, or compiled in place."""
        parents = self._parents.get(id(module), ())
        return module._compiled_call_impl is not None or any("_orig_mod" in parent._modules for parent in parents)


def live_objects() -> list[Any]:
    """What the garbage collector tracks, and what ``gc.freeze()`` has hidden from it."""
    if gc.get_freeze_count() == 0:
        return gc.get_objects()
    gc.unfreeze()
    gc.collect()  # so that no garbage of the time since is frozen with the rest
    found = gc.get_objects()
    gc.freeze()
    return found


def _wrapped(module: nn.Module) -> nn.Module | None:
    if "_orig_mod" in module._modules:
        return module._modules["_orig_mod"]
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else None
