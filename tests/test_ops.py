"""The two ops, against an independent reference."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from op_weights import ANNEAL, MASK, THRESHOLDS, make_threshold, run_op
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autosparse_fx.ops import MOST, anneal_gradient, signed_sum, threshold_mask

TOLERANCES = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 8e-3, "atol": 1e-3},
    torch.float16: {"rtol": 1e-3, "atol": 1e-4},
}


# A sum over the weight is taken in float32 at least, whatever the dtype of the weight.
SUM_TOLERANCES = {dtype: {"rtol": 1e-4, "atol": 1e-4} for dtype in TOLERANCES} | {
    torch.float64: {"rtol": 1e-11, "atol": 1e-11}
}


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(8, 6, 3, 3),
    "matrix": lambda: torch.randn(8, 6),
    "channels_last": lambda: torch.randn(8, 6, 3, 3).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(6, 8).t(),
    "sliced": lambda: torch.randn(16, 6, 5, 3)[::2, :, 1:4],
    "strided_inside": lambda: torch.randn(8, 12)[:, ::2],
    "expanded": lambda: torch.randn(8, 1, 3).expand(8, 6, 3),
    "zeros": lambda: torch.zeros(8, 6, 3, 3),
    "empty": lambda: torch.empty(8, 6, 0),
}


def as_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast and keep the strides, those with gaps included."""
    return (
        torch.empty_strided(weight.shape, weight.stride(), dtype=dtype).copy_(weight)
        if weight.numel()
        else weight.to(dtype)
    )


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", THRESHOLDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_value_and_gradients_equal_the_reference(layout: str, kind: str, dtype: torch.dtype) -> None:
    weight = LAYOUTS[layout]()
    weight = weight.to(dtype) if layout == "expanded" else as_dtype(weight, dtype)
    s = make_threshold(kind, weight, torch.float64 if dtype == torch.float64 else torch.float32)
    grad = torch.randn(weight.shape).to(dtype)
    value, dw, ds = run_op(weight, s, torch.tensor(0.3), grad)
    expected, expected_dw, expected_ds = reference.gradients(weight, s, float(torch.tensor(0.3)), grad)

    assert value.dtype == dw.dtype == dtype and ds.dtype == s.dtype
    assert value.shape == dw.shape == weight.shape and ds.shape == s.shape
    torch.testing.assert_close(value.double(), expected, **TOLERANCES[dtype])
    torch.testing.assert_close(dw.double(), expected_dw, **TOLERANCES[dtype])
    torch.testing.assert_close(ds.double(), expected_ds, **SUM_TOLERANCES[dtype])
    if weight.numel() and layout != "zeros":
        zeros = int((value == 0).sum())
        assert 0 < zeros < weight.numel()
        assert zeros == int((expected == 0).sum())


@pytest.mark.parametrize("kind", THRESHOLDS)
def test_a_channel_without_weights_has_no_gradient(kind: str) -> None:
    weight = torch.empty(0, 4) if kind != "axis1" else torch.empty(4, 0)
    value, dw, ds = run_op(weight, make_threshold(kind, weight), torch.tensor(0.5), torch.empty_like(weight))
    assert value.shape == dw.shape == weight.shape
    assert torch.equal(ds, torch.zeros_like(ds))


def test_a_float32_threshold_serves_a_float64_weight() -> None:
    weight, grad, s = torch.randn(5, 7).double(), torch.randn(5, 7).double(), torch.tensor([-0.5])
    value, dw, ds = run_op(weight, s, torch.tensor(0.25), grad)
    expected, expected_dw, expected_ds = reference.gradients(weight, s, 0.25, grad)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dw, expected_dw, rtol=1e-12, atol=1e-12)
    assert ds.dtype == torch.float32
    torch.testing.assert_close(ds.double(), expected_ds, rtol=1e-6, atol=1e-6)


