"""The controller of an annealer: it shifts thresholds to the scheduled sparsity, and finds out where that failed."""

from collections.abc import Iterable
from typing import Any

import torch

from autosparse_fx.config import AutoSparse
from autosparse_fx.masked import MaskedModule
from autosparse_fx.steering import (
    Shift,
    SteeredWeight,
    explain_divergence,
    explain_out_of_reach,
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
        out_of_reach: targets that a shift has fallen short of.
    """

    def __init__(self, config: AutoSparse) -> None:
        self._config = config
        self.floors: list[list[float]] | None = None
        self._checks: list[_DeferredCheck] = []
        self.out_of_reach: set[float] = set()

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

    def shift(self, modules: Iterable[MaskedModule], progress: float, *, exact: bool) -> list[str]:
        """Shift the thresholds of ``modules`` to where the schedule has them.

        Returns:
            What to warn of: once for each target, that this shift, or on a GPU the one before it, fell short of the
            schedule.

        Raises:
            RuntimeError: if this shift, or on a GPU the one before it, was not finite.
        """
        warned = self._look_at(self._take_checks(on_device=True))
        groups = steered_groups(modules)
        exact = exact or progress == 1
        for (target, _), weights in groups.items():
            sparsity = self.scheduled(target, progress)
            limit = self._config.max_layer_sparsity
            shift = steer(weights, sparsity, limit, ramping=sparsity < target, exact=exact)
            self._checks.append(_DeferredCheck(shift, weights, target))
        return warned + self._look_at(self._take_checks(on_device=progress == 1))

    def _look_at(self, checks: "list[_DeferredCheck]") -> list[str]:
        found = []
        for check in checks:
            finite, reached = check.result()
            if not finite:
                raise RuntimeError(explain_divergence(check.weights))
            if not reached and check.target not in self.out_of_reach:
                self.out_of_reach.add(check.target)
                why = explain_out_of_reach(check.weights, check.target)
                found.append(f"{why}. The training goes on as sparse as can be")
        return found

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
    """How a shift went, looked at once the device has come that far, without waiting for it."""

    def __init__(self, shift: Shift, weights: list[SteeredWeight], target: float) -> None:
        self.weights, self.target = weights, target
        self._result = torch.stack(shift)
        self.on_device = self._result.device.type != "cpu"
        self._ready: torch.cuda.Event | None = None
        if self._result.is_cuda:
            pinned = torch.empty(2, dtype=torch.bool, device="cpu", pin_memory=True)
            with torch.cuda.device(self._result.device):
                self._result = pinned.copy_(self._result, non_blocking=True)
                self._ready = torch.cuda.Event()
                self._ready.record()

    def result(self) -> tuple[bool, bool]:
        """Whether it was finite, and whether it reached the sparsity."""
        if self._ready is not None and not self._ready.query():
            self._ready.synchronize()  # a whole interval old: long done
        finite, reached = self._result.tolist()
        return finite, reached
