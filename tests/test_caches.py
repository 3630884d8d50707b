"""Inductor's FX-graph cache and the AOTAutograd cache: found in a second process, and not after a change of an option.

(After a change of a pass or a lowering: see test_backend.py.)
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

CODE = """
import json, sys
import torch
import autosparse_fx
from autosparse_fx import AutoSparse
from torch._dynamo.utils import counters

torch.manual_seed(0)
torch.set_num_threads(1)
prepared, options = json.loads(sys.argv[1])
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
if prepared:
    autosparse_fx.sparsify(model, AutoSparse(threshold_init=-2.5))
x = torch.linspace(-1, 1, 24).view(3, 8)
torch.compile(model, backend="autosparse", options=options)(x).square().sum().backward()
aot, inductor = counters["aot_autograd"], counters["inductor"]
assert aot["autograd_cache_bypass"] == inductor["fxgraph_cache_bypass"] == 0, counters
gradient = [p.grad.sum().item() for p in model.parameters() if p.grad is not None]
print(json.dumps({"hits": aot["autograd_cache_hit"], "misses": aot["autograd_cache_miss"], "gradient": gradient}))
"""
ONE_LINE = {"total_steps": 10, "threshold_init": -2.5}


def run(folder: Path, *, prepared: bool, options: dict[str, Any]) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR_")}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    command = [sys.executable, "-c", CODE, json.dumps([prepared, options])]
    done = subprocess.run(command, check=True, timeout=300, env=environment, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for both forms, whose graphs differ, so that Inductor prepares its C++ compiler once."""
    return tmp_path_factory.mktemp("caches")


@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "one line"])
def test_second_process_finds_what_the_first_compiled_and_a_change_is_noticed(prepared: bool, folder: Path) -> None:
    options: dict[str, Any] = {} if prepared else dict(ONE_LINE)
    first = run(folder, prepared=prepared, options=options)
    assert (first["hits"], first["misses"]) == (0, 1)
    second = run(folder, prepared=prepared, options=options)
    assert (second["hits"], second["misses"]) == (1, 0)
    assert second["gradient"] == first["gradient"]
    assert any(second["gradient"])

    change = {"recompute_masks": False} if prepared else {"granularity": "channel"}
    changed = run(folder, prepared=prepared, options={**options, **change})
    assert (changed["hits"], changed["misses"]) == (0, 1)
