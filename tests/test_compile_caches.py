"""Compiled code of an earlier version of the lowerings is not taken from torch's caches, by no backend."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import inspect, sys, torch
read = inspect.getsource
inspect.getsource = lambda module: read(module) + sys.argv[1]  # as another version of the package would be
import autosparse_fx
from torch._dynamo.utils import counters

torch.manual_seed(0)
model = autosparse_fx.sparsify(torch.nn.Sequential(torch.nn.Linear(8, 4)))
torch.compile(model, backend="inductor")(torch.ones(2, 8)).sum().backward()
inductor, aot = counters["inductor"], counters["aot_autograd"]
for what in ("hit", "miss"):
    print(inductor[f"fxgraph_cache_{what}"] + aot[f"autograd_cache_{what}"])
"""


def hits_and_misses(folder: Path, version: str) -> tuple[int, int]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR_")}
    environment = {**inherited, "TORCHINDUCTOR_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, version]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300).stdout
    hits, misses = output.split()[-2:]
    return int(hits), int(misses)


@pytest.mark.slow
def test_a_changed_lowering_misses_the_cache_and_the_same_one_hits_it(tmp_path: Path) -> None:
    cold = hits_and_misses(tmp_path, "")
    assert cold[0] == 0 < cold[1]
    hits, misses = hits_and_misses(tmp_path, "")
    assert hits > 0 == misses
    assert hits_and_misses(tmp_path, "# changed") == cold
