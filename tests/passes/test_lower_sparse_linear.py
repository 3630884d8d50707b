"""lower_sparse_linear: which products are lowered, with what, and which must not be."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernels.graphs import SPARSE_LINEAR, Captured, Function, cleanings, prune
from torch import Tensor, nn

from autosparse_fx.kernels.choice import CHOICE
from autosparse_fx.passes import lower_sparse_linear

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default)
G = torch.Generator().manual_seed(0)
X, X3 = torch.randn(40, 64, generator=G), torch.randn(3, 20, 64, generator=G)


def captured(*layers: nn.Module, x: Tensor = X) -> Captured:
    return Captured(prune(nn.Sequential(*layers)), x)


def function(forward: Callable[..., Any], *inputs: Tensor, **layers: nn.Module) -> Captured:
    return Captured(prune(Function(forward, **layers)), *(inputs or (X,)))


def left_alone(graph: Captured, reason: str) -> None:
    graph.check_left_alone(lower_sparse_linear, reason)


def targets(graph: Captured) -> list[object]:
    return [node.target for node in graph.gm.graph.nodes if node.op == "call_function"]


# What is lowered.


def test_whole_graph_is_cleaned_as_often_for_many_layers_as_for_few() -> None:
    graphs = [captured(*(nn.Linear(64, 64), nn.GELU()) * layers) for layers in (2, 6)]
    with cleanings() as cleaned:
        assert [graph.apply(lower_sparse_linear) for graph in graphs] == [2, 6]
    few, many = (cleaned.count(graph.gm.graph) for graph in graphs)
    assert few == many > 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("x", [X, X3, X3.view(3, 4, 5, 64), X3.transpose(0, 1)], ids=["2d", "3d", "4d", "transposed"])
def test_lowers(x: Tensor, bias: bool) -> None:
    graph = captured(nn.Linear(64, 96, bias=bias), x=x)
    assert graph.apply(lower_sparse_linear) == 1
    (node,) = graph.nodes(SPARSE_LINEAR)
    assert node.meta[CHOICE].is_sparse and "estimated" in node.meta[CHOICE].reason
    assert not any(graph.count(product) for product in PRODUCTS) and not graph.count(aten.t.default)


def test_input_without_a_batch() -> None:
    assert captured(nn.Linear(256, 512), x=torch.randn(256)).apply(lower_sparse_linear) in (0, 1)


@pytest.mark.parametrize(
    "activation, name",
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU6(), "clamp"),
        (nn.Hardtanh(-0.25, 2.0), "clamp"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.SiLU(), "silu"),
        (nn.Hardswish(), "hardswish"),
        (nn.Hardsigmoid(), "hardsigmoid"),
        (nn.Tanh(), "tanh"),
        (nn.Mish(), "mish"),
        (nn.LeakyReLU(), "leaky_relu"),
        (nn.LeakyReLU(0.2), "leaky_relu"),
        (nn.ELU(), "elu"),
        (nn.ELU(0.5), "elu"),
        (nn.SELU(), "elu"),
        (nn.Sigmoid(), "sigmoid"),
    ],
    ids=str,
)
@pytest.mark.parametrize("x", [X, X3], ids=["2d", "3d"])
@pytest.mark.parametrize("bias", [True, False])
def test_takes_the_activation_along(activation: nn.Module, name: str, x: Tensor, bias: bool) -> None:
    graph = captured(nn.Linear(64, 96, bias=bias), activation, x=x)
    assert graph.apply(lower_sparse_linear) == 1
    assert graph.nodes(SPARSE_LINEAR)[0].args[3] == name
    assert not any(graph.count(node) for node in (aten.relu.default, aten.gelu.default, aten.hardtanh.default))


def test_views_between_layers_cancel() -> None:
    graph = captured(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32), x=X3)
    assert graph.apply(lower_sparse_linear) == 3
    first, second, third = graph.nodes(SPARSE_LINEAR)
    assert second.args[0] is first and third.args[0] is second
    assert graph.count(aten.view.default) == 2  # into the first, and out of the last


def test_vector_that_is_added_becomes_the_bias() -> None:
    graph = function(lambda m, x: F.relu(m.a(x) + m.b.bias), X3, a=nn.Linear(64, 96, bias=False), b=nn.Linear(9, 96))
    assert graph.apply(lower_sparse_linear) == 1
    assert graph.nodes(SPARSE_LINEAR)[0].args[3] == "relu" and graph.count(aten.add.Tensor) == 0


def test_second_vector_stays() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.relu(m.a(x) + m.b.bias + m.c.bias)

    layers = {"a": nn.Linear(64, 96, bias=False), "b": nn.Linear(9, 96), "c": nn.Linear(8, 96)}
    graph = function(forward, X3, **layers)
    assert graph.apply(lower_sparse_linear) == 1
    assert graph.count(aten.add.Tensor) == 1 and graph.count(aten.relu.default) == 1


@pytest.mark.parametrize("forward", [
    lambda m, x, y: m.a(x) + y,
    lambda m, x, y: torch.add(m.a(x), m.b.bias, alpha=2) + y,
    lambda m, x, y: m.a(x) + m.b.bias[:1] + y,
    lambda m, x, y: m.a(x) + m.b.bias[:, None] + y,
    lambda m, x, y: m.a(x) + 1 + y,
    lambda m, x, y: m.b.bias - m.a(x) + y,
    lambda m, x, y: (z := m.a(x)) + z + y,
], ids=["input", "alpha", "number in a vector", "column", "number", "sub", "doubled"])  # fmt: skip
def test_other_sums_stay(forward: Callable[..., Any]) -> None:
    layers = {"a": nn.Linear(64, 96, bias=False), "b": nn.Linear(9, 96)}
    graph = function(forward, torch.randn(96, 64), torch.randn(96, 96), **layers)
    assert graph.apply(lower_sparse_linear) == 1
    assert graph.count(aten.add.Tensor) >= 1


class Vector(nn.Module):
    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 96, bias=False)
        self.register_buffer("vector", vector)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.vector


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bfloat16])
def test_vector_of_another_dtype(dtype: torch.dtype) -> None:
    """A float64 one makes the sum float64."""
    graph = Captured(prune(Vector((9 * torch.randn(96)).to(dtype))), X)
    assert graph.gm.graph.output_node().args[0][0].meta["val"].dtype == torch.promote_types(torch.float32, dtype)
    assert graph.apply(lower_sparse_linear) == 1


def test_addmm_with_a_number_as_bias() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.addmm(m.b.bias, x, m.a.weight.t())

    left_alone(function(forward, a=nn.Linear(64, 96), b=nn.Linear(9, 1)), "bias")


def test_matmul_by_a_parameter() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.gelu(x @ m.a.weight)

    graph = function(forward, X3, a=nn.Linear(96, 64, bias=False))
    assert graph.apply(lower_sparse_linear) == 1
    assert graph.nodes(SPARSE_LINEAR)[0].args[3] == "gelu"


@pytest.mark.parametrize("forward", [
    lambda m, x: (y := m.a(x)) * F.relu(y),
    lambda m, x: [y := m.a(x), F.relu(y)],
    lambda m, x: [F.relu(y := m.a(x)), y.transpose(0, 1)],
    lambda m, x: [y := F.gelu(m.a(x)), y + 1, y.sum(-1)],
], ids=["mul", "returned", "transposed", "two users of the activation"])  # fmt: skip
@pytest.mark.parametrize("x", [X, X3], ids=["2d", "3d"])
def test_results_that_are_used_twice(forward: Callable[..., Any], x: Tensor) -> None:
    assert function(forward, x, a=nn.Linear(64, 96)).apply(lower_sparse_linear) == 1


def test_view_that_splits_the_features_stays_behind() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.relu(m.a(x).view(3, 20, 4, 24).transpose(1, 2))

    graph = function(forward, X3, a=nn.Linear(64, 96))
    assert graph.apply(lower_sparse_linear) == 1
    assert graph.nodes(SPARSE_LINEAR)[0].args[3] == "none"


def test_square_heads() -> None:
    """A view whose last dimension happens to be that of the weight, after another that split it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).view(30, 2, 48).view(60, 96 // 2).view(3, 10, 96)
        return F.relu(y) + y

    function(forward, X3[:, :10], a=nn.Linear(64, 96)).apply(lower_sparse_linear)


def test_attention() -> None:
    layer = nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.attention(x, x, x, need_weights=False)[0]

    graph = function(forward, X3, attention=layer)
    assert graph.apply(lower_sparse_linear) == 2


def test_weight_of_two_layers() -> None:
    graph = function(lambda m, x: m.a(F.relu(m.a(x))), X3, a=nn.Linear(64, 64))
    assert graph.apply(lower_sparse_linear) == 2


@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_cast_around_a_perceptron_and_not_within(dtype: torch.dtype, is_autocast: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=is_autocast):
            return m.b(F.gelu(m.a(x)))

    model = prune(Function(forward, a=nn.Linear(64, 96), b=nn.Linear(96, 64)))
    graph = Captured(model, X3) if is_autocast else Captured(model.to(dtype), X3.to(dtype))
    assert graph.apply(lower_sparse_linear) == 2
    first, second = graph.nodes(SPARSE_LINEAR)
    assert second.args[0] is first
    (result,) = graph.gm.graph.output_node().args[0]
    assert result.meta["val"].dtype == dtype and result.meta["val"].shape == X3.shape


@pytest.mark.parametrize("bias", [True, False])
def test_products_in_a_row_share_what_calling_them_costs(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [module for _ in range(6) for module in (nn.Linear(64, 64, bias=bias), nn.ReLU())]
    gained = Captured(prune(nn.Sequential(*layers[:1])), X)
    gained.apply(lower_sparse_linear)
    monkeypatch.setattr("autosparse_fx.kernels.choice.PROGRAM", 2 * gained.choices()[0].saved)
    for model, count in ((layers[:1], 0), (layers, 6)):
        torch._dynamo.reset()
        assert Captured(prune(nn.Sequential(*model)), X).apply(lower_sparse_linear) == count


def test_products_in_half_precision_pay_for_their_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autosparse_fx.kernels.choice.CAST", 1e9)
    model = prune(nn.Linear(64, 96))
    left_alone(Captured(model.bfloat16(), X.bfloat16()), "less than calling it costs")
    torch._dynamo.reset()
    assert Captured(model.float(), X).apply(lower_sparse_linear) == 1


def test_products_of_one_input_share_its_cast() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.cos(x)  # neither an input nor a result of theirs
        return m.a(y) + m.b(y) * m.c(y)

    model = prune(Function(forward, **{name: nn.Linear(64, 96) for name in "abc"})).bfloat16()
    graph = Captured(model, X.bfloat16())
    assert graph.apply(lower_sparse_linear) == 3
    assert len({node.args[0] for node in graph.nodes(SPARSE_LINEAR)}) == 1


def test_sums_between_products_end_their_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse products add no tensors, so behind a sum ``b`` is called by itself, which alone does not pay here."""

    def forward(m: Any, x: Tensor, *, is_sum: bool) -> Tensor:
        y = m.a(x)
        return m.b(y + x if is_sum else y)

    layers = {name: nn.Linear(64, 64) for name in "ab"}
    gained = Captured(prune(nn.Linear(64, 64)), X)
    gained.apply(lower_sparse_linear)
    monkeypatch.setattr("autosparse_fx.kernels.choice.PROGRAM", 1.5 * gained.choices()[0].saved)
    for is_sum, count in ((True, 0), (False, 2)):
        torch._dynamo.reset()
        graph = Captured(prune(Function(partial(forward, is_sum=is_sum), **layers)), X)
        assert graph.apply(lower_sparse_linear) == count


# What is not.


def test_dense_products_stay_and_say_so() -> None:
    left_alone(Captured(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)), X), "estimated 0.")


def test_sparse_ones_among_dense_ones() -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32))
    prune(model[2])
    graph = Captured(model, X3)
    assert graph.apply(lower_sparse_linear) == 1
    assert sum(graph.count(product) for product in PRODUCTS) == 2
    assert [choice.is_sparse for choice in graph.choices()] == [False, True, False]


def test_too_small_a_product_stays() -> None:
    left_alone(captured(nn.Linear(64, 9), x=X[:3]), "too small")


def test_float64_stays() -> None:
    left_alone(Captured(prune(nn.Linear(64, 96)).double(), X.double()), "compute in float32")


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_weight_and_bias_that_are_no_constants_stay(which: str) -> None:
    def forward(m: Any, x: Tensor, given: Tensor) -> Tensor:
        return F.linear(x, given, m.a.bias) if which == "weight" else F.linear(x, m.a.weight, given)

    given = torch.randn(96, 64) if which == "weight" else torch.randn(96)
    left_alone(function(forward, X, given, a=nn.Linear(64, 96)), "no constant")


def test_computed_weight_stays() -> None:
    left_alone(function(lambda m, x: F.linear(x, m.a.weight * 2), a=nn.Linear(64, 96)), "no constant")


def test_products_of_inputs_stay() -> None:
    code = (graph := function(lambda m, x, y: x @ y, X, X.t().contiguous(), a=nn.Linear(2, 2))).gm.code
    assert graph.apply(lower_sparse_linear) == 0 and graph.gm.code == code


def test_weight_on_the_left_stays() -> None:
    left_alone(function(lambda m, x: m.a.weight @ x.t(), a=nn.Linear(64, 96)), "no constant")


def test_scaled_products_stay() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.addmm(m.a.bias, x, m.a.weight.t(), beta=0.5, alpha=2)

    left_alone(function(forward, a=nn.Linear(64, 96)), "scaled")
