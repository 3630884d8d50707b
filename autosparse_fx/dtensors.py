"""Weights that are DTensors: where their thresholds lie, and how masks and their gradients are sharded.

A weight is a DTensor where ``parallelize_module`` made it one (tensor parallelism), and then its threshold and its
offset are DTensors of the same mesh: sharded with the weight where there is one per channel and the channels are
sharded, replicated otherwise. Under FSDP2 alone weights and thresholds are DTensors only between two forwards; offsets
and alpha never are: every rank has them, and moves them by the same amount.
"""

import functools
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(t: object) -> "TypeGuard[DTensor]":
    """Whether ``t`` is a DTensor; importing their package, which takes most of a second, only where it may be one."""
    if type(t) in (Tensor, nn.Parameter) or not isinstance(t, Tensor) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(t, DTensor)


def full_tensor(t: Tensor) -> Tensor:
    """The whole of a tensor, gathered where it is a DTensor: then every rank must call this."""
    return t.full_tensor() if is_dtensor(t) else t


def placed_like(value: Tensor, other: Tensor) -> Tensor:
    """``value``, which every rank has, laid out as ``other`` is. Nothing is communicated."""
    if not is_dtensor(other):
        return value
    return _placed(value, other.device_mesh, other.placements)


def placed_beside(value: Tensor, weight: Tensor, axis: int) -> Tensor:
    """One number for ``weight``, or one for each of its channels, laid out beside it."""
    if not is_dtensor(weight):
        return value
    from torch.distributed.tensor import Replicate, Shard

    register_sharding()
    sharded = [value.numel() > 1 and p.is_shard(axis) for p in weight.placements]
    return _placed(value, weight.device_mesh, [Shard(0) if s else Replicate() for s in sharded])


def _placed(value: Tensor, mesh: Any, placements: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate

    replicated = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=placements)


def with_summed_gradient(t: Tensor) -> Tensor:
    """``t``, but a gradient of which every rank has a part is summed before it reaches ``t``.

    The gradient of a replicated threshold of a sharded weight is such a one, and optimizers would keep it as it is in
    their momentum.
    """
    return t.redistribute(placements=t.placements) if is_dtensor(t) else t


@functools.cache
def register_sharding() -> None:
    """Tell DTensor how the two operators may be sharded, in the words of ``torch.distributed.tensor.experimental``."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding as register

    def layouts(weight: Any, threshold: Any) -> list[tuple[Any, Any]]:
        """The layouts of a weight, each with that of its threshold, which is broadcast to it."""
        dims = len(weight.shape)
        lacking = dims - len(threshold.shape)
        along = [d >= lacking and threshold.shape[d - lacking] != 1 for d in range(dims)]
        return [(Shard(d), Shard(d - lacking) if along[d] else Replicate()) for d in range(dims)]

    @register(torch.ops.autosparse.threshold_mask.default)
    def mask(weight: Any, threshold: Any, alpha: Any) -> list[tuple[list[Any], list[Any]]]:
        rows = [(Replicate(), Replicate()), *layouts(weight, threshold)]
        return [([w], [w, s, Replicate()]) for w, s in rows]

    @register(torch.ops.autosparse.anneal_gradient.default)
    def gradient(grad: Any, weight: Any, threshold: Any, alpha: Any) -> list[tuple[list[Any], list[Any]]]:
        whole = Replicate()
        rows: list[tuple[list[Any], list[Any]]] = [([g, g], [g, whole, whole, whole]) for g in (whole, Partial())]
        for w, s in layouts(weight, threshold):
            rows.append(([w, Partial() if s == whole else s], [w, w, s, whole]))
        return rows
