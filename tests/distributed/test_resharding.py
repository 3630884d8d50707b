"""Checkpoints of torch.distributed.checkpoint: half a training on one number of ranks, the other half on another."""

from pathlib import Path
from typing import Any

import pytest
import ranks
import reference
import torch
import torch.distributed as dist
from torch import nn

from autosparse_fx import AutoSparse, GradientAnnealing, sparsify

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
    # Of torch, about the half of a training that one process makes without a group.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
]

HALF = ranks.STEPS // 2 + 3  # not where thresholds are shifted, nor where a record is made
LAYOUTS = ("fsdp2", "parallel")


def prepared(layout: str, granularity: str) -> nn.Module:
    torch.manual_seed(0)
    model = reference.mlp().double()
    config = AutoSparse(0.8, granularity=granularity)
    if layout == "parallel" and dist.is_initialized():
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    sparsify(model, config).double()
    if layout == "fsdp2" and dist.is_initialized():
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    return model


def train(layout: str, granularity: str, load: Path | None, save: Path | None) -> dict[str, Any]:
    """From the start, or from a checkpoint on, to the end, or to the next checkpoint."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = prepared(layout, granularity)
    optimizer = ranks.sgd(model)
    annealer = GradientAnnealing(model, ranks.STEPS, optimizer)
    if load is not None:
        with torch.no_grad():
            for t in (*model.parameters(), *model.buffers()):
                t.mul_(0.5)  # what is not loaded is wrong
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state, "annealer": annealer}, checkpoint_id=load)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        assert annealer.steps == HALF and len(annealer.history) == HALF
    part = slice(None) if layout == "parallel" or not dist.is_initialized() else ranks.own_part()
    first, last = (0 if load is None else HALF), (ranks.STEPS if save is None else HALF)
    reference.train(model, optimizer, ranks.batches(first, last, part))
    if save is not None:
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state, "annealer": annealer}, checkpoint_id=save)
    return ranks.outcome(model, annealer)


def half_by_two_and_half_of_one(folder: Path) -> list[dict[str, Any]]:
    """Both directions: save in two processes; load in two what one process has saved."""
    found = []
    for layout in LAYOUTS:
        for granularity in ("layer", "channel"):
            name = f"{layout}-{granularity}"
            train(layout, granularity, None, folder / f"two-{name}")
            found.append(train(layout, granularity, folder / f"one-{granularity}", None))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[list[dict[str, Any]]]:
    for granularity in ("layer", "channel"):
        train("plain", granularity, None, folder / f"one-{granularity}")
    return ranks.run(half_by_two_and_half_of_one, folder, folder)


CASES = [(layout, granularity) for layout in LAYOUTS for granularity in ("layer", "channel")]


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(case) for case in CASES])
def test_from_one_process_to_two(found: list[list[dict[str, Any]]], case: int) -> None:
    first, second = (rank[case] for rank in found)
    ranks.assert_same(first, second, exactly=True)
    ranks.assert_same(first, train("plain", CASES[case][1], None, None), exactly=False)


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(case) for case in CASES])
def test_from_two_processes_to_one(found: list[list[dict[str, Any]]], folder: Path, case: int) -> None:
    layout, granularity = CASES[case]
    resumed = train("plain", granularity, folder / f"two-{layout}-{granularity}", None)
    ranks.assert_same(resumed, train("plain", granularity, None, None), exactly=False)
