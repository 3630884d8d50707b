"""Train an image classifier with sparse weights in several processes, with DDP or FSDP2, and survive the loss of one.

    torchrun --nproc-per-node 2 examples/train_distributed.py --strategy ddp
    torchrun --nproc-per-node 2 --max-restarts 3 examples/train_distributed.py --strategy fsdp --checkpoint run

NCCL where there is a GPU for each process, gloo on the CPU otherwise. With `--checkpoint` the run writes its state into
that folder, and goes on from there when it is started again: by `torchrun --max-restarts` after a process has died, or
by you, on another number of processes or with the other strategy if you like.

What sparse training adds to an ordinary loop: `sparsify` before the model is wrapped, `GradientAnnealing` after it, and
the annealer in the checkpoint. Thresholds are parameters, so DDP averages their gradients and FSDP2 shards them.
"""

import argparse
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import autosparse_fx
from _arguments import MAX_SEED, real, whole
from _data import DATA_SETS, load_data
from _models import build_model
from autosparse_fx import AutoSparse

RECIPE = ("data", "arch", "epochs", "batch_size", "lr", "momentum", "weight_decay", "target_sparsity", "seed")
EVAL_BATCH = 500


class Trainer:
    """A network in training on one of several ranks. Every method is called on all of them, at the same time."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args = args
        self.device = device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if args.batch_size % self.world:
            raise ValueError(f"--batch-size {args.batch_size} cannot be shared out evenly to {self.world} processes")
        self.data = load_data(
            args.data, args.data_dir, device=device, download=False, rgb=False, image_size=224, workers=4
        )
        self.steps_per_epoch = len(self.data.train) // args.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(f"--batch-size {args.batch_size} is more than the {len(self.data.train)} training images")
        self.total_steps = args.epochs * self.steps_per_epoch
        self.model = self._sparse_model().to(device)
        self.forward: nn.Module = self.model
        if args.strategy == "ddp":
            self.forward = DistributedDataParallel(self.model)
        else:
            mesh = dist.init_device_mesh(device.type, (self.world,))
            for layer in self.model.children():
                if any(True for _ in layer.parameters()):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay
        )
        self.annealer = autosparse_fx.GradientAnnealing(self.model, self.total_steps, optimizer=self.optimizer)
        self.step = 0
        self.loss_sum = torch.zeros((), device=device)  # since the epoch began
        self.epochs: list[dict[str, float]] = []
        self.resumed_at: list[int] = []

    def _sparse_model(self) -> nn.Module:
        torch.manual_seed(self.args.seed)  # the same weights on every rank
        model = build_model(
            self.args.arch, channels=self.data.channels, size=self.data.size, num_classes=self.data.num_classes
        )
        return autosparse_fx.sparsify(model, AutoSparse(target_sparsity=self.args.target_sparsity))

    def run(self) -> None:
        """Train from the current step to the last."""
        criterion = nn.CrossEntropyLoss()
        every = self.args.checkpoint_every or self.steps_per_epoch
        self.forward.train()
        for images, labels in self._remaining_batches():
            loss = criterion(self.forward(images), labels)
            loss.backward()
            for group in self.optimizer.param_groups:
                group["lr"] = self.args.lr * (1 + math.cos(math.pi * self.step / self.total_steps)) / 2
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.loss_sum += loss.detach()
            self.step += 1
            if self.step % self.steps_per_epoch == 0:
                self._average()
                mean_loss = float(self.loss_sum) / self.steps_per_epoch
                self.loss_sum.zero_()
                self.epochs.append({"loss": mean_loss, "accuracy": self.evaluate()})
                self._print(
                    f"epoch {len(self.epochs)}: loss {mean_loss:.4f}, accuracy {self.epochs[-1]['accuracy']:.2%}"
                )
            if self.args.checkpoint and (self.step % every == 0 or self.step == self.total_steps):
                self.save()

    def _remaining_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's part of every batch that is still to come."""
        own = slice(self.rank, None, self.world)
        while self.step < self.total_steps:
            epoch, start = divmod(self.step, self.steps_per_epoch)
            batches = self.data.train.batches(self.args.batch_size, seed=self.args.seed, epoch=epoch, start=start)
            for images, labels in batches:
                yield images[own], labels[own]

    @torch.no_grad()
    def _average(self) -> None:
        """Average what each rank has kept of its own part of the batches: batch norm's statistics, and losses."""
        buffers = [b for name, b in self.model.named_buffers() if name.endswith(("running_mean", "running_var"))]
        for t in (*buffers, self.loss_sum):
            dist.all_reduce(t)
            t /= self.world

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the fraction of test images that are classified correctly; each rank looks at its share."""
        self.forward.eval()
        counts = torch.zeros(2, device=self.device)
        for images, labels in self.data.test.eval_batches(EVAL_BATCH):
            images, labels = images[self.rank :: self.world], labels[self.rank :: self.world]
            counts[0] += (self.forward(images).argmax(1) == labels).sum()
            counts[1] += len(labels)
        self.forward.train()
        dist.all_reduce(counts)
        return float(counts[0] / counts[1])

    def save(self) -> None:
        """Write a checkpoint, and let the file `latest` name it once it is complete. The one before it goes."""
        self._average()
        folder = self.args.checkpoint
        weights, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": weights, "optimizer": optimizer, "annealer": self.annealer, "progress": self._progress()}
        dcp.save(state, checkpoint_id=folder / f"step-{self.step}")
        if self.rank == 0:
            latest, before = folder / "latest", latest_checkpoint(folder)
            latest.with_suffix(".tmp").write_text(f"step-{self.step}")
            latest.with_suffix(".tmp").replace(latest)
            if before is not None and before.name != f"step-{self.step}":
                shutil.rmtree(before)
        dist.barrier()

    def resume(self) -> None:
        """Go on from the last complete checkpoint, if there is one."""
        checkpoint = latest_checkpoint(self.args.checkpoint)
        if checkpoint is None:
            return
        weights, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": weights, "optimizer": optimizer, "annealer": self.annealer, "progress": self._progress()}
        dcp.load(state, checkpoint_id=checkpoint)
        progress = json.loads(state["progress"])
        if progress["recipe"] != self.recipe():
            raise ValueError(f"{checkpoint} was written by another recipe: {dict(progress['recipe'])}")
        set_state_dict(self.model, self.optimizer, model_state_dict=weights, optim_state_dict=optimizer)
        self.step, self.epochs = progress["step"], progress["epochs"]
        self.loss_sum.fill_(progress["loss_sum"])
        self.resumed_at = [*progress["resumed_at"], self.step]
        self._print(f"resumed at step {self.step} of {self.total_steps}")

    def _progress(self) -> str:
        """In one piece: of lists and dicts only those entries are loaded that are there already."""
        return json.dumps(
            {
                "recipe": self.recipe(),
                "step": self.step,
                "epochs": self.epochs,
                "loss_sum": float(self.loss_sum),
                "resumed_at": self.resumed_at,
            }
        )

    def recipe(self) -> list[list[Any]]:
        """The options that decide what is trained; how many processes do it, and how, may change."""
        return [[name, getattr(self.args, name)] for name in RECIPE]

    def finish(self) -> dict[str, Any]:
        """Gather the results, and turn the network back into a plain one, in one process."""
        report = autosparse_fx.report(self.model)  # gathers: on every rank
        accuracy = self.evaluate()
        results = {
            "recipe": dict(self.recipe()),
            "strategy": self.args.strategy,
            "processes": self.world,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "steps": self.step,
            "resumed_at": self.resumed_at,
            "epochs": self.epochs,
            "accuracy": accuracy,
            "sparsity": report.sparsity,
            "layers": [{"name": x.name, "zeros": x.zeros, "sparsity": x.sparsity} for x in report.layers],
        }
        # A sharded model is finalized as a plain copy that has loaded all of its state.
        state = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if self.rank == 0:
            self._print(str(report))
            plain = self._sparse_model()
            plain.load_state_dict(state)
            autosparse_fx.finalize(plain)
            if self.args.save_model:
                torch.save(plain.state_dict(), self.args.save_model)
            if self.args.json:
                self.args.json.write_text(json.dumps(results, indent=1) + "\n")
        dist.barrier()
        return results

    def _print(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end."""
    latest = folder / "latest"
    return folder / latest.read_text() if latest.exists() else None


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train an image classifier with sparse weights in several processes.")
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="ddp", help="(default: %(default)s)")
    parser.add_argument("--data", choices=DATA_SETS, default="digits", help="(default: %(default)s)")
    parser.add_argument(
        "--data-dir", type=Path, default=Path(os.environ.get("AUTOSPARSE_DATA", "data")),
        help="folder that holds it (default: environment variable AUTOSPARSE_DATA, or 'data')",
    )  # fmt: skip
    parser.add_argument("--arch", default="convnet", help="a network of _models.py (default: %(default)s)")
    parser.add_argument("--epochs", type=whole(), default=6, help="(default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=whole(), default=128, help="of all processes together (default: %(default)s)"
    )
    parser.add_argument(
        "--lr", type=real(0.1, above=0), default=0.1, help="peak learning rate of SGD (default: %(default)s)"
    )
    parser.add_argument("--momentum", type=real(0.9, least=0, below=1), default=0.9, help="(default: %(default)s)")
    parser.add_argument("--weight-decay", type=real(5e-4, least=0), default=5e-4, help="(default: %(default)s)")
    parser.add_argument(
        "--target-sparsity", type=real(0.9, above=0, below=1), default=0.9, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=whole(0, MAX_SEED), default=0, help="of weights, order and augmentation (default: 0)"
    )
    parser.add_argument("--threads", type=whole(), default=1, help="of each process, on the CPU (default: %(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="folder to keep the state of the run in, and to go on from")
    parser.add_argument("--checkpoint-every", type=whole(), metavar="STEPS", help="(default: an epoch)")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--save-model", type=Path, help="write the finalized model's state_dict here")
    return parser.parse_args(argv)


def join_group(backend: str) -> None:
    """`dist.init_process_group(backend)`, but under names of its own after every restart.

    torchrun keeps its store, and with it the addresses of processes that are gone (pytorch/pytorch#167288).
    """
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def main() -> None:
    args = parse_args()
    if "RANK" not in os.environ:
        sys.exit("error: start this script with torchrun, as in: torchrun --nproc-per-node 2 train_distributed.py")
    torch.set_num_threads(args.threads)
    device = torch.device("cpu")
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):  # NCCL wants a GPU for each process
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    join_group("nccl" if device.type == "cuda" else "gloo")
    try:
        print(f"rank {dist.get_rank()} of {dist.get_world_size()}: process {os.getpid()}", flush=True)
        for path in (args.checkpoint and args.checkpoint / "latest", args.json, args.save_model):
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(args, device)
        if args.checkpoint:
            trainer.resume()
        trainer.run()
        results = trainer.finish()
        if trainer.rank == 0:
            print(f"accuracy {results['accuracy']:.2%}, {results['sparsity']:.2%} of the weights are zero")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
