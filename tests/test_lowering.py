"""Inductor lowerings: under our backend and the stock one the ops fuse, and equal eager."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import autosparse_fx
from autosparse_fx import AutoSparse
from autosparse_fx.ops import anneal_gradient, threshold_mask

BACKENDS = ["inductor", "autosparse"]


def fused_kernels(codes: list[str]) -> list[str]:
    """The names of the kernels that the generated code calls."""
    return [
        line.split("(")[0].strip().removesuffix(".run")
        for code in codes
        for line in code.splitlines()
        if line.strip().startswith(("cpp_fused", "triton_")) and "async_compile" not in line and "(" in line
    ]


def assert_no_fallback(codes: list[str]) -> None:
    assert codes
    for code in codes:
        lines = [line for line in code.splitlines() if not line.lstrip().startswith("#")]
        assert not [line for line in lines if "autosparse." in line]


@pytest.fixture
def two_threads() -> Iterator[None]:
    """So that the generated code divides its sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


CASES: dict[str, tuple[tuple[int, ...], int | None, torch.dtype, torch.dtype]] = {
    "layer": ((33, 20, 3, 3), None, torch.float32, torch.float32),
    "axis0": ((33, 20), 0, torch.float32, torch.float32),
    "bfloat16, axis1": ((40, 30), 1, torch.bfloat16, torch.float32),
    "float64": ((9, 11), 1, torch.float64, torch.float64),
    "empty": ((0, 5), None, torch.float32, torch.float32),
}


def case_inputs(name: str) -> tuple[Tensor, Tensor, Tensor]:
    shape, axis, dtype, threshold_dtype = CASES[name]
    weight = torch.randn(shape)
    weight[: shape[0] // 2, 0] = 0
    s = torch.full((1,), -0.5, dtype=threshold_dtype)
    if axis is not None:
        s = torch.linspace(-2, 1, shape[axis], dtype=threshold_dtype).view(
            [-1 if d == axis else 1 for d in range(len(shape))]
        )
    return weight.to(dtype), s, torch.randn(shape).to(dtype)


def both_ops(inputs: list[tuple[Tensor, Tensor, Tensor]], alpha: Tensor) -> list[tuple[Tensor, ...]]:
    return [(threshold_mask(w, s, alpha), *anneal_gradient(g, w, s, alpha)) for w, s, g in inputs]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_dtype_and_threshold_compiles_without_fallback_and_equals_eager(backend: str, two_threads: None) -> None:
    names = list(CASES)
    inputs = [case_inputs(name) for name in names]
    inputs += [(w.to(memory_format=torch.channels_last), s, g) for w, s, g in inputs[:1]]
    inputs += [(w[::2], s[::2], g[::2]) for w, s, g in inputs[1:2]]
    names += ["channels_last", "sliced"]
    alpha = torch.tensor(0.3)
    compiled, codes = run_and_get_code(torch.compile(both_ops, backend=backend, fullgraph=True), inputs, alpha)
    assert fused_kernels(codes)
    assert_no_fallback(codes)
    for name, seen, expected in zip(names, compiled, both_ops(inputs, alpha), strict=True):
        for a, b in zip(seen, expected, strict=True):
            assert a.dtype == b.dtype and a.stride() == b.stride(), name
        value, dw, ds = seen
        assert torch.equal(dw, expected[1]), name
        assert torch.equal(value == 0, expected[0] == 0), name
        assert not bool(torch.signbit(value[value == 0]).any()), name
        torch.testing.assert_close(value, expected[0], msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(ds, expected[2], rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_generated_code_treats_nan_infinity_zero_and_the_cut_itself_as_eager_does() -> None:
    weight = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.1, 2.0, 0.5, -0.5, 0.0, -0.0] * 8)
    s, alpha, grad = torch.tensor([0.0]), torch.tensor(0.25), torch.ones(72)
    value, dw, _ = torch.compile(lambda: both_ops([(weight, s, grad)], alpha)[0])()
    torch.testing.assert_close(value, threshold_mask(weight, s, alpha), equal_nan=True)
    assert bool(value[::9].isnan().all()) and bool((value[1::9] == torch.inf).all())
    assert torch.equal(dw, torch.tensor([0.25, 1.0, 1.0, 0.25, 1.0, 0.25, 0.25, 0.25, 0.25] * 8))
    assert torch.equal(dw, anneal_gradient(grad, weight, s, alpha)[0])
    assert not bool(torch.signbit(value[value == 0]).any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mask_fuses_with_its_neighbours_and_its_name_stays(backend: str) -> None:
    weight, s, alpha = torch.randn(64, 48), torch.tensor([-1.0]), torch.tensor(0.5)

    def function(weight: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
        return torch.relu(threshold_mask(weight * 2, s, alpha)) + 1

    compiled, codes = run_and_get_code(torch.compile(function, backend=backend), weight, s, alpha)
    kernels = fused_kernels(codes)
    assert_no_fallback(codes)
    over_the_weight = [name for name in kernels if "relu" in name]
    assert len(over_the_weight) == 1 and "threshold_mask" in over_the_weight[0]
    assert len(kernels) <= 2
    torch.testing.assert_close(compiled, function(weight, s, alpha))


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


def step_gradients(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output = call(x)
    output.square().sum().backward()
    return {"output": output.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_compiles_without_fallback_equals_eager_and_never_recompiles_for_alpha(backend: str) -> None:
    config = AutoSparse(threshold_init=-2.5, rules={"fc.weight": {"granularity": "channel"}})
    model = autosparse_fx.sparsify(Both(), config)
    x = torch.randn(5, 3, 9, 9)
    alpha = model.conv._buffers["autosparse_alpha"]
    compiled = torch.compile(model, backend=backend, fullgraph=True)

    seen, codes = run_and_get_code(lambda: step_gradients(model, compiled, x))
    assert len(codes) == 2
    assert_no_fallback(codes)
    assert any("threshold_mask" in name for name in fused_kernels(codes[:1]))
    assert any("anneal_gradient" in name for name in fused_kernels(codes[1:]))

    with torch.compiler.set_stance("fail_on_recompile"):
        for value in (0.75, 0.5, 0.1, 0.0):
            alpha.fill_(value)
            seen = step_gradients(model, compiled, x)
            expected = step_gradients(model, model, x)
            assert set(seen) == set(expected) >= {"conv.weight_threshold", "fc.weight_threshold"}
            for name in expected:
                torch.testing.assert_close(
                    seen[name], expected[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
                )
            dead = expected["fc.weight"][model.fc.weight == 0]
            assert dead.numel() > 0 and bool((dead == 0).all()) == (value == 0)


def test_the_lowerings_are_registered_by_compiling_and_not_by_importing() -> None:
    import subprocess
    import sys

    code = (
        "import sys, autosparse_fx\n"
        "assert 'torch._inductor.lowering' not in sys.modules\n"
        "assert 'autosparse_fx.lowering' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
