"""AutoSparseCallback in a Lightning Trainer."""

import csv
import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import autosparse_fx
from autosparse_fx import AutoSparse

lightning = pytest.importorskip("lightning.pytorch")

from autosparse_fx.integrations.lightning import AutoSparseCallback  # noqa: E402

# Lightning warns of small data, few workers and of PyTorch's own deprecations; the library must not.
pytestmark = pytest.mark.filterwarnings(
    "default::UserWarning", "default::DeprecationWarning", "default::FutureWarning",
    "error:finalize:UserWarning", "error:the optimizer:UserWarning",
)  # fmt: skip

BATCHES, BATCH = 8, 16


@pytest.fixture(autouse=True)
def quiet() -> None:
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class LateDigits(Digits):
    """Makes its layers where Lightning recommends it."""

    def __init__(self) -> None:
        lightning.LightningModule.__init__(self)

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            self.model = module().model


class SetupDigits(Digits):
    def __init__(self) -> None:
        lightning.LightningModule.__init__(self)

    def setup(self, stage: str) -> None:
        self.model = module().model


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCHES * BATCH, 20, generator=generator)
    y = (x @ torch.randn(20, 4, generator=generator)).argmax(1)
    return DataLoader(TensorDataset(x, y), batch_size=BATCH)


def module(cls: type = Digits) -> Any:
    torch.manual_seed(3)
    return cls()


def trainer(callback: Any, path: Path, epochs: int = 4, callbacks: tuple[Any, ...] = (), **kwargs: Any) -> Any:
    defaults = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}
    defaults |= {"logger": False, "enable_checkpointing": any("Checkpoint" in type(c).__name__ for c in callbacks)}
    return lightning.Trainer(
        max_epochs=epochs, callbacks=[callback, *callbacks], default_root_dir=path, **(defaults | kwargs)
    )


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("cls", [Digits, LateDigits, SetupDigits])
def test_trains_to_the_target_and_finalizes(cls: type, tmp_path: Path) -> None:
    model = module(cls)
    callback = AutoSparseCallback(target_sparsity=0.9, finalize=True)
    trainer(callback, tmp_path).fit(model, loader())
    assert callback.annealer.steps == callback.annealer.total_steps == 4 * BATCHES
    assert callback.annealer.alpha == 0
    assert autosparse_fx.sparsity(model) == pytest.approx(0.9, abs=0.005)
    assert type(model.model[0]) is nn.Linear
    assert model.state_dict().keys() == module().state_dict().keys()


def test_without_finalize_the_module_stays_sparse_and_equals_the_loop_by_hand(tmp_path: Path) -> None:
    model, by_hand = module(), module()
    config = AutoSparse(target_sparsity=0.8, rules={"model.0.weight": None})
    trainer(AutoSparseCallback(config), tmp_path).fit(model, loader())

    autosparse_fx.sparsify(by_hand, config)
    optimizer = by_hand.configure_optimizers()
    annealer = autosparse_fx.GradientAnnealing(by_hand, 4 * BATCHES, optimizer=optimizer)
    for _ in range(4):
        for batch in loader():
            by_hand.training_step(batch, 0).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert annealer.steps == 4 * BATCHES
    assert_equal(state(model), state(by_hand))


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    model, callback = module(), AutoSparseCallback(target_sparsity=0.7)
    trainer(callback, tmp_path, epochs=6, accumulate_grad_batches=3).fit(model, loader())
    assert callback.annealer.steps == callback.annealer.total_steps == 6 * 3  # 8 batches: 3, 3 and 2
    assert autosparse_fx.sparsity(model) == pytest.approx(0.7, abs=0.005)


def test_max_steps_is_the_end(tmp_path: Path) -> None:
    callback = AutoSparseCallback(target_sparsity=0.7)
    trainer(callback, tmp_path, epochs=-1, max_steps=13).fit(module(), loader())
    assert callback.annealer.steps == callback.annealer.total_steps == 13


def test_bfloat16_autocast(tmp_path: Path) -> None:
    model = module()
    trainer(AutoSparseCallback(target_sparsity=0.8, finalize=True), tmp_path, precision="bf16-mixed").fit(
        model, loader()
    )
    assert model.model[0].weight.dtype == torch.float32
    assert autosparse_fx.sparsity(model) == pytest.approx(0.8, abs=0.005)


