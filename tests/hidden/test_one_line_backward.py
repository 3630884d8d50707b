"""One-line form: backward passes that Dynamo captures too."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hidden.compare import Mlp, eager, one_line, options, without_inductor
from torch import Tensor

from autosparse_fx import thresholds

# All of torch itself: where a compiled graph begins with a computed tensor.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
WEIGHTS = ["0.weight", "2.weight", "4.weight"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_inductor(monkeypatch)


@pytest.mark.parametrize("form", ["config", "context"])
def test_compiled_autograd_compiles_the_backward_pass_as_it_is(form: str) -> None:
    from torch._dynamo import compiled_autograd

    def train(context: Callable[[], Any]) -> dict[str, Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Mlp()
        compiled, optimizer = one_line(model, target_sparsity=None), torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(3):
            with context():
                compiled(X).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        logits = {f"{name} logit": logit for name, logit in thresholds(model).items()}
        return {**{name: p.detach() for name, p in model.named_parameters()}, **logits}

    contexts: dict[str, Callable[[], Any]] = {
        "config": lambda: torch._dynamo.config.patch(compiled_autograd=True),
        "context": lambda: compiled_autograd._enable(
            torch.compile(backend="autosparse", options=options(target_sparsity=None))
        ),
    }
    seen, expected = train(contexts[form]), train(nullcontext)
    assert len(expected) == 9
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value)


def test_gradients_that_the_graph_takes_are_annealed() -> None:
    model = Mlp()

    def gradients() -> tuple[Tensor, ...]:
        loss = (call(X)).square().sum()
        return torch.autograd.grad(loss, [model.get_parameter(name) for name in WEIGHTS])

    call: Callable[..., Any] = model
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        seen = torch.compile(gradients, backend="autosparse", options=options(), fullgraph=True)()
    call = eager(model)
    for a, b in zip(seen, gradients(), strict=True):
        torch.testing.assert_close(a, b)
