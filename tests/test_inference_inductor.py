"""Sparse inference with all of Inductor: that what it makes of the graphs is right, and its caches."""

import copy
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels.graphs import Function
from kernels.models import MODELS, check, inputs_of, made, small_layers_pay

from autosparse_fx import AutoSparse, finalize, sparsify
from autosparse_fx._compat import inductor
from autosparse_fx.kernels.library import KernelLibrary

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One number for each program that ran."""
    small_layers_pay(monkeypatch)
    found: list[int] = []
    run = KernelLibrary.run

    def counted(*arguments: Any) -> None:
        found.append(1)
        run(*arguments)

    monkeypatch.setattr(KernelLibrary, "run", counted)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, programs: list[int]) -> None:
    model, x = made(name), inputs_of(name)
    fast = torch.compile(model, backend="autosparse")
    first, second = check(fast, model, x), check(fast, model, x)
    assert torch.equal(first, second)
    assert programs and len(programs) % 2 == 0


def test_autotuned(
    programs: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(inductor, "inductor_cache_dir", lambda: tmp_path)
    model, x = made("mlp"), inputs_of("mlp")
    fast = torch.compile(model, backend="autosparse", mode="max-autotune")
    with caplog.at_level("INFO", "autosparse_fx"):
        first, second = check(fast, model, x), check(fast, model, x)
    assert torch.equal(first, second)
    assert re.search(r"ms with 1,.* ms with 0\b(?!\.)", caplog.text)
    assert len(list(tmp_path.glob("autosparse_fx/choices/*.json"))) == 1


def test_weights_that_are_written_to(programs: list[int]) -> None:
    model, x = made("mlp"), inputs_of("mlp")
    fast = torch.compile(model, backend="autosparse")
    check(fast, model, x)
    with torch.no_grad():
        model.up.weight.mul_(2)  # a sparse layer
    check(fast, model, x)
    with torch.no_grad():
        model.norm.bias.add_(1)  # what Inductor keeps as a constant
    check(fast, model, x)
    count = len(programs)
    model.load_state_dict(made("mlp").state_dict())
    check(fast, model, x)
    assert len(programs) > count


@pytest.mark.parametrize("name", ["stack", "mlp"])
def test_batches_of_several_sizes(name: str, programs: list[int]) -> None:
    model = made(name)
    fast = torch.compile(model, backend="autosparse")
    for batch in (4, 2, 7):
        check(fast, model, inputs_of(name, batch))
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    for batch in (5, 2):
        check(fast, model, inputs_of(name, batch))
    assert len(programs) == 5


def test_images_of_other_sizes() -> None:
    model = made()
    fast = torch.compile(model, backend="autosparse")
    for size in ((12, 14), (9, 10), (20, 8)):
        check(fast, model, torch.randn(2, 16, *size))


def test_outputs_besides_the_result() -> None:
    model = Function(
        lambda m, x, y: {"y": m.layers(x) * y, "x": x, "view": x.view(-1), "w": m.layers.first.weight}, layers=made()
    )
    check(torch.compile(model, backend="autosparse"), model, inputs_of(), inputs_of())


def test_options_pass_through() -> None:
    model, x = made(), inputs_of()
    check(torch.compile(model, backend="autosparse", options={"epilogue_fusion": False}), model, x)


def test_finalized_model_trains_on_and_is_right_again(programs: list[int]) -> None:
    """Sparse, then dense with gradients, then sparse again with what was learned."""
    model = finalize(sparsify(copy.deepcopy(made()), AutoSparse(target_sparsity=None, threshold_init=-3.0)))
    fast, x = torch.compile(model, backend="autosparse"), inputs_of()
    check(fast, model, x)
    count = len(programs)
    fast(x).square().mean().backward()
    assert len(programs) == count
    wide = copy.deepcopy(model).double()
    wide.zero_grad()
    wide(x.double()).square().mean().backward()
    for parameter, expected in zip(model.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.double(), expected.grad, rtol=1e-3, atol=1e-5)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    check(fast, model, x)


def test_dense_model_is_what_it_was(programs: list[int]) -> None:
    model, x = made("residual", 0.0), inputs_of("residual")
    check(torch.compile(model, backend="autosparse"), model, x)
    assert not programs


def live_programs() -> int:
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor]
    return sum(t.dtype == torch.uint8 and t.dim() == 1 and t.numel() > 4096 for t in tensors)


def test_packed_weights_go_when_weights_change_and_with_the_model() -> None:
    torch._dynamo.reset()
    before = live_programs()
    model, x = made(), inputs_of()
    fast = torch.compile(model, backend="autosparse")
    for _ in range(4):
        check(fast, model, x)
        assert live_programs() <= before + 2  # the first, which Dynamo holds, and that of now
        with torch.no_grad():
            model.first.weight.mul_(1.5)
    del model, fast
    torch._dynamo.reset()
    assert live_programs() == before


CODE = """
import json, sys
import torch
import autosparse_fx.kernels.choice
torch.set_num_threads(1)
torch.manual_seed(int(sys.argv[1]))
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64), torch.nn.Tanh())
autosparse_fx.kernels.choice.WORTHWHILE = autosparse_fx.kernels.choice.PROGRAM = 0
x = torch.linspace(-1, 1, 64 * 40).view(40, 64)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.mul_(torch.rand_like(parameter) > 0.9)
    found = torch.compile(model, backend="autosparse")(x)
    error = (found - model.double()(x.double())).abs().max().item()
print(json.dumps([error, found.sum().item()]))
"""


@pytest.mark.slow
def test_caches_of_inductor_tell_weights_apart(tmp_path: Path) -> None:
    """A program is a constant of the graph, and the graphs of two models differ in nothing else."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR_")}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path)
    sums = []
    for seed in (0, 1, 0):
        done = subprocess.run(
            [sys.executable, "-c", CODE, str(seed)],
            check=True, timeout=300, env=environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        error, total = json.loads(done.stdout.splitlines()[-1])
        assert error < 1e-5
        sums.append(total)
    assert sums[0] == sums[2] != sums[1]