@pytest.mark.parametrize("cls", [Digits, LateDigits])
def test_resumed_equals_unbroken(cls: type, tmp_path: Path) -> None:
    unbroken, first, resumed = module(cls), module(cls), module(cls)
    whole = AutoSparseCallback(target_sparsity=0.9)
    trainer(whole, tmp_path).fit(unbroken, loader())

    class Stop(lightning.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")
                trainer.should_stop = True

    trainer(AutoSparseCallback(target_sparsity=0.9), tmp_path, callbacks=(Stop(),)).fit(first, loader())
    callback = AutoSparseCallback(target_sparsity=0.9)
    trainer(callback, tmp_path).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)  # nothing in it runs code
    assert callback.annealer.steps == 4 * BATCHES
    assert len(callback.annealer.history) == len(whole.annealer.history)
    assert_equal(state(resumed), state(unbroken))


def test_best_model_is_one_that_is_sparse(tmp_path: Path) -> None:
    """The lowest loss is that of the first epoch here, when the model is still dense."""

    class Growing(Digits):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("val_loss", float(self.current_epoch))

    checkpoint = lightning.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss", filename="{epoch}-{sparsity:.2f}")
    model = module(Growing)
    run = trainer(AutoSparseCallback(target_sparsity=0.9, finalize=True), tmp_path, epochs=10, callbacks=(checkpoint,))
    run.fit(model, loader(), loader())
    epoch = int(Path(checkpoint.best_model_path).name.removeprefix("epoch=").split("-")[0])
    assert epoch in (5, 6)  # ramp_end is 0.6

    run.test(model, loader(), ckpt_path="best", verbose=False)  # a sparse checkpoint into a finalized model
    assert "model.0.weight_threshold" in model.state_dict()
    assert autosparse_fx.sparsity(model) == pytest.approx(0.9, abs=0.005)


@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_early_stopping_waits_for_the_target(first: bool, validation: bool, tmp_path: Path) -> None:
    """The loss grows with every epoch here: patience is counted from where the model is as sparse as asked for."""

    class Growing(Digits):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("val_loss", float(self.current_epoch))

        def on_train_epoch_end(self) -> None:
            self.log("epoch_loss", float(self.current_epoch))

    stopping = lightning.callbacks.EarlyStopping(
        "val_loss" if validation else "epoch_loss", patience=2, check_on_train_epoch_end=not validation
    )
    model = module(Growing)
    callback = AutoSparseCallback(target_sparsity=0.9)
    run = trainer(callback, tmp_path, epochs=12, callbacks=(stopping,))
    if first:
        run.callbacks.remove(stopping)
        run.callbacks.insert(0, stopping)
    run.fit(model, loader(), loader() if validation else None)
    assert autosparse_fx.sparsity(model) == pytest.approx(0.9, abs=0.005)
    assert run.current_epoch < 12


def test_a_saved_finalized_model_is_plain_and_cannot_be_resumed(tmp_path: Path) -> None:
    model = module()
    run = trainer(AutoSparseCallback(target_sparsity=0.9, finalize=True), tmp_path)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "final.ckpt")
    loaded = Digits.load_from_checkpoint(tmp_path / "final.ckpt")
    assert_equal(state(loaded), state(model))
    assert (loaded.model[2].weight == 0).float().mean() > 0.5

    sparse = autosparse_fx.sparsify(module())  # a plain checkpoint into a sparse model
    trainer(AutoSparseCallback(target_sparsity=0.9), tmp_path).test(
        sparse, loader(), ckpt_path=tmp_path / "final.ckpt", verbose=False
    )
    assert_equal(state(sparse), state(model))

    with pytest.raises(ValueError, match="holds a finalized model"):
        trainer(AutoSparseCallback(target_sparsity=0.9), tmp_path, epochs=5).fit(
            module(), loader(), ckpt_path=tmp_path / "final.ckpt"
        )


def test_sparsity_and_alpha_are_logged(tmp_path: Path) -> None:
    logger = lightning.loggers.CSVLogger(tmp_path)
    callback = AutoSparseCallback(target_sparsity=0.9)
    run = trainer(callback, tmp_path, logger=logger, log_every_n_steps=4)
    run.fit(module(), loader())
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["sparsity"]]
    logged = {int(row["step"]): float(row["sparsity"]) for row in rows}
    assert set(logged) >= {3, 7, 11, 15, 19, 23, 27, 31}
    assert logged[3] < logged[11] < logged[31] == pytest.approx(0.9, abs=0.005)
    assert float(rows[0]["alpha"]) > float(rows[-1]["alpha"]) == 0
    assert run.callback_metrics["sparsity"] == pytest.approx(0.9, abs=0.005)


