"""The C++ is one source for all vector instructions: the narrower ones of this machine, and none at all."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys, torch
import torch._inductor.config
torch._inductor.config.cpp.simdlen = int(sys.argv[1])
import autosparse_fx
from autosparse_fx.kernels.library import library
from torch import nn

autosparse_fx.kernels.choice.PROGRAM = autosparse_fx.kernels.choice.CONVERT = 0
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(8, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, 2, 1, groups=64),
    nn.Conv2d(64, 64, 5, 2, 2, groups=64), nn.Conv2d(64, 128, 3), nn.ReLU(),
    nn.Conv2d(128, 128, 3, padding=1, groups=128), nn.Conv2d(128, 96, 1), nn.SiLU(),
    nn.Flatten(), nn.Linear(96 * 8 * 8, 32), nn.GELU(),
).eval()
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter[torch.rand_like(parameter) < 0.9] = 0
    x = torch.randn(3, 8, 38, 40)
    y = torch.compile(model, backend="autosparse")(x)
    expected = model.double()(x.double())
print(library().machine.vector_length, float((y - expected).abs().max() / expected.abs().max()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("bits", [256, 1])
def test_other_vector_lengths(bits: int) -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(bits)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    length, error = run.stdout.split()
    assert float(error) < 1e-5 and int(length) <= 8
