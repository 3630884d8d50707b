"""GradientAnnealing: after every optimizer step it lowers alpha, and steers the thresholds to the target."""

import threading
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autosparse_fx.arguments import check_bool, check_module, whole_steps
from autosparse_fx.attach import masked_modules
from autosparse_fx.consistency import refuse_broken_ties
from autosparse_fx.controller import Controller
from autosparse_fx.decay import annealed_alpha
from autosparse_fx.history import RECORDS, History
from autosparse_fx.masked import MaskedModule, full_logit
from autosparse_fx.masked_state import ALPHA, alpha_of, reset_mask, stored_weight
from autosparse_fx.optimizers import (
    check_momentum_can_be_cleared,
    clear_momentum_of_masked,
    optimizer_steps,
    steps_nowhere,
    unwrapped,
    warn_of_late_weights,
    warn_of_untrained_parameters,
    warn_of_zeros_that_stay,
)

__all__ = ["GradientAnnealing"]

MAX_STEPS_BETWEEN_SHIFTS = 20
MAX_HELD_CALLS = 20  # of step() in a row that may have come after no optimizer step: GradScaler seldom skips as many
MAX_UNHEARD_STEPS = 20  # of one optimizer that trains masked weights, between two that were counted

_annealers: "weakref.WeakSet[GradientAnnealing]" = weakref.WeakSet()
_lock = threading.RLock()  # of that set