def test_one_part_of_the_module(tmp_path: Path) -> None:
    class Taught(Digits):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Linear(20, 4).requires_grad_(False)

    model = module(Taught)
    callback = AutoSparseCallback(target_sparsity=0.9, submodule="model", rules={"4.weight": None})
    trainer(callback, tmp_path).fit(model, loader())
    assert set(autosparse_fx.thresholds(model)) == {"model.0.weight", "model.2.weight"}
    with pytest.raises(ValueError, match=r"submodule='net'.*it has model, teacher"):
        trainer(AutoSparseCallback(submodule="net"), tmp_path).fit(module(Taught), loader())


def test_a_model_that_was_prepared_before(tmp_path: Path) -> None:
    config = AutoSparse(target_sparsity=0.6)
    model = autosparse_fx.sparsify(module(), config)
    with pytest.raises(ValueError, match="leave the configuration out"):
        trainer(AutoSparseCallback(target_sparsity=0.9), tmp_path).fit(model, loader())
    trainer(AutoSparseCallback(), tmp_path).fit(model, loader())
    assert autosparse_fx.sparsity(model) == pytest.approx(0.6, abs=0.005)


def test_fit_again_to_go_on(tmp_path: Path) -> None:
    callback = AutoSparseCallback(target_sparsity=0.9, total_steps=6 * BATCHES)
    run, model = trainer(callback, tmp_path, epochs=3), module()
    run.fit(model, loader())
    assert callback.annealer.steps == 3 * BATCHES
    run.fit_loop.max_epochs = 6
    run.fit(model, loader())
    assert callback.annealer.steps == 6 * BATCHES
    assert autosparse_fx.sparsity(model) == pytest.approx(0.9, abs=0.005)


