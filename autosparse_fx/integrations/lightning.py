"""AutoSparseCallback for Lightning: ``Trainer(callbacks=[AutoSparseCallback(target_sparsity=0.9)])``."""

import contextlib
import importlib
import math
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from autosparse_fx.annealing import GradientAnnealing
from autosparse_fx.attach import detach, masked_modules
from autosparse_fx.config import AutoSparse, masking_exactly
from autosparse_fx.integrations.run import SparseRun
from autosparse_fx.masked_state import saved_thresholds
from autosparse_fx.sparsify import finalize as finalize_model
from autosparse_fx.sparsify import sparsify

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["AutoSparseCallback"]

# The same framework under two names, with classes of their own; who has the first has the second too.
_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _callback_bases() -> tuple[type, ...]:
    """The class ``Callback`` of the package that is imported already (of both, if both are), or that can be."""
    imported = [sys.modules[name] for name in _PACKAGES if sys.modules.get(name) is not None]
    for name in () if imported else _PACKAGES:
        with contextlib.suppress(ImportError):
            imported = [importlib.import_module(name)]
            break
    if not imported:
        raise ImportError(
            "autosparse_fx.integrations.lightning needs the package lightning (or pytorch-lightning): "
            "pip install 'autosparse-fx[lightning]'"
        )
    return tuple(module.Callback for module in imported)


_Callback: Any = type("_Callback", _callback_bases(), {})


