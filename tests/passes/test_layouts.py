"""keep_formats and reshape_views: what layers do to the layout of tensors is seen by nobody."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernels.graphs import Captured, Function, prune
from torch import nn

from autosparse_fx.passes import keep_formats, lower_sparse_conv, reshape_views

X = torch.randn(2, 6, 7, 8, generator=torch.Generator().manual_seed(0))
LAST = X.contiguous(memory_format=torch.channels_last)
aten = torch.ops.aten


def captured(function: Callable[..., Any], x: torch.Tensor = LAST) -> Captured:
    return Captured(prune(Function(function, a=nn.Conv2d(6, 8, 3))), x)


KEPT: dict[str, tuple[Callable[..., Any], int]] = {
    "images": (lambda m, x: m.a(x), 1),
    "computed from images": (lambda m, x: m.a(x).relu() * 2, 1),
    "computed from turned ones": (lambda m, x: m.a(x).permute(0, 2, 3, 1).relu(), 1),
    "pieces": (lambda m, x: m.a(x).permute(0, 2, 3, 1).unbind(0), 2),
    "turned": (lambda m, x: m.a(x).permute(0, 2, 3, 1), 1),
    "several": (lambda m, x: (m.a(x), m.a(x).relu(), m.a(x).sum()), 3),
    "pieces of the input": (lambda m, x: (*x.chunk(2), x[:, 1:]), 0),
    "vectors": (lambda m, x: m.a(x).mean((2, 3)), 1),
}


@pytest.mark.parametrize("name", KEPT)
def test_formats_of_outputs_are_kept(name: str) -> None:
    function, count = KEPT[name]
    graph = captured(function)
    assert graph.apply(keep_formats) == count


def test_views_become_reshapes_and_no_other_node_does() -> None:
    graph = captured(lambda m, x: (m.a(x).permute(0, 2, 3, 1).reshape(2, -1), m.a(x).flatten(2), m.a(x).mT))
    assert graph.apply(keep_formats, lower_sparse_conv, reshape_views) == 2
    targets = [node.target for node in graph.gm.graph.nodes]
    assert aten.view.default not in targets and aten.permute.default in targets
