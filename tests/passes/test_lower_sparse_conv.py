"""lower_sparse_conv: which convolutions are lowered, with what, and which must not be."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernels.graphs import CONVOLUTION, SPARSE_CONV, Captured, Function, cleanings, conv, prune
from torch import Tensor, nn

from autosparse_fx.kernels.choice import CHOICE
from autosparse_fx.passes import fold_batch_norm, lower_sparse_conv

aten = torch.ops.aten
X = torch.randn(2, 16, 20, 20, generator=torch.Generator().manual_seed(0))


def captured(*layers: nn.Module, x: Tensor = X) -> Captured:
    return Captured(prune(nn.Sequential(*layers)), x)


def function(forward: Callable[..., Any], *inputs: Tensor, **layers: nn.Module) -> Captured:
    return Captured(prune(Function(forward, **layers)), *(inputs or (X,)))


def left_alone(graph: Captured, reason: str) -> None:
    graph.check_left_alone(lower_sparse_conv, reason)


# What is lowered.


def test_whole_graph_is_cleaned_as_often_for_many_layers_as_for_few() -> None:
    graphs = [captured(*(conv(16, 16), nn.ReLU()) * layers) for layers in (2, 6)]
    with cleanings() as cleaned:
        assert [graph.apply(lower_sparse_conv) for graph in graphs] == [2, 6]
    few, many = (cleaned.count(graph.gm.graph) for graph in graphs)
    assert few == many > 0


@pytest.mark.parametrize(
    "layer",
    [
        conv(kernel=1, padding=0),
        conv(),
        conv(bias=False),
        conv(stride=2),
        conv(stride=(1, 3)),
        conv(padding=4, dilation=2),
        conv(kernel=(5, 2), padding=(0, 3)),
        conv(padding="same"),
        conv(kernel=4, padding="same", dilation=2),
        conv(padding=1, padding_mode="reflect"),
        conv(padding=0),
        conv(stride=(2,)),
        conv(padding=(2,), dilation=(2,)),
    ],
    ids=str,
)
def test_lowers(layer: nn.Conv2d) -> None:
    graph = captured(layer)
    assert graph.apply(lower_sparse_conv) == 1
    assert graph.count(SPARSE_CONV) == 1 and graph.count(CONVOLUTION) == 0
    (node,) = graph.nodes(SPARSE_CONV)
    assert node.meta[CHOICE].is_sparse and "estimated" in node.meta[CHOICE].reason


def test_lowers_an_image_without_a_batch() -> None:
    assert captured(conv(), x=X[0]).apply(lower_sparse_conv) == 1


def test_lowers_a_channels_last_input() -> None:
    graph = captured(conv(), nn.ReLU(), conv(32), x=X.to(memory_format=torch.channels_last))
    assert graph.apply(lower_sparse_conv) == 2
    assert graph.nodes(SPARSE_CONV)[0].meta["val"].is_contiguous()


@pytest.mark.parametrize(
    "activation, name",
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.ReLU6(), "clamp"),
        (nn.Hardtanh(), "clamp"),
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
def test_takes_the_activation_along(activation: nn.Module, name: str) -> None:
    graph = captured(conv(), activation)
    assert graph.apply(lower_sparse_conv) == 1
    (node,) = graph.nodes(SPARSE_CONV)
    assert node.args[8] == name
    assert [n.target for n in graph.gm.graph.nodes if n.op == "call_function"] == [SPARSE_CONV]


@pytest.mark.parametrize("activation", [nn.CELU(2.0), nn.PReLU(), nn.Softsign(), nn.Softplus()], ids=str)
def test_leaves_other_functions_behind(activation: nn.Module) -> None:
    graph = captured(conv(), activation)
    assert graph.apply(lower_sparse_conv) == 1
    assert graph.nodes(SPARSE_CONV)[0].args[8] == "none"


@pytest.mark.parametrize(
    "bounds, expected",
    [((0, 6), [0.0, 6.0]), ((-0.25, None), [-0.25, math.inf]), ((None, 2), [-math.inf, 2.0])],
    ids=str,
)
def test_takes_clamp_along(bounds: tuple[Any, Any], expected: list[float]) -> None:
    graph = function(lambda m, x: m.conv(x).clamp(*bounds), conv=conv())
    assert graph.apply(lower_sparse_conv) == 1
    assert graph.nodes(SPARSE_CONV)[0].args[8:] == ("clamp", expected) and graph.count(aten.clamp.default) == 0


def test_leaves_clamp_by_tensors_behind() -> None:
    graph = function(lambda m, x: m.conv(x).clamp(x.mean(), x.amax()), conv=conv())
    assert graph.apply(lower_sparse_conv) == 1
    assert graph.nodes(SPARSE_CONV)[0].args[8] == "none" and graph.count(aten.clamp.Tensor) == 1


def test_clamp_behind_an_activation_stays() -> None:
    graph = captured(conv(), nn.ReLU(), nn.Sigmoid())
    graph.apply(lower_sparse_conv)
    assert graph.nodes(SPARSE_CONV)[0].args[8] == "relu" and graph.count(aten.sigmoid.default) == 1


@pytest.mark.parametrize("flipped", [False, True])
def test_takes_the_residual_along(flipped: bool) -> None:
    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(y + m.conv(x) if flipped else m.conv(x) + y)

    graph = function(forward, X, torch.randn(2, 32, 20, 20), conv=conv())
    assert graph.apply(lower_sparse_conv) == 1
    (node,) = graph.nodes(SPARSE_CONV)
    assert node.args[3] in graph.gm.graph.find_nodes(op="placeholder") and node.args[8] == "relu"
    assert graph.count(aten.add.Tensor) == 0


def test_residual_in_place() -> None:
    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        z = m.conv(x)
        z += y
        return z.relu_()

    graph = function(forward, X, torch.randn(2, 32, 20, 20), conv=conv())
    assert graph.apply(lower_sparse_conv) == 1
    assert graph.count(aten.add.Tensor) == 0


def test_residual_that_is_the_input() -> None:
    graph = function(lambda m, x: F.relu(m.conv(x) + x), conv=conv(16, 16))
    graph.apply(lower_sparse_conv)
    (node,) = graph.nodes(SPARSE_CONV)
    assert node.args[3] is node.args[0]


def test_sum_of_two_convolutions_belongs_to_the_later_one() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.relu(m.a(x) + m.b(x))

    graph = function(forward, a=conv(), b=conv(kernel=1, padding=0))
    assert graph.apply(lower_sparse_conv) == 2
    first, second = graph.nodes(SPARSE_CONV)
    assert (first.args[3], first.args[8]) == (None, "none")
    assert (second.args[3], second.args[8]) == (first, "relu")
    assert graph.count(aten.add.Tensor) == 0


def test_sum_with_a_dense_convolution() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.relu(m.dense(x) + m.b(x))

    model = prune(Function(forward, dense=conv(), b=conv()))
    nn.init.normal_(model.dense.weight)
    graph = Captured(model, X)
    assert graph.apply(lower_sparse_conv) == 1
    assert graph.nodes(SPARSE_CONV)[0].args[3] is graph.nodes(CONVOLUTION)[0]


def test_bottleneck_with_norms() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.n1(m.c1(x)))
        y = F.relu(m.n2(m.c2(y)))
        return F.relu(m.n3(m.c3(y)) + m.n4(m.c4(x)))

    layers = {
        "c1": conv(16, 16, 1, 0), "c2": conv(16, 16, stride=2),
        "c3": conv(16, 64, 1, 0), "c4": conv(16, 64, 1, 0, stride=2),
    }  # fmt: skip
    norms = {f"n{i}": nn.BatchNorm2d(n) for i, n in zip((1, 2, 3, 4), (16, 16, 64, 64), strict=True)}
    graph = function(forward, **layers, **norms)
    assert graph.apply(fold_batch_norm, lower_sparse_conv) == 4
    assert [n.target for n in graph.gm.graph.nodes if n.op == "call_function"] == [SPARSE_CONV] * 4


@pytest.mark.parametrize("forward", [
    lambda m, x: (y := m.conv(x)) * F.relu(y),
    lambda m, x: [y := m.conv(x), F.relu(y)],
    lambda m, x: (y := m.conv(x)) + F.relu(y),
    lambda m, x: (y := m.conv(x)) + y,
    lambda m, x: [z := F.relu(m.conv(x)), z * 2, z + 1],
    lambda m, x: [z := m.conv(x) + 1, F.relu(z)],
], ids=["mul", "returned", "added", "doubled", "two users of the activation", "two users of the sum"])  # fmt: skip
def test_results_that_are_used_twice(forward: Callable[..., Any]) -> None:
    graph = function(forward, conv=conv())
    assert graph.apply(lower_sparse_conv) == 1


def test_activation_of_a_sum_that_is_used_twice_stays() -> None:
    def forward(m: Any, x: Tensor, y: Tensor) -> Any:
        z = m.conv(x) + y
        return F.relu(z), z

    graph = function(forward, X, torch.randn(2, 32, 20, 20), conv=conv())
    graph.apply(lower_sparse_conv)
    (node,) = graph.nodes(SPARSE_CONV)
    assert node.args[3] is not None and node.args[8] == "none"
    assert graph.count(aten.relu.default) == 1


@pytest.mark.parametrize(
    "shape", [(1,), (32, 1, 1), (2, 32, 1, 1), (2, 1, 20, 20), (1, 32, 20, 20), (20,), (3, 2, 32, 20, 20)]
)
def test_sum_that_broadcasts_is_no_residual(shape: tuple[int, ...]) -> None:
    graph = function(lambda m, x, y: F.relu(m.conv(x) + y), X, torch.randn(shape), conv=conv())
    assert graph.apply(lower_sparse_conv) == 1
    assert graph.nodes(SPARSE_CONV)[0].args[3] is None
    assert graph.count(aten.add.Tensor) == 1


@pytest.mark.parametrize("forward", [
    lambda m, x, y: torch.add(m.conv(x), y, alpha=2),
    lambda m, x, y: torch.add(y, m.conv(x), alpha=0.5),
    lambda m, x, y: m.conv(x) - y,
    lambda m, x, y: y - m.conv(x),
    lambda m, x, y: m.conv(x) + 1.5 - y,
    lambda m, x, y: m.conv(x) + y.double(),
], ids=["alpha", "alpha of the layer", "sub", "sub of the layer", "number", "float64"])  # fmt: skip
def test_sums_of_other_kinds_are_no_residuals(forward: Callable[..., Any]) -> None:
    graph = function(forward, X, torch.randn(2, 32, 20, 20), conv=conv())
    assert graph.apply(lower_sparse_conv) == 1
    assert graph.nodes(SPARSE_CONV)[0].args[3] is None


def test_residual_of_integers_or_an_expanded_tensor() -> None:
    integers = torch.randint(0, 9, (2, 32, 20, 20))
    function(lambda m, x, y: F.relu(m.conv(x) + y), X, integers, conv=conv()).apply(lower_sparse_conv)
    torch._dynamo.reset()
    expanded = torch.randn(2, 32, 1, 1)
    function(
        lambda m, x, y: F.relu(m.conv(x) + y.expand(2, 32, 20, 20)), X, expanded, conv=conv()
    ).apply(lower_sparse_conv)  # fmt: skip


def test_weight_of_two_layers() -> None:
    graph = function(lambda m, x: m.conv(F.relu(m.conv(x))), conv=conv(16, 16))
    assert graph.apply(lower_sparse_conv) == 2


# What is not.


def test_dense_layers_stay_and_say_so() -> None:
    graph = Captured(nn.Sequential(conv(), nn.ReLU(), conv(32)), X)
    left_alone(graph, "estimated 0.")
    assert len(graph.choices()) == 2


def test_sparse_ones_among_dense_ones() -> None:
    model = nn.Sequential(conv(), nn.ReLU(), conv(32), nn.ReLU(), conv(32, 16))
    prune(model[2])
    graph = Captured(model, X)
    assert graph.apply(lower_sparse_conv) == 1
    assert graph.count(CONVOLUTION) == 2 and [c.is_sparse for c in graph.choices()] == [False, True, False]


def test_too_small_a_layer_stays() -> None:
    left_alone(captured(conv(16, 4), x=X[:, :, :5, :5]), "too small")


def test_too_large_a_window_stays() -> None:
    layer = conv(1, 2, kernel=(65, 64), padding=0)
    left_alone(captured(layer, x=torch.randn(1, 1, 70, 70)), "a window of 65 x 64")


def test_float64_stays() -> None:
    left_alone(Captured(prune(conv()).double(), X.double()), "compute in float32")


def test_transposed_convolution_stays() -> None:
    left_alone(captured(nn.ConvTranspose2d(16, 32, 3)), "transposed")


def test_one_dimension() -> None:
    layer = nn.Conv1d(16, 64, 5, stride=2, padding=3, dilation=2)
    graph = captured(nn.Conv1d(16, 16, 3), layer, nn.ReLU(), x=torch.randn(2, 16, 99))
    assert graph.apply(lower_sparse_conv) == 2
    *_, node = graph.nodes(SPARSE_CONV)
    assert node.args[4:] == ([2], [3], [2], 1, "relu", []) and node.meta["val"].shape == (2, 64, 48)


def test_other_dimensions_stay() -> None:
    left_alone(captured(nn.Conv3d(16, 32, 3), x=torch.randn(1, 16, 9, 9, 9)), "3-dimensional")


@pytest.mark.parametrize("inputs", ["weight", "bias"])
def test_weight_and_bias_that_are_no_constants_stay(inputs: str) -> None:
    def forward(m: Any, x: Tensor, given: Tensor) -> Tensor:
        if inputs == "weight":
            return F.conv2d(x, given, m.conv.bias)
        return F.conv2d(x, m.conv.weight, given)

    given = prune(conv()).weight.detach() if inputs == "weight" else torch.randn(32)
    left_alone(function(forward, X, given, conv=conv()), "no constant")


def test_computed_weight_stays() -> None:
    left_alone(function(lambda m, x: F.conv2d(x, m.conv.weight * 2), conv=conv()), "no constant")


# Half precision.


def bottleneck(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.c(F.relu(m.b(F.relu(m.a(x))))) + x)


def half(dtype: torch.dtype, *, is_autocast: bool) -> Captured:
    layers = {"a": conv(16, 32, 1, 0), "b": conv(32, 32), "c": conv(32, 16, 1, 0, bias=False)}

    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=is_autocast):
            return bottleneck(m, x).to(dtype)

    model = prune(Function(forward, **layers))
    return Captured(model, X) if is_autocast else Captured(model.to(dtype), X.to(dtype))


@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_cast_around_a_row_of_layers_and_not_between(dtype: torch.dtype, is_autocast: bool) -> None:
    graph = half(dtype, is_autocast=is_autocast)
    assert graph.apply(lower_sparse_conv) == 3
    layers = graph.nodes(SPARSE_CONV)
    assert all(node.meta["val"].dtype == torch.float32 for node in layers)
    assert layers[1].args[0] is layers[0] and layers[2].args[0] is layers[1]
    to_float = [n for n in graph.nodes(aten._to_copy.default) if n.meta["val"].dtype == torch.float32]
    assert len(to_float) == 1  # x, which the first layer reads and the last adds


def test_half_precision_pays_less_where_the_processor_is_good_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autosparse_fx._compat.cpu.has_bf16_matrices", lambda: True)
    model = prune(conv(64, 64), 0.8)
    x = torch.randn(2, 64, 20, 20)
    left_alone(Captured(model.bfloat16(), x.bfloat16()), "estimated")
    torch._dynamo.reset()
    assert Captured(model.half(), x.half()).apply(lower_sparse_conv) == 1
    torch._dynamo.reset()
    assert Captured(model.float(), x).apply(lower_sparse_conv) == 1


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_casts_of_a_model_stay(dtype: torch.dtype) -> None:
    graph = function(lambda m, x: m.a(x).relu().to(dtype).float(), a=conv())
    assert graph.apply(lower_sparse_conv) == 1
    assert graph.count(aten._to_copy.default) == 2


def test_model_keeps_its_own_weights() -> None:
    graph = captured(conv(), nn.ReLU())
    before = graph.model[0].weight.clone()
    graph.apply(lower_sparse_conv)
    assert torch.equal(graph.model[0].weight, before)
