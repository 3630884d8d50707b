"""GradientAnnealing: after every optimizer step it lowers alpha, and steers the thresholds to the target."""

import operator
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from autosparse_fx.attach import masked_modules
from autosparse_fx.decay import annealed_alpha
from autosparse_fx.history import RECORDS, History
from autosparse_fx.masked import ALPHA, MaskedModule, alpha_of, logit, mask_state, reset_mask, stored_weight
from autosparse_fx.plan import Plan
from autosparse_fx.selection import is_dtensor
from autosparse_fx.steering import SteeredWeight, explain_failure, scheduled_sparsity, steer, steered_groups

__all__ = ["GradientAnnealing", "param_groups"]

MAX_STEPS_BETWEEN_SHIFTS = 20
MOMENTA = ("momentum_buffer", "exp_avg")  # what the optimizers of torch call it

_annealers: "weakref.WeakKeyDictionary[Plan, weakref.ref[GradientAnnealing]]" = weakref.WeakKeyDictionary()


class GradientAnnealing:
    """Anneal alpha, and steer the sparsity to its target, once per optimizer step.

    After step ``i`` of ``total_steps`` alpha is ``config.alpha * decay(i / total_steps)``, and exactly 0 from
    ``config.alpha_end`` on (Gradient Annealing, arXiv:2304.06941, per step instead of per epoch). With a target, all
    thresholds that share it move together to the scheduled sparsity, up to every 20 steps (see ``steering.py``).

    Args:
        model: what ``sparsify`` returned, or any module around it.
        total_steps: number of optimizer steps (not batches, not epochs) of the whole training.
        optimizer: with it the annealer counts the optimizer's steps by itself, for as long as the optimizer lives: a
            step that ``GradScaler`` skips does not count, nor do the batches of gradient accumulation. (A fused
            optimizer, ``fused=True``, that ``GradScaler`` lets skip on the device does count.) Without it, call
            :meth:`step` after every ``optimizer.step()``.
        clear_momentum: after each step of ``optimizer``, set its momentum (``momentum_buffer``, ``exp_avg``) to zero
            where weights are masked. Without it, momentum carries a masked weight on for a while after its gradient
            has been scaled down by alpha, or to nothing; with it, a masked weight moves by the gradient of the step.

    Attributes:
        history: alpha, sparsity and cuts over the training; see :class:`~autosparse_fx.history.History`.

    Raises:
        ValueError: if the model is not sparse, ``total_steps`` is not positive, or momentum is to be cleared without
            an optimizer or in sharded weights.

    Warns:
        UserWarning: if masked weights or thresholds are in none of the optimizer's groups.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        optimizer: Optimizer | None = None,
        *,
        clear_momentum: bool = False,
    ) -> None:
        modules = masked_modules(model)
        if not modules:
            raise ValueError(f"{type(model).__name__} is not sparse: call autosparse_fx.sparsify(model) first")
        if isinstance(total_steps, bool) or not hasattr(total_steps, "__index__") or total_steps <= 0:
            raise ValueError(f"total_steps must be a positive number of optimizer steps, got {total_steps!r}")
        plans = {id(m._autosparse.plan): m._autosparse.plan for _, m in modules}
        configs = [plan.config for plan in plans.values()]
        if any(config != configs[0] for config in configs):
            raise ValueError(
                "parts of the model were prepared with different configurations, and alpha is one for the whole model: "
                "sparsify the whole model once, with rules for its parts"
            )
        if clear_momentum and optimizer is None:
            raise ValueError("clear_momentum needs the optimizer whose momentum it is to clear: pass optimizer=")
        if clear_momentum and any(
            is_dtensor(stored_weight(m, slot)) for _, m in modules for slot in m._autosparse_slots
        ):
            raise ValueError("clear_momentum does not work on sharded weights (FSDP2): leave it out")
        if optimizer is not None:
            _warn_of_missing_parameters(model, optimizer)
        self.total_steps = operator.index(total_steps)
        self._config = configs[0]
        self._plans = list(plans.values())
        self._model = model
        self._modules = modules
        self._interval = max(1, min(MAX_STEPS_BETWEEN_SHIFTS, total_steps // 100))
        self._count = 0
        self._warned_of_end = False
        self._warned_of_order = False
        self._checks: list[_DeferredCheck] = []
        self._handle: Any = None
        self._clears_momentum = clear_momentum
        for _, module in modules:
            for slot in module._autosparse_slots:
                if module._autosparse.weights[slot.name].provisional:
                    reset_mask(module, slot)
                    module._autosparse.weights[slot.name].provisional = False  # from here on they are trained
        for plan in self._plans:
            previous = _annealers[plan]() if plan in _annealers else None
            if previous is not None:
                previous.detach()
            _annealers[plan] = weakref.ref(self)
        self.continue_history(History())
        if optimizer is not None:
            self._handle = optimizer.register_step_post_hook(self._after_optimizer_step)
        self._versions = self._weight_versions() if optimizer is None else None
        self._write_alpha()

    @property
    def steps(self) -> int:
        """How many optimizer steps were counted."""
        return self._count

    @property
    def alpha(self) -> float:
        """The alpha of the next backward pass."""
        config = self._config
        return annealed_alpha(config.alpha, config.decay, config.alpha_end, min(1.0, self._count / self.total_steps))

    @property
    def scheduled_sparsity(self) -> float | None:
        """The sparsity that the model-wide target asks for now; None in the open loop."""
        if self._config.target_sparsity is None:
            return None
        return scheduled_sparsity(self._config.target_sparsity, self._config.ramp_end, self._count / self.total_steps)

    def step(self) -> None:
        """Count one optimizer step; call it after ``optimizer.step()`` where no optimizer was given."""
        if self._handle is not None:
            raise RuntimeError("this annealer counts its optimizer's steps by itself: do not call step()")
        versions = self._weight_versions()
        if versions == self._versions and not self._warned_of_order:
            self._warned_of_order = True
            warnings.warn(
                "GradientAnnealing.step() was called although no weight has changed since the last call: call it "
                "after optimizer.step()",
                stacklevel=2,
            )
        self._versions = versions
        self._advance()

    def detach(self) -> None:
        """Stop counting the optimizer's steps. A new annealer for the same model does this to the one before it."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs, and the history; thresholds and offsets are in the model's own state_dict."""
        return {"steps": self._count, "total_steps": self.total_steps, "history": self.history.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume where :meth:`state_dict` was taken, alpha included.

        Raises:
            ValueError: if a key is missing, or the training that was saved has another ``total_steps``.
        """
        missing = {"steps", "total_steps"} - set(state)
        if missing:
            raise ValueError(f"the annealer's state lacks {', '.join(sorted(missing))}: save annealer.state_dict()")
        if state["total_steps"] != self.total_steps:
            raise ValueError(
                f"the saved training has total_steps={state['total_steps']}, this annealer {self.total_steps}: make it "
                "with the same total_steps to resume"
            )
        self._count = state["steps"]
        if "history" in state:
            self.continue_history(History.from_state(state["history"]))
        for plan in self._plans:
            plan.annealed_steps = self._count
        self._write_alpha()

    def continue_history(self, history: History) -> None:
        """Add records to a history that was begun before."""
        self.history = history
        for plan in self._plans:
            plan.history = history

    @torch.compiler.disable
    def _after_optimizer_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self._advance()
        if self._clears_momentum:
            _clear_momentum(optimizer, self._modules)

    def _advance(self) -> None:
        if self._count >= self.total_steps:
            if not self._warned_of_end:
                self._warned_of_end = True
                warnings.warn(
                    f"the optimizer steps past the annealer's total_steps={self.total_steps}: alpha stays 0 and the "
                    "sparsity is no longer steered",
                    stacklevel=3,
                )
            return
        self._count += 1
        for plan in self._plans:
            plan.annealed_steps = self._count
        self._write_alpha()
        interval = max(self._interval, self.total_steps // 100) if self._settling() else self._interval
        final = self._count == self.total_steps
        steering = final or self._count % interval == 0
        recording = final or self._count == 1 or self._count % -(-self.total_steps // RECORDS) == 0
        if steering or recording:
            self._modules = masked_modules(self._model)  # dense_weights and finalize may have changed which there are
        if steering:
            self._steer()
        if recording and self._modules:
            self._record()

    def _record(self) -> None:
        weights: dict[int, tuple[str, str, Tensor, Tensor]] = {}
        for prefix, module in self._modules:
            for slot in module._autosparse_slots:
                stored = stored_weight(module, slot)
                name, path = module._autosparse.weights[slot.name].name, f"{prefix}.{slot.name}"
                weights.setdefault(id(stored), (name, path, stored.detach(), logit(module, slot).detach()))
        names = {name for name, *_ in weights.values()}
        apart = len(names) < len(weights)  # parts that were prepared on their own, by the same names
        rows = [(path if apart else name, stored, s) for name, path, stored, s in weights.values()]
        self.history.add(self._count, self.alpha, rows)

    def _settling(self) -> bool:
        return self._count >= self._config.alpha_end * self.total_steps

    @torch.no_grad()
    def _write_alpha(self) -> None:
        alphas = [alpha_of(m) for _, m in self._modules if ALPHA in m._buffers]
        for alpha in {id(alpha): alpha for alpha in alphas}.values():
            alpha.fill_(self.alpha)

    def _steer(self) -> None:
        for check in self._checks:
            check.raise_if_failed()
        self._checks = []
        final = self._count == self.total_steps
        for (target, _), weights in steered_groups(m for _, m in self._modules).items():
            sparsity = scheduled_sparsity(target, self._config.ramp_end, self._count / self.total_steps)
            finite = steer(
                weights,
                sparsity,
                self._config.max_layer_sparsity,
                ramping=sparsity < target,
                exact=final or self._settling(),
            )
            self._checks.append(_DeferredCheck(finite, weights, target))
        for check in self._checks:
            if final or not check.on_device:
                check.raise_if_failed()

    def _weight_versions(self) -> tuple[int, int]:
        """What changes when a weight is written to; fused optimizers do so without counting it as a write."""
        writes = sum(
            stored_weight(module, slot)._version for _, module in self._modules for slot in module._autosparse_slots
        )
        return writes, _optimizer_steps.count


def _check_momentum_can_be_cleared(modules: list[tuple[str, MaskedModule]], optimizer: Optimizer | None) -> None:
    if optimizer is None:
        raise ValueError("clear_momentum needs the optimizer whose momentum it is to clear: pass optimizer=")
    for prefix, module in modules:
        for slot in module._autosparse_slots:
            if is_dtensor(stored_weight(module, slot)):
                raise ValueError(
                    f"clear_momentum does not work on sharded weights ('{prefix}.{slot.name}'): leave it out"
                )


@torch.no_grad()
def _clear_momentum(optimizer: Optimizer, modules: list[tuple[str, MaskedModule]]) -> None:
    weights = {id(stored_weight(m, slot)): (m, slot) for _, m in modules for slot in m._autosparse_slots}
    for module, slot in weights.values():
        weight, s = stored_weight(module, slot), logit(module, slot)
        state = optimizer.state.get(weight, {})
        momenta = [state[name] for name in MOMENTA if isinstance(state.get(name), Tensor)]
        if momenta:
            masked = weight.to(torch.promote_types(weight.dtype, s.dtype)).abs() <= torch.sigmoid(s)
            for momentum in momenta:
                momentum.masked_fill_(masked, 0)


class _OptimizerSteps:
    """Counts the steps of all optimizers of the process, from the first time that it is asked."""

    def __init__(self) -> None:
        self._count = 0
        self._handle: Any = None

    @property
    def count(self) -> int:
        if self._handle is None:
            self._handle = register_optimizer_step_post_hook(self._after_step)
        return self._count

    @torch.compiler.disable
    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self._count += 1


_optimizer_steps = _OptimizerSteps()


class _DeferredCheck:
    """Whether a shift was finite, looked at once the device has come that far, without waiting for it."""

    def __init__(self, finite: Tensor, weights: list[SteeredWeight], target: float) -> None:
        self.on_device = finite.device.type != "cpu"
        self._finite = finite
        self._weights = weights
        self._target = target
        self._ready: torch.cuda.Event | None = None
        if finite.is_cuda:
            self._finite = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def raise_if_failed(self) -> None:
        if self._ready is not None and not self._ready.query():
            self._ready.synchronize()  # a whole interval old: long done
        if bool(self._finite):
            return
        raise RuntimeError(explain_failure(self._weights, self._target))


def param_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    threshold_lr: float | None = None,
    threshold_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Return two optimizer groups, the thresholds apart from all other parameters, for rates of their own.

    Plain ``model.parameters()`` trains thresholds well already; this is for who wants to try other rates.

    Args:
        model: what ``sparsify`` returned.
        lr: learning rate of the other parameters; the optimizer's own by default.
        weight_decay: weight decay of the other parameters; the optimizer's own by default.
        threshold_lr: learning rate of the thresholds; ``lr`` by default. It acts on the deviations, so under SGD a
            logit moves by ``threshold_scale**2`` of it.
        threshold_weight_decay: pulls thresholds back to where they started.

    Raises:
        ValueError: if the model is not sparse.
    """
    thresholds = {
        id(p): p for _, m in masked_modules(model) for p in (mask_state(m, slot)[0] for slot in m._autosparse_slots)
    }
    if not thresholds:
        raise ValueError(f"{type(model).__name__} is not sparse: call autosparse_fx.sparsify(model) first")
    threshold_lr = lr if threshold_lr is None else threshold_lr
    others: dict[str, Any] = {"params": [p for p in model.parameters() if id(p) not in thresholds]}
    own: dict[str, Any] = {"params": list(thresholds.values()), "weight_decay": threshold_weight_decay}
    others |= {key: value for key, value in (("lr", lr), ("weight_decay", weight_decay)) if value is not None}
    own |= {"lr": threshold_lr} if threshold_lr is not None else {}
    return [others, own]


def _warn_of_missing_parameters(model: nn.Module, optimizer: Optimizer) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    weights: list[str] = []
    thresholds: list[str] = []
    for prefix, module in masked_modules(model):
        for slot in module._autosparse_slots:
            for name, lost in ((slot.name, weights), (slot.threshold, thresholds)):
                parameter = module._parameters[name]
                if parameter is not None and parameter.requires_grad and id(parameter) not in held:
                    lost.append(f"{prefix}.{name}" if prefix else name)
    for what, names in (("masked weights", weights), ("thresholds", thresholds)):
        if names:
            warnings.warn(
                f"the optimizer holds {'none' if _all(model, names) else 'not all'} of the {what}: {_some(names)} "
                "will not be trained; make the optimizer from model.parameters() after sparsify",
                stacklevel=3,
            )


def _all(model: nn.Module, names: list[str]) -> bool:
    return len(names) >= sum(len(m._autosparse_slots) for _, m in masked_modules(model))


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f", ... ({len(names)} in all)" if len(names) > 3 else "")
