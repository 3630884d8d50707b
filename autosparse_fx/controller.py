"""The controller of an annealer: it shifts thresholds to the scheduled sparsity, and finds out where that failed."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from autosparse_fx.config import AutoSparse
from autosparse_fx.masked import MaskedModule
from autosparse_fx.steering import (
    SteeredWeight,
    explain_failure,
    masked_fraction,
    refuse_unreachable,
    scheduled_sparsity,
    steer,
    steered_groups,
)


class Controller:
    """Holds the sparsity of masked modules on its schedule, which never falls below where a trained model began.

    So one that is sparse already (a second training, a checkpoint that was loaded without the annealer's state) goes on
    from there, instead of being pruned once more from the start.

    Attributes:
        floors: pairs of a target and the sparsity that the training began with; None before its first step.
    """

    def __init__(self, config: AutoSparse) -> None:
        self._config = config
        self.floors: list[list[float]] | None = None
        self._checks: list[_DeferredCheck] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_checks": []}

    def resume(self, floors: list[list[float]] | None) -> None:
        """Go on as if the shifts so far had been others."""
        self.floors = floors
        self._checks = []

    def check(self, modules: Iterable[MaskedModule]) -> None:
        """Raise where a target cannot be reached.

        Raises:
            ValueError: see :func:`~autosparse_fx.steering.refuse_unreachable`.
        """
        for (target, _), weights in steered_groups(modules).items():
            refuse_unreachable(weights, target, self._config.max_layer_sparsity)

    def begin(self, modules: Iterable[MaskedModule]) -> None:
        """Have the schedule start no lower than where the modules are now, if they were trained before."""
        trained = [m for m in modules if m._autosparse.plan.was_trained]
        self.floors = _masked_now(steered_groups(trained))

    def scheduled(self, target: float, progress: float) -> float:
        """The sparsity to hold after the fraction ``progress`` of the training."""
        floors = [min(target, floor) for theirs, floor in self.floors or [] if theirs == target]
        return max([scheduled_sparsity(target, self._config.ramp_end, progress), *floors])

    def shift(self, modules: Iterable[MaskedModule], progress: float, *, exact: bool) -> None:
        """Shift the thresholds of ``modules`` to where the schedule has them.

        Raises:
            RuntimeError: if this shift, or on a GPU the one before it, was not finite.
        """
        for check in self._take_checks(on_device=True):
            check.raise_if_failed()
        groups = steered_groups(modules)
        exact = exact or progress == 1
        for (target, _), weights in groups.items():
            sparsity = self.scheduled(target, progress)
            limit = self._config.max_layer_sparsity
            finite = steer(weights, sparsity, limit, ramping=sparsity < target, exact=exact)
            self._checks.append(_DeferredCheck(finite, weights, target))
        for check in self._take_checks(on_device=progress == 1):
            check.raise_if_failed()

    def _take_checks(self, *, on_device: bool) -> "list[_DeferredCheck]":
        """Those that need no waiting, or all of them."""
        taken = [check for check in self._checks if on_device or not check.on_device]
        self._checks = [check for check in self._checks if check not in taken]
        return taken


def _masked_now(groups: dict[tuple[float, torch.device], list[SteeredWeight]]) -> list[list[float]]:
    by_target: dict[float, list[SteeredWeight]] = {}
    for (target, _), weights in groups.items():
        by_target.setdefault(target, []).extend(weights)
    return [[target, masked_fraction(weights)] for target, weights in by_target.items()]


class _DeferredCheck:
    """Whether a shift was finite, looked at once the device has come that far, without waiting for it."""

    def __init__(self, finite: Tensor, weights: list[SteeredWeight], target: float) -> None:
        self.on_device = finite.device.type != "cpu"
        self._finite = finite
        self._weights = weights
        self._target = target
        self._ready: torch.cuda.Event | None = None
        if finite.is_cuda:
            pinned = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
            with torch.cuda.device(finite.device):
                self._finite = pinned.copy_(finite, non_blocking=True)
                self._ready = torch.cuda.Event()
                self._ready.record()

    def raise_if_failed(self) -> None:
        if self._ready is not None and not self._ready.query():
            self._ready.synchronize()  # a whole interval old: long done
        if bool(self._finite):
            return
        raise RuntimeError(explain_failure(self._weights, self._target))
