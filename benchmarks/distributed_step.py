"""Measure what masking and steering cost where weights are sharded (FSDP2), or are on every rank (DDP).

    torchrun --nproc-per-node 2 benchmarks/distributed_step.py --strategy fsdp
    torchrun --nproc-per-node 2 benchmarks/distributed_step.py --strategy ddp --model gpt2_small

Dense and sparse steps (forward, backward, optimizer, annealing) in turn, eager; a ratio is the median of those within
the rounds. A shift of all thresholds, for which sharded weights are gathered one at a time, comes every 20 steps: it is
timed apart, and given as its share of a step when spread over them. Rank 0 prints its own times.
"""

import argparse
import copy
import os
import statistics
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import autosparse_fx
from _step_models import BATCHES, Block, build
from autosparse_fx import AutoSparse
from autosparse_fx.annealing import MAX_STEPS_BETWEEN_SHIFTS


class Trained:
    """One network on this rank, ready to step."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, strategy: str, *, target: float | None) -> None:
        self.x, self.y = x, y
        if target is not None:
            autosparse_fx.sparsify(model, AutoSparse(target_sparsity=target))
        self.call: nn.Module = DistributedDataParallel(model) if strategy == "ddp" else sharded(model)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, weight_decay=1e-4)
        self.annealer: autosparse_fx.GradientAnnealing | None = None
        if target is not None:
            self.annealer = autosparse_fx.GradientAnnealing(model, 10_000, optimizer=self.optimizer)

    def step(self) -> None:
        nn.functional.cross_entropy(self.call(self.x), self.y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def shift(self) -> None:
        assert self.annealer is not None
        self.annealer._shift()

    def seconds(self, *, of_shift: bool = False) -> float:
        dist.barrier()
        start = time.perf_counter()
        self.shift() if of_shift else self.step()
        if self.x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def sharded(model: nn.Module) -> nn.Module:
    """Shard it with a group of parameters for every block."""
    for module in list(model.modules()):
        if isinstance(module, Block) or type(module).__name__ in ("Bottleneck", "EncoderBlock", "InvertedResidual"):
            fully_shard(module)
    fully_shard(model)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategy", choices=("fsdp", "ddp"), default="fsdp")
    parser.add_argument("--model", choices=tuple(BATCHES), default="resnet50")
    parser.add_argument("--batch-size", type=int, help="of each rank (default: as train_step.py has it)")
    parser.add_argument("--rounds", type=int, default=9, help="of dense and sparse in turn (default: %(default)s)")
    args = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):  # NCCL wants a GPU for each process
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(0)
    model, x, y = build(args.model, args.batch_size or BATCHES[args.model], device)
    dense = Trained(copy.deepcopy(model), x, y, args.strategy, target=None)
    sparse = Trained(model, x, y, args.strategy, target=0.9)
    for trained in (dense, sparse):
        trained.step()
    sparse.shift()
    pairs = [(dense.seconds(), sparse.seconds()) for _ in range(args.rounds)]
    shifts = [sparse.seconds(of_shift=True) for _ in range(args.rounds)]
    if dist.get_rank() == 0:
        step = statistics.median(own for _, own in pairs)
        shift = statistics.median(shifts)
        print(
            f"{args.model}, {args.strategy}, {dist.get_world_size()} ranks of {torch.get_num_threads()} threads, torch "
            f"{torch.__version__}: a step takes {1000 * step:.0f} ms, "
            f"{statistics.median(own / other for other, own in pairs):.3f} of the dense one; a shift "
            f"{1000 * shift:.0f} ms, {shift / MAX_STEPS_BETWEEN_SHIFTS / step:.2%} of a step when spread over "
            f"{MAX_STEPS_BETWEEN_SHIFTS}"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
