"""Training hidden thresholds behind the user's optimizer, which never sees them.

The gradient of a threshold is read off the gradient of its weight. With ``dw = G * h`` (see ``ops.py``)::

    ds = -g'(s) * sum(G * sign(w) * h) = -g'(s) * sum(sign(w) * dw)

so whatever was done to the weight's gradient holds for its threshold too: unscaling, clipping, accumulation, averaging
over processes, a batch that was thrown away by ``zero_grad``. It costs one pass over weights and gradients. The
thresholds then take a step of a second optimizer, of the same class and with the same settings as the group that holds
their weight, as they would as parameters of a prepared model.
"""

import inspect
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from autosparse_fx.annealing import GradientAnnealing
from autosparse_fx.hidden import asked, masks
from autosparse_fx.hidden.masks import HiddenMask, Request
from autosparse_fx.ops import signed_sum
from autosparse_fx.optimizers import optimizer_steps, steps_nowhere
from autosparse_fx.plan import Plan

_READ = "_autosparse_read"  # the version of a gradient that a step has seen
_LIMIT = (
    "or its recompile limit is reached, which models of a class share: TORCH_LOGS=recompiles says why, and "
    "torch._dynamo.config.recompile_limit raises it"
)
_Held = tuple[nn.Parameter, HiddenMask]
_Missed = tuple[nn.Parameter, str, bool]  # a weight, its name, whether it had a mask before
_CURE = "prepare the model with model = autosparse_fx.sparsify(model) before making the optimizer"


