"""Tensor parallelism in two processes, also inside FSDP2 and compiled, and refused where sparsify came first."""

import warnings
from typing import Any

import pytest
import ranks
import reference
import torch
import torch.distributed as dist
from torch import nn

from autosparse_fx import AutoSparse, GradientAnnealing, finalize, sparsify

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

KINDS = ("parallel", "compiled", "fsdp2")
CASES = [(kind, granularity) for kind in KINDS for granularity in ("layer", "channel")]


def parallel(model: nn.Module, mesh: dist.DeviceMesh) -> nn.Module:
    """The first layer by rows of its weight, the second by columns; the third stays whole."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def train(kind: str, granularity: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = reference.mlp().double()
    if kind != "single":
        mesh = dist.init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "model"))
        parallel(model, mesh["model"])
    sparsify(model, AutoSparse(0.8, granularity=granularity)).double()
    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
    step = torch.compile(model, backend="aot_eager") if kind == "compiled" else model
    optimizer = ranks.sgd(model)
    annealer = GradientAnnealing(model, ranks.STEPS, optimizer)
    reference.train(step, optimizer, ranks.batches())
    made = {**ranks.outcome(model, annealer), "layout": layout(model, optimizer)}
    if kind != "fsdp2":
        x, _ = next(ranks.batches())
        expected = model(x)
        finalize(model)
        made["kept by finalize"] = torch.equal(model(x), expected)
        made["zeros in storage"] = {
            name: int((ranks.full(p) == 0).sum()) for name, p in model.named_parameters() if p.dim() > 1
        }
    return made


def layout(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[str, str]]:
    """Of every parameter, and of its momentum."""
    found = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]["momentum_buffer"]
        found[name] = tuple(str(getattr(t, "placements", "")) for t in (p, state))
    for name, t in model.named_buffers():
        if name.endswith("_offset"):
            found[name] = (str(getattr(t, "placements", "")),) * 2
    return found


def wrong_order() -> list[str]:
    from torch.distributed.tensor import distribute_module
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = dist.init_device_mesh("cpu", (2,))
    texts = []
    for plan in ({"0": ColwiseParallel()}, {"0": RowwiseParallel()}, None):
        model = sparsify(reference.mlp())
        before = {name: id(p) for name, p in model.named_parameters()}
        try:
            distribute_module(model, mesh) if plan is None else parallelize_module(model, mesh, plan)
            texts.append("no error")
        except RuntimeError as error:
            texts.append(str(error))
        assert {name: id(p) for name, p in model.named_parameters()} == before
    return texts


def everything() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # DTensor's of a tensor that it had to take for a replicated one
        trained = [train(*case) for case in CASES if case[0] == "parallel"]
    trained += [train(*case) for case in CASES if case[0] != "parallel"]
    return {"trained": trained, "wrong order": wrong_order()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return ranks.run(everything, tmp_path_factory.mktemp("tp"))


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(case) for case in CASES])
def test_two_processes_train_what_one_does(found: list[dict[str, Any]], case: int) -> None:
    first, second = (rank["trained"][case] for rank in found)
    single = train("single", CASES[case][1])
    ranks.assert_same(first, second, exactly=True)
    ranks.assert_same(first, single, exactly=False)
    assert first["sparsity"] == pytest.approx(0.8, abs=0.005)
    if CASES[case][0] != "fsdp2":
        assert first["kept by finalize"] and second["kept by finalize"]
        assert first["zeros in storage"] == first["zeros"] == single["zeros"]


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_thresholds_lie_beside_their_weights(found: list[dict[str, Any]], granularity: str) -> None:
    made = found[1]["trained"][CASES.index(("parallel", granularity))]["layout"]
    rows, columns, whole = "(Shard(dim=0),)", "(Shard(dim=1),)", "(Replicate(),)"
    beside = rows if granularity == "channel" else whole
    assert made["0.weight"] == (rows, rows) and made["2.weight"] == (columns, columns) and made["4.weight"] == ("", "")
    for name in ("threshold", "offset"):  # and so do their momenta: no rank keeps a part of a sum
        assert made[f"0.weight_{name}"] == (beside, beside)
        assert made[f"2.weight_{name}"] == (whole, whole)
        assert made[f"4.weight_{name}"] == ("", "")


def test_parallelizing_after_sparsify_is_refused(found: list[dict[str, Any]]) -> None:
    for rank in found:
        for text in rank["wrong order"]:
            assert "weight '0.weight' [64, 16] of Linear cannot become a DTensor after sparsify" in text
            assert "parallelize the model first" in text
