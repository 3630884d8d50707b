"""What every test runs under: a fixed seed, a fresh Dynamo, and Inductor without its graph caches."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported. The stock backend's cache key does not know our lowerings, so a cached graph could be one
# of an older version of them. Compiled C++ is still found again: its key is the source itself.
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")
sys.path.insert(0, str(Path(__file__).parent))  # for `import reference`, in every import mode

import pytest
import torch

# The models of the tests are too small to share out: a second thread costs time on an idle machine, and five times
# as much on a busy one.
torch.set_num_threads(1)


def pytest_collectstart() -> None:
    """Models and inputs in parameters of tests are made on import, and torch starts from another seed each time."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def objects_of_other_modules_are_set_aside() -> Iterator[None]:
    """What torch, its libraries and other tests leave behind is neither collected nor searched again and again."""
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "get_freeze_count", lambda: 0)  # or this package looks among them
        yield


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled by one test is seen by another; costs nothing where nothing compiles."""
    _reset_dynamo()
    yield
    _reset_dynamo()


def _reset_dynamo() -> None:
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "long" not in config.option.markexpr:
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def verified_graphs() -> Iterator[None]:
    """Every graph that our backend compiles in a test is checked after every pass."""
    from autosparse_fx import pipeline
    from autosparse_fx.passes.verify import verify_masked_graph

    def check(gm: torch.fx.GraphModule, stage: str, pass_name: str) -> None:
        verify_masked_graph(gm, deduped=pass_name == "dedupe_masks", tagged=pass_name == "tag_recompute")

    pipeline.checks.append(check)
    yield
    pipeline.checks.remove(check)


@pytest.fixture(autouse=True)
def small_graphs_run_sparse_too() -> Iterator[None]:
    """Otherwise only layers run on sparse kernels that gain more than that costs, which differs between machines."""
    with pytest.MonkeyPatch.context() as patch:  # of its own: the fixture would outlive others that tests patch with
        for cost in ("CALL", "PROGRAM", "CAST"):
            patch.setattr(f"autosparse_fx.kernels.choice.{cost}", 0)
        patch.setattr("autosparse_fx.kernels.choice.CONVERT", 0.001)  # depthwise layers go with their neighbours
        for feature in ("has_bf16_matrices", "has_bf16_vectors", "halves_avx512"):
            patch.setattr(f"autosparse_fx._compat.cpu.{feature}", lambda: False)
        patch.setattr("autosparse_fx._compat.cpu.has_avx512", lambda: True)
        yield
