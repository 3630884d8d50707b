"""find_weights: what a graph multiplies by, and along which axis its output channels lie."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan  # no public name yet
from uses import axis_of, found_in

from autosparse_fx.passes.find_weights import find_weights

# x, w, op, axis of the output channels of w
FOUND: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[[Tensor, Tensor], Any], int]] = {
    "linear": ((3, 4), (5, 4), lambda x, w: F.linear(x, w), 0),
    "linear by name": ((3, 4), (5, 4), lambda x, w: F.linear(input=x, weight=w), 0),
    "bilinear": ((3, 4), (5, 4, 4), lambda x, w: F.bilinear(x, x, w), 0),
    "conv1d": ((1, 4, 9), (5, 4, 3), lambda x, w: F.conv1d(x, w), 0),
    "conv2d": ((1, 4, 9, 9), (5, 4, 3, 3), lambda x, w: F.conv2d(x, w), 0),
    "conv2d by name": ((1, 4, 9, 9), (5, 4, 3, 3), lambda x, w: F.conv2d(x, weight=w), 0),
    "conv3d": ((1, 4, 5, 5, 5), (5, 4, 3, 3, 3), lambda x, w: F.conv3d(x, w), 0),
    "conv_transpose1d": ((1, 4, 9), (4, 5, 3), lambda x, w: F.conv_transpose1d(x, w), 1),
    "conv_transpose2d": ((1, 4, 9, 9), (4, 5, 3, 3), lambda x, w: F.conv_transpose2d(x, w), 1),
    "conv_transpose3d": ((1, 4, 5, 5, 5), (4, 5, 3, 3, 3), lambda x, w: F.conv_transpose3d(x, w), 1),
    "@ from the right": ((3, 4), (4, 5), lambda x, w: x @ w, 1),
    "@ from the left": ((4, 3), (5, 4), lambda x, w: w @ x, 0),
    "matmul": ((3, 4), (4, 5), lambda x, w: torch.matmul(x, w), 1),
    "matmul by name": ((3, 4), (4, 5), lambda x, w: torch.matmul(input=x, other=w), 1),
    "matmul method": ((3, 4), (4, 5), lambda x, w: x.matmul(w), 1),
    "matmul method of w": ((4, 3), (5, 4), lambda x, w: w.matmul(x), 0),
    "matmul function of Tensor": ((3, 4), (4, 5), lambda x, w: torch.Tensor.matmul(x, w), 1),
    "linalg.matmul": ((3, 4), (4, 5), lambda x, w: torch.linalg.matmul(x, w), 1),
    "mm": ((3, 4), (4, 5), lambda x, w: torch.mm(x, w), 1),
    "mm by name": ((3, 4), (4, 5), lambda x, w: torch.mm(x, mat2=w), 1),
    "mm method": ((3, 4), (4, 5), lambda x, w: x.mm(w), 1),
    "bmm": ((2, 3, 4), (2, 4, 5), lambda x, w: torch.bmm(x, w), 2),
    "bmm from the left": ((2, 4, 3), (2, 5, 4), lambda x, w: w.bmm(x), 1),
    "mv": ((4,), (5, 4), lambda x, w: torch.mv(w, x), 0),
    "mv method": ((4,), (5, 4), lambda x, w: w.mv(x), 0),
    "addmm": ((3, 4), (4, 5), lambda x, w: torch.addmm(torch.zeros(5), x, w), 1),
    "addmm method": ((3, 4), (4, 5), lambda x, w: torch.zeros(3, 5).addmm(x, w), 1),
    "addmv": ((4,), (5, 4), lambda x, w: torch.addmv(torch.zeros(5), w, x), 0),
    "baddbmm": ((2, 3, 4), (2, 4, 5), lambda x, w: torch.baddbmm(torch.zeros(1), x, w), 2),
    "addbmm": ((2, 3, 4), (2, 4, 5), lambda x, w: torch.addbmm(torch.zeros(1), x, w), 2),
    "inner": ((3, 4), (5, 4), lambda x, w: torch.inner(x, w), 0),
    "inner from the left": ((3, 4), (5, 4), lambda x, w: torch.inner(w, x), 0),
    "tensordot": ((3, 4), (4, 5), lambda x, w: torch.tensordot(x, w, dims=1), 1),
    "einsum": ((3, 4), (5, 4), lambda x, w: torch.einsum("bi,oi->bo", x, w), 0),
    "einsum transposed": ((3, 4), (4, 5), lambda x, w: torch.einsum("bi,io->bo", x, w), 1),
    "einsum from the left": ((3, 4), (5, 4), lambda x, w: torch.einsum("oi,bi->bo", w, x), 0),
    "einsum with spaces": ((3, 4), (4, 5), lambda x, w: torch.einsum("b i, i o -> b o", x, w), 1),
    "einsum with an ellipsis": ((2, 3, 4), (4, 5), lambda x, w: torch.einsum("...i,io->...o", x, w), 1),
    "einsum without an output": ((3, 4), (4, 5), lambda x, w: torch.einsum("bi,io", x, w), 1),
    "einsum with a list": ((3, 4), (4, 5), lambda x, w: torch.einsum("bi,io->bo", [x, w]), 1),
    "einsum per head": ((2, 3, 4), (2, 4, 5), lambda x, w: torch.einsum("hbi,hio->hbo", x, w), 2),
    # through views, casts and transpositions
    "w.t()": ((3, 4), (5, 4), lambda x, w: x @ w.t(), 0),
    "w.T": ((3, 4), (5, 4), lambda x, w: x @ w.T, 0),
    "w.mT": ((3, 4), (5, 4), lambda x, w: x @ w.mT, 0),
    "w.transpose": ((3, 4), (5, 4), lambda x, w: x @ w.transpose(0, 1), 0),
    "w.transpose, negative": ((3, 4), (5, 4), lambda x, w: x @ w.transpose(-1, -2), 0),
    "torch.transpose": ((3, 4), (5, 4), lambda x, w: x @ torch.transpose(w, 0, 1), 0),
    "w.swapaxes": ((3, 4), (5, 4), lambda x, w: x @ w.swapaxes(0, 1), 0),
    "w.permute": ((3, 4), (5, 4), lambda x, w: x @ w.permute(1, 0), 0),
    "transposed twice": ((3, 4), (4, 5), lambda x, w: x @ w.t().t(), 1),
    "transposed linear": ((3, 4), (4, 5), lambda x, w: F.linear(x, w.t()), 1),
    "cast": ((3, 4), (5, 4), lambda x, w: F.linear(x.double(), w.double()), 0),
    "to": ((3, 4), (4, 5), lambda x, w: x.half() @ w.to(torch.float16), 1),
    "type_as": ((3, 4), (4, 5), lambda x, w: x @ w.type_as(x), 1),
    "contiguous": ((3, 4), (4, 5), lambda x, w: x @ w.contiguous(), 1),
}


@pytest.mark.parametrize("name", FOUND)
def test_each_form_of_multiplication_is_found_with_its_channel_axis(name: str) -> None:
    x, w, function, axis = FOUND[name]
    assert axis_of(function, torch.randn(x), torch.randn(w)) == axis


VIEWED: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[[Tensor, Tensor], Any]]] = {
    "view": ((3, 4), (20,), lambda x, w: F.linear(x, w.view(5, 4))),
    "reshape": ((3, 4), (2, 2, 5), lambda x, w: x @ w.reshape(4, 5)),
    "flatten": ((3, 4), (5, 2, 2), lambda x, w: F.linear(x, w.flatten(1))),
    "unflatten": ((3, 4), (20,), lambda x, w: F.linear(x, w.unflatten(0, (5, 4)))),
    "index": ((3, 4), (2, 5, 4), lambda x, w: F.linear(x, w[1])),
    "slice": ((3, 4), (6, 4), lambda x, w: F.linear(x, w[:5])),
    "chunk": ((3, 4), (10, 4), lambda x, w: F.linear(x, w.chunk(2)[1])),
    "split": ((3, 4), (10, 4), lambda x, w: F.linear(x, torch.split(w, 5)[0])),
    "unbind": ((3, 4), (2, 5, 4), lambda x, w: F.linear(x, w.unbind(0)[0])),
    "narrow": ((3, 4), (6, 4), lambda x, w: F.linear(x, w.narrow(0, 0, 5))),
    "select": ((3, 4), (2, 5, 4), lambda x, w: F.linear(x, w.select(0, 1))),
    "unsqueeze": ((2, 3, 4), (4, 5), lambda x, w: torch.matmul(x, w.unsqueeze(0))),
    "squeeze": ((3, 4), (5, 4, 1), lambda x, w: F.linear(x, w.squeeze(-1))),
    "expand": ((2, 3, 4), (1, 4, 5), lambda x, w: torch.bmm(x, w.expand(2, -1, -1))),
}


@pytest.mark.parametrize("name", VIEWED)
def test_weights_are_found_through_views(name: str) -> None:
    x, w, function = VIEWED[name]
    axis = axis_of(function, torch.randn(x), torch.randn(w))
    assert axis is not None and 0 <= axis < len(w)


NOT_FOUND: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[[Tensor, Tensor], Any]]] = {
    "times": ((3, 4), (3, 4), lambda x, w: x * w),
    "plus": ((3, 4), (3, 4), lambda x, w: x + w),
    "over": ((3, 4), (3, 4), lambda x, w: x / w),
    "layer scale": ((2, 3, 4), (1, 1, 4), lambda x, w: x * w),
    "position table": ((2, 3, 4), (1, 3, 4), lambda x, w: (x + w) @ x.mT),
    "class token": ((2, 3, 4), (1, 1, 4), lambda x, w: torch.cat([w.expand(2, -1, -1), x], 1) @ x.mT),
    "embedding": ((3, 4), (5, 4), lambda x, w: F.embedding(torch.zeros(3, dtype=torch.long), w)),
    "index": ((3, 4), (5, 4), lambda x, w: w[torch.zeros(3, dtype=torch.long)] + x),
    "layer norm": ((3, 4), (4,), lambda x, w: F.layer_norm(x, (4,), w, w)),
    "group norm": ((3, 4, 5), (4,), lambda x, w: F.group_norm(x, 2, w, w)),
    "prelu": ((3, 4), (4,), lambda x, w: F.prelu(x, w)),
    "bias of linear": ((3, 4), (4,), lambda x, w: F.linear(x, x.new_ones(4, 4), w)),
    "bias of linear by name": ((3, 4), (4,), lambda x, w: F.linear(x, x.new_ones(4, 4), bias=w)),
    "bias of conv": ((1, 4, 9), (4,), lambda x, w: F.conv1d(x, x.new_ones(4, 4, 1), w)),
    "bias of addmm": ((3, 4), (4,), lambda x, w: torch.addmm(w, x, x.new_ones(4, 4))),
    "einsum of one operand": ((3, 4), (4, 4), lambda x, w: torch.einsum("ii->i", w) + x),
    "norm of it": ((3, 4), (4, 4), lambda x, w: x / w.norm()),
    "a sum with it": ((4, 4), (4, 4), lambda x, w: x @ (w + x)),
    "unused": ((3, 4), (4, 4), lambda x, w: x @ x.t()),
}


@pytest.mark.parametrize("name", NOT_FOUND)
def test_what_is_no_multiplication_is_not_found(name: str) -> None:
    x, w, function = NOT_FOUND[name]
    assert found_in(function, torch.randn(x), torch.randn(w)) == {}


def test_what_the_caller_does_not_ask_for_is_not_found() -> None:
    """Inputs and buffers are multiplied by as well."""
    gm = torch.fx.symbolic_trace(lambda x, w: x @ w)
    assert find_weights(gm, lambda node: False) == {}
    assert {n.name for n in find_weights(gm, lambda node: True)} == {"x", "w"}


def test_first_use_decides_about_the_axis() -> None:
    assert axis_of(lambda x, w: (x @ w) @ w.t(), torch.randn(3, 4), torch.randn(4, 5)) == 1
    assert axis_of(lambda x, w: F.linear(x, w) @ w, torch.randn(3, 4), torch.randn(5, 4)) == 0


HIGHER_ORDER: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "checkpoint": lambda x, w: torch.utils.checkpoint.checkpoint(lambda y: y @ w, x, use_reentrant=False),
    "nested checkpoint": lambda x, w: torch.utils.checkpoint.checkpoint(
        lambda y: torch.utils.checkpoint.checkpoint(lambda z: z @ w, y, use_reentrant=False), x, use_reentrant=False
    ),
    "cond, first branch": lambda x, w: torch.cond(x.sum() > 0, lambda y: y @ w, lambda y: y + w.sum(), (x,)),
    "cond, second branch": lambda x, w: torch.cond(x.sum() > 0, lambda y: y + w.sum(), lambda y: y @ w, (x,)),
    "view outside": lambda x, w: torch.utils.checkpoint.checkpoint(lambda y, v: y @ v, x, w.t(), use_reentrant=False),
}


@pytest.mark.parametrize("name", HIGHER_ORDER)
def test_weights_inside_higher_order_ops_are_found(name: str) -> None:
    axis = axis_of(HIGHER_ORDER[name], torch.randn(4, 4), torch.randn(4, 4))
    assert axis == (0 if name == "view outside" else 1)


def test_axis_of_weights_stacked_for_scan_is_that_of_the_stack() -> None:
    def scanned(x: Tensor, w: Tensor) -> Any:
        return scan(lambda y, v: (F.linear(y, v), y.sum()), x, w)[0]

    assert axis_of(scanned, torch.randn(4, 4), torch.randn(3, 4, 4)) == 1


def test_other_uses_inside_higher_order_ops_are_not_found() -> None:
    def scaled(x: Tensor, w: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(lambda y: y * w, x, use_reentrant=False)

    assert found_in(scaled, torch.randn(4, 4), torch.randn(4, 4)) == {}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo of 2.11 does
def test_weights_of_a_users_autograd_function_are_found() -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            x, w = ctx.saved_tensors
            return grad @ w.t(), x.t() @ grad

    x = torch.randn(3, 4, requires_grad=True)
    assert axis_of(Product.apply, x, torch.randn(4, 5)) == 1


class Affine(torch.autograd.Function):
    """As many tensors are saved as are passed, and in another order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t() + b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w, grad.t() @ x, grad.sum(0)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo of 2.11 does
def test_products_in_a_backward_pass_make_no_weights() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    found = found_in(Affine.apply, x, torch.randn(5, 4, requires_grad=True), torch.randn(5, requires_grad=True))
    assert list(found.values()) == [0] and len(found) == 1
