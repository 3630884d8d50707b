"""Train an image classifier with sparse weights, or its dense twin, on one device.

    python examples/train_image_classifier.py --data digits --target-sparsity 0.9
    python examples/train_image_classifier.py --data fashion-mnist --data-dir data --download --epochs 6
    python examples/train_image_classifier.py --preset imagenet --data-dir imagenet --device cuda --amp bf16

What sparse training adds to an ordinary training loop are the four lines that mention `autosparse_fx`: `sparsify` and
`GradientAnnealing` before it, `report` and `finalize` after it. The rest is data, optimizer, checkpoints and results.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import autosparse_fx
from _checkpoint import load_checkpoint, rng_state, save_checkpoint, set_rng_state
from _data import ImageData, Split, load_data
from _models import BUILT_IN, build_model
from _options import SPARSE_OPTIONS, THRESHOLD_OPTIONS, parse_args, recipe
from autosparse_fx import AutoSparse

HISTORY_POINTS = 50
EVAL_BATCH = 500
PACKAGES = ("torch", "torchvision", "autosparse-fx")


class Trainer:
    """A network in training, with everything that a checkpoint must hold."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        torch.manual_seed(args.seed)
        self.data = self._load_data()
        self.steps_per_epoch = len(self.data.train) // args.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(f"--batch-size {args.batch_size} is more than the {len(self.data.train)} training images")
        self.total_steps = args.max_steps or args.epochs * self.steps_per_epoch

        self.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        model = build_model(
            args.arch, channels=self.data.channels, size=self.data.size, num_classes=self.data.num_classes
        )
        self.model = model.to(device=self.device, memory_format=self.memory_format)
        self.compile_options: dict[str, Any] | None = None
        if not args.dense:
            chosen = {name: getattr(args, name) for name in SPARSE_OPTIONS if hasattr(args, name)}
            self.config = AutoSparse(**chosen)
            if args.one_line:
                self.compile_options = {**chosen, "total_steps": self.total_steps}
            else:
                self.model = autosparse_fx.sparsify(self.model, self.config)
        self.optimizer = self._make_optimizer()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._lr_factor)
        self.annealer = None
        if not args.dense and not args.one_line:
            self.annealer = autosparse_fx.GradientAnnealing(self.model, self.total_steps, optimizer=self.optimizer)
        self.forward: Any = self.model
        if args.compile:
            backend = "inductor" if args.dense else "autosparse"
            self.forward = torch.compile(self.model, backend=backend, options=self.compile_options)
        self.scaler = torch.amp.GradScaler("cuda") if args.amp == "fp16" else None

        self.step = 0
        self.loss_sum = torch.zeros((), device=self.device)  # since the epoch began; read once per epoch
        self.epochs: list[dict[str, float]] = []
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0

    def _load_data(self) -> ImageData:
        args = self.args
        return load_data(
            args.data,
            args.data_dir,
            device=self.device,
            download=args.download,
            rgb=args.arch not in BUILT_IN,
            image_size=args.image_size,
            workers=args.workers,
        )

    def _make_optimizer(self) -> torch.optim.Optimizer:
        args = self.args
        parameters: Any = self.model.parameters()
        if args.param_groups:
            rates = {name: getattr(args, name) for name in THRESHOLD_OPTIONS if hasattr(args, name)}
            parameters = autosparse_fx.param_groups(self.model, lr=args.lr, weight_decay=args.weight_decay, **rates)
        if args.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
        return torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay)

    def _lr_factor(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to zero."""
        warmup = round(self.args.warmup_epochs * self.steps_per_epoch)
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * (step - warmup) / max(1, self.total_steps - warmup))) / 2

    def run(self) -> None:
        """Train from the current step to the last, writing checkpoints on the way."""
        args = self.args
        forward = self.forward
        criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
        self.model.train()
        started = time.perf_counter() - self.seconds
        with tqdm(total=self.total_steps, initial=self.step, disable=None, unit="step") as bar:
            for images, labels in self._remaining_batches():
                with self._autocast():
                    loss = criterion(forward(images.to(memory_format=self.memory_format)), labels)
                self._update(loss)
                bar.update()
                self.seconds = time.perf_counter() - started
                if args.checkpoint and self._due(args.checkpoint_every):
                    save_checkpoint(self.state_dict(), args.checkpoint)

    def _remaining_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        while self.step < self.total_steps:
            epoch, start = divmod(self.step, self.steps_per_epoch)
            for batch in self.data.train.batches(self.args.batch_size, seed=self.args.seed, epoch=epoch, start=start):
                yield batch
                if self.step == self.total_steps:
                    return

    def _update(self, loss: Tensor) -> None:
        """One optimizer step and what is recorded about it."""
        stepped = True
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            scale = self.scaler.get_scale()
            self.scaler.update()
            stepped = self.scaler.get_scale() >= scale  # it shrinks when the gradients overflowed
        self.optimizer.zero_grad()
        if stepped:
            self.scheduler.step()
        self.loss_sum += loss.detach()
        self.step += 1

        every = max(1, self.total_steps // HISTORY_POINTS)
        if self.step % every == 0 or self.step == self.total_steps:
            self._record(loss)
        if self._due(None):
            steps = self.step - len(self.epochs) * self.steps_per_epoch
            mean_loss = float(self.loss_sum) / steps
            self.loss_sum.zero_()
            self.epochs.append({"loss": mean_loss, "accuracy": self._evaluate()})
            tqdm.write(f"epoch {len(self.epochs)}: loss {mean_loss:.4f}, accuracy {self.epochs[-1]['accuracy']:.2%}")

    def _due(self, every: int | None) -> bool:
        """Whether an epoch, the training, or a period of `every` steps has just ended."""
        periods = (self.steps_per_epoch, self.total_steps, every or self.total_steps)
        return any(self.step % period == 0 for period in periods)

    def _record(self, loss: Tensor) -> None:
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.step}: try a lower --lr")
        point = {"step": self.step, "loss": loss.item()}
        if not self.args.dense:
            point["sparsity"] = autosparse_fx.sparsity(self.model)
        if self.annealer is not None:
            point["alpha"] = self.annealer.alpha
        self.history.append(point)

    def _evaluate(self) -> float:
        """Accuracy on the test images; thresholds that only compiled graphs know apply only there."""
        model = self.forward if self.compile_options else self.model
        return evaluate(model, self.data.test, self._autocast)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.args.amp is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.args.amp == "bf16" else torch.float16)

    def state_dict(self) -> dict[str, Any]:
        return {
            "recipe": recipe(self.args),
            "architecture": {"name": self.args.arch, "num_classes": self.data.num_classes},
            "config": None if self.args.dense else self.config.to_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "annealer": self.annealer.state_dict() if self.annealer else None,
            "thresholds": autosparse_fx.state_dict(self.model) if self.compile_options else None,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "rng": rng_state(),
            "step": self.step,
            "loss_sum": self.loss_sum,
            "epochs": self.epochs,
            "history": self.history,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        wanted, found = recipe(self.args), state["recipe"]
        different = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k, "-") != found.get(k, "-"))
        if different:
            options = ", ".join(f"{k}: {found.get(k, '-')} then, {wanted.get(k, '-')} now" for k in different)
            raise ValueError(f"--resume: {self.args.checkpoint} was written by another recipe ({options})")
        self.model.load_state_dict(state["model"])
        if self.compile_options:
            autosparse_fx.load_state_dict(self.model, state["thresholds"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.annealer is not None:
            self.annealer.load_state_dict(state["annealer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.loss_sum.copy_(state["loss_sum"])
        self.epochs, self.history, self.seconds = state["epochs"], state["history"], state["seconds"]
        set_rng_state(state["rng"])

    def finish(self) -> dict[str, Any]:
        """Turn the network back into a plain one, check that nothing changed by that, and gather the results."""
        accuracy = self._evaluate()
        results: dict[str, Any] = {
            "recipe": recipe(self.args),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "machine": describe_machine(self.device),
            "steps": self.step,
            "accuracy": accuracy,
            "epochs": self.epochs,
            "history": self.history,
            "seconds": round(self.seconds, 1),
        }
        if not self.args.dense:
            report = autosparse_fx.report(self.model)
            print(report)
            results["config"] = self.config.to_dict()
            results["sparsity"] = autosparse_fx.sparsity(self.model)
            results["layers"] = [
                {"name": layer.name, "shape": list(layer.shape), "zeros": layer.zeros, "sparsity": layer.sparsity}
                for layer in report.layers
            ]
            self.model = autosparse_fx.finalize(self.model)
            finalized = self._evaluate()
            if finalized != accuracy:
                raise RuntimeError(f"finalize changed the accuracy from {accuracy:.4%} to {finalized:.4%}")
        return results


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, autocast: Any) -> float:
    """Return the fraction of images that are classified correctly."""
    was_training = model.training
    model.eval()
    correct = count = 0
    for images, labels in split.eval_batches(EVAL_BATCH):
        with autocast():
            correct += (model(images).argmax(1) == labels).sum()
        count += len(labels)
    model.train(was_training)
    return int(correct) / count


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Name the processor, not the computer."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    machine = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train as the options say; return what `--json` writes."""
    if args.threads:
        torch.set_num_threads(args.threads)
    for path in (args.checkpoint, args.json, args.save_model):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args)
    if args.resume and args.checkpoint.exists():
        trainer.load_state_dict(load_checkpoint(args.checkpoint))
        print(f"resumed at step {trainer.step} of {trainer.total_steps}")
    trainer.run()
    results = trainer.finish()
    if args.save_model is not None:
        torch.save(trainer.model.state_dict(), args.save_model)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return results


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        results = train(args)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    zeros = f", {results['sparsity']:.2%} of the weights are zero" if "sparsity" in results else ""
    print(f"accuracy {results['accuracy']:.2%}{zeros}, {results['seconds']:.0f} s of training")


if __name__ == "__main__":
    main()
