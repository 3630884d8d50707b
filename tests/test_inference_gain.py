"""Graphs that sparse kernels would gain too little stay dense."""

import logging

import pytest
import torch
from torch import nn

from autosparse_fx.kernels import choice
from autosparse_fx.passes.fuse_sparse_programs import RUN_PROGRAM
from autosparse_fx.pipeline import compilations

COSTS = choice.PROGRAM  # which other tests set to nothing


def run(width: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Call a sparse linear layer of this width on 64 tokens, and count its programs."""
    monkeypatch.setattr(choice, "PROGRAM", COSTS)
    model = nn.Linear(width, width)
    x = torch.randn(64, width)
    with torch.no_grad():
        model.weight[torch.rand(width, width) < 0.95] = 0
        y = torch.compile(model, backend="autosparse")(x)
        torch.testing.assert_close(y, model(x))
    graph = next(v.graph for v in reversed(compilations[-1].versions) if v.stage != "joint")
    programs: int = len(graph.find_nodes(op="call_function", target=RUN_PROGRAM))
    return programs


def test_small_gains_are_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="autosparse_fx"):
        run(64, monkeypatch)
    assert "less than calling it costs" in caplog.text


def test_large_gains_are_taken(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="autosparse_fx"):
        assert run(1024, monkeypatch) == 1
    assert "packed the weights of a graph for 1 sparse programs" in caplog.text
