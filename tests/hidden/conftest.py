"""Fixtures for the one-line form."""

from collections.abc import Callable
from typing import Any

import pytest
from torch.fx import GraphModule


@pytest.fixture
def eager_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Inductor the prepared model, in eager mode, computes the same to the last bit, and nothing is slow."""

    def compile_fx(gm: GraphModule, inputs: Any, **_: Any) -> Callable[..., Any]:
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
