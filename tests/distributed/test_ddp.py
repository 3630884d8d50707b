"""DistributedDataParallel in two processes: a prepared model trains as it does in one, and nothing waits for masks."""

from pathlib import Path
from typing import Any

import pytest
import ranks
import reference
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import autosparse_fx
from autosparse_fx import AutoSparse, GradientAnnealing, sparsify

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

CASES = [(model, granularity) for model in ("mlp", "recurrent") for granularity in ("layer", "channel")]


def train(model: str, granularity: str, *, wrapped: bool, compiled: bool = False) -> dict[str, Any]:
    # Each rank starts with other weights, and so with other cuts: DDP broadcasts those of rank 0.
    torch.manual_seed(dist.get_rank() if wrapped else 0)
    made = sparsify(ranks.MODELS[model](), AutoSparse(0.8, granularity=granularity)).double()
    step = DistributedDataParallel(made, bucket_cap_mb=0.01) if wrapped else made
    if compiled:
        step = torch.compile(step, backend="aot_eager")  # in parts, so that buckets can be sent between them
    optimizer = ranks.sgd(made)
    annealer = GradientAnnealing(step, ranks.STEPS, optimizer)
    reference.train(step, optimizer, ranks.batches(part=ranks.own_part() if wrapped else slice(None)))
    return ranks.outcome(made, annealer)


def everything() -> dict[str, Any]:
    dist._DEFAULT_FIRST_BUCKET_BYTES = 512  # type: ignore[attr-defined]  # which may not be larger than the others
    return {
        "trained": [train(*case, wrapped=True) for case in CASES],
        "events": [events(sparse=False), events(sparse=True)],
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return ranks.run(everything, tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(case) for case in CASES])
def test_two_processes_train_what_one_does(found: list[dict[str, Any]], case: int) -> None:
    first, second = (rank["trained"][case] for rank in found)
    ranks.assert_same(first, second, exactly=True)
    ranks.assert_same(first, train(*CASES[case], wrapped=False), exactly=False)
    assert first["sparsity"] == pytest.approx(0.8, abs=0.005) and first["alpha"] == 0


def train_compiled() -> dict[str, Any]:
    dist._DEFAULT_FIRST_BUCKET_BYTES = 512  # type: ignore[attr-defined]
    return train("residual", "layer", wrapped=True, compiled=True)


@pytest.mark.slow
def test_compiled_ddp_trains_what_one_process_does(tmp_path: Path) -> None:
    first, second = ranks.run(train_compiled, tmp_path)
    ranks.assert_same(first, second, exactly=True)
    ranks.assert_same(first, train("residual", "layer", wrapped=False), exactly=False)


# Overlap of communication with the backward pass.


def events(*, sparse: bool) -> list[str]:
    """What happens in one backward pass, in order: buckets that are sent, with their parameters, and the gradient of
    the first layer's weight, which comes last."""
    model = reference.mlp()
    if sparse:
        sparsify(model, AutoSparse(0.8))
    names = {id(p): name for name, p in model.named_parameters()}
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.001)
    seen: list[str] = []

    def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        seen.append(" ".join(names[id(p)] for p in bucket.parameters()))
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, hook)
    model.get_parameter("0.bias").register_hook(lambda _: seen.append("first layer"))
    for _ in range(3):  # buckets are arranged anew after the first pass
        seen.clear()
        wrapped(torch.randn(4, 16)).sum().backward()
    return seen


def test_buckets_are_sent_while_the_backward_pass_runs(found: list[dict[str, Any]]) -> None:
    dense, sparse = found[0]["events"]
    early = [[bucket.split() for bucket in seen[: seen.index("first layer")]] for seen in (dense, sparse)]
    without_thresholds = [[name for name in bucket if not name.endswith("_threshold")] for bucket in early[1]]
    assert without_thresholds == early[0] == [["4.bias", "4.weight", "2.bias"], ["2.weight"]]
    assert "4.weight_threshold" in early[1][0]
    names = {name for bucket in sparse for name in bucket.split()}
    assert names >= {f"{layer}.weight_threshold" for layer in (0, 2, 4)}


# The wrong order.


def test_sparsify_after_ddp_is_refused(tmp_path: Path) -> None:
    """DDP would never hear of the thresholds, and each rank would train its own."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = nn.Sequential(DistributedDataParallel(reference.mlp()))
        with pytest.raises(ValueError, match=r"module '0' is DistributedDataParallel already.*then wrap it"):
            sparsify(model)
        assert not autosparse_fx.thresholds(model)
        prepared = sparsify(reference.mlp())
        wrapped = DistributedDataParallel(prepared)
        assert sparsify(wrapped) is wrapped  # prepared before: nothing to do
    finally:
        dist.destroy_process_group()
