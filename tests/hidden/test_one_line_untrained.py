"""Masked weights that no optimizer trains, plans that were loaded, and optimizers with required arguments."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hidden.compare import Mlp, one_line, options, without_inductor
from threads import in_turns
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import autosparse_fx
from autosparse_fx import sparsity, thresholds
from autosparse_fx.hidden import masks

# All of torch itself: where a compiled graph begins with a computed tensor.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 4


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_inductor(monkeypatch)


def train(call: Callable[..., Tensor], *optimizers: Optimizer, steps: int = 10) -> None:
    for _ in range(steps):
        F.cross_entropy(call(X), Y).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def masks_of(model: nn.Module) -> tuple[masks.HiddenMask, ...]:
    one_line(model)(X)
    return tuple(mask for _, _, mask in masks.hidden_masks(model))


def test_a_masked_weight_that_no_optimizer_holds_is_named_once() -> None:
    model = Mlp()
    optimizer = SGD([*model[0].parameters(), *model[4].parameters()], lr=0.05)
    compiled = one_line(model)
    with pytest.warns(UserWarning, match=r"holds the weight '2\.weight' \(1 masked weights in all\)") as caught:
        train(compiled, optimizer)
    assert len(caught) == 1


def test_a_training_by_no_torch_optimizer_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "UNHEARD_CALLS", 5)
    masks.tick()
    model = Mlp()
    compiled = one_line(model)
    train(compiled, SGD(model.parameters(), lr=0.05))
    with torch.no_grad():
        for _ in range(20):
            compiled(X)
    with pytest.warns(UserWarning, match=r"'0\.weight' has been called 5 times with gradients") as caught:
        for _ in range(30):
            F.cross_entropy(compiled(X), Y).backward()
            for parameter in model.parameters():
                parameter.data.sub_(parameter.grad, alpha=0.05)
                parameter.grad = None
    assert len(caught) == 1


def test_accumulation_over_many_graphs_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "UNHEARD_CALLS", 10)
    model = nn.ModuleList(Mlp() for _ in range(4))
    for block in model:
        block.compile(backend="autosparse", options=options())
    optimizer = SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        for _ in range(6):  # 24 calls of graphs
            sum(F.cross_entropy(block(X), Y) for block in model).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_calls_of_several_graphs_are_counted_from_the_last_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another graph is the first after it to use what a graph counts by."""
    monkeypatch.setattr(masks, "UNHEARD_CALLS", 6)
    first, second = masks_of(Mlp())[:2]
    masks.tick()
    for _ in range(3):
        for _ in range(5):
            masks.note_use((first, second))
        masks.tick()
        masks.note_use((second, first))
    with pytest.warns(UserWarning, match="'0.weight' has been called 6 times"):
        for _ in range(6):
            masks.note_use((first, second))


def test_threads_step_optimizers_of_their_own() -> None:
    """A use counts for the next step of a thread and not for the one after it, whatever the others do."""
    held = [masks_of(Mlp()) for _ in range(4)]

    def work(number: int) -> None:
        now = masks.tick()
        for _ in range(2000):
            masks.note_use(held[number])
            last, now = now, masks.tick()
            assert all(last < mask.used <= now for mask in held[number])
            last, now = now, masks.tick()
            assert all(mask.used <= last for mask in held[number])

    in_turns(len(held), work)


def test_two_optimizers_and_frozen_weights_are_no_reason_to_warn() -> None:
    model, other = Mlp(), Mlp()
    compiled = one_line(model)
    compiled(X)
    model[2].weight.requires_grad_(False)
    kept = one_line(other)
    kept(X)  # another model, whose optimizer is yet to come
    train(compiled, SGD(model[0].parameters(), lr=0.05), torch.optim.Adam(model[4].parameters(), lr=0.01))


def test_a_loaded_plan_knows_what_rules_leave_dense() -> None:
    model, resumed = Mlp(), Mlp()
    train(one_line(model, rules={"4.weight": None}), SGD(model.parameters(), lr=0.05), steps=3)
    state = copy.deepcopy(autosparse_fx.state_dict(model))
    expected = autosparse_fx.report(model).skipped
    assert "rule" in expected["4.weight"][1]

    autosparse_fx.load_state_dict(resumed, state)
    train(one_line(resumed, rules={"4.weight": None}), SGD(resumed.parameters(), lr=0.05), steps=3)
    assert autosparse_fx.report(resumed).skipped == expected
    autosparse_fx.load_state_dict(model, state)  # back to an earlier step, in place
    assert autosparse_fx.report(model).skipped == expected


class Plain(Optimizer):
    """Takes its arguments without defaults, as many optimizers that people write do."""

    def __init__(self, params: Any, lr: float, scale: float) -> None:
        super().__init__(params, {"lr": lr, "scale": scale})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * group["scale"] * p.grad)


class Unknown(Plain):
    """Needs an argument that is in no group."""

    def __init__(self, params: Any, lr: float, world: int) -> None:
        super().__init__(params, lr, 1.0 / world)


def test_required_arguments_of_an_optimizer_are_taken_from_its_defaults() -> None:
    model, twin = Mlp(), Mlp()
    twin.load_state_dict(model.state_dict())
    train(one_line(model), Plain(model.parameters(), lr=0.1, scale=0.5))
    train(one_line(twin), SGD(twin.parameters(), lr=0.05))
    assert sparsity(model) == pytest.approx(0.8, abs=0.005)
    for name, s in thresholds(twin).items():
        torch.testing.assert_close(thresholds(model)[name], s)


def test_other_required_arguments_are_refused_with_the_cure() -> None:
    model = Mlp()
    with pytest.raises(RuntimeError, match=r"Unknown cannot train the thresholds.*'world'.*autosparse_fx\.sparsify"):
        train(one_line(model), Unknown(model.parameters(), 0.1, 2))


def test_nothing_here_warns_by_itself() -> None:
    model: nn.Module = Mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(one_line(model), SGD(model.parameters(), lr=0.05))
