"""Weights are found through views, copies, joinings and arithmetic, and the axis of their channels with them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from uses import axis_of, found_in

from autosparse_fx.passes.find_weights import find_weights

# x, w, op, axis of the output channels of w
VIEWS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[[Tensor, Tensor], Any], int]] = {
    "transpose by name": ((3, 4), (5, 4), lambda x, w: x @ torch.transpose(input=w, dim0=0, dim1=1), 0),
    "transpose to the front": ((3, 2, 4), (4, 3, 5), lambda x, w: torch.bmm(x, w.transpose(0, 1)), 2),
    "movedim": ((3, 4), (5, 4), lambda x, w: x @ w.movedim(0, 1), 0),
    "torch.movedim": ((3, 4), (5, 4), lambda x, w: x @ torch.movedim(w, 0, 1), 0),
    "moveaxis": ((3, 4), (5, 4), lambda x, w: x @ w.moveaxis(0, 1), 0),
    "swapdims": ((3, 4), (5, 4), lambda x, w: x @ w.swapdims(0, 1), 0),
    "torch.swapaxes": ((3, 4), (5, 4), lambda x, w: x @ torch.swapaxes(w, 0, 1), 0),
    "adjoint": ((3, 4), (5, 4), lambda x, w: x @ w.adjoint(), 0),
    "mH": ((3, 4), (5, 4), lambda x, w: x @ w.mH, 0),
    "H": ((3, 4), (5, 4), lambda x, w: x @ w.H, 0),
    "permute": ((2, 3, 4), (4, 5, 2), lambda x, w: torch.bmm(x, w.permute(2, 0, 1)), 1),
    "unsqueeze": ((2, 3, 4), (4, 5), lambda x, w: torch.matmul(x, w.unsqueeze(0)), 1),
    "unsqueeze of the last": ((1, 4, 3), (5, 4), lambda x, w: F.conv1d(x, w.unsqueeze(-1)), 0),
    "squeeze": ((3, 4), (4, 1, 5), lambda x, w: x @ w.squeeze(1), 2),
    "index": ((3, 4), (2, 4, 5), lambda x, w: x @ w[1], 2),
    "index of the last": ((3, 4), (4, 5, 2), lambda x, w: x @ w[..., 1], 1),
    "select": ((3, 4), (2, 4, 5), lambda x, w: x @ torch.select(w, 0, 1), 2),
    "narrow": ((3, 4), (4, 9), lambda x, w: x @ torch.narrow(w, 1, 0, 5), 1),
    "slice": ((3, 4), (4, 9), lambda x, w: x @ w[:, ::2], 1),
    "chunk": ((3, 4), (4, 10), lambda x, w: x @ w.chunk(2, 1)[1], 1),
    "unsafe_chunk": ((3, 4), (4, 10), lambda x, w: x @ torch.unsafe_chunk(w, 2, 1)[1], 1),
    "tensor_split": ((3, 4), (4, 10), lambda x, w: x @ w.tensor_split(2, 1)[0], 1),
    "split_with_sizes": ((3, 4), (4, 10), lambda x, w: x @ w.split_with_sizes([4, 6], 1)[0], 1),
    "unsafe_split": ((3, 4), (4, 10), lambda x, w: x @ w.unsafe_split(5, 1)[0], 1),
    "hsplit": ((3, 4), (4, 10), lambda x, w: x @ w.hsplit(2)[0], 1),
    "unbind": ((3, 4), (4, 2, 5), lambda x, w: x @ w.unbind(1)[0], 2),
    "unflatten": ((2, 3, 4), (4, 2, 5), lambda x, w: torch.matmul(x, torch.unflatten(w, 1, (1, 2))[:, 0, 0]), 2),
    "flattened per head": ((3, 4), (4, 2, 5), lambda x, w: x @ w.flatten(1), 2),
    "view that keeps the channels": ((3, 4), (2, 2, 5), lambda x, w: x @ w.view(4, 5), 2),
    "view_as": ((3, 4), (20,), lambda x, w: F.linear(x, w.view_as(torch.empty(5, 4))), 0),
    "reshape_as": ((3, 4), (2, 2, 5), lambda x, w: x @ w.reshape_as(torch.empty(4, 5)), 2),
    "ravel": ((3, 4), (4, 5), lambda x, w: x @ w.ravel().view(4, 5), 1),
    "expand_as": ((2, 3, 4), (1, 4, 5), lambda x, w: torch.bmm(x, w.expand_as(torch.empty(2, 4, 5))), 2),
    "expand to the batch": ((2, 3, 4), (1, 4, 5), lambda x, w: torch.bmm(x, w.expand(len(x), -1, -1)), 2),
    "broadcast_to": ((2, 3, 4), (4, 5), lambda x, w: torch.bmm(x, w.broadcast_to((2, 4, 5))), 1),
    "torch.broadcast_to": ((2, 3, 4), (4, 5), lambda x, w: torch.bmm(x, torch.broadcast_to(w, (2, 4, 5))), 1),
    "as_strided": ((3, 4), (4, 5), lambda x, w: x @ w.as_strided((4, 5), (5, 1)), 1),
    "unfold": ((3, 4), (4, 5), lambda x, w: x @ w.unfold(1, 5, 1)[:, 0], 1),
    "detached": ((3, 4), (4, 5), lambda x, w: x @ w.detach(), 1),
}

COPIES: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[[Tensor, Tensor], Any], int]] = {
    "clone": ((3, 4), (4, 5), lambda x, w: x @ w.clone(), 1),
    "transposed contiguous": ((3, 4), (5, 4), lambda x, w: x @ w.t().contiguous(), 0),
    "transposed reshape": ((3, 4), (5, 2, 2), lambda x, w: x @ w.permute(1, 2, 0).reshape(4, 5), 0),
    "cpu": ((3, 4), (4, 5), lambda x, w: x @ w.cpu(), 1),
    "to by name": ((3, 4), (4, 5), lambda x, w: x.double() @ w.to(dtype=torch.float64), 1),
    "to the dtype of x": ((3, 4), (4, 5), lambda x, w: x.double() @ w.to(x.double()), 1),
    "type_as": ((3, 4), (4, 5), lambda x, w: x.double() @ w.type_as(x.double()), 1),
    "repeat": ((2, 3, 4), (1, 4, 5), lambda x, w: torch.bmm(x, w.repeat(2, 1, 1)), 2),
    "repeat to the batch": ((2, 3, 4), (4, 5), lambda x, w: torch.bmm(x, w.repeat(len(x), 1, 1)), 1),
    "index of a list": ((3, 4), (4, 5), lambda x, w: x @ w[:, [0, 1, 2]], 1),
    "index_select": ((3, 4), (4, 5), lambda x, w: x @ w.index_select(1, torch.arange(3)), 1),
    "experts of each token": ((3, 4), (2, 4, 5), lambda x, w: torch.bmm(x[:, None], w[(x[:, 0] > 0).long()]), 2),
    "rows of a layer": ((3, 4), (9, 4), lambda x, w: F.linear(x, w[(x[:, 0] > 0).long()]), 0),
    "flip": ((1, 4, 9), (5, 4, 3), lambda x, w: F.conv1d(x, w.flip(2)), 0),
    "padded": ((1, 4, 9), (5, 4, 1), lambda x, w: F.conv1d(x, F.pad(w, (1, 1))), 0),
    "triangle": ((3, 4), (4, 4), lambda x, w: x @ w.tril(), 1),
    "dropped": ((3, 4), (4, 5), lambda x, w: x @ F.dropout(w, 0.5, True), 1),
    "normalized": ((3, 4), (5, 4), lambda x, w: F.linear(x, F.normalize(w)), 0),
    "rectified": ((3, 4), (4, 5), lambda x, w: x @ w.relu(), 1),
    "cat": ((3, 4), (4, 5), lambda x, w: x @ torch.cat([w, w], 1), 1),
    "cat with zeros": ((3, 4), (4, 5), lambda x, w: x @ torch.cat([w, w.new_zeros(4, 2)], 1), 1),
    "cat by name": ((3, 4), (5, 4), lambda x, w: F.linear(x, torch.cat(tensors=[w, w])), 0),
    "stack": ((2, 3, 4), (4, 5), lambda x, w: torch.bmm(x, torch.stack([w, w])), 1),
    "cat in a layer": ((5, 4), (5, 4), lambda x, w: F.linear(x, torch.cat([w, x])), 0),
}

ARITHMETIC: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[[Tensor, Tensor], Any], int]] = {
    "scaled": ((3, 4), (4, 5), lambda x, w: x @ (w * 0.5), 1),
    "scaled from the left": ((3, 4), (4, 5), lambda x, w: x @ (0.5 * w), 1),
    "over": ((3, 4), (4, 5), lambda x, w: x @ torch.div(w, 2), 1),
    "negative": ((3, 4), (4, 5), lambda x, w: x @ -w, 1),
    "shifted": ((3, 4), (4, 4), lambda x, w: x @ (w + torch.eye(4)), 1),
    "scaled in place": ((3, 4), (4, 5), lambda x, w: x @ w.clone().mul_(2.0), 1),
    "standardized": (
        (3, 4),
        (5, 4),
        lambda x, w: F.linear(x, (w - w.mean(1, True)) / (w.std(1, keepdim=True) + 1e-5)),
        0,
    ),
    "of unit norm": ((3, 4), (4, 5), lambda x, w: x @ (w / w.norm(dim=0, keepdim=True)), 1),
    "scaled for each sample": (
        (2, 4, 9),
        (5, 4, 3),
        lambda x, w: F.conv1d(x.view(1, 8, 9), (w * x.mean(2)[:, None, :, None]).view(10, 4, 3), groups=2),
        0,
    ),
    "where": ((3, 4), (4, 5), lambda x, w: x @ torch.where(x.sum() > 0, w, -w), 1),
}

ALL = {**VIEWS, **COPIES, **ARITHMETIC}


@pytest.mark.parametrize("name", ALL)
def test_weights_are_found_with_the_axis_of_their_channels(name: str) -> None:
    x, w, function, axis = ALL[name]
    assert axis_of(function, torch.randn(x), torch.randn(w)) == axis


NOT_FOUND: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[[Tensor, Tensor], Any]]] = {
    "token beside the input": ((2, 3, 4), (1, 1, 4), lambda x, w: torch.cat([w.repeat(2, 1, 1), x], 1) @ x.mT),
    "token joined, from the left": ((3, 4), (1, 4), lambda x, w: torch.cat([w, x]) @ x.new_ones(4, 4)),
    "memory beside the input": (
        (1, 1, 3, 4),
        (1, 1, 2, 4),
        lambda x, w: F.scaled_dot_product_attention(x, torch.cat([x, w], 2), torch.cat([x, x[:, :, :2]], 2)),
    ),
    "positions": ((3, 4), (3, 4), lambda x, w: (x + w) @ x.new_ones(4, 4)),
    "scale of the input": ((3, 4), (3, 4), lambda x, w: (x * w) @ x.new_ones(4, 4)),
    "scale of the input of a layer": ((3, 4), (3, 4), lambda x, w: F.linear(x * w, x.new_ones(4, 4))),
    "scale of the weight": ((3, 4), (5, 1), lambda x, w: F.linear(x, torch.ones(5, 4) * w)),
    "expanded scale of the weight": ((3, 4), (5, 1), lambda x, w: F.linear(x, torch.ones(5, 4) * w.expand(5, 4))),
    "one scale of the weight": ((3, 4), (1,), lambda x, w: F.linear(x, torch.ones(5, 4) * w)),
    "shift of the weight": ((3, 4), (4,), lambda x, w: F.linear(x, torch.ones(5, 4) + w)),
    "exponential": ((3, 4), (4, 5), lambda x, w: x @ w.exp()),
    "softmax": ((3, 4), (4, 5), lambda x, w: x @ w.softmax(1)),
    "sigmoid": ((3, 4), (4, 5), lambda x, w: x @ torch.sigmoid(w)),
    "mean": ((3, 4), (4, 5), lambda x, w: x @ w.mean(1)),
    "look-up": ((3, 4), (9, 4), lambda x, w: w[(x[:, 0] > 0).long()] @ x.new_ones(4, 4)),
    "look-up by index_select": (
        (3, 4),
        (9, 4),
        lambda x, w: w.index_select(0, (x[:, 0] > 0).long()) @ x.new_ones(4, 4),
    ),
    "look-up of an embedding": ((3, 4), (9, 4), lambda x, w: F.embedding((x[:, 0] > 0).long(), w) @ x.new_ones(4, 4)),
    "its shape": ((3, 4), (4, 4), lambda x, w: x @ torch.ones_like(w)),
    "as many rows as it": ((3, 4), (4, 4), lambda x, w: x.view_as(w[:3]) @ x.new_ones(w.shape)),
    "normalized together with the input": ((3, 4), (4,), lambda x, w: F.layer_norm(x, (4,), w) @ x.new_ones(4, 4)),
}


@pytest.mark.parametrize("name", NOT_FOUND)
def test_tokens_tables_and_scales_stay_what_they_are(name: str) -> None:
    x, w, function = NOT_FOUND[name]
    assert found_in(function, torch.randn(x), torch.randn(w)) == {}


def test_all_terms_of_a_low_rank_update_are_found() -> None:
    found = found_in(
        lambda x, w, b, a: F.linear(x, w + b @ a),
        torch.randn(3, 4),
        torch.randn(5, 4),
        torch.randn(5, 2),
        torch.randn(2, 4),
    )
    assert found == {"w": 0, "w1": 0, "w2": 1}


def test_a_learned_scale_of_a_weight_is_not_found_with_it() -> None:
    found = found_in(
        lambda x, w, g: F.linear(x, g * w / w.norm()), torch.randn(3, 4), torch.randn(5, 4), torch.randn(5, 1)
    )
    assert found == {"w": 0}


def test_separate_projections_that_are_joined_are_found() -> None:
    weights = [torch.randn(5, 4), torch.randn(6, 4)]
    assert found_in(lambda x, q, k: F.linear(x, torch.cat([q, k])), torch.randn(3, 4), *weights) == {"w": 0, "w1": 0}


def test_buffers_do_not_make_a_weight_an_input() -> None:
    """A masked convolution, of an autoregressive model."""

    def autoregressive(x: Tensor, w: Tensor, mask: Tensor) -> Tensor:
        return x @ (w * mask)

    assert found_in(autoregressive, torch.randn(3, 4), torch.randn(4, 5), mask=torch.ones(4, 5)) == {"w": 1}


def test_batch_size_that_is_a_symbol_is_not_fixed() -> None:
    """Nothing that is asked of a graph may add a guard to it."""
    w = torch.nn.Parameter(torch.randn(1, 4, 5))
    found, graphs = [], 0

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        is_weight = {n for n in gm.graph.nodes if isinstance(n.meta.get("example_value"), torch.nn.Parameter)}
        found.extend(find_weights(gm, is_weight.__contains__).values())
        return gm.forward

    @torch.compile(backend=backend, dynamic=True)
    def scaled(x: Tensor) -> Tensor:
        return torch.bmm(x, w.expand(len(x), -1, -1) * torch.ones(len(x), 1, 1)) @ w[0].t()

    for batch in (2, 3, 5):
        scaled(torch.randn(batch, 3, 4))
    assert found == [2] and graphs == 1