class _Run:
    """The hidden thresholds of the weights that one optimizer holds."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.signature = _signature(optimizer)
        self._calls = -1
        self._tick = 0
        self._steps = 0
        self._addresses: list[int] = []
        self._asked: list[_Missed] = []
        self._missed: list[_Missed] = []
        self._held: list[_Held] = []
        self._groups: list[int] = []  # for each group of the twin, the index of the optimizer's own
        groups = []
        for index, group in enumerate(optimizer.param_groups):
            held = []
            for parameter in group["params"]:
                mask = masks.hidden_mask(parameter)
                if mask is not None:
                    held.append((parameter, mask))
                elif (missed := masks.missed_weight(parameter)) is not None:
                    self._missed.append((parameter, *missed))
            if held:
                groups.append({**_settings(group), "params": [mask.threshold for _, mask in held]})
                self._groups.append(index)
                self._held += held
        self._twin = _twin(optimizer, groups) if groups else None
        for parameter, mask in self._held:
            goes_on = mask.optimizer == type(optimizer).__name__ and _has_stepped(optimizer.state.get(parameter, {}))
            if self._twin is not None and mask.optimizer_state and goes_on:
                self._twin.state[mask.threshold] = mask.optimizer_state
        if optimizer not in _runs:  # its first step in this process
            _warn_of_lost_state(optimizer, self._held)
        self._annealers = _annealers(self._held)
        for _, mask in self._held:
            mask.trained = True

    @property
    def trains_masks(self) -> bool:
        """Whether the optimizer holds weights that are masked."""
        return bool(self._held)

    def check(self, optimizer: Optimizer, closure: bool) -> None:
        """Raise where weights are trained that nothing masks, or in a way that thresholds cannot follow."""
        if self._calls != (calls := asked.calls()):
            self._calls = calls
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            found, unseen = asked.uncaptured(set(map(id, parameters)))
            self._asked = [(p, found[p], False) for p in parameters if p in found]
            _warn_of_unseen({p: unseen[p] for p in parameters if p in unseen and not _is_zero_or_none(p.grad)})
        missed = [*self._missed, *self._asked]
        if closure and (self._held or missed):
            raise RuntimeError(_no_closure(optimizer))
        for parameter, name, again in missed:
            if _is_zero_or_none(parameter.grad):  # unused in this step
                continue
            if again:
                raise RuntimeError(
                    f"weight '{name}' {list(parameter.shape)} was finalized, and the options that it was made sparse "
                    "by do not mask it a second time: compile the model without options to train it as it is, or with "
                    "others, or a copy of it (copy.deepcopy), to make it sparse anew"
                )
            raise RuntimeError(
                f"weight '{name}' {list(parameter.shape)} is trained, but no compiled graph has masked it: its "
                "layer ran outside the compiled model, or where torch.compile leaves a model to eager mode (an "
                f"nn.LSTM in it, a graph break inside a loop, {_LIMIT}). {_CURE}, or leave the weight dense with "
                f"options={{'rules': {{{name!r}: None}}, ...}}"
            )

    @torch.no_grad()
    def read(self, optimizer: Optimizer) -> None:
        """Read settings and gradients, while the weights are still those that the gradients were taken at."""
        if self._twin is None:
            return
        for group, index in zip(self._twin.param_groups, self._groups, strict=True):
            group.update(_settings(optimizer.param_groups[index]))
        _place_steps(self._twin)
        last, self._tick = self._tick, masks.tick()
        scale = getattr(optimizer, "grad_scale", None)  # GradScaler lets fused optimizers unscale by themselves
        for parameter, mask in self._held:
            mask.threshold.grad = None
            if parameter.grad is not None:
                if mask.used <= last:
                    _refuse_dense_gradient(parameter.grad, mask)
                parameter.grad.__dict__[_READ] = parameter.grad._version
                gradient = _threshold_gradient(parameter.detach(), parameter.grad, mask)
                mask.threshold.grad = gradient if scale is None else gradient / scale.to(gradient.device)

    def step(self, optimizer: Optimizer) -> None:
        """Step the thresholds, then alpha and the sparsity."""
        if self._twin is None:
            return
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None:  # the step of a fused optimizer that GradScaler may have told to skip
            self._twin.grad_scale, self._twin.found_inf = None, found_inf  # type: ignore[attr-defined]
        try:
            self._twin.step()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise RuntimeError(_cannot_train(type(self._twin), error)) from error
        finally:
            if found_inf is not None:
                del self._twin.grad_scale, self._twin.found_inf  # type: ignore[attr-defined]
        addresses = [mask.threshold.data_ptr() for _, mask in self._held]
        if addresses != self._addresses:  # it gave thresholds other memory, by p.data = ..., than graphs were given
            self._addresses = addresses
            masks.touch()
        if steps_nowhere(optimizer):
            return
        self._steps += 1
        if self._steps == 2:  # every other optimizer has had its first step, or its chance of one
            _warn_of_untrained({id(mask.plan): mask.plan for _, mask in self._held}.values())
        for annealer, held in self._annealers:
            steps = max(mask.steps for _, mask in held)
            if steps > annealer.steps + 1:  # another optimizer has trained these weights for more than this round
                _go_on(annealer, steps, held)
            annealer.step()
            for _, mask in held:
                mask.steps = annealer.steps
                mask.threshold.grad = None
                mask.optimizer = type(optimizer).__name__
                mask.optimizer_state = self._twin.state[mask.threshold]


def _annealers(held: list[_Held]) -> list[tuple[GradientAnnealing, list[_Held]]]:
    """One annealer for all weights of the same request, in however many models or parts of one, since they are steered
    together; it goes on where they are in their training."""
    groups: list[tuple[Request, list[_Held]]] = []
    for item in held:
        group = next((group for request, group in groups if request == item[1].request), None)
        if group is None:
            groups.append((item[1].request, [item]))
        else:
            group.append(item)
    made = []
    for request, group in groups:
        history = group[0][1].plan.history
        annealer = GradientAnnealing(nn.ModuleList(m.holder(p) for p, m in group), request.total_steps)
        optimizer_steps.leave(annealer)  # whoever else trains the weights has an annealer of its own
        annealer.continue_history(history)
        steps = max(mask.steps for _, mask in group)
        if steps == 0:  # weights that join a training: another optimizer's first step of it is one of the same round
            steps = max(mask.plan.annealed_steps for _, mask in group)
            steps = steps if steps > 1 else 0
        _go_on(annealer, steps, group)
        made.append((annealer, group))
    return made


def _go_on(annealer: GradientAnnealing, steps: int, held: list[_Held]) -> None:
    """Have an annealer go on from where the training of its weights is."""
    total_steps = annealer.total_steps
    state = {"steps": min(steps, total_steps), "total_steps": total_steps, "floors": held[0][1].plan.floors}
    annealer.load_state_dict(state)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _place_steps(twin: Optimizer) -> None:
    """Have the count of steps where fused and capturable optimizers want it, as ``Optimizer.load_state_dict`` does."""
    for group in twin.param_groups:
        if group.get("fused") or group.get("capturable"):
            for threshold in group["params"]:
                state = twin.state.get(threshold, {})
                if isinstance(step := state.get("step"), Tensor) and step.device != threshold.device:
                    state["step"] = step.to(threshold.device, torch.float32)


def _signature(optimizer: Optimizer) -> tuple[object, ...]:
    return masks.membership(), *(tuple(map(id, group["params"])) for group in optimizer.param_groups)


def _twin(optimizer: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """An optimizer of the same class and settings over the thresholds."""
    kind = type(optimizer)
    takes = inspect.signature(kind).parameters
    try:
        twin = kind(groups, **{name: value for name, value in optimizer.defaults.items() if name in takes})
    except Exception as error:
        raise RuntimeError(_cannot_train(kind, error)) from error
    _twins.add(twin)
    return twin


def _cannot_train(kind: type, error: Exception) -> str:
    why = str(error) or type(error).__name__
    return f"{kind.__name__} cannot train the thresholds of a model that was never prepared ({why}): {_CURE}"


def _refuse_dense_gradient(grad: Tensor, mask: HiddenMask) -> None:
    """Raise where a gradient is new although no graph has used the mask of its weight since the last step."""
    if grad.__dict__.get(_READ) == grad._version or _is_zero(grad):  # left from the last step, or of no use
        return
    name = mask.weight.name
    raise RuntimeError(
        f"weight '{name}' {list(grad.shape)} is trained as a dense one: it has a gradient, but since the last step no "
        "compiled graph has used its mask. Either the model is called that is not compiled, or torch.compile runs the "
        f"model in eager mode ({_LIMIT}). Call the compiled model, and mark what changes as dynamic; or {_CURE}"
    )


def _is_zero(grad: Tensor) -> bool:
    return not grad.is_sparse and not grad.any()


def _is_zero_or_none(grad: Tensor | None) -> bool:
    return grad is None or _is_zero(grad)


def _warn_of_unseen(names: dict[nn.Parameter, str]) -> None:
    if names:
        parameter, name = next(iter(names.items()))
        warnings.warn(
            f"'{name}' {list(parameter.shape)} ({len(names)} parameters in all) is trained, but in no compiled graph: "
            "the code that uses it ran in eager mode (a graph break inside a loop, a sparse tensor; "
            "TORCH_LOGS=graph_breaks says where). If it is a weight, it is dense. Prepare the model with "
            "model = autosparse_fx.sparsify(model, example_inputs=...) before making the optimizer, or leave it dense "
            f"with options={{'rules': {{{name!r}: None}}, ...}}",
            stacklevel=2,
        )


def _warn_of_lost_state(optimizer: Optimizer, held: list[_Held]) -> None:
    """Warn where the optimizer has trained weights before, and their thresholds are new."""
    for parameter, mask in held:
        is_new = mask.steps == mask.plan.annealed_steps == 0 and not mask.plan.warned_of_new
        if is_new and _has_stepped(optimizer.state.get(parameter, {})):
            mask.plan.warned_of_new = True
            warnings.warn(
                f"the optimizer has trained weight '{mask.weight.name}' before, but its threshold is new, and alpha "
                "and the sparsity begin anew: if this resumes a training, call autosparse_fx.load_state_dict(model, "
                "state) with what autosparse_fx.state_dict(model) had returned",
                stacklevel=2,
            )


def _has_stepped(state: dict[str, Any]) -> bool:
    """Whether an optimizer keeps this of a parameter that it has stepped; some make it before, LBFGS while it does."""
    return bool(state) and "func_evals" not in state and float(state.get("step", 1)) > 0


def _warn_of_untrained(plans: Iterable[Plan]) -> None:
    """Warn, once for each model, of masked weights that no optimizer trains: their thresholds stay where they are."""
    for plan in plans:
        names = [] if plan.warned_of_untrained else masks.untrained(plan)
        if names:
            plan.warned_of_untrained = True
            warnings.warn(
                f"no optimizer that has taken a step holds the weight '{names[0]}' ({len(names)} masked weights in "
                "all): its threshold is neither trained nor steered. Give its parameter to an optimizer, freeze it "
                f"with requires_grad_(False), or leave it dense with options={{'rules': {{{names[0]!r}: None}}, ...}}",
                stacklevel=2,
            )


def _no_closure(optimizer: Optimizer) -> str:
    return (
        f"{type(optimizer).__name__}.step(closure) computes gradients inside the step, where the thresholds of a model "
        f"that was never prepared cannot follow: {_CURE}"
    )


def _threshold_gradient(weight: Tensor, grad: Tensor, mask: HiddenMask) -> Tensor:
    if grad.is_sparse:
        raise RuntimeError(f"weight '{mask.weight.name}' has a sparse gradient, which cannot be masked: {_CURE}")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    grad = grad.to(dtype)
    s = mask.offset + mask.plan.config.threshold_scale * mask.threshold
    if s.shape[0] == 1:
        total = signed_sum(grad, weight)
    else:
        total = (torch.sign(weight) * grad).sum([d for d in range(weight.dim()) if d != mask.axis])
    cut = torch.sigmoid(s)
    return (-mask.plan.config.threshold_scale * cut * (1 - cut) * total).to(torch.float32)


_runs: "weakref.WeakKeyDictionary[Optimizer, _Run]" = weakref.WeakKeyDictionary()
_twins: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()
_readers: "weakref.WeakKeyDictionary[Optimizer, RemovableHandle]" = weakref.WeakKeyDictionary()
_hooked = False


def hook_optimizers() -> None:
    """Have every optimizer of the process step the hidden thresholds of the weights that it holds."""
    global _hooked
    if not _hooked:
        _hooked = True
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)


@torch.compiler.disable
def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if optimizer in _twins:
        return
    run = _runs.get(optimizer)
    if run is None or run.signature != _signature(optimizer):
        run = _runs[optimizer] = _Run(optimizer)
    run.check(optimizer, closure=_has_closure(args, kwargs))
    _remove_reader(optimizer)
    # The optimizer's own hooks run after those of all optimizers, and may still change gradients: ours is to be last.
    if run.trains_masks:
        _readers[optimizer] = optimizer.register_step_pre_hook(_read)


@torch.compiler.disable
def _read(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _runs[optimizer].read(optimizer)


@torch.compiler.disable
def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if optimizer in _readers:
        _remove_reader(optimizer)
        _runs[optimizer].step(optimizer)
    elif optimizer in _runs and _has_closure(args, kwargs) and _runs[optimizer].signature != _signature(optimizer):
        _Run(optimizer).check(optimizer, closure=True)  # the masks of graphs that were compiled inside the step


def _has_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(map(callable, args)) or kwargs.get("closure") is not None


def _remove_reader(optimizer: Optimizer) -> None:
    handle = _readers.pop(optimizer, None)
    if handle is not None:
        handle.remove()
