"""What optimizers hold of a sparse model: groups for thresholds, and what none of them trains."""

import threading
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from autosparse_fx._compat.eager import has_step_hooks
from autosparse_fx.attach import masked_modules
from autosparse_fx.consistency import late_weights
from autosparse_fx.dtensors import full_tensor, is_dtensor
from autosparse_fx.masked import MaskedModule, logit
from autosparse_fx.masked_state import mask_state, stored_weight
from autosparse_fx.report import plans_of

__all__ = ["param_groups"]

MOMENTA = ("momentum_buffer", "exp_avg")  # what the optimizers of torch call it


class OptimizerSteps:
    """Counts the optimizer steps of the process since the first annealer, and when each optimizer stepped last."""

    def __init__(self) -> None:
        self.count = 0
        self._last: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._handle: Any = None
        self._listeners: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lock = threading.RLock()  # annealers come and go, and optimizers step, in several threads

    def start(self, listener: Any) -> None:
        """Call ``listener.saw_step(optimizer)`` after every step, as long as it lives."""
        with self._lock:
            self._listeners.add(listener)
            if self._handle is None:
                self._handle = register_optimizer_step_post_hook(self._after_step)

    def leave(self, listener: Any) -> None:
        with self._lock:
            self._listeners.discard(listener)

    def stepped_since(self, count: int) -> list[Optimizer]:
        with self._lock:
            return [optimizer for optimizer, last in self._last.items() if last > count]

    @torch.compiler.disable
    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        with self._lock:
            self.count += 1
            self._last[optimizer] = self.count
            listeners = list(self._listeners)
        for listener in listeners:
            listener.saw_step(optimizer)


optimizer_steps = OptimizerSteps()


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


def unwrapped(optimizer: object) -> Optimizer:
    """The optimizer that has hooks: accelerate's wrapper is one by inheritance only, and steps the one in it.

    Raises:
        TypeError: if it is no optimizer, or one whose hooks are out of reach.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    found = optimizer
    while not has_step_hooks(found) and isinstance(inner := getattr(found, "optimizer", None), Optimizer):
        found = inner
    if not has_step_hooks(found):
        raise TypeError(
            f"{type(optimizer).__name__} has no step hooks (it does not call torch.optim.Optimizer.__init__): pass the "
            "optimizer that it wraps, or none, and call step() of the annealer after each of its steps"
        )
    return found


def steps_nowhere(optimizer: Optimizer) -> bool:
    """Whether the step that an optimizer just took was none: with rates and gradients of 0, as the state dicts of
    torch.distributed.checkpoint take one to have an optimizer make its state.

    Where gradients are sharded they gather, so every rank must call this.
    """
    if not all(_is_zero(group.get("lr")) for group in optimizer.param_groups):
        return False
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    values = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    return bool(values) and not any(full_tensor(torch.linalg.vector_norm(v)) for v in values)


def _is_zero(rate: object) -> bool:
    """Without waiting for a device: the rate of such a step is on the CPU."""
    if isinstance(rate, Tensor):
        return rate.device.type == "cpu" and float(rate) == 0
    return rate == 0


def warn_of_late_weights(model: nn.Module) -> None:
    late = late_weights(model, plans_of(model))
    if late:
        warnings.warn(
            f"{_some(late)} came into the model after sparsify, and is not masked: finalize the model and sparsify "
            "all of it, or replace its layers inside `with autosparse_fx.dense_weights(model):`",
            stacklevel=3,
        )


@torch.no_grad()
def warn_of_zeros_that_stay(modules: Iterable[MaskedModule]) -> None:
    """Warn once, where alpha is 0, of trainable weights that are all zeros: every gradient that reaches them is 0."""
    zeros = []
    for module in modules:
        plan = module._autosparse.plan
        for slot in module._autosparse_slots if not plan.warned_of_zeros else ():
            weight = stored_weight(module, slot)
            if weight.requires_grad and not weight.is_meta and not weight.any():
                zeros.append((module._autosparse.weights[slot.name].name, plan))
    for _, plan in zeros:
        plan.warned_of_zeros = True
    if zeros:
        warnings.warn(
            f"{_some([name for name, _ in zeros])} is all zeros, and alpha is 0, so that it is never trained: "
            "initialise it with other values, leave it dense with rules={...: None}, or begin with a larger alpha",
            stacklevel=3,
        )


def warn_of_untrained_parameters(model: nn.Module, optimizers: list[Optimizer]) -> None:
    if not optimizers:
        return  # of a kind that is not torch's
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
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


def check_momentum_can_be_cleared(modules: list[tuple[str, MaskedModule]], optimizer: Optimizer | None) -> None:
    if optimizer is None:
        raise ValueError("clear_momentum needs the optimizer whose momentum it is to clear: pass optimizer=")
    for prefix, module in modules:
        for slot in module._autosparse_slots:
            if is_dtensor(stored_weight(module, slot)):
                raise ValueError(
                    f"clear_momentum does not work on sharded weights ('{prefix}.{slot.name}'): leave it out"
                )


@torch.no_grad()
def clear_momentum_of_masked(optimizer: Optimizer, modules: list[tuple[str, MaskedModule]]) -> None:
    weights = {id(stored_weight(m, slot)): (m, slot) for _, m in modules for slot in m._autosparse_slots}
    for module, slot in weights.values():
        weight, s = stored_weight(module, slot), logit(module, slot)
        state = optimizer.state.get(weight, {})
        momenta = [state[name] for name in MOMENTA if isinstance(state.get(name), Tensor)]
        if momenta:
            masked = weight.to(torch.promote_types(weight.dtype, s.dtype)).abs() <= torch.sigmoid(s)
            for momentum in momenta:
                momentum.masked_fill_(masked, 0)
