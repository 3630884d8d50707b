"""AutoSparseCallback in a Hugging Face Trainer."""

import copy
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autosparse_fx
from autosparse_fx import AutoSparse

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from autosparse_fx.integrations.transformers import AutoSparseCallback  # noqa: E402

# transformers, accelerate and their dependencies warn about themselves; the library must not.
pytestmark = pytest.mark.filterwarnings(
    "default::UserWarning", "default::DeprecationWarning", "default::FutureWarning",
    "error:finalize:UserWarning", "error:the optimizer:UserWarning",
)  # fmt: skip

TOKENS, SAMPLES, BATCH = 40, 64, 8


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers.logging.set_verbosity_error()


def gpt2() -> Any:
    """Its embedding and its head share their weight."""
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=TOKENS, n_embd=16, n_layer=1, n_head=2, n_positions=16, resid_pdrop=0.1, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(TOKENS, (SAMPLES, 1), generator=generator)
    ids = (starts + torch.arange(8)) % TOKENS
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(model: Any, path: Path, *callbacks: Any, **arguments: Any) -> Any:
    options = {k: arguments.pop(k) for k in ("optimizers", "model_init", "compute_metrics") if k in arguments}
    defaults = {"num_train_epochs": 4, "per_device_train_batch_size": BATCH, "learning_rate": 1e-2, "use_cpu": True}
    defaults |= {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_steps": 8, "seed": 5}
    args = transformers.TrainingArguments(str(path), **(defaults | arguments))
    return transformers.Trainer(
        model, args, train_dataset=data(), eval_dataset=data()[:16], callbacks=list(callbacks), **options
    )


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


STEPS = 4 * SAMPLES // BATCH


def test_trains_to_the_target_and_saves_a_plain_model(tmp_path: Path) -> None:
    model, callback = gpt2(), AutoSparseCallback(target_sparsity=0.9, finalize=True)
    run = trainer(model, tmp_path, callback)
    run.train()
    assert callback.annealer.steps == callback.annealer.total_steps == STEPS
    assert callback.annealer.alpha == 0
    assert model.state_dict().keys() == gpt2().state_dict().keys()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert autosparse_fx.sparsity(model) == pytest.approx(0.9, abs=0.005)

    run.save_model(tmp_path / "final")
    assert_equal(state(transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "final")), state(model))


def test_optimizer_holds_the_thresholds(tmp_path: Path) -> None:
    run = trainer(gpt2(), tmp_path, AutoSparseCallback(target_sparsity=0.8), max_steps=2)
    run.train()
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert all(id(p) in held for p in run.model.parameters())


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    model, callback = gpt2(), AutoSparseCallback(target_sparsity=0.7)
    trainer(model, tmp_path, callback, gradient_accumulation_steps=3, num_train_epochs=6).train()
    assert callback.annealer.steps == callback.annealer.total_steps == 6 * 3  # 8 batches: 3, 3 and 2
    assert autosparse_fx.sparsity(model) == pytest.approx(0.7, abs=0.005)


def test_bfloat16_autocast_and_activation_checkpointing(tmp_path: Path) -> None:
    model, callback = gpt2(), AutoSparseCallback(target_sparsity=0.8, finalize=True)
    trainer(model, tmp_path, callback, bf16=True, gradient_checkpointing=True).train()
    assert model.transformer.h[0].attn.c_attn.weight.dtype == torch.float32
    assert autosparse_fx.sparsity(model) == pytest.approx(0.8, abs=0.005)