def test_a_float64_threshold_keeps_its_dtype_beside_a_float32_weight() -> None:
    weight, s = torch.randn(5, 7), torch.tensor([-0.5], dtype=torch.float64)
    value, dw, ds = run_op(weight, s, torch.tensor(0.25), torch.randn(5, 7))
    assert (value.dtype, dw.dtype, ds.dtype) == (torch.float32, torch.float32, torch.float64)


def test_a_long_low_precision_weight_sums_its_threshold_gradient_in_float32() -> None:
    weight = torch.full((1 << 16,), 1.0, dtype=torch.bfloat16)
    s = torch.tensor([0.0])
    _, _, ds = run_op(weight, s, torch.tensor(0.0), torch.ones_like(weight))
    torch.testing.assert_close(ds, torch.tensor([-0.25 * (1 << 16)]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(3, 2**31 + 5), (6, 8), (6, 0)])
def test_sums_of_huge_weights_are_taken_in_parts_that_libraries_can_count(shape: tuple[int, ...]) -> None:
    """On the meta device, which is no CPU either: CUDA's dot takes 2**31 - 1 elements at most."""
    weight = torch.empty(shape, device="meta")
    with Dots() as dots:
        assert signed_sum(weight, weight).shape == (1,)
    assert sum(dots.sizes) == weight.numel() and max(dots.sizes) < 2**31
    assert len(dots.sizes) == max(1, -(-weight.numel() // MOST))


class Dots(TorchDispatchMode):
    """Notes how many elements each dot product has."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.dot.default:
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


def test_the_survivors_shrink_by_the_cut_and_the_rest_is_zero() -> None:
    g = torch.sigmoid(torch.tensor(-1.0)).item()
    weight = torch.tensor([-2.0, -g - 0.1, -g + 0.1, 0.0, g - 0.1, g + 0.1, 2.0])
    expected = torch.tensor([-2.0 + g, -0.1, 0.0, 0.0, 0.0, 0.1, 2.0 - g])
    torch.testing.assert_close(threshold_mask(weight, torch.tensor([-1.0]), torch.tensor(1.0)), expected)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_zeros_are_positive(dtype: torch.dtype) -> None:
    weight = torch.cat([torch.linspace(-0.4, 0.4, 41), torch.tensor([-0.0, 0.0, -1e-30, -0.5])]).to(dtype)
    value = threshold_mask(weight, torch.tensor([0.0]), torch.tensor(0.5))
    assert bool((value == 0).all())
    assert not bool(torch.signbit(value).any())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_nan_and_infinity_are_passed_on_and_mask_nothing_else(dtype: torch.dtype) -> None:
    weight = torch.tensor([math.nan, math.inf, -math.inf, 0.1, 2.0], dtype=dtype)
    value = threshold_mask(weight, torch.tensor([0.0]), torch.tensor(0.5))
    assert value[0].isnan()
    assert value[1] == math.inf and value[2] == -math.inf
    assert value[3] == 0 and value[4] == 1.5


def test_infinite_weights_get_the_whole_gradient() -> None:
    weight = torch.tensor([math.inf, -math.inf, 0.1])
    _, dw, _ = run_op(weight, torch.tensor([0.0]), torch.tensor(0.5), torch.ones(3))
    assert dw.tolist() == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_value_does_not_depend_on_alpha(alpha: float) -> None:
    weight, s = torch.randn(50), torch.tensor([-0.3])
    at_half = threshold_mask(weight, s, torch.tensor(0.5))
    assert torch.equal(threshold_mask(weight, s, torch.tensor(alpha)), at_half)


def test_alpha_one_passes_the_gradient_straight_through() -> None:
    weight, grad = torch.randn(50), torch.randn(50)
    _, dw, _ = run_op(weight, torch.tensor([0.0]), torch.tensor(1.0), grad)
    assert torch.equal(dw, grad)


def test_alpha_zero_is_the_true_derivative() -> None:
    weight, grad = torch.randn(50), torch.randn(50)
    value, dw, _ = run_op(weight, torch.tensor([0.0]), torch.tensor(0.0), grad)
    assert torch.equal(dw, torch.where(value != 0, grad, torch.zeros_like(grad)))


def test_alpha_gets_no_gradient() -> None:
    alpha = torch.tensor(0.5, requires_grad=True)
    weight = torch.randn(6, requires_grad=True)
    threshold_mask(weight, torch.tensor([-1.0]), alpha).sum().backward()
    assert alpha.grad is None
    assert weight.grad is not None


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_a_weight_of_zero_gets_alpha_times_the_gradient(alpha: float) -> None:
    grad = torch.randn(6)
    _, dw, ds = run_op(torch.tensor([0.0, -0.0, 0.0, 0.0, 0.0, 0.0]), torch.tensor([-3.0]), torch.tensor(alpha), grad)
    torch.testing.assert_close(dw, alpha * grad, rtol=0, atol=0)
    assert torch.equal(ds, torch.zeros(1))


def test_a_weight_at_the_cut_counts_as_masked() -> None:
    weight = torch.tensor([0.5, -0.5])
    value, dw, _ = run_op(weight, torch.tensor([0.0]), torch.tensor(0.25), torch.ones(2))
    assert value.tolist() == [0.0, 0.0]
    assert dw.tolist() == [0.25, 0.25]


@pytest.mark.parametrize("kind", THRESHOLDS)
def test_anneal_gradient_is_what_backward_computes(kind: str) -> None:
    weight, grad, alpha = torch.randn(4, 5), torch.randn(4, 5), torch.tensor(0.4)
    s = make_threshold(kind, weight)
    _, dw, ds = run_op(weight, s, alpha, grad)
    direct_dw, direct_ds = anneal_gradient(grad, weight, s, alpha)
    assert torch.equal(dw, direct_dw) and torch.equal(ds, direct_ds)


@pytest.mark.parametrize("wanted", ["weight", "threshold"])
def test_only_the_gradient_that_is_asked_for_is_returned(wanted: str) -> None:
    weight = torch.randn(6, requires_grad=wanted == "weight")
    s = torch.tensor([-0.2], requires_grad=wanted == "threshold")
    threshold_mask(weight, s, torch.tensor(0.5)).sum().backward()
    assert (weight.grad is None) == (wanted != "weight")
    assert (s.grad is None) == (wanted != "threshold")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("kind", THRESHOLDS)
def test_dense_strides_are_kept_and_memory_is_not_shared(layout: str, kind: str) -> None:
    weight = LAYOUTS[layout]()
    value, dw, _ = run_op(weight, make_threshold(kind, weight), torch.tensor(0.5), torch.randn_like(weight))
    assert value.stride() == dw.stride() == weight.stride()
    assert value.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("kind", THRESHOLDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced", "empty"])
def test_meta_and_fake_tensors_have_the_shape_strides_and_dtype_of_the_real_ones(layout: str, kind: str) -> None:
    weight = LAYOUTS[layout]()
    s, alpha, grad = make_threshold(kind, weight), torch.tensor(0.5), torch.randn(weight.shape)
    real = (threshold_mask(weight, s, alpha), *anneal_gradient(grad, weight, s, alpha))
    on_meta = [t.to("meta") if t is not weight else meta_like(t) for t in (weight, s, alpha, grad)]
    w, s, alpha, grad = on_meta
    meta = (threshold_mask(w, s, alpha), *anneal_gradient(grad, w, s, alpha))
    for expected, seen in zip(real, meta, strict=True):
        assert seen.device.type == "meta"
        assert (seen.shape, seen.stride(), seen.dtype) == (expected.shape, expected.stride(), expected.dtype)


def meta_like(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


@pytest.mark.parametrize("kind", THRESHOLDS)
def test_without_alpha_gradcheck_holds_away_from_the_kinks(kind: str) -> None:
    weight = away_from_the_cut(kind)
    s = make_threshold(kind, weight, torch.float64).requires_grad_()
    alpha = torch.tensor(0.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda w, s: threshold_mask(w, s, alpha), (weight.requires_grad_(), s))
    assert torch.autograd.gradgradcheck(lambda w, s: threshold_mask(w, s, alpha), (weight, s))


@pytest.mark.parametrize("kind", THRESHOLDS)
def test_gradcheck_of_the_annealed_gradient(kind: str) -> None:
    weight = away_from_the_cut(kind)
    s = make_threshold(kind, weight, torch.float64).requires_grad_()
    grad = torch.randn_like(weight, requires_grad=True)
    alpha = torch.tensor(0.3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda g, s: anneal_gradient(g, weight, s, alpha), (grad, s))


def away_from_the_cut(kind: str) -> Tensor:
    weight = torch.randn(4, 5, dtype=torch.float64)
    g = torch.sigmoid(make_threshold(kind, weight, torch.float64))
    weight = torch.where((weight.abs() - g).abs() < 0.02, 2 * weight, weight)
    assert bool(((weight.abs() - g).abs() > 1e-3).all() and (weight.abs() > 1e-4).all())
    return weight


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", THRESHOLDS)
def test_double_backward_equals_the_reference(kind: str, alpha: float) -> None:
    weight, u = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    s = make_threshold(kind, weight, torch.float64)
    v = torch.randn_like(s)

    def second(mask: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
        w, threshold = weight.clone().requires_grad_(), s.clone().requires_grad_()
        grad = torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5).requires_grad_()
        value = mask(w, threshold, torch.tensor(alpha, dtype=torch.float64))
        dw, ds = torch.autograd.grad(value, (w, threshold), grad, create_graph=True)
        return list(
            torch.autograd.grad(
                (dw * u).sum() + (ds * v).sum(), (w, threshold, grad), allow_unused=True, materialize_grads=True
            )
        )

    for seen, expected in zip(second(threshold_mask), second(reference.masked), strict=True):
        torch.testing.assert_close(seen, expected, rtol=1e-10, atol=1e-12)


# torch 2.15's own opcheck reads .grad of the copies that it made of its arguments.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    ("layout", "kind", "dtype"),
    [
        ("contiguous", "layer", torch.float32),
        ("channels_last", "axis0", torch.float32),
        ("matrix", "axis1", torch.bfloat16),
        ("strided_inside", "axis1", torch.float32),
        ("empty", "layer", torch.float32),
        ("zeros", "axis0", torch.float32),
    ],
)
def test_opcheck_is_clean(layout: str, kind: str, dtype: torch.dtype) -> None:
    weight = as_dtype(LAYOUTS[layout](), dtype)
    s, alpha, grad = make_threshold(kind, weight), torch.tensor(0.5), torch.randn(weight.shape).to(dtype)
    torch.library.opcheck(MASK, (weight.detach().requires_grad_(), s.clone().requires_grad_(), alpha))
    torch.library.opcheck(MASK, (weight, s, alpha))
    torch.library.opcheck(ANNEAL, (grad.requires_grad_(), weight, s.clone().requires_grad_(), alpha))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64], ids=str)
def test_weights_that_are_not_real_floating_point_are_refused(dtype: torch.dtype, device: str) -> None:
    weight = torch.ones(3, 2, dtype=dtype, device=device)
    s, alpha = torch.zeros(1, device=device), torch.tensor(0.5, device=device)
    with pytest.raises(TypeError, match=f"floating-point.*{dtype}"):
        threshold_mask(weight, s, alpha)
    with pytest.raises(TypeError, match=f"floating-point.*{dtype}"):
        anneal_gradient(weight, weight, s, alpha)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_thresholds_below_float32_are_refused(dtype: torch.dtype) -> None:
    weight, s = torch.ones(3, 2), torch.zeros(1, dtype=dtype)
    with pytest.raises(TypeError, match=f"thresholds must be float32 or float64.*{dtype}"):
        threshold_mask(weight, s, torch.tensor(0.5))
    with pytest.raises(TypeError, match=f"thresholds must be float32 or float64.*{dtype}"):
        anneal_gradient(weight, weight, s, torch.tensor(0.5))
