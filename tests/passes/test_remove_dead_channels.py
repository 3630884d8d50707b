"""remove_dead_channels: which channels go, which must stay, and that the graph computes the same."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from kernels.graphs import CONVOLUTION, Captured, Function, prune
from torch import Tensor, nn

from autosparse_fx.passes import remove_dead_channels

X = torch.randn(2, 6, 9, 9, generator=torch.Generator().manual_seed(0))
DEAD = [1, 4, 7]


def pair(second: nn.Conv2d, *between: nn.Module) -> nn.Sequential:
    """Two convolutions, nothing of which is zero."""
    model = nn.Sequential(nn.Conv2d(6, 10, 3), *between, second)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * parameter.sign())
    return model


def kill(convolution: nn.Module, bias: float = 0.0) -> None:
    assert isinstance(convolution, nn.Conv2d) and convolution.bias is not None
    with torch.no_grad():
        convolution.weight[DEAD] = 0
        convolution.bias[DEAD] = bias


def channels(graph: Captured) -> list[int]:
    return [node.meta["val"].shape[1] for node in graph.gm.graph.nodes if node.target is CONVOLUTION]


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Hardswish, nn.GELU], ids=lambda a: a.__name__)
def test_filters_that_are_zero_go_where_their_output_is_zero(activation: Callable[[], nn.Module], padding: int) -> None:
    model = pair(nn.Conv2d(10, 4, 3, padding=padding), activation())
    kill(model[0])
    graph = Captured(model, X)
    assert graph.apply(remove_dead_channels) == 3
    assert channels(graph) == [7, 4]


def test_what_a_relu_makes_zero_is_zero() -> None:
    model = pair(nn.Conv2d(10, 4, 3, padding=1), nn.ReLU())
    kill(model[0], bias=-2.0)
    assert Captured(model, X).apply(remove_dead_channels) == 3


def test_constants_move_into_the_bias_of_who_does_not_pad() -> None:
    model = pair(nn.Conv2d(10, 4, 3, bias=False), nn.Hardswish())
    kill(model[0], bias=0.7)
    graph = Captured(model, X)
    assert graph.apply(remove_dead_channels) == 3
    assert channels(graph) == [7, 4]


def test_constants_stay_where_a_consumer_pads() -> None:
    model = pair(nn.Conv2d(10, 4, 3, padding=1), nn.ReLU())
    kill(model[0], bias=0.7)
    assert Captured(model, X).apply(remove_dead_channels) == 0


def test_channels_that_nobody_reads_go_and_what_only_they_read_goes_too() -> None:
    model = nn.Sequential(nn.Conv2d(6, 10, 3), nn.ReLU(), nn.Conv2d(10, 10, 3), nn.ReLU(), nn.Conv2d(10, 4, 1))
    with torch.no_grad():
        model[4].weight[:, DEAD] = 0
        model[2].weight[:, 2] = 0
        model[2].weight[DEAD] += 1
        model[2].weight[:, 5] = 0
        model[2].weight[1, 5] = 3.0  # a dead channel is the only one that reads this one
    graph = Captured(model, X)
    assert graph.apply(remove_dead_channels) == 3 + 2
    assert channels(graph) == [8, 7, 4]


def test_depthwise_convolutions_in_between_shrink_along() -> None:
    model = pair(nn.Conv2d(10, 4, 1), nn.ReLU(), nn.Conv2d(10, 10, 3, padding=1, groups=10), nn.ReLU6())
    kill(model[0])
    graph = Captured(model, X)
    assert graph.apply(remove_dead_channels) == 3
    assert channels(graph) == [7, 7, 4]
    assert [node.args[8] for node in graph.gm.graph.nodes if node.target is CONVOLUTION] == [1, 7, 1]


def test_all_consumers_decide() -> None:
    layers = {"a": nn.Conv2d(6, 10, 3), "b": nn.Conv2d(10, 4, 1), "c": nn.Conv2d(10, 5, 3, padding=1)}

    def forward(model: Function, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(model.a(x))
        return model.b(y), model.c(y)

    model = Function(forward, **layers)
    with torch.no_grad():
        layers["b"].weight[:, [1, 4]] = 0
        layers["c"].weight[:, [4, 5]] = 0
    graph = Captured(model, X)
    assert graph.apply(remove_dead_channels) == 1
    assert channels(graph) == [9, 4, 5]


def test_one_channel_is_left_of_none() -> None:
    model = pair(nn.Conv2d(10, 4, 1), nn.ReLU())
    nn.init.zeros_(model[0].weight)
    graph = Captured(model, X)
    assert graph.apply(remove_dead_channels) == 9
    assert channels(graph) == [1, 4]


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.b(F.relu(y := m.a(x))) + y.mean(),  # read by something else as well
        lambda m, x: m.b(F.max_pool2d(m.a(x), 2)),
        lambda m, x: m.b(m.a(x) + x.mean()),
        lambda m, x: m.a(x),  # an output
    ],
    ids=["shared", "pooled", "added to", "output"],
)
def test_channels_stay_where_others_may_see_them(forward: Callable[..., Tensor]) -> None:
    model = Function(forward, a=nn.Conv2d(6, 10, 3), b=nn.Conv2d(10, 4, 1))
    kill(model.a)
    assert Captured(model, X).apply(remove_dead_channels) == 0


@pytest.mark.parametrize(
    "second", [nn.Conv2d(10, 4, 3, groups=2), nn.ConvTranspose2d(10, 4, 3)], ids=["grouped", "transposed"]
)
def test_channels_stay_for_other_convolutions(second: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(6, 10, 3), nn.ReLU(), second)
    kill(model[0])
    assert Captured(model, X).apply(remove_dead_channels) == 0


def test_nothing_dead_nothing_done() -> None:
    model = prune(nn.Sequential(nn.Conv2d(6, 30, 3), nn.ReLU(), nn.Conv2d(30, 20, 3)), 0.3)
    assert Captured(model, X).apply(remove_dead_channels) == 0