class Logged(transformers.TrainerCallback):
    """What a logger sees, such as that of TensorBoard."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


@pytest.mark.parametrize("options", [{}, {"restore_callback_states_from_checkpoint": True}])
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_resumed_equals_unbroken(granularity: str, options: dict[str, Any], tmp_path: Path) -> None:
    def callback() -> AutoSparseCallback:
        return AutoSparseCallback(target_sparsity=0.9, granularity=granularity, rules={"transformer.h.0.attn.*": None})

    options = options | {"save_strategy": "steps", "save_steps": 13}  # in the middle of an epoch
    unbroken = gpt2()
    trainer(unbroken, tmp_path, callback(), **options).train()

    resumed = gpt2()
    logged = Logged()
    run = trainer(resumed, tmp_path, callback(), logged, **options)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-13"))
    (last,) = (c for c in run.callback_handler.callbacks if isinstance(c, AutoSparseCallback))
    assert last.annealer.steps == STEPS
    assert last.annealer.history.records[0].step == 1
    assert logged.seen and all("sparsity" in logs for logs in logged.seen if "loss" in logs)
    assert_equal(state(resumed), state(unbroken))
    assert resumed.lm_head.weight_offset is resumed.transformer.wte.weight_offset


def test_best_model_is_one_that_is_sparse(tmp_path: Path) -> None:
    """The metric grows with every step here: the best would be the first model, which is still dense."""
    model = gpt2()
    arguments = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    run = trainer(
        model, tmp_path, AutoSparseCallback(target_sparsity=0.9, finalize=True),
        load_best_model_at_end=True, metric_for_best_model="grown", greater_is_better=False,
        compute_metrics=lambda _: {"grown": float(run.state.global_step)}, **arguments,
    )  # fmt: skip
    run.train()
    assert 0.5 * STEPS <= run.state.best_global_step <= 0.8 * STEPS  # the target comes at 0.6, but for half a point
    assert autosparse_fx.sparsity(model) == pytest.approx(0.9, abs=0.005)
    assert model.state_dict().keys() == gpt2().state_dict().keys()


def test_sparsity_and_alpha_are_logged_to_callbacks_before_it_too(tmp_path: Path) -> None:
    class Logger(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[dict[str, float]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.seen.append(dict(logs))

    logger = Logger()
    run = trainer(gpt2(), tmp_path, logger, AutoSparseCallback(target_sparsity=0.9), eval_strategy="epoch")
    run.train()
    for logs in (logger.seen, run.state.log_history):
        rows = [row for row in logs if "loss" in row]
        assert len(rows) == STEPS / 8
        assert 0 < rows[0]["sparsity"] < rows[1]["sparsity"] < rows[-1]["sparsity"] == pytest.approx(0.9, abs=0.005)
        assert rows[0]["alpha"] > rows[-1]["alpha"] == 0
        assert not any("sparsity" in row for row in logs if "eval_loss" in row)


def test_a_model_that_was_prepared_before(tmp_path: Path) -> None:
    model = autosparse_fx.sparsify(gpt2(), AutoSparse(target_sparsity=0.6))
    with pytest.raises(ValueError, match="leave the configuration out"):
        trainer(model, tmp_path, AutoSparseCallback(target_sparsity=0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer(model, tmp_path, AutoSparseCallback(), optimizers=(optimizer, None)).train()
    assert autosparse_fx.sparsity(model) == pytest.approx(0.6, abs=0.005)


def test_model_init(tmp_path: Path) -> None:
    run = trainer(None, tmp_path, AutoSparseCallback(target_sparsity=0.9), model_init=gpt2)
    with pytest.raises(ValueError, match=r"with model_init, let that return autosparse_fx.sparsify\(model, config\)"):
        run.train()

    def sparse_gpt2() -> Any:
        return autosparse_fx.sparsify(gpt2(), AutoSparse(target_sparsity=0.9))

    run = trainer(None, tmp_path, AutoSparseCallback(), model_init=sparse_gpt2)
    run.train()
    assert autosparse_fx.sparsity(run.model) == pytest.approx(0.9, abs=0.005)


def test_trainings_that_are_refused(tmp_path: Path) -> None:
    model = gpt2()
    with pytest.raises(ValueError, match="optimizer_cls_and_kwargs instead of optimizers"):
        trainer(model, tmp_path, AutoSparseCallback(), optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None))
    run = trainer(gpt2(), tmp_path)
    run.add_callback(AutoSparseCallback())
    with pytest.raises(ValueError, match="not to add_callback"):
        run.train()
    with pytest.raises(ValueError, match="lm_haed"):
        trainer(gpt2(), tmp_path, AutoSparseCallback(rules={"lm_haed.weight": None}))


def test_other_training_is_not_resumed(tmp_path: Path) -> None:
    save = {"save_strategy": "steps", "save_steps": 8, "save_only_model": True}
    trainer(gpt2(), tmp_path / "sparse", AutoSparseCallback(target_sparsity=0.9), **save, max_steps=8).train()
    trainer(gpt2(), tmp_path / "dense", **save, max_steps=8).train()
    for path, callback, arguments, message in (
        ("sparse", AutoSparseCallback(target_sparsity=0.9), {"max_steps": 16}, r"AutoSparseCallback\(total_steps=8\)"),
        ("sparse", AutoSparseCallback(target_sparsity=0.8), {"max_steps": 8}, "trained with {'target_sparsity': 0.9}"),
        ("dense", AutoSparseCallback(target_sparsity=0.9), {"max_steps": 16}, "saved without AutoSparseCallback"),
    ):
        checkpoint = tmp_path / path / "checkpoint-8"
        saved = json.loads((checkpoint / "trainer_state.json").read_text())
        assert ("AutoSparseCallback" in saved["stateful_callbacks"]) == (path == "sparse")
        with pytest.raises(ValueError, match=message):
            trainer(gpt2(), tmp_path, callback, **arguments).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("frozen", [True, False])
def test_checkpoints_that_lack_what_is_sparse_are_warned_of(frozen: bool, tmp_path: Path) -> None:
    model = gpt2()
    model.transformer.h.requires_grad_(not frozen)
    model.peft_config = {}  # as PEFT marks a model of which it saves the adapters
    run = trainer(model, tmp_path, AutoSparseCallback(target_sparsity=0.5), max_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
    found = [str(w.message) for w in caught if "PEFT" in str(w.message)]
    assert len(found) == frozen and all("'transformer.h.0.attn.c_attn.weight', 4 weights" in text for text in found)


def test_training_again_begins_again(tmp_path: Path) -> None:
    callback = AutoSparseCallback(target_sparsity=0.9)
    run = trainer(gpt2(), tmp_path, callback, max_steps=10)
    run.train()
    run.train()
    assert callback.annealer.steps == 10
    assert autosparse_fx.sparsity(run.model) == pytest.approx(0.9, abs=0.005)


def test_the_callback_itself_changes_nothing_else(tmp_path: Path) -> None:
    one, other = gpt2(), None
    other = copy.deepcopy(one)
    config = AutoSparse(target_sparsity=0.9)
    trainer(one, tmp_path, AutoSparseCallback(config)).train()

    autosparse_fx.sparsify(other, config)
    run = trainer(other, tmp_path)
    run.create_optimizer()
    annealer = autosparse_fx.GradientAnnealing(other, STEPS, optimizer=run.optimizer)
    run.train()
    assert annealer.steps == STEPS
    assert_equal(state(one), state(other))


def test_missing_package_is_named() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import autosparse_fx.integrations\n"
        "import autosparse_fx.integrations.transformers"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'autosparse-fx[transformers]'" in done.stderr


@pytest.mark.slow
def test_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import train_transformers

    monkeypatch.setattr(sys, "argv", ["train_transformers.py", "--epochs", "8", "--output", str(tmp_path)])
    train_transformers.main()
    numbers = re.search(r"accuracy +dense ([\d.]+)% +sparse ([\d.]+)% +sparsity ([\d.]+)", capsys.readouterr().out)
    assert numbers is not None
    dense, sparse, sparsity = map(float, numbers.groups())
    assert dense > 80
    assert sparse > 70
    assert sparsity == pytest.approx(0.8, abs=0.005)

    saved = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    assert autosparse_fx.sparsity(saved) == pytest.approx(0.8, abs=0.005)
