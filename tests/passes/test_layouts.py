"""keep_formats and reshape_views: what layers do to the layout of tensors is seen by nobody."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernels.graphs import Captured, Function, prune
from kernels.models import small_layers_pay
from torch import nn
from torch.utils._pytree import tree_leaves

from autosparse_fx.passes import keep_formats, lower_sparse_conv, reshape_views

X = torch.randn(2, 6, 7, 8, generator=torch.Generator().manual_seed(0))
LAST = X.contiguous(memory_format=torch.channels_last)
aten = torch.ops.aten


def captured(function: Callable[..., Any], x: torch.Tensor = LAST) -> Captured:
    return Captured(prune(Function(function, a=nn.Conv2d(6, 8, 3), norm=nn.GroupNorm(2, 8))), x)


KEPT: dict[str, tuple[Callable[..., Any], int]] = {
    "images": (lambda m, x: m.a(x), 1),
    "computed from images": (lambda m, x: m.a(x).relu() * 2, 1),
    "computed from turned ones": (lambda m, x: m.a(x).permute(0, 2, 3, 1).relu(), 1),
    "pieces": (lambda m, x: m.a(x).permute(0, 2, 3, 1).unbind(0), 2),
    "turned": (lambda m, x: m.a(x).permute(0, 2, 3, 1), 1),
    "computed of turned ones": (lambda m, x: m.a(x).mT.sigmoid().mT, 1),
    "computed of ones turned otherwise": (lambda m, x: m.a(x).permute(0, 2, 1, 3).relu().permute(0, 2, 1, 3), 1),
    "several": (lambda m, x: (m.a(x), m.a(x).relu(), m.a(x).sum()), 3),
    "pieces of the input": (lambda m, x: (*x.chunk(2), x[:, 1:]), 0),
    "vectors": (lambda m, x: m.a(x).mean((2, 3)), 1),
    "slices": (lambda m, x: (m.a(x)[:, ::2], m.a(x)[:, :4], m.a(x)[..., 1:, 1:]), 3),
    "split channels": (lambda m, x: m.a(x).split([3, 5], 1), 2),
    "whole and parts": (lambda m, x: ((y := m.a(x)), y[:, :3], y[:, :3].permute(0, 2, 3, 1)), 3),
    "best channels": (lambda m, x: m.a(x).topk(3, 1)[0][:, 1:], 1),
    "normalised over groups": (lambda m, x: m.norm(m.a(x)), 1),
    "computed from groups": (lambda m, x: m.norm(m.a(x)).relu()[:, 1:], 1),
}


@pytest.mark.parametrize("name", KEPT)
def test_formats_of_outputs_are_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_layers_pay(monkeypatch)
    function, count = KEPT[name]
    graph = captured(function)
    assert graph.apply(keep_formats, lower_sparse_conv) > 0 or not count
    with torch.no_grad():
        expected = tree_leaves(graph.model(LAST))
        assert [y.stride() for y in graph.gm(LAST)] == [y.stride() for y in expected]
    assert captured(function).apply(keep_formats) == count


def test_what_several_outputs_are_views_of_is_copied_once() -> None:
    graph = captured(lambda m, x: ((y := m.a(x)), (part := y[:, :3]), *part.unbind(0)))
    assert graph.apply(keep_formats) == 4
    assert graph.count(aten.clone.default) == 1 and graph.count(aten.slice.Tensor) == 1


def test_views_become_reshapes_and_no_other_node_does() -> None:
    graph = captured(lambda m, x: (m.a(x).permute(0, 2, 3, 1).reshape(2, -1), m.a(x).flatten(2), m.a(x).mT))
    assert graph.apply(keep_formats, lower_sparse_conv, reshape_views) == 2
    targets = [node.target for node in graph.gm.graph.nodes]
    assert aten.view.default not in targets and aten.permute.default in targets


def test_views_of_what_groups_are_normalised_to_copy_it() -> None:
    """They have been traced as if it were contiguous."""
    graph = captured(lambda m, x: (m.norm(m.a(x)).flatten(1), m.norm(m.a(x)).flatten(1).relu()))
    assert graph.apply(keep_formats, lower_sparse_conv, reshape_views) > 0
    assert all(y.is_contiguous() for y in graph.gm(LAST))
