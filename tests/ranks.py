"""Functions that run in several processes at once, and what they return; for the tests of distributed training."""

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import reference
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import autosparse_fx
from autosparse_fx import GradientAnnealing

STEPS = 40


def run(function: Callable[..., Any], folder: Path, *args: Any, world: int = 2) -> list[Any]:
    """Call ``function(*args)`` in ``world`` processes of one gloo group; return what each returned, by rank.

    A warning of ours is an error there too.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    file, name = function.__code__.co_filename, function.__qualname__
    torch.multiprocessing.spawn(_call, (world, str(folder), file, name, args), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _call(rank: int, world: int, folder: str, file: str, name: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", module="autosparse_fx")
    store = dist.FileStore(f"{folder}/store-{world}", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    spec = importlib.util.spec_from_file_location("in_rank", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["in_rank"] = module
    spec.loader.exec_module(module)
    torch.save(getattr(module, name)(*args), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


class Recurrent(nn.Module):
    """Linear layers whose sizes no two ranks share evenly, and an LSTM, which Dynamo does not capture."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 33)
        self.lstm = nn.LSTM(33, 9, batch_first=True)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(F.relu(self.stem(x)).unsqueeze(1))[0][:, 0])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": reference.mlp,
    "recurrent": Recurrent,
    "residual": reference.Residual,
}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def batches(first: int = 0, last: int = STEPS, part: slice = slice(None)) -> Iterator[tuple[Tensor, Tensor]]:
    """The part of every global batch that one rank gets, in float64: rounding would move weights across the cut."""
    for step, (x, y) in enumerate(reference.classification_batches(last)):
        if step >= first:
            yield x[part].double(), y[part]


def own_part() -> slice:
    return slice(dist.get_rank(), None, dist.get_world_size())


def full(t: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def outcome(model: nn.Module, annealer: GradientAnnealing) -> dict[str, Any]:
    """All that a training leaves behind, gathered: every rank must call this."""
    return {
        "state": {name: full(t) for name, t in model.state_dict().items()},
        "thresholds": {name: full(t) for name, t in autosparse_fx.thresholds(model).items()},
        "sparsity": autosparse_fx.sparsity(model),
        "zeros": {layer.name: layer.zeros for layer in autosparse_fx.report(model).layers},
        "alpha": annealer.alpha,
        "steps": annealer.steps,
        "history": [(r.step, r.alpha, r.sparsity) for r in annealer.history.records],
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any], *, exactly: bool) -> None:
    """Compare two outcomes, to the last bit or to rounding, and print by how much they differ (pytest -s).

    Counts of zeros are the same in both cases.
    """
    for part in ("state", "thresholds"):
        assert list(found[part]) == list(expected[part]) != []
        for name, t in expected[part].items():
            if exactly:
                assert torch.equal(found[part][name], t), name
            else:
                torch.testing.assert_close(found[part][name], t, rtol=1e-12, atol=1e-12, msg=name)
    for part in ("sparsity", "zeros", "alpha", "steps", "history"):
        assert found[part] == expected[part], part
    difference = max(float((found["state"][name] - t).abs().max()) for name, t in expected["state"].items())
    test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0].rpartition("/")[2]
    print(f"{test}: sparsity {found['sparsity']:.4f}, largest difference {difference:.1e}")
