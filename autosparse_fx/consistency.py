"""Whether the masks of a model still belong to its weights: what was tied, untied or replaced since ``sparsify``."""

from typing import Any

import torch
from torch import Tensor, nn

from autosparse_fx._compat.dynamo_graphs import storage_id
from autosparse_fx.hidden.masks import hidden_mask
from autosparse_fx.masked import MaskedModule
from autosparse_fx.masked_state import mask_state
from autosparse_fx.ownership import was_masked
from autosparse_fx.plan import Plan, Slot
from autosparse_fx.selection import Candidate, collect

_CURE = (
    "an empty `with autosparse_fx.dense_weights(model): pass` brings the masks in line, before the optimizer is made"
)


def refuse_broken_ties(model: nn.Module) -> None:
    """Raise where a masked tensor is read dense or under another mask somewhere, or shares its mask or its memory with
    another.

    Raises:
        ValueError: naming the weight, where else it is held, and the cure.
    """
    owner: dict[int, str] = {}
    for candidate in collect(model):
        held = [(module, _slot_of(module, name)) for module, name in candidate.holders]
        if all(slot is None for _, slot in held):
            continue
        states = set()
        for (module, slot), name in zip(held, candidate.holder_names, strict=True):
            if slot is None or not isinstance(module, MaskedModule):
                raise ValueError(
                    f"weight {_describe(candidate)} is masked, but reads as it is under the name '{name}', to which it "
                    f"was tied after sparsify, outside of dense_weights: {_CURE}"
                )
            states.add(tuple(map(id, mask_state(module, slot))))
        if len(states) > 1:
            raise ValueError(
                f"weight {_describe(candidate)} is masked by several thresholds, because it was tied after sparsify, "
                f"outside of dense_weights: {_CURE}"
            )
        for part in states.pop():
            other = owner.setdefault(part, candidate.name)
            if other != candidate.name:
                raise ValueError(
                    f"weights '{other}' and {_describe(candidate)} share the state of a mask, but are no longer tied: "
                    f"tie them again, or {_CURE}"
                )
    _refuse_shared_memory(model)


def _refuse_shared_memory(model: nn.Module) -> None:
    by_storage: dict[int, list[tuple[int, int, Candidate]]] = {}
    for candidate in collect(model):
        parameter: Any = candidate.parameter
        is_plain = type(parameter) is nn.Parameter and parameter.layout is torch.strided and not parameter.is_meta
        if is_plain and parameter.numel():
            start = parameter.storage_offset() * parameter.itemsize
            stop = start + _extent(parameter) * parameter.itemsize
            by_storage.setdefault(storage_id(parameter), []).append((start, stop, candidate))
    for sharing in by_storage.values():
        sharing.sort(key=lambda item: item[:2])
        for number, (_, stop, one) in enumerate(sharing):
            for start, _, other in sharing[number + 1 :]:
                if start >= stop:
                    break
                if (_has_mask(one) or _has_mask(other)) and _overlap(one.parameter, other.parameter):
                    raise ValueError(
                        f"weights {_describe(one)} and {_describe(other)} are two parameters in the same memory, where "
                        "a mask of one would be the other's as well: make them one parameter that both places hold (of "
                        "which one may use the transpose in its forward), or give each memory of its own, as "
                        "nn.Parameter(weight.detach().clone()) has it"
                    )


def _has_mask(candidate: Candidate) -> bool:
    return is_masked(candidate) or hidden_mask(candidate.parameter) is not None


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors that lie between the same places of one storage have an element in common."""
    if one.dtype != other.dtype:
        return True
    if _extent(one) == one.numel() and _extent(other) == other.numel():
        return True
    used = torch.zeros(max(t.storage_offset() + _extent(t) for t in (one, other)), dtype=torch.bool)
    used.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(used.as_strided(other.shape, other.stride(), other.storage_offset()).any())


def _extent(tensor: Tensor) -> int:
    """How many elements of its storage lie between the first and the last of a tensor, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def is_masked(candidate: Candidate) -> bool:
    """Whether any module reads this parameter masked."""
    return any(_slot_of(module, name) is not None for module, name in candidate.holders)


def late_weights(model: nn.Module, plans: list[tuple[Plan, str, str]]) -> list[str]:
    """The weights of known layers that came into a prepared part of the model after ``sparsify``, and are dense.

    Args:
        plans: each with how names were prefixed when it was made, and how they are prefixed now.
    """
    return [
        candidate.name
        for candidate in collect(model)
        if candidate.axis is not None
        and not is_masked(candidate)
        and not was_masked(candidate.parameter)
        and any(_came_late(candidate, plan, then, now) for plan, then, now in plans)
    ]


def _came_late(candidate: Candidate, plan: Plan, then: str, now: str) -> bool:
    inside = [name.removeprefix(f"{now}.") for name in candidate.names if not now or name.startswith(f"{now}.")]
    before = [f"{then}.{name}" if then else name for name in inside]
    if not before or any(name in plan.skipped for name in before):
        return False
    return plan.config.rule_for(before)[1] is not None


def _slot_of(module: nn.Module, name: str) -> Slot | None:
    if not isinstance(module, MaskedModule):
        return None
    return next((slot for slot in module._autosparse_slots if slot.name == name), None)


def _describe(candidate: Candidate) -> str:
    return f"'{candidate.name}' {list(candidate.parameter.shape)}"