class GradientAnnealing:
    """Anneal alpha, and steer the sparsity to its target, once per optimizer step.

    After step ``i`` of ``total_steps`` alpha is ``config.alpha * decay(i / total_steps)``, and exactly 0 from
    ``config.alpha_end`` on (Gradient Annealing, arXiv:2304.06941, per step instead of per epoch). With a target, all
    thresholds that share it move together to the scheduled sparsity, up to every 20 steps (see ``steering.py``).
    Parts of a model that step apart (the two networks of a GAN) may each have an annealer, given the part and its
    optimizer; alpha is common to all that one ``sparsify`` prepared, so what is to be annealed at a pace of its own is
    to be prepared on its own.

    Args:
        model: what ``sparsify`` returned, or any module around it.
        total_steps: number of optimizer steps (not batches, not epochs) of the whole training.
        optimizer: with it the annealer counts the optimizer's steps by itself, for as long as the optimizer lives: a
            step that ``GradScaler`` skips does not count, nor do the batches of gradient accumulation. (A fused
            optimizer, ``fused=True``, that ``GradScaler`` lets skip on the device does count.) Without it, call
            :meth:`step` after every ``optimizer.step()`` or ``scaler.step(optimizer)``.
        clear_momentum: after each step of ``optimizer``, set its momentum (``momentum_buffer``, ``exp_avg``) to zero
            where weights are masked. Without it, momentum carries a masked weight on for a while after its gradient
            has been scaled down by alpha, or to nothing; with it, a masked weight moves by the gradient of the step.

    Attributes:
        history: alpha, sparsity and cuts over the training; see :class:`~autosparse_fx.history.History`.

    Raises:
        ValueError: if the model is not sparse, ``total_steps`` is no positive whole number, ``max_layer_sparsity`` puts
            a target out of reach, weights were tied or untied outside of ``dense_weights`` or share memory, or momentum
            is to be cleared without an optimizer or in sharded weights.
        TypeError: if ``model`` is no module, or ``optimizer`` no optimizer, or a wrapper that hides the hooks of one,
            or ``clear_momentum`` no bool.

    Warns:
        UserWarning: if a layer joined the model after ``sparsify``, and so is dense; if alpha is 0 throughout and a
            weight holds nothing but zeros, which no gradient reaches; if an annealer of more of the model is stopped
            for this one; at the second step, if masked weights or thresholds are in none of the optimizers that have
            stepped by then; if another optimizer trains masked weights for 20 steps without one that counts; and once
            for each target, if it is out of reach: the training then goes on as sparse as can be.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        optimizer: Optimizer | None = None,
        *,
        clear_momentum: bool = False,
    ) -> None:
        check_module(model, "GradientAnnealing")
        modules = masked_modules(model)
        if not any(module._autosparse_slots for _, module in modules):
            raise ValueError(f"{type(model).__name__} is not sparse: call autosparse_fx.sparsify(model) first")
        self.total_steps = whole_steps(total_steps, "total_steps")
        check_bool(clear_momentum, "clear_momentum")
        plans = {id(m._autosparse.plan): m._autosparse.plan for _, m in modules if m._autosparse_slots}
        configs = [plan.config for plan in plans.values()]
        if any(config != configs[0] for config in configs):
            raise ValueError(
                "parts of the model were prepared with different configurations, and alpha is one for the whole model: "
                "sparsify the whole model once, with rules for its parts"
            )
        if optimizer is not None:
            optimizer = unwrapped(optimizer)
        if clear_momentum:
            check_momentum_can_be_cleared(modules, optimizer)
        refuse_broken_ties(model)
        controller = Controller(configs[0])
        controller.check(module for _, module in modules)
        warn_of_late_weights(model)
        if configs[0].alpha == 0:
            warn_of_zeros_that_stay(module for _, module in modules)
        self._config = configs[0]
        self._plans = list(plans.values())
        self._lineages = {plan.lineage for plan in self._plans}
        self._model = model
        self._modules = modules
        self._interval = max(1, min(MAX_STEPS_BETWEEN_SHIFTS, self.total_steps // 100))
        self._count = 0
        self._warned_of_end = False
        self._warned_of_order = False
        self._held_calls = 0
        self._sees_steps: bool | None = None  # unknown until the first that it sees, or should have seen
        self._controller = controller
        self._unchecked_steps = 2
        self._optimizer = optimizer
        self._handle: Any = None
        self._clears_momentum = clear_momentum
        for _, module in modules:
            for slot in module._autosparse_slots:
                if module._autosparse.weights[slot.name].provisional:
                    reset_mask(module, slot)
                    module._autosparse.weights[slot.name].provisional = False  # from here on they are trained
        for plan in self._plans:
            plan.was_trained = plan.was_trained or plan.annealed_steps > 0
        beside = self._replace_earlier()
        self.continue_history(beside[0].history if beside else History())
        self._attach()
        self._versions = self._weight_versions() if optimizer is None else None
        self._write_alpha()

    def _replace_earlier(self) -> "list[GradientAnnealing]":
        """Stop the annealers of modules that this one takes over; return those of other modules that begin with it."""
        own = {id(module) for _, module in self._modules}
        beside = []
        with _lock:
            known = list(_annealers)
            _annealers.add(self)
        for earlier in known:
            held = {id(module) for module in earlier._model.modules()}
            theirs = [(name, module) for name, module in earlier._masked() if id(module) in held]
            left = [name for name, module in theirs if id(module) not in own]
            if not theirs and any(id(module) in own for _, module in earlier._modules):
                earlier.detach()  # of masks that these modules had before
            if len(left) == len(theirs):
                if earlier.steps == 0 and any(plan in self._plans for plan in earlier._plans):
                    beside.append(earlier)
                continue
            if left and earlier._handle is not None:
                warnings.warn(
                    f"the annealer of {len(theirs)} masked modules is stopped, because a new one takes over some "
                    f"of them: the others ('{left[0]}', {len(left)} in all) are no longer annealed or steered; "
                    "give each annealer a part of the model of its own, or one the whole model",
                    stacklevel=4,
                )
            earlier.detach()
            with _lock:
                _annealers.discard(earlier)
        return beside

    def _attach(self) -> None:
        self._unheard: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        optimizer_steps.start(self)
        self._optimizer_steps_before = optimizer_steps.count
        if self._optimizer is not None:
            self._handle = self._optimizer.register_step_post_hook(self._after_optimizer_step)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None, "_unheard": {}}  # optimizers leave their hooks behind, too

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._unchecked_steps = 2
        self._replace_earlier()
        self._attach()

    def __repr__(self) -> str:
        weights = len(
            {id(stored_weight(module, slot)) for _, module in self._masked() for slot in module._autosparse_slots}
        )
        target = "" if self._config.target_sparsity is None else f", target_sparsity={self._config.target_sparsity}"
        steps = f"step {self._count} of {self.total_steps}"
        return f"GradientAnnealing({steps}, alpha={self.alpha:.4g}{target}, {weights} weights)"

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
    def out_of_reach(self) -> frozenset[float]:
        """The targets of which a shift has fallen short, because weights are too large for any cut."""
        return frozenset(self._controller.out_of_reach)

    @property
    def scheduled_sparsity(self) -> float | None:
        """The sparsity that the model-wide target asks for now; None in the open loop."""
        if self._config.target_sparsity is None:
            return None
        return self._controller.scheduled(self._config.target_sparsity, self._count / self.total_steps)

    def step(self) -> None:
        """Count one optimizer step; call it after ``optimizer.step()`` where no optimizer was given.

        A call after a step that ``GradScaler`` skipped does not count: since the call before it no optimizer has
        stepped, and no masked weight was written to. (A step of any optimizer of torch counts, though: with several,
        and one of them skipped, give the annealer its own.) An optimizer that is none of torch's and writes through
        ``.data`` is not seen, so when more calls in a row follow no step than ``GradScaler`` would skip (20, or half
        of a short training), they do count, all of them.
        """
        if self._handle is not None:
            raise RuntimeError("this annealer counts its optimizer's steps by itself: do not call step()")
        versions = self._weight_versions()
        if versions != self._versions:
            self._versions = versions
            self._held_calls, self._sees_steps = 0, True
            self._advance()
            return
        if self._sees_steps is None and not self._warned_of_order:
            self._warned_of_order = True
            warnings.warn(
                "GradientAnnealing.step() was called although no weight has changed since the last call: call it "
                "after optimizer.step(). It does not count (which is right where GradScaler skipped that step)",
                stacklevel=2,
            )
        self._held_calls += 1
        if self._held_calls > min(MAX_HELD_CALLS, self.total_steps // 2):
            self._sees_steps = False
        if self._sees_steps is False:
            for _ in range(self._held_calls):
                self._advance()
            self._held_calls = 0

    def detach(self) -> None:
        """Stop counting the optimizer's steps. A new annealer for the same model does this to the one before it."""
        optimizer_steps.leave(self)
        if self._handle is not None:
            self._handle.remove()
            self._optimizer = self._handle = None

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs, and the history; thresholds and offsets are in the model's own state_dict."""
        return {
            "steps": self._count,
            "total_steps": self.total_steps,
            "floors": self._controller.floors,
            "history": self.history.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume where :meth:`state_dict` was taken, alpha included.

        Raises:
            TypeError: if it is no dict.
            ValueError: if a key is missing or wrong, or the training that was saved has another ``total_steps``. The
                annealer is then as it was.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"load_state_dict takes what annealer.state_dict() returned, got {type(state).__name__}")
        missing = {"steps", "total_steps"} - set(state)
        if missing:
            raise ValueError(f"the annealer's state lacks {', '.join(sorted(missing))}: save annealer.state_dict()")
        if state["total_steps"] != self.total_steps:
            raise ValueError(
                f"the saved training has total_steps={state['total_steps']}, this annealer {self.total_steps}: make it "
                "with the same total_steps to resume"
            )
        steps = state["steps"]
        if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps <= self.total_steps:
            raise ValueError(
                f"the annealer's state counts {steps!r} steps of {self.total_steps}: save annealer.state_dict()"
            )
        try:
            history = History.from_state(state["history"]) if "history" in state else None
            saved = state.get("floors", [])
            floors = None if saved is None else [[float(target), float(floor)] for target, floor in saved]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the history or the floors in the annealer's state are damaged ({error!r}): save annealer.state_dict()"
            ) from error
        self._count = steps
        self._controller.resume(floors)
        if history is not None:
            self.history.become(history)  # which annealers of other parts may share
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
        if steps_nowhere(optimizer):
            return
        self._advance()
        if self._clears_momentum:
            clear_momentum_of_masked(optimizer, self._masked())

    def saw_step(self, optimizer: Optimizer) -> None:
        """Warn where an optimizer trains the masked weights again and again, and no step is counted."""
        unheard = self._unheard[optimizer] = self._unheard.get(optimizer, 0) + 1
        if unheard != MAX_UNHEARD_STEPS or self._count >= self.total_steps:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        trained = [
            f"{prefix}.{slot.name}"
            for prefix, module in self._masked()
            for slot in module._autosparse_slots
            if id(stored_weight(module, slot)) in held
        ]
        if trained:
            theirs = "" if self._optimizer is None else f" of its own {type(self._optimizer).__name__}"
            warnings.warn(
                f"{unheard} steps of {type(optimizer).__name__} have trained masked weights ('{trained[0]}', "
                f"{len(trained)} in all) since GradientAnnealing last counted a step{theirs}: alpha and the sparsity "
                "stand still meanwhile; give it the optimizer that steps, or none and call its step() after each",
                stacklevel=2,
            )

    def _advance(self) -> None:
        self._unheard.clear()
        if not self._masked():
            self._warn_of_other_masks()
            return
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
        if self._controller.floors is None:
            self._controller.begin(module for _, module in self._masked())
        if self._unchecked_steps > 0:
            self._unchecked_steps -= 1
            if self._unchecked_steps == 0:  # by now every optimizer of the loop has stepped
                warn_of_untrained_parameters(self._model, optimizer_steps.stepped_since(self._optimizer_steps_before))
        for plan in self._plans:
            plan.annealed_steps, plan.floors = self._count, self._controller.floors
        self._write_alpha()
        interval = max(self._interval, self.total_steps // 100) if self._settling() else self._interval
        final = self._count == self.total_steps
        steering = final or self._count % interval == 0
        recording = final or self._count == 1 or self._count % -(-self.total_steps // RECORDS) == 0
        if steering or recording:
            self._modules = masked_modules(self._model)  # dense_weights and finalize may have changed which there are
            self._modules = self._masked()
        warned = self._shift() if steering else []
        if recording and self._modules:
            self._record()
        for text in warned:  # which may be an error to whoever asked for that
            warnings.warn(text, stacklevel=4)

    def _shift(self) -> list[str]:
        modules = [module for _, module in self._modules]
        return self._controller.shift(modules, self._count / self.total_steps, exact=self._settling())

    def _record(self) -> None:
        weights: dict[int, tuple[str, str, Tensor, Tensor]] = {}
        for prefix, module in self._modules:
            for slot in module._autosparse_slots:
                stored = stored_weight(module, slot)
                name, path = module._autosparse.weights[slot.name].name, f"{prefix}.{slot.name}"
                weights.setdefault(id(stored), (name, path, stored.detach(), full_logit(module, slot)))
        names = {name for name, *_ in weights.values()}
        apart = len(names) < len(weights)  # parts that were prepared on their own, by the same names
        rows = [(path if apart else name, stored, s) for name, path, stored, s in weights.values()]
        self.history.add(self._count, self.alpha, rows)

    def _settling(self) -> bool:
        return self._count >= self._config.alpha_end * self.total_steps

    @torch.no_grad()
    def _write_alpha(self) -> None:
        alphas = [alpha_of(m) for _, m in self._masked() if ALPHA in m._buffers]
        for alpha in {id(alpha): alpha for alpha in alphas}.values():
            alpha.data.fill_(self.alpha)  # no write that autograd sees: a graph of another part may still need alpha

    def _masked(self) -> list[tuple[str, MaskedModule]]:
        """Its modules but for those that were finalized, whether or not another ``sparsify`` has masked them since."""
        return [
            (name, module)
            for name, module in self._modules
            if isinstance(module, MaskedModule) and module._autosparse.plan.lineage in self._lineages
        ]

    def _warn_of_other_masks(self) -> None:
        if not self._warned_of_end and any(isinstance(module, MaskedModule) for _, module in self._modules):
            self._warned_of_end = True
            warnings.warn(
                "the model was finalized and made sparse anew since this annealer was made, which leaves the new masks "
                "alone: make a new GradientAnnealing for them",
                stacklevel=4,
            )

    def _weight_versions(self) -> tuple[int, int]:
        """What changes when a weight is written to; fused optimizers do so without counting it as a write."""
        writes = sum(
            stored_weight(module, slot)._version for _, module in self._masked() for slot in module._autosparse_slots
        )
        return writes, optimizer_steps.count
