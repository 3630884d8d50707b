"""SparseRun: what the callbacks of all frameworks do, from the dense model to the dense model."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from autosparse_fx._compat import eager
from autosparse_fx.annealing import GradientAnnealing
from autosparse_fx.arguments import check_bool, unknown_names, whole_steps
from autosparse_fx.attach import masked_modules
from autosparse_fx.config import AutoSparse, check_config
from autosparse_fx.masked_state import stored_weight
from autosparse_fx.report import group_sparsities, sparsity
from autosparse_fx.sparsify import finalize, sparsify
from autosparse_fx.steering import TOLERANCE

__all__ = ["SparseRun"]


class SparseRun:
    """One sparse training inside a framework: prepare, anneal, resume, finalize.

    Args:
        config: what to make sparse; None for the default, or for a model that was prepared before.
        fields: the fields of a configuration by name, instead of ``config``.
        total_steps: optimizer steps of the whole training, where the framework is not to be asked.
        finalize: make the model plain again at the end.

    Raises:
        TypeError, ValueError: naming the argument and what it accepts.
    """

    def __init__(
        self, config: AutoSparse | None, fields: Mapping[str, object], *, total_steps: int | None, finalize: bool
    ) -> None:
        known = [f.name for f in dataclasses.fields(AutoSparse)]
        unknown = [name for name in fields if name not in known]
        if unknown:
            raise TypeError(
                f"AutoSparseCallback has no argument {unknown_names(unknown, known)}; beside its own it takes the "
                f"fields of AutoSparse: {', '.join(known)}"
            )
        if config is not None:
            check_config(config, "AutoSparseCallback")
        if config is not None and fields:
            raise TypeError(
                f"AutoSparseCallback got a configuration and {', '.join(map(repr, fields))} too: set these in the "
                "configuration"
            )
        check_bool(finalize, "finalize")
        self.config = AutoSparse.from_dict(fields) if fields else config
        self.total_steps = None if total_steps is None else whole_steps(total_steps, "total_steps")
        self.finalize = finalize
        self.annealer: GradientAnnealing | None = None
        self._prepared: AutoSparse | None = None
        self._finalized = False
        self._reached = False

    def described(self, **others: object) -> str:
        """How to make the callback, defaults left out."""
        given = {"config": self.config, **others, "finalize": self.finalize, "total_steps": self.total_steps}
        return f"AutoSparseCallback({', '.join(f'{name}={value!r}' for name, value in given.items() if value)})"

    def prepare(self, model: nn.Module) -> None:
        """Sparsify the model; one that was prepared before stays as it is.

        Raises:
            ValueError: if it was prepared with another configuration than this one, or cannot be prepared.
        """
        prepared = _config_of(model)
        if prepared is not None and self.config is None:
            return
        if prepared is not None and prepared != self.config:
            raise ValueError(
                f"the model was prepared before, with {prepared}, and AutoSparseCallback was given {self.config}: "
                "leave the configuration out of AutoSparseCallback(), or do not sparsify the model yourself"
            )
        sparsify(model, self.config)

    def begin(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        total_steps: int,
        *,
        step: int,
        saved: Mapping[str, Any] | None,
    ) -> None:
        """Start to anneal, from the beginning or where a checkpoint was saved.

        Args:
            model: what :meth:`prepare` prepared.
            optimizers: all of the training; the one that holds the masked weights is followed.
            total_steps: optimizer steps of the whole training.
            step: how many of them the framework counts as done.
            saved: what :meth:`state` returned, if a checkpoint was loaded that has it.

        Raises:
            ValueError: if the training cannot go on from there, or the model not be finalized at its end; says why.
        """
        config = _config_of(model)
        if config is None:
            raise ValueError(f"{type(model).__name__} is not sparse when its training begins")
        if self.finalize and any(eager.is_managed_by_fsdp(module) for _, module in masked_modules(model)):
            raise ValueError(
                "AutoSparseCallback(finalize=True) cannot finalize a model that fully_shard has sharded: leave "
                "finalize out, and finalize a plain copy of the model that has loaded the full state_dict"
            )
        optimizer = _holder(model, optimizers)
        if saved is None and step > 0:
            raise ValueError(
                f"the training goes on at step {step}, from a checkpoint that was saved without AutoSparseCallback: "
                "load its weights into the model instead, and begin a training of its own"
            )
        if saved is not None:
            self._refuse_other_training(saved, config, total_steps)
        self.annealer = GradientAnnealing(model, total_steps, optimizer=optimizer)
        if saved is not None:
            self.annealer.load_state_dict(dict(saved["annealing"]))
        self._prepared = config
        self._finalized = False
        self._reached = False

    def _refuse_other_training(self, saved: Mapping[str, Any], config: AutoSparse, total_steps: int) -> None:
        if saved["finalized"]:
            raise ValueError(
                "the checkpoint holds a finalized model, whose thresholds are gone: resume from one that was saved "
                "during the training"
            )
        steps = saved["annealing"]["total_steps"]
        if steps != total_steps:
            raise ValueError(
                f"the checkpoint is of a training of {steps} optimizer steps and this one has {total_steps}, but alpha "
                "and the sparsity follow the whole training: set the same epochs, steps and batch sizes, or "
                f"AutoSparseCallback(total_steps={steps})"
            )
        now = config.to_dict()
        changed = [name for name, value in saved["config"].items() if now.get(name) != value]
        if changed:
            then = {name: saved["config"][name] for name in changed}
            raise ValueError(
                f"the checkpoint was trained with {then}, this configuration has { {n: now.get(n) for n in changed} }: "
                "resume with the same configuration"
            )

    def state(self) -> dict[str, Any] | None:
        """Plain values, fit for JSON, from which :meth:`begin` resumes; None before the training."""
        if self.annealer is None or self._prepared is None:
            return None
        return {
            "annealing": self.annealer.state_dict(),
            "config": self._prepared.to_dict(),
            "finalized": self._finalized,
        }

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """What is logged; counts all zeros."""
        assert self.annealer is not None
        return {"sparsity": sparsity(model), "alpha": self.annealer.alpha}

    def reached(self, model: nn.Module) -> bool:
        """Whether the sparsity has risen to its target, so that the model can be compared with later ones; or as far as
        it can, where the schedule has come to its target and that is out of reach."""
        if not self._reached:
            given_up = self.annealer.out_of_reach if self.annealer and self._steps_at_target() >= 0 else frozenset()
            self._reached = all(
                target is None or found >= target - TOLERANCE or target in given_up
                for target, (found, _) in group_sparsities(model).items()
            )
        return self._reached

    def may_have_reached(self) -> bool:
        """Whether the schedule has reached the target, so that it is worth to look; not after every step."""
        if self.annealer is None or self._prepared is None:
            return False
        total, after = self.annealer.total_steps, self._steps_at_target()
        return after >= 0 and (after % max(1, total // 100) == 0 or self.annealer.steps == total)

    def _steps_at_target(self) -> int:
        """Since the schedule has reached the target; negative before."""
        if self.annealer is None or self._prepared is None:
            return -1
        return self.annealer.steps - math.ceil(self._prepared.ramp_end * self.annealer.total_steps)

    def end(self, model: nn.Module) -> None:
        """Make the model plain again, where that was asked for."""
        if self.finalize and masked_modules(model):
            finalize(model)
            self._finalized = True
            if self.annealer is not None:
                self.annealer.detach()


def _config_of(model: nn.Module) -> AutoSparse | None:
    prepared = masked_modules(model)
    return prepared[0][1]._autosparse.plan.config if prepared else None


def _holder(model: nn.Module, optimizers: Sequence[Optimizer]) -> Optimizer:
    """The optimizer that holds the masked weights."""
    masked = {id(stored_weight(m, slot)) for _, m in masked_modules(model) for slot in m._autosparse_slots}
    holding = [o for o in optimizers if any(id(p) in masked for group in o.param_groups for p in group["params"])]
    if len(holding) != 1:
        raise ValueError(
            f"{len(holding)} of {len(optimizers)} optimizers hold masked weights, but the steps of one are counted: "
            "leave the other weights dense (with rules, or by naming the part of the model to sparsify), and make the "
            "optimizer from parameters() after the model was prepared"
        )
    return holding[0]
