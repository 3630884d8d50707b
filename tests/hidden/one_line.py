"""The same model trained twice: made sparse by options of torch.compile, and prepared by sparsify."""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import autosparse_fx
from autosparse_fx import AutoSparse, GradientAnnealing

MakeOptimizer = Callable[[nn.Module], Optimizer]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def options(config: AutoSparse, total_steps: int) -> dict[str, Any]:
    """What torch.compile is to be told to do as ``config`` says."""
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    default = AutoSparse()
    return {"total_steps": total_steps, **{k: v for k, v in given.items() if v != getattr(default, k)}}


def one_line(model: nn.Module, total_steps: int, config: AutoSparse | None = None) -> Any:
    return torch.compile(model, backend="autosparse", options=options(config or AutoSparse(), total_steps))


@dataclasses.dataclass
class Run:
    """A model in training. ``loss`` and ``step`` are there to be replaced."""

    model: nn.Module
    compiled: Any
    optimizer: Optimizer
    annealer: GradientAnnealing | None
    batches: Iterator[tuple[Tensor, Tensor]]
    losses: list[float]

    @property
    def prepared(self) -> bool:
        return self.annealer is not None

    def backward(self, scale: float = 1.0) -> Tensor:
        x, y = next(self.batches)
        loss = F.cross_entropy(self.compiled(x), y)
        (loss * scale).backward()
        self.losses.append(float(loss.detach()))
        return loss.detach()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self, number: int) -> None:
        for _ in range(number):
            self.step()

    def weights(self) -> list[nn.Parameter]:
        """All parameters but thresholds."""
        return [p for name, p in self.model.named_parameters() if not name.endswith("_threshold")]


def start(
    model: nn.Module,
    make_optimizer: MakeOptimizer = sgd,
    *,
    prepared: bool,
    config: AutoSparse | None = None,
    total_steps: int = 20,
    shape: tuple[int, ...] = (16,),
    inductor: bool = False,
) -> Run:
    """Begin to train ``model`` itself; a prepared one in eager mode, to save time, unless ``inductor`` is asked for."""
    config = config or AutoSparse()
    annealer = None
    if prepared:
        autosparse_fx.sparsify(model, config)
        optimizer = make_optimizer(model)
        annealer = GradientAnnealing(model, total_steps, optimizer)
        compiled = torch.compile(model, backend="autosparse") if inductor else model
    else:
        optimizer = make_optimizer(model)
        compiled = one_line(model, total_steps, config)
    batches = itertools.cycle(list(reference.classification_batches(12, shape)))
    return Run(model, compiled, optimizer, annealer, batches, [])


def both(model: nn.Module, make_optimizer: MakeOptimizer = sgd, **settings: Any) -> tuple[Run, Run]:
    """Begin to train ``model`` by options, and a prepared copy of it."""
    twin = copy.deepcopy(model)
    return (
        start(model, make_optimizer, prepared=False, **settings),
        start(twin, make_optimizer, prepared=True, **settings),
    )


def assert_same(one: Run, prepared: Run) -> None:
    """Losses, weights, buffers, thresholds and sparsity agree."""
    assert one.losses == pytest.approx(prepared.losses, rel=1e-4)
    assert_same_models(one.model, prepared.model)


def assert_same_models(one: nn.Module, prepared: nn.Module) -> None:
    expected = prepared.state_dict()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    ours, theirs = autosparse_fx.thresholds(one), autosparse_fx.thresholds(prepared)
    assert list(ours) == list(theirs)
    for name, s in theirs.items():
        torch.testing.assert_close(ours[name], s, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"threshold {n}: {m}")
    assert autosparse_fx.sparsity(one) == pytest.approx(autosparse_fx.sparsity(prepared), abs=2e-3)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything that training changes: weights, buffers and thresholds."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return {**weights, **{f"{name} threshold": s for name, s in autosparse_fx.thresholds(model).items()}}


def assert_equal_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """To the last bit."""
    assert list(one) == list(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def masked_output(model: nn.Module, x: Tensor) -> Tensor:
    """What the model is to compute: each weight masked as its definition says, with torch alone."""
    parameters = dict(model.named_parameters())
    masked = {}
    for name, s in autosparse_fx.thresholds(model).items():
        weight = parameters[name].detach()
        masked[name] = reference.masked(weight, s.view(-1, *(1 for _ in weight.shape[1:])), 0.0)
    with torch.no_grad():
        return torch.func.functional_call(model, masked, (x,))
