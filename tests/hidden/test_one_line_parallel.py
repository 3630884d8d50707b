"""The one-line form under data parallelism: two processes train what one does, and the rest is refused with a cure."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
from hidden.compare import error, one_line, without_inductor
from torch import Tensor, nn

from autosparse_fx import sparsify, thresholds

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

# How a model is wrapped and compiled, by name. A bucket of 0.001 MB holds about one layer.
WRAPPED = (
    "compile(ddp)",
    "ddp(compile)",
    "compile(ddp) in buckets",
    "ddp(compile) in buckets",
    "compile(ddp) in place",
)

# Each process trains on its half of every batch; then the first trains a plain model on the whole batches.
SCRIPT = """
import sys
import torch, torch.distributed as dist, torch.nn.functional as F, torch._inductor.compile_fx
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.parallel import DistributedDataParallel as DDP
import autosparse_fx, reference

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch._inductor.compile_fx.compile_fx = lambda gm, inputs, **_: aot_eager(gm, inputs)
dist.init_process_group("gloo", store=dist.FileStore(folder + "/store", 2), rank=rank, world_size=2)
# Weights of one threshold, and one that has its own target.
OPTIONS = {"target_sparsity": 0.9, "total_steps": 10, "rules": {"head.weight": {"target_sparsity": 0.5}}}

def compiled(m, in_place=False):
    if in_place:
        m.compile(backend="autosparse", options=OPTIONS)
        return m
    return torch.compile(m, backend="autosparse", options=OPTIONS)

def train(kind):
    torch._dynamo.reset()
    torch.manual_seed(rank if kind != "single" else 0)  # DDP broadcasts the weights of rank 0
    # In float64: rounding would move single weights across the cut.
    model = reference.Residual().double()
    cap = {"bucket_cap_mb": 0.001} if "buckets" in kind else {}
    dist._DEFAULT_FIRST_BUCKET_BYTES = 512 if cap else 2**20  # which may not be larger than the others
    if kind == "single":
        step = compiled(model)
    elif kind.startswith("compile"):
        step = compiled(DDP(model, **cap), in_place="in place" in kind)
    else:
        step = DDP(compiled(model), **cap)
    # Biases in a group of their own.
    optimizer = torch.optim.SGD(
        [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 1e-3},
         {"params": [p for p in model.parameters() if p.dim() == 1]}], lr=0.05, momentum=0.9)
    for x, y in reference.classification_batches(10):
        part = slice(None) if kind == "single" else slice(rank, None, 2)
        loss = F.cross_entropy(step(x[part].double()), y[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"weights": {n: p.detach() for n, p in model.named_parameters()},
            "thresholds": autosparse_fx.thresholds(model), "sparsity": autosparse_fx.sparsity(model),
            "layers": [layer.sparsity for layer in autosparse_fx.report(model).layers]}

found = {}
for kind in sys.argv[3:] + (["single"] if rank == 0 else []):
    try:
        found[kind] = train(kind)
    except Exception as error:
        found[kind] = {"error": f"{type(error).__name__}: {error}"}
torch.save(found, f"{folder}/{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def two_processes(folder: Path, kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(reference.__file__).parent)}
    script = folder / "script.py"
    script.write_text(SCRIPT)
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(rank), str(folder), *kinds],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return two_processes(tmp_path_factory.mktemp("ddp"), WRAPPED)


def assert_equal_to_one_process(trained: list[dict[str, Any]], kind: str) -> None:
    first, second, single = trained[0][kind], trained[1][kind], trained[0]["single"]
    assert not any("error" in r for r in (first, second, single)), (first, second, single)
    for part in ("weights", "thresholds"):
        assert list(first[part]) == list(second[part]) == list(single[part]) != []
        for name, t in single[part].items():
            assert torch.equal(first[part][name], second[part][name]), name
            torch.testing.assert_close(first[part][name], t, rtol=1e-5, atol=1e-5, msg=f"{part} {name}")
    assert first["sparsity"] == second["sparsity"] == single["sparsity"]
    assert list(first["thresholds"]) == ["stem.weight", "branch.0.weight", "branch.2.weight", "head.weight"]
    assert first["layers"][3] == pytest.approx(0.5, abs=0.01)  # by the rule, which says "head.weight"


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(WRAPPED))
def test_two_processes_train_what_one_does(trained: list[dict[str, Any]], kind: str) -> None:
    assert_equal_to_one_process(trained, kind)


# One process.


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Dynamo captures no weight of a wrapped layer whose class is one of torch.nn: an nn.Sequential under DDP or FSDP2, an
# nn.Linear that is sharded by itself.


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("make", [reference.Residual, reference.mlp])
def test_fsdp2_is_refused_with_the_cure(
    process_group: None, monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module], parts: bool
) -> None:
    from torch.distributed.fsdp import fully_shard

    without_inductor(monkeypatch)
    model = make()
    mesh = dist.init_device_mesh("cpu", (1,))
    if parts:
        for layer in [m for m in model.modules() if isinstance(m, nn.Linear)]:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = one_line(model)

    def step() -> None:
        compiled(torch.randn(4, 16)).sum().backward()
        optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Dynamo about FSDP's own hooks
        text = error(step)
    assert "sparsify" in text and "fully_shard" in text
    assert not thresholds(model)


@pytest.mark.parametrize("make", [reference.Residual, reference.mlp])
def test_compiled_ddp_is_never_dense_in_silence(
    process_group: None, monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module]
) -> None:
    without_inductor(monkeypatch)
    model = make()
    step = one_line(nn.parallel.DistributedDataParallel(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    refused = False
    try:
        step(torch.randn(4, 16)).sum().backward()
        optimizer.step()
    except RuntimeError as refusal:
        refused = "sparsify" in str(refusal)
    assert refused or thresholds(model)


def test_dtensor_weights_are_refused(process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor

    without_inductor(monkeypatch)
    mesh = dist.init_device_mesh("cpu", (1,))
    model = distribute_module(reference.mlp(), mesh)
    x = distribute_tensor(torch.randn(4, 16), mesh, [Replicate()])
    text = error(one_line(model), x)
    assert "'0.weight'" in text and "DTensor" in text and "sparsify" in text
    assert not thresholds(model)


def test_data_parallel_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    without_inductor(monkeypatch)
    model = reference.mlp()
    text = error(one_line(nn.DataParallel(model)), torch.randn(4, 16))
    assert "DataParallel" in text and "DistributedDataParallel" in text and not thresholds(model)


def test_prepared_model_under_ddp_with_options_is_refused(process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    without_inductor(monkeypatch)
    model = nn.parallel.DistributedDataParallel(sparsify(reference.mlp()))
    x: Tensor = torch.randn(4, 16)
    assert "was prepared with sparsify" in error(one_line(model), x)
