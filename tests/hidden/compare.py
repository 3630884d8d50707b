"""What the tests of the one-line form share: options that mask from the first call on, and what to compare with."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autosparse_fx import AutoSparse, sparsify, thresholds

INIT, ALPHA = -2.5, 0.75
OLD = torch.__version__ < (2, 14)  # seen on 2.11, gone in 2.14; what lies between was not tried


def options(**extra: Any) -> dict[str, Any]:
    return {"total_steps": 10, "threshold_init": INIT, **extra}


def one_line(model: Any, **extra: Any) -> Any:
    return torch.compile(model, backend="autosparse", options=options(**extra))


class Mlp(nn.Sequential):
    """With a forward of its own: torch 2.11 captures nothing of an nn.Sequential that is compiled in place."""

    def __init__(self, inputs: int = 16, hidden: int = 64, outputs: int = 4) -> None:
        super().__init__(*reference.mlp(inputs, hidden, outputs))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo, our passes and AOTAutograd, and then eager kernels: a tenth of the time to compile."""
    from torch._dynamo.backends.debugging import aot_eager

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, **_: aot_eager(gm, inputs))


def logits(model: nn.Module, name: str, axis: int = 0) -> Tensor:
    """The logit of a masked weight, of a shape that broadcasts to the weight."""
    s = thresholds(model)[name]
    dims = dict(model.named_parameters())[name].dim()
    return s.view([-1 if d == axis else 1 for d in range(dims)])


def eager(model: nn.Module, *, alpha: float = ALPHA, axes: dict[str, int] | None = None) -> Callable[..., Any]:
    """The masked computation of ``model`` as plain autograd over the definition, with the thresholds that it has."""

    def call(*args: Any, **kwargs: Any) -> Any:
        held = dict(model.named_parameters())
        read = {
            name: reference.masked(held[name], logits(model, name, (axes or {}).get(name, 0)), alpha).to(
                held[name].dtype
            )
            for name in thresholds(model)
        }
        return torch.func.functional_call(model, read, args, kwargs)

    return call


def outputs_and_gradients(
    call: Callable[..., Any], model: nn.Module, names: list[str], *args: Any, **kwargs: Any
) -> dict[str, Tensor | None]:
    """Floating-point outputs, and the gradients of the named parameters (None where unused)."""
    leaves = [t for t in tree_leaves(call(*args, **kwargs)) if isinstance(t, Tensor) and t.is_floating_point()]
    held = dict(model.named_parameters())
    loss = sum((t.float().square().sum() for t in leaves), torch.zeros(()))
    wanted = [held[name] for name in names]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    outputs = {f"output {i}": t.detach() for i, t in enumerate(leaves)}
    return {**outputs, **dict(zip(names, gradients, strict=True))}


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], **tolerance: float) -> None:
    assert list(found) == list(expected)
    tolerance = tolerance or {"rtol": 1e-4, "atol": 1e-4}
    for name, t in expected.items():
        if t is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], t, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def check(
    model: nn.Module,
    *args: Any,
    call: Callable[..., Any] | None = None,
    example_inputs: Any = None,
    axes: dict[str, int] | None = None,
    config: dict[str, Any] | None = None,
    by_definition: bool = True,
    **tolerance: float,
) -> set[str]:
    """Compare the one-line form with the prepared model and with the masked computation; return what is masked."""
    config = config or {}
    twin = sparsify(copy.deepcopy(model), AutoSparse(threshold_init=INIT, **config), example_inputs=example_inputs)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    found = outputs_and_gradients(one_line(model, **config) if call is None else call, model, names, *args)
    assert {n: s.shape for n, s in thresholds(model).items()} == {n: s.shape for n, s in thresholds(twin).items()}
    assert_same(found, outputs_and_gradients(twin, twin, names, *args), **tolerance)
    if by_definition:  # not where a forward runs again in the backward pass
        assert_same(found, outputs_and_gradients(eager(model, axes=axes), model, names, *args), **tolerance)
    masked = set(thresholds(model))
    held = dict(model.named_parameters())
    cut = torch.sigmoid(torch.tensor(INIT))
    assert all((held[name].detach().abs() <= cut).any() for name in masked)  # the comparison says something
    return masked


def error(call: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(Exception) as caught:  # Dynamo wraps what a backend raises in a class of its own
        call(*args)
    return str(caught.value)
