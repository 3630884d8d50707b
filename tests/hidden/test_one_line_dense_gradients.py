"""Gradients of masked weights that come from no masked graph: an error, and nothing else is."""

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from hidden.compare import Mlp, one_line, without_inductor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autosparse_fx import thresholds

# All of torch itself: where a compiled graph begins with a computed tensor.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
DENSE = r"weight '0\.weight' \[64, 16\] is trained as a dense one(?s:.)*recompile limit(?s:.)*autosparse_fx\.sparsify"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    without_inductor(monkeypatch)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # of the recompile limit it warns
    yield
    logging.getLogger("torch._dynamo").setLevel(logging.NOTSET)


def sgd(*parameters: nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def backward(call: Callable[..., Any], *args: Any) -> None:
    call(*args).square().mean().backward()


class Tagged(Mlp):
    """Compiled anew for every tag."""

    tag = ""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * len(self.tag)


def test_past_the_recompile_limit_is_an_error() -> None:
    model = Tagged()
    compiled, optimizer = one_line(model, target_sparsity=None), sgd(*model.parameters())

    def step() -> None:
        model.tag += "a"
        backward(compiled, X)
        optimizer.step()
        optimizer.zero_grad()

    with torch._dynamo.config.patch(recompile_limit=2):
        step()
        step()
        before, cuts = copy.deepcopy(model.state_dict()), thresholds(model)
        with pytest.raises(RuntimeError, match=DENSE):
            step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert cuts == thresholds(model)


def test_calling_the_uncompiled_model_after_the_compiled_one_is_an_error() -> None:
    model = Mlp()
    compiled, optimizer = one_line(model), sgd(*model.parameters())
    for _ in range(2):
        backward(compiled, X)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        compiled(X)  # to evaluate is not to train
    backward(model, X)
    with pytest.raises(RuntimeError, match=DENSE):
        optimizer.step()
    optimizer.zero_grad()
    backward(compiled, X)
    optimizer.step()  # the error left nothing behind


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_layer_that_some_steps_do_not_use_is_no_error(set_to_none: bool) -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor, both: bool) -> Tensor:
            x = F.relu(self.a(x))
            return self.b(x) if both else x

    model = Late()
    compiled, optimizer = one_line(model), sgd(*model.parameters())
    for both in (True, False, True, False, False):
        backward(compiled, X, both)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    assert len(thresholds(model)) == 2


def test_gradient_accumulation_and_steps_without_a_call_are_no_error() -> None:
    model = Mlp()
    compiled, optimizer = one_line(model), sgd(*model.parameters())
    for _ in range(2):
        for _ in range(3):
            backward(compiled, X)
        optimizer.step()
        optimizer.step()  # on the gradients that there are
        optimizer.zero_grad()
    backward(compiled, X)
    optimizer.step()
    backward(model, X)  # a new gradient on top of the old one
    with pytest.raises(RuntimeError, match=DENSE):
        optimizer.step()


def test_two_optimizers_of_the_same_weights_are_no_error() -> None:
    model = Mlp()
    compiled, optimizers = one_line(model), [sgd(*model.parameters()) for _ in range(2)]
    for _ in range(3):
        backward(compiled, X)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()


def test_adversarial_training_is_no_error() -> None:
    generator, critic = Mlp(16, 32, 16), Mlp(16, 32, 1)
    compiled = [one_line(generator), one_line(critic)]
    optimizers = [sgd(*generator.parameters()), sgd(*critic.parameters())]
    for _ in range(3):
        for _ in range(2):
            optimizers[1].zero_grad()
            (compiled[1](compiled[0](X).detach()) - compiled[1](X)).mean().backward()
            optimizers[1].step()
        optimizers[0].zero_grad()
        (-compiled[1](compiled[0](X))).mean().backward()  # leaves gradients in the critic
        optimizers[0].step()
    assert len(thresholds(generator)) == len(thresholds(critic)) == 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_are_no_error(reentrant: bool) -> None:
    model = Mlp()
    compiled, optimizer = one_line(model), sgd(*model.parameters())
    for _ in range(3):
        x = X.clone().requires_grad_()
        backward(lambda x: checkpoint(compiled, x, use_reentrant=reentrant), x)
        optimizer.step()
        optimizer.zero_grad()


def test_a_compiled_step_function_and_dense_weights_are_no_error() -> None:
    model = reference.mlp()
    optimizer = sgd(*model.parameters())

    def step(x: Tensor) -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    compiled: Any = one_line(step, rules={"2.weight": None})
    for _ in range(3):
        compiled(X)
    assert set(thresholds(model)) == {"0.weight", "4.weight"}


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.SGD])
def test_a_closure_that_compiles_the_first_graphs_is_refused(kind: Any) -> None:
    """By a function that is given its model, so that nothing is known of it before."""
    model = reference.mlp()
    compiled: Any = one_line(lambda model, x: model(x))
    optimizer = kind(model.parameters(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = compiled(model, X).square().mean()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"step\(closure\).*autosparse_fx\.sparsify"):
        optimizer.step(closure)

    other = reference.mlp()  # which is none of ours
    optimizer = kind(other.parameters(), lr=0.1)

    def dense() -> Tensor:
        optimizer.zero_grad()
        loss = other(X).square().mean()
        loss.backward()
        return loss

    optimizer.step(dense)