class AutoSparseCallback(_Callback):
    """Train a ``LightningModule`` sparse: prepares it, anneals, logs, saves and resumes.

    The module is prepared before its optimizers are made (after ``setup`` and ``configure_model``, where it has its
    own). The annealer counts the optimizer's steps, so gradient accumulation and mixed precision need no setting.
    ``sparsity`` and ``alpha`` are logged every ``log_every_n_steps`` steps and at the end of each epoch. What resuming
    needs is in the checkpoints. A ``ModelCheckpoint`` with ``monitor`` looks for the best model from the moment on
    when the sparsity has reached its target: earlier models are not sparse yet.

    Args:
        config: what to make sparse and how; 80 % sparsity by default. Left out where the module was prepared before.
        submodule: name of the part of the module to make sparse, as ``"model"``; the whole module by default. Names
            in the configuration's rules start below it.
        finalize: at the end of ``fit`` make the module plain again, with real zeros in its weights.
        total_steps: optimizer steps of the whole training; ``trainer.estimated_stepping_batches`` by default.
        **fields: the fields of :class:`~autosparse_fx.AutoSparse`, instead of ``config``.

    Attributes:
        annealer: the :class:`~autosparse_fx.GradientAnnealing`, from the start of the training on.

    Raises:
        TypeError, ValueError: naming the argument and what it accepts.

    Example::

        trainer = Trainer(max_epochs=10, callbacks=[AutoSparseCallback(target_sparsity=0.9, finalize=True)])
        trainer.fit(module, loader)
    """

    def __init__(
        self,
        config: AutoSparse | None = None,
        *,
        submodule: str = "",
        finalize: bool = False,
        total_steps: int | None = None,
        **fields: object,
    ) -> None:
        super().__init__()
        self._run = SparseRun(config, fields, total_steps=total_steps, finalize=finalize)
        self._submodule = submodule
        self._saved: dict[str, Any] | None = None
        self._load_hook: Any = None
        self._last_step = 0
        self._is_as_saved = False  # whether the module was prepared for a test, as a checkpoint tells
        self._choosing = True  # whether ModelCheckpoint may look for the best model

    def __repr__(self) -> str:
        return self._run.described(submodule=self._submodule)

    @property
    def annealer(self) -> GradientAnnealing | None:
        return self._run.annealer

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Prepare the module to be trained; to be tested, it becomes what the checkpoint is."""
        self._saved = None
        self._remove_load_hook()
        if stage != "fit":
            self._load_hook = pl_module.register_load_state_dict_pre_hook(self._become_as_saved)
            return
        if self._is_as_saved:  # from a test; the training has the configuration that it asks for
            self._is_as_saved = False
            for _, masked in masked_modules(self._part(pl_module)):
                detach(masked)
        makes_layers = _overrides(pl_module, "setup") or _overrides(pl_module, "configure_model")
        if not masked_modules(pl_module):
            _refuse_averages_before(self, trainer)
            if not self._run.finalize:
                _refuse_workers_that_keep_thresholds(trainer)
            if makes_layers:
                _refuse_copies_made_in_setup(trainer)
        if makes_layers:
            self._prepare_after_configure_model(pl_module)  # which may still make layers
        else:
            self._run.prepare(self._part(pl_module))

    def on_load_checkpoint(self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]) -> None:
        self._saved = checkpoint["callbacks"].get(self.state_key)

    def state_dict(self) -> dict[str, Any]:
        return self._run.state() or {}

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        part = self._part(pl_module)
        saved = self._saved
        if saved is None and trainer.global_step > 0:
            saved = self._run.state()  # a second `fit` of the same trainer, to go on
        total_steps = self._run.total_steps or _total_steps(trainer, pl_module)
        self._run.begin(part, trainer.optimizers, total_steps, step=trainer.global_step, saved=saved)
        self._last_step = trainer.global_step
        self._choosing = self._run.reached(part)

    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._last_step:
            return  # no step of the optimizer: gradients are accumulated
        self._last_step = trainer.global_step
        if not self._choosing and self._run.may_have_reached():
            self._choosing = self._run.reached(self._part(pl_module))
            if self._choosing:
                _forget_best_models(trainer)
                _wait_anew(trainer)
        if trainer.log_every_n_steps and trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log_dict(self._run.metrics(self._part(pl_module)))

    def on_train_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if not self._choosing:
            _wait_anew(trainer)
        if trainer.log_every_n_steps:
            pl_module.log_dict(self._run.metrics(self._part(pl_module)), sync_dist=True)

    def on_validation_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if not self._choosing:
            _wait_anew(trainer)  # models that are not sparse yet are nothing to compare later ones with

    def on_fit_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._run.end(self._part(pl_module))

    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        self._remove_load_hook()

    def _part(self, pl_module: "LightningModule") -> nn.Module:
        try:
            part: nn.Module = pl_module.get_submodule(self._submodule)
        except AttributeError as error:
            names = [name for name, _ in pl_module.named_children()]
            raise ValueError(
                f"AutoSparseCallback(submodule={self._submodule!r}): {type(pl_module).__name__} has no such part; "
                f"it has {', '.join(names) or 'none'}"
            ) from error
        return part

    def _prepare_after_configure_model(self, pl_module: "LightningModule") -> None:
        """Lightning calls ``configure_model`` last, right before it loads a checkpoint; there is no hook behind it."""
        configure_model = pl_module.configure_model

        def configure_model_and_prepare() -> None:
            vars(pl_module).pop("configure_model", None)
            configure_model()
            self._run.prepare(self._part(pl_module))

        vars(pl_module)["configure_model"] = configure_model_and_prepare

    def _become_as_saved(self, pl_module: "LightningModule", state_dict: dict[str, Any], *_: object) -> None:
        """Before a checkpoint is loaded for a test: sparse or plain, as the saved module was."""
        part, prefix = self._part(pl_module), f"{self._submodule}." if self._submodule else ""
        saved = saved_thresholds(state_dict).items()
        thresholds = {name.removeprefix(prefix): value for name, value in saved if name.startswith(prefix)}
        if thresholds:
            if self._run.config is None and not masked_modules(part):
                sparsify(part, masking_exactly(thresholds))
                self._is_as_saved = True
            else:
                self._run.prepare(part)
        elif masked_modules(part):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of a missed target: all weights are about to be replaced
                finalize_model(part)

    def _remove_load_hook(self) -> None:
        if self._load_hook is not None:
            self._load_hook.remove()
            self._load_hook = None


def _overrides(pl_module: "LightningModule", name: str) -> bool:
    """Whether the user's class, and not Lightning's, defines the hook."""
    definer = next(cls for cls in type(pl_module).__mro__ if name in vars(cls))
    return definer.__module__.partition(".")[0] not in {package.partition(".")[0] for package in _PACKAGES}


def _total_steps(trainer: "Trainer", pl_module: "LightningModule") -> int:
    cure = "AutoSparseCallback(total_steps=...) says how many steps of the optimizer the whole training has"
    if not pl_module.automatic_optimization:
        raise ValueError(f"with manual optimization only you know how often the optimizer steps: {cure}")
    if any(_is_a(callback, "GradientAccumulationScheduler") for callback in trainer.callbacks):
        raise ValueError(f"Lightning does not count steps under a GradientAccumulationScheduler: {cure}")
    steps = trainer.estimated_stepping_batches
    if not 0 < steps < math.inf:
        raise ValueError(f"the training has no end to anneal alpha to: set max_steps or max_epochs, or {cure}")
    return int(steps)


def _refuse_averages_before(callback: AutoSparseCallback, trainer: "Trainer") -> None:
    before = trainer.callbacks[: trainer.callbacks.index(callback)]
    names = [type(other).__name__ for other in before if _averages(other)]
    if names:
        raise ValueError(
            f"{names[0]} would copy the model before it is prepared: put AutoSparseCallback before it in "
            "Trainer(callbacks=[...])"
        )


def _averages(callback: object) -> bool:
    return _is_a(callback, "WeightAveraging") or _is_a(callback, "StochasticWeightAveraging")


def _refuse_copies_made_in_setup(trainer: "Trainer") -> None:
    """Where the module is prepared behind its own hooks, what copied it in ``setup`` has a dense one."""
    names = [type(other).__name__ for other in trainer.callbacks if _is_a(other, "StochasticWeightAveraging")]
    if names:
        raise ValueError(
            f"{names[0]} copies the module before its own setup and configure_model have made the layers to prepare: "
            "make them in __init__ (and drop these hooks), or sparsify the module yourself before fit"
        )


def _refuse_workers_that_keep_thresholds(trainer: "Trainer") -> None:
    """Processes that Lightning forks or spawns give back the state of the module that this process has: a dense one."""
    launcher = getattr(trainer.strategy, "launcher", None)
    if _is_a(launcher, "_MultiProcessingLauncher"):
        raise ValueError(
            "the processes that this strategy starts would leave this one with the dense module, without thresholds: "
            "use strategy='ddp', AutoSparseCallback(finalize=True), or sparsify the module yourself before fit"
        )


def _forget_best_models(trainer: "Trainer") -> None:
    """Let every ModelCheckpoint choose its best models anew; their files stay."""
    for checkpoint in trainer.checkpoint_callbacks:
        if getattr(checkpoint, "monitor", None) is not None:
            checkpoint.best_k_models = {}
            checkpoint.best_model_path = checkpoint.kth_best_model_path = ""
            checkpoint.best_model_score = None


def _wait_anew(trainer: "Trainer") -> None:
    """Let every EarlyStopping forget what it has seen."""
    for stopping in trainer.callbacks:
        if _is_a(stopping, "EarlyStopping"):
            stopping.wait_count = 0
            stopping.best_score = torch.tensor(math.inf if stopping.mode == "min" else -math.inf)


def _is_a(callback: object, name: str) -> bool:
    """By name, for there are two packages, and not every version of them has every class."""
    return any(cls.__name__ == name for cls in type(callback).__mro__)
