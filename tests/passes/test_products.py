"""Which calls multiply by a weight, in every form that torch has of them, and along which axis its channels lie."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from uses import axis_of, found_in

aten = torch.ops.aten


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def in_place(x: Tensor, w: Tensor) -> Tensor:
    y = x.clone()
    y @= w
    return y


def transposed(x: Tensor, w: Tensor) -> Tensor:
    return torch.convolution(x, w, None, (1,), (0,), (1,), True, (0,), 1)


# x, w, op, axis of the output channels of w
FOUND: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[[Tensor, Tensor], Any], int]] = {
    "convolution": ((1, 4, 9), (5, 4, 3), lambda x, w: torch.convolution(x, w, None, [1], [0], [1], False, [0], 1), 0),
    "convolution, transposed": ((1, 4, 9), (4, 5, 3), transposed, 1),
    "conv_tbc": ((9, 1, 4), (3, 4, 5), lambda x, w: torch.conv_tbc(x, w, torch.zeros(5)), 2),
    "aten.convolution": (
        (1, 4, 9),
        (5, 4, 3),
        lambda x, w: aten.convolution.default(x, w, None, [1], [0], [1], False, [0], 1),
        0,
    ),
    "aten.linear": ((3, 4), (5, 4), lambda x, w: aten.linear(x, w), 0),
    "aten.mm": ((3, 4), (4, 5), lambda x, w: aten.mm(x, w), 1),
    "aten.mm.default": ((3, 4), (4, 5), lambda x, w: aten.mm.default(x, w), 1),
    "aten.addmm by name": ((3, 4), (4, 5), lambda x, w: aten.addmm(torch.zeros(5), mat1=x, mat2=w), 1),
    "addmm by name": ((3, 4), (5, 4), lambda x, w: torch.addmm(torch.zeros(5, 3), mat1=w, mat2=x.t()), 0),
    "@=": ((4, 4), (4, 4), in_place, 1),
    "__rmatmul__": ((3, 4), (4, 5), lambda x, w: w.__rmatmul__(x), 1),
    "__rmatmul__ of x": ((4, 3), (5, 4), lambda x, w: x.__rmatmul__(w), 0),
    "dot": ((4,), (4,), lambda x, w: torch.dot(x, w), 0),
    "dot by name": ((4,), (4,), lambda x, w: torch.dot(input=x, tensor=w), 0),
    "dot method": ((4,), (4,), lambda x, w: x.dot(w), 0),
    "vdot": ((4,), (4,), lambda x, w: torch.vdot(x, w), 0),
    "vecdot": ((3, 4), (4,), lambda x, w: torch.linalg.vecdot(x, w), 0),
    "@ a vector": ((3, 4), (4,), lambda x, w: x @ w, 0),
    "outer": ((3,), (4,), lambda x, w: torch.outer(x, w), 0),
    "kron": ((3, 4), (2, 5), lambda x, w: torch.kron(x, w), 0),
    "addr": ((3,), (4,), lambda x, w: torch.addr(torch.zeros(3, 4), vec1=x, vec2=w), 0),
    "chain_matmul": ((3, 4), (4, 5), lambda x, w: torch.chain_matmul(x, w), 1),
    "multi_dot": ((3, 4), (4, 5), lambda x, w: torch.linalg.multi_dot([x, w, x.new_ones(5, 2)]), 0),
    "tensordot by name": ((3, 4), (4, 5), lambda x, w: torch.tensordot(a=x, b=w, dims=1), 1),
    "query": ((1, 1, 6, 4), (1, 1, 5, 4), lambda x, w: attend(w, x, x), 2),
    "memory": ((1, 1, 6, 4), (1, 1, 5, 4), lambda x, w: attend(x, w, w), 2),
    "values by name": (
        (1, 1, 6, 4),
        (1, 1, 6, 5),
        lambda x, w: F.scaled_dot_product_attention(query=x, key=x, value=w),
        3,
    ),
    "vmap": ((3, 4), (2, 4, 5), lambda x, w: torch.vmap(lambda one: x @ one)(w), 2),
    "einsum of lists": ((3, 4), (4, 5), lambda x, w: torch.einsum(x, [0, 1], w, [1, 2], [0, 2]), 1),
    "einsum of lists without an output": ((3, 4), (4, 5), lambda x, w: torch.einsum(x, [0, 1], w, [1, 2]), 1),
    "einsum, ellipsis of the weight": ((2, 3, 4), (2, 4, 5), lambda x, w: torch.einsum("...bi,...io->...bo", x, w), 2),
    "einsum, dot product": ((3, 4), (4,), lambda x, w: torch.einsum("bi,i->b", x, w), 0),
    "einsum, outer product": ((3,), (4,), lambda x, w: torch.einsum("i,j->ij", x, w), 0),
}


@pytest.mark.filterwarnings("ignore:.*chain_matmul is deprecated.*:UserWarning")
@pytest.mark.parametrize("name", FOUND)
def test_each_form_of_product_is_found_with_its_channel_axis(name: str) -> None:
    x, w, function, axis = FOUND[name]
    assert axis_of(function, torch.randn(x), torch.randn(w)) == axis


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="no grouped product in this torch")
def test_grouped_products_are_found() -> None:
    offsets = torch.tensor([8, 16], dtype=torch.int32)
    x, w = torch.randn(16, 16, dtype=torch.bfloat16), torch.randn(2, 16, 8, dtype=torch.bfloat16)
    assert axis_of(lambda x, w: torch._grouped_mm(x, w, offs=offsets), x, w) == 2
    assert axis_of(lambda x, w: torch._grouped_mm(x, w.mT, offs=offsets), x, w.mT.contiguous()) == 1


NOT_FOUND: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[[Tensor, Tensor], Any]]] = {
    "einsum, scale": ((3, 4), (4,), lambda x, w: torch.einsum("bd,d->bd", x, w)),
    "einsum, scale in two dimensions": ((2, 3, 4), (3, 4), lambda x, w: torch.einsum("bnd,nd->bnd", x, w)),
    "einsum, scale in all dimensions": ((3, 4), (3, 4), lambda x, w: torch.einsum("bd,bd->bd", x, w)),
    "einsum, scale by a list": ((3, 4), (4,), lambda x, w: torch.einsum(x, [0, 1], w, [1], [0, 1])),
    "einsum, scale with an ellipsis": ((2, 3, 4), (4,), lambda x, w: torch.einsum("...d,d->...d", x, w)),
    "einsum, scale by a sum of it": ((3, 4), (5,), lambda x, w: torch.einsum("bd,e->bd", x, w)),
    "query of a layer": ((3, 4), (5, 4), lambda x, w: F.linear(w, x)),
    "kernel is an input": ((1, 4, 3), (1, 4, 9), lambda x, w: F.conv1d(w, x)),
    "mask of attention": (
        (1, 1, 6, 4),
        (6, 6),
        lambda x, w: F.scaled_dot_product_attention(x, x, x, attn_mask=w),
    ),
    "addcmul": ((3, 4), (3, 4), lambda x, w: torch.addcmul(x, x, w)),
    "cdist": ((3, 4), (5, 4), lambda x, w: torch.cdist(x, w)),
    "rms norm": ((3, 4), (4,), lambda x, w: F.rms_norm(x, (4,), w)),
    "batch norm": ((3, 4), (4,), lambda x, w: F.batch_norm(x, None, None, w, w, training=True)),
    "embedding bag": ((3, 4), (5, 4), lambda x, w: F.embedding_bag(torch.zeros(3, 2, dtype=torch.long), w)),
    "aten.embedding": ((3, 4), (5, 4), lambda x, w: aten.embedding(w, torch.zeros(3, dtype=torch.long))),
}


@pytest.mark.parametrize("name", NOT_FOUND)
def test_what_is_no_product_is_not_found(name: str) -> None:
    x, w, function = NOT_FOUND[name]
    assert found_in(function, torch.randn(x), torch.randn(w)) == {}
