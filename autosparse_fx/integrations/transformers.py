"""AutoSparseCallback for Hugging Face: ``Trainer(..., callbacks=[AutoSparseCallback(target_sparsity=0.9)])``."""

import inspect
import warnings
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from autosparse_fx.annealing import GradientAnnealing
from autosparse_fx.attach import masked_modules
from autosparse_fx.config import AutoSparse
from autosparse_fx.integrations.run import SparseRun
from autosparse_fx.masked_state import stored_weight

try:
    from transformers.trainer_callback import CallbackHandler, ExportableState, TrainerCallback
except ImportError as error:
    raise ImportError(
        "autosparse_fx.integrations.transformers needs the packages transformers and accelerate: "
        "pip install 'autosparse-fx[transformers]'"
    ) from error

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = ["AutoSparseCallback"]


class AutoSparseCallback(TrainerCallback, ExportableState):
    """Train the model of a ``transformers.Trainer`` sparse: prepares it, anneals, logs, saves and resumes.

    The model is prepared when the Trainer is made, before its optimizer. The annealer counts the optimizer's steps, so
    gradient accumulation and mixed precision need no setting. ``sparsity`` and ``alpha`` are in every training log.
    What resuming needs is in the checkpoints, if these hold the whole model. ``load_best_model_at_end`` chooses among
    the models of which the sparsity has reached its target: earlier ones are not sparse yet.

    Args:
        config: what to make sparse and how; 80 % sparsity by default. Left out where the model was prepared before.
        finalize: at the end of ``train`` make the model plain again, with real zeros in its weights, so that
            ``save_pretrained`` and ``trainer.save_model`` write what ``from_pretrained`` reads.
        total_steps: optimizer steps of the whole training; ``state.max_steps`` by default.
        **fields: the fields of :class:`~autosparse_fx.AutoSparse`, instead of ``config``.

    Attributes:
        annealer: the :class:`~autosparse_fx.GradientAnnealing`, from the start of the training on.

    Raises:
        TypeError, ValueError: naming the argument and what it accepts.

    Warns:
        UserWarning: if the checkpoints, being of PEFT, lack the thresholds and zeros of frozen weights.

    Example::

        trainer = Trainer(model, args, train_dataset=data, callbacks=[AutoSparseCallback(target_sparsity=0.9)])
        trainer.train()
    """

    def __init__(
        self,
        config: AutoSparse | None = None,
        *,
        finalize: bool = False,
        total_steps: int | None = None,
        **fields: object,
    ) -> None:
        self._run = SparseRun(config, fields, total_steps=total_steps, finalize=finalize)

    def __repr__(self) -> str:
        return self._run.described()

    @property
    def annealer(self) -> GradientAnnealing | None:
        return self._run.annealer

    def on_init_end(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        model: nn.Module,
        optimizer: Optimizer | None = None,
        **kwargs: object,
    ) -> None:
        _go_first(self)
        if optimizer is not None and not masked_modules(model):
            raise ValueError(
                "this Trainer was given an optimizer, which knows no thresholds: sparsify the model before you make "
                "the optimizer, and leave the configuration out of AutoSparseCallback(); or give Trainer "
                "optimizer_cls_and_kwargs instead of optimizers"
            )
        self._run.prepare(model)

    def on_train_begin(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        model: nn.Module,
        optimizer: Optimizer,
        **kwargs: object,
    ) -> None:
        _go_first(self)  # again, since a resume with restore_callback_states_from_checkpoint puts it behind the others
        if not masked_modules(model):
            raise ValueError(
                "the model is not sparse when the training begins, and its optimizer has been made: pass "
                "AutoSparseCallback to Trainer(callbacks=[...]), not to add_callback; with model_init, let that return "
                "autosparse_fx.sparsify(model, config), and leave the configuration out of AutoSparseCallback(); a "
                "model that was finalized needs a new Trainer"
            )
        total_steps = self._run.total_steps or state.max_steps
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step > 0 else None
        if isinstance(saved, list):
            saved = saved[-1]
        self._run.begin(
            model,
            [optimizer],
            total_steps,
            step=state.global_step,
            saved=None if saved is None else saved["attributes"]["resumed"],
        )
        _warn_of_adapters(model)

    def on_step_begin(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        model: nn.Module,
        **kwargs: object,
    ) -> None:
        if state.best_metric is not None and not self._run.reached(model):
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_log(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        model: nn.Module,
        logs: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        if self.annealer is None or logs is None or not {"loss", "train_loss"} & logs.keys():
            return
        metrics = self._run.metrics(model)
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)  # a copy of the logs was put there before

    def on_train_end(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        model: nn.Module,
        **kwargs: object,
    ) -> None:
        self._run.end(model)

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into ``trainer_state.json``: how to make this callback, and how far it is."""
        fields = {} if self._run.config is None else self._run.config.to_dict()
        return {
            "args": {"finalize": self._run.finalize, "total_steps": self._run.total_steps, **fields},
            "attributes": {"resumed": self._run.state()},
        }


def _warn_of_adapters(model: nn.Module) -> None:
    """Warn where the checkpoints of PEFT, which hold the adapters alone, lack what is made sparse."""
    frozen = [
        weight.name
        for _, module in masked_modules(model)
        for slot in module._autosparse_slots
        if not stored_weight(module, slot).requires_grad and (weight := module._autosparse.weights[slot.name])
    ]
    if hasattr(model, "peft_config") and frozen:
        warnings.warn(
            "the checkpoints of a model of PEFT hold its adapters, and neither thresholds nor zeros of their base "
            f"('{frozen[0]}', {len(frozen)} weights in all): a training cannot be resumed from them, nor the model be "
            "put together again. Make the base sparse first, finalize and save it, and train adapters on that; or "
            "leave it dense with rules, or save the whole state_dict() yourself",
            stacklevel=2,
        )


def _go_first(callback: AutoSparseCallback) -> None:
    """Put the callback before those that write the logs, for them to write its values too.

    The Trainer calls them in the order of a list in which its own come first, and shows it to no callback. So it is
    looked up in the calling frames; where it is not found, only later callbacks see the values.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler) and callback in caller.callbacks:
            # The handler is walking along this list: its place in it stays the same.
            caller.callbacks.remove(callback)
            caller.callbacks.insert(0, callback)
            return
        frame = frame.f_back
