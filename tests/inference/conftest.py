"""Inductor is left out in these tests, so that graphs run as the passes leave them."""

from collections.abc import Callable
from typing import Any

import pytest
from kernels.models import Seen, small_layers_pay
from threads import is_free
from torch.fx import GraphModule

from autosparse_fx._compat import dynamo
from autosparse_fx.kernels.library import KernelLibrary


@pytest.fixture(autouse=True)
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen(0, [])
    run = KernelLibrary.run

    def counted(*arguments: Any) -> None:
        found.programs += 1
        run(*arguments)

    def compile_fx(gm: GraphModule, inputs: Any, **_: Any) -> Callable[..., Any]:
        assert not is_free(dynamo.compile_lock()), "Inductor's options are those of all threads"
        found.graphs.append(gm)
        return gm.forward

    small_layers_pay(monkeypatch)
    monkeypatch.setattr(KernelLibrary, "run", counted)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return found
