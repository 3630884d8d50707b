"""fold_batch_norm: what is folded, what must not be, and that the graph computes the same."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernels.graphs import CONVOLUTION, Captured, Function, prune
from torch import Tensor, nn

from autosparse_fx.passes import fold_batch_norm
from autosparse_fx.passes.fold_batch_norm import BATCH_NORM

X = torch.randn(2, 6, 7, 8, generator=torch.Generator().manual_seed(0))


def captured(*layers: nn.Module, x: Tensor = X, **arguments: Any) -> Captured:
    return Captured(prune(nn.Sequential(*layers), 0.5), x, **arguments)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_folds(bias: bool, affine: bool, groups: int) -> None:
    graph = captured(nn.Conv2d(6, 12, 3, groups=groups, bias=bias), nn.BatchNorm2d(12, affine=affine, eps=0.1))
    assert graph.count(BATCH_NORM) == 1
    assert graph.apply(fold_batch_norm) == 1
    assert graph.count(BATCH_NORM) == 0 and graph.count(CONVOLUTION) == 1
    assert len(dict(graph.gm.named_buffers())) == 2


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv1d(6, 5, 3), nn.BatchNorm1d(5)),
        (nn.Conv3d(6, 5, 3), nn.BatchNorm3d(5)),
    ],
    ids=["1d", "3d"],
)
def test_folds_in_other_dimensions(layers: tuple[nn.Module, nn.Module]) -> None:
    size = (9,) if isinstance(layers[0], nn.Conv1d) else (4, 5, 6)
    assert captured(*layers, x=torch.randn(2, 6, *size)).apply(fold_batch_norm) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_folds_in_other_dtypes(dtype: torch.dtype) -> None:
    model = prune(nn.Sequential(nn.Conv2d(6, 12, 3), nn.BatchNorm2d(12))).to(dtype)
    graph = Captured(model, X.to(dtype))
    assert graph.apply(fold_batch_norm) == 1
    assert {buffer.dtype for buffer in graph.gm.buffers()} == {dtype}


def test_folds_every_one_of_a_row() -> None:
    layers = [nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()] * 1
    more = [nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 9, 1), nn.BatchNorm2d(9)]
    assert captured(*layers, *more).apply(fold_batch_norm) == 3


def test_second_norm_in_a_row_is_folded_too() -> None:
    graph = captured(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6))
    assert graph.apply(fold_batch_norm) == 2
    assert graph.count(BATCH_NORM) == 0


def test_zeros_stay_zeros() -> None:
    graph = captured(nn.Conv2d(6, 12, 3), nn.BatchNorm2d(12))
    zeros = graph.model[0].weight == 0
    graph.apply(fold_batch_norm)
    (weight,) = [b for b in graph.gm.buffers() if b.dim() == 4]
    assert torch.equal(weight == 0, zeros) and zeros.any()


def test_model_keeps_its_own_weights() -> None:
    graph = captured(nn.Conv2d(6, 12, 3), nn.BatchNorm2d(12))
    before = {name: value.clone() for name, value in graph.model.state_dict().items()}
    graph.apply(fold_batch_norm)
    for name, value in graph.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_weight_that_two_convolutions_share_is_scaled_for_each() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.a(m.conv(x)) + m.conv(m.b(m.conv(x)))

    layers = {"conv": nn.Conv2d(6, 6, 3, padding=1), "a": nn.BatchNorm2d(6), "b": nn.BatchNorm2d(6)}
    graph = Captured(prune(Function(forward, **layers), 0.5), X)
    graph.apply(fold_batch_norm)


def left_alone(graph: Captured, norms: int = 1) -> None:
    code = graph.gm.code
    assert graph.apply(fold_batch_norm) == 0
    assert graph.gm.code == code and graph.count(BATCH_NORM) == norms


def test_convolution_that_is_used_twice_is_left_alone() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.norm(y) + y

    left_alone(Captured(prune(Function(forward, conv=nn.Conv2d(6, 6, 3), norm=nn.BatchNorm2d(6))), X))


def test_transposed_convolution_is_left_alone() -> None:
    left_alone(captured(nn.ConvTranspose2d(6, 6, 3), nn.BatchNorm2d(6)))


def test_norm_without_a_convolution_before_it_is_left_alone() -> None:
    left_alone(captured(nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6)), 2)
    left_alone(captured(nn.Conv2d(6, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)))


def test_weight_that_is_no_constant_is_left_alone() -> None:
    def forward(m: Any, x: Tensor, w: Tensor) -> Tensor:
        return m.norm(F.conv2d(x, w))

    left_alone(Captured(prune(Function(forward, norm=nn.BatchNorm2d(5))), X, torch.randn(5, 6, 3, 3)))


def test_statistics_that_are_no_constants_are_left_alone() -> None:
    def forward(m: Any, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return F.batch_norm(m.conv(x), mean, var)

    left_alone(Captured(prune(Function(forward, conv=nn.Conv2d(6, 5, 3))), X, torch.randn(5), torch.rand(5)))


def test_norm_over_the_batch_is_left_alone() -> None:
    left_alone(captured(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)), 0)


def test_training_writes_to_statistics_and_has_no_inference_graph() -> None:
    graph = captured(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), train=True)
    assert graph.graphs == ["its graph writes to an input or a buffer"]