def test_other_training_is_not_resumed(tmp_path: Path) -> None:
    run = trainer(AutoSparseCallback(target_sparsity=0.9, total_steps=40), tmp_path, epochs=2)
    run.fit(module(), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    for callback, message in (
        (AutoSparseCallback(target_sparsity=0.9), r"total_steps=40\)"),
        (AutoSparseCallback(target_sparsity=0.8, total_steps=40), "trained with {'target_sparsity': 0.9}"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(callback, tmp_path).fit(module(), loader(), ckpt_path=tmp_path / "a.ckpt")


def test_trainings_that_are_refused(tmp_path: Path) -> None:
    class Manual(Digits):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    class TwoOptimizers(Manual):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.model[0], self.model[2:])]

    scheduler = lightning.callbacks.GradientAccumulationScheduler({0: 1, 1: 2})
    for cls, callback, options, message in (
        (Digits, AutoSparseCallback(), {"epochs": -1}, "has no end"),
        (Digits, AutoSparseCallback(), {"callbacks": (scheduler,)}, "GradientAccumulationScheduler"),
        (Manual, AutoSparseCallback(), {}, "with manual optimization"),
        (TwoOptimizers, AutoSparseCallback(total_steps=10), {}, "2 of 2 optimizers hold masked weights"),
        (Digits, AutoSparseCallback(rules={"conv.weight": None}), {}, "conv.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(callback, tmp_path, **options).fit(module(cls), loader())


def test_weight_averaging_comes_after(tmp_path: Path) -> None:
    if not hasattr(lightning.callbacks, "WeightAveraging"):
        pytest.skip("this version of Lightning has no WeightAveraging")
    callback, average = AutoSparseCallback(target_sparsity=0.8, finalize=True), lightning.callbacks.WeightAveraging()
    with pytest.raises(ValueError, match="put AutoSparseCallback before it"):
        trainer(average, tmp_path, callbacks=(callback,)).fit(module(), loader())
    model = module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the plain average of all steps is denser than the last
        trainer(callback, tmp_path, callbacks=(lightning.callbacks.WeightAveraging(),)).fit(model, loader())
    assert type(model.model[0]) is nn.Linear


def test_stochastic_weight_averaging_copies_a_prepared_module_only(tmp_path: Path) -> None:
    def average() -> Any:
        return lightning.callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=0.5)

    with pytest.raises(ValueError, match="put AutoSparseCallback before it"):
        trainer(average(), tmp_path, callbacks=(AutoSparseCallback(),)).fit(module(), loader())
    with pytest.raises(ValueError, match="StochasticWeightAveraging copies the module before"):
        trainer(AutoSparseCallback(), tmp_path, callbacks=(average(),)).fit(module(LateDigits), loader())


def test_processes_that_would_leave_the_thresholds_behind_are_refused(tmp_path: Path) -> None:
    def set_up(callback: AutoSparseCallback, model: Digits) -> None:
        spawned = trainer(callback, tmp_path, devices=2, strategy="ddp_spawn")
        callback.setup(spawned, model, "fit")

    with pytest.raises(ValueError, match=r"strategy='ddp', AutoSparseCallback\(finalize=True\)"):
        set_up(AutoSparseCallback(), module())
    set_up(AutoSparseCallback(finalize=True), module())  # which it does in the processes
    set_up(AutoSparseCallback(), autosparse_fx.sparsify(module()))


def test_checkpoint_of_a_module_that_the_user_prepared_is_tested_as_it_was_saved(tmp_path: Path) -> None:
    model = autosparse_fx.sparsify(
        module(), AutoSparse(target_sparsity=0.8, granularity="channel", rules={"model.4.weight": None})
    )
    run = trainer(AutoSparseCallback(), tmp_path)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "sparse.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("default", ".*(dataloader|workers|logger|litlogger).*")
        tested = module()
        trainer(AutoSparseCallback(), tmp_path).test(
            tested, loader(), ckpt_path=tmp_path / "sparse.ckpt", verbose=False
        )
    assert_equal(state(tested), state(model))
    callback = AutoSparseCallback()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tested = module()
        trainer(callback, tmp_path).validate(tested, loader(), ckpt_path=tmp_path / "sparse.ckpt", verbose=False)
    trainer(callback, tmp_path).fit(tested, loader())  # by the configuration of the callback
    assert autosparse_fx.sparsity(tested) == pytest.approx(0.8, abs=0.005)
    assert any(name == "model.4.weight_threshold" for name, _ in tested.named_parameters())


def test_compiled_training(tmp_path: Path) -> None:
    eager, compiled = module(), module()
    trainer(AutoSparseCallback(target_sparsity=0.8), tmp_path).fit(eager, loader())
    trainer(AutoSparseCallback(target_sparsity=0.8), tmp_path).fit(
        torch.compile(compiled, backend="aot_eager"), loader()
    )
    for name, value in state(eager).items():
        torch.testing.assert_close(state(compiled)[name], value)


IN_PYTORCH_LIGHTNING = """
import torch, logging
import pytorch_lightning as pl
from torch import nn
from autosparse_fx.integrations.lightning import AutoSparseCallback

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(20, 20)
    def setup(self, stage): pass
    def training_step(self, batch, batch_idx): return self.layer(batch).square().mean()
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=0.1)

assert issubclass(AutoSparseCallback, pl.Callback)
module = Module()
pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, callbacks=AutoSparseCallback(target_sparsity=0.9, finalize=True),
).fit(module, torch.utils.data.DataLoader(torch.randn(40, 20)))
print((module.layer.weight == 0).float().mean().item())
"""


@pytest.mark.slow
def test_the_other_package_of_lightning() -> None:
    pytest.importorskip("pytorch_lightning")
    done = subprocess.run([sys.executable, "-c", IN_PYTORCH_LIGHTNING], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(0.9, abs=0.005)


def test_missing_package_is_named() -> None:
    code = (
        "import sys; sys.modules['lightning'] = sys.modules['pytorch_lightning'] = None\n"
        "import autosparse_fx.integrations\n"
        "import autosparse_fx.integrations.lightning"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'autosparse-fx[lightning]'" in done.stderr


@pytest.mark.slow
def test_example(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import train_lightning

    monkeypatch.setattr(sys, "argv", ["train_lightning.py", "--epochs", "8"])
    train_lightning.main()
    numbers = re.search(r"accuracy +dense ([\d.]+)% +sparse ([\d.]+)% +sparsity ([\d.]+)", capsys.readouterr().out)
    assert numbers is not None
    dense, sparse, sparsity = map(float, numbers.groups())
    assert dense > 90
    assert sparse > 85
    assert sparsity == pytest.approx(0.9, abs=0.005)
