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
    perceptron = nn.Sequential(nn.Linear(300, 500), nn.GELU(), nn.Linear(500, 200)).eval()
    for linear in (perceptron[0], perceptron[2]):
        linear.weight[torch.rand_like(linear.weight) < 0.9] = 0
    errors = []
    for net, inputs in ((model, [x]), (perceptron, [torch.randn(tokens, 300) for tokens in (1, 3, 100)])):
        found = [torch.compile(net, backend="autosparse", dynamic=False)(i) for i in inputs]
        net.double()
        for y, i in zip(found, inputs):
            expected = net(i.double())
            errors.append(float((y - expected).abs().max() / expected.abs().max()))
print(library().machine.vector_length, max(errors))
"""


@pytest.mark.slow
@pytest.mark.parametrize("bits", [256, 1])
def test_other_vector_lengths(bits: int) -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(bits)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    length, error = run.stdout.split()
    assert float(error) < 1e-5 and int(length) <= 8
