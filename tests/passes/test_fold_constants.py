"""fold_constants: which computed weights become constants, which must not, and that the graph computes the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernels.graphs import CONVOLUTION, Captured, Function, prune
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from autosparse_fx.passes import fold_batch_norm, fold_constants
from autosparse_fx.passes.constants import constant

X = torch.randn(2, 6, 7, 8, generator=torch.Generator().manual_seed(0))


def masked() -> nn.Module:
    layer = nn.Conv2d(6, 8, 3)
    layer.register_buffer("mask", (torch.rand(8, 6, 3, 3) > 0.9).float())
    return Function(lambda m, x: F.conv2d(x, m.a.weight * m.a.mask), a=layer)


LAYERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "masked": (masked, 1),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Conv2d(6, 8, 3)), 1),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(6, 8, 3)), 1),
    "product": (lambda: Function(lambda m, x: F.conv2d(x, m.a.weight * 2, m.a.bias + 1), a=nn.Conv2d(6, 8, 3)), 2),
    "parts": (lambda: Function(lambda m, x: F.conv2d(x, m.a.weight.chunk(2)[1]), a=nn.Conv2d(6, 8, 3)), 1),
    "linear": (lambda: Function(lambda m, x: F.linear(x, m.a.weight.abs()), a=nn.Linear(8, 5)), 1),
    "transposed": (lambda: Function(lambda m, x: x @ (m.a.weight * 2).t(), a=nn.Linear(8, 5)), 1),
    "written in place": (lambda: Function(lambda m, x: F.linear(x, m.a.weight.clone().mul_(2)), a=nn.Linear(8, 5)), 1),
    "shared": (
        lambda: Function(lambda m, x: F.linear(F.linear(x, w := m.a.weight * 2), w), a=nn.Linear(8, 8)), 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_folds(name: str) -> None:
    make, count = LAYERS[name]
    graph = Captured(make().eval(), X)
    assert graph.apply(fold_constants) == count
    multiplied = [node.args[1] for node in graph.gm.graph.nodes if node.target is CONVOLUTION]
    assert all(constant(weight) is not None for weight in multiplied)


def test_batch_norm_behind_a_folded_weight_is_folded_into_it() -> None:
    graph = Captured(prune(nn.Sequential(masked(), nn.BatchNorm2d(8))), X)
    graph.apply(fold_constants)
    assert graph.apply(fold_batch_norm) == 1


LEFT: dict[str, Callable[..., Any]] = {
    "plain": lambda m, x: m.a(x),
    "transposes and casts": lambda m, x: (x.double() @ m.a.weight.t().double()).float(),
    "of the input": lambda m, x: F.linear(x, m.a.weight * x.mean()),
    "no weight": lambda m, x: m.a(x) + m.a.bias * 2,
}


@pytest.mark.parametrize("name", LEFT)
def test_leaves(name: str) -> None:
    assert Captured(Function(LEFT[name], a=nn.Linear(8, 8)), X).apply(fold_constants) == 0


def test_leaves_random_weights() -> None:
    graph = Captured(Function(lambda m, x: F.linear(x, F.dropout(m.a.weight, 0.5)), a=nn.Linear(8, 8)), X, train=True)
    assert fold_constants(graph.gm) == 0


def test_what_else_reads_a_folded_weight_reads_what_it_did() -> None:
    graph = Captured(Function(lambda m, x: (F.linear(x, w := m.a.weight * 2), w), a=nn.Linear(8, 8)), X)
    assert graph.apply(fold_constants) == 1
    weight: Any = graph.gm.graph.output_node().args[0][1]
    assert isinstance(weight.target, torch._ops.OpOverload)


def test_a_view_of_a_folded_weight_that_is_returned_is_no_view_of_the_constant() -> None:
    graph = Captured(Function(lambda m, x: (x @ (t := (m.a.weight * 2).t()), t), a=nn.Linear(8, 8)), X)
    graph.apply(fold_constants)
    with torch.no_grad():
        (_, first), (_, second) = graph.gm(X), graph.gm(X)
    assert first.data_ptr() != second.data_ptr()


def test_weights_are_computed_in_their_own_precision_under_autocast() -> None:
    """What autocast casts is cast in the graph; the rest of it asked for float32."""

    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.to(m.a.weight), m.a.weight @ m.b.weight)

    model = Function(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        graph = Captured(model, X)
        assert fold_constants(graph.gm) == 1
    graph.check()
    assert {buffer.dtype for buffer in graph.gm.buffers()} == {torch.float32}


def test_deep_constants_are_no_matter() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        weight = m.a.weight
        for _ in range(1500):
            weight = (weight + weight) * 0.5
        return F.linear(x, weight)

    assert Captured(Function(forward, a=nn.Linear(8, 8)), X).apply(fold_constants) == 1


def test_deep_graphs_are_no_matter() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(1500):
            x = x.relu().sin()
        return F.linear(x, m.a.weight * 2)

    assert Captured(Function(forward, a=nn.Linear(8, 8)), X).apply(fold_constants) == 1
