"""sparse_groups: which convolutions run sparse because of others, and which stay dense although they gain alone."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernels.graphs import SPARSE_CONV, Captured, Function, conv, prune
from torch import Tensor, nn

from autosparse_fx.kernels import choice
from autosparse_fx.kernels.choice import CHOICE
from autosparse_fx.kernels.steps import Machine
from autosparse_fx.passes import lower_sparse_conv, sparse_groups

X = torch.randn(2, 16, 20, 20, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def runs_code(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Whether patterns can be machine code is not this machine's affair. They can, until the fixture is called."""

    def set_to(runs_code: bool) -> None:
        kernels = SimpleNamespace(machine=Machine(16, 8, runs_code))
        monkeypatch.setitem(sparse_groups.choose_each.__globals__, "library", lambda: kernels)

    set_to(True)
    return set_to


def captured(*layers: nn.Module) -> Captured:
    return Captured(prune(nn.Sequential(*layers)), X)


# What converting tensors costs.


def test_layer_that_gains_less_than_converting_its_tensors_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prune(conv())
    gained = Captured(model, X)
    gained.apply(lower_sparse_conv)
    (saved,) = (choice.saved for choice in gained.choices())
    elements = 2 * 32 * 20 * 20  # of the result; the input is as it should be
    for cycles, count in ((0.99 * saved / elements, 1), (1.01 * saved / elements, 0)):
        torch._dynamo.reset()
        monkeypatch.setattr(choice, "CONVERT", cycles)
        graph = Captured(model, X)
        assert graph.apply(lower_sparse_conv) == count
        assert any("less than converting" in reason for reason in graph.reasons()) == (count == 0)


def test_layer_that_gains_less_than_calling_a_program_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prune(conv())
    gained = Captured(model, X)
    gained.apply(lower_sparse_conv)
    (saved,) = (choice.saved for choice in gained.choices())
    for share, count in ((0.99, 1), (1.01, 0)):
        torch._dynamo.reset()
        monkeypatch.setattr(choice, "PROGRAM", share * saved)
        graph = Captured(model, X)
        assert graph.apply(lower_sparse_conv) == count
        assert any("less than calling it costs" in reason for reason in graph.reasons()) == (count == 0)


def test_layers_in_a_row_share_what_converting_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [module for _ in range(6) for module in (conv(16, 16), nn.ReLU())]
    gained = captured(conv(16, 16))
    gained.apply(lower_sparse_conv)
    (saved,) = (choice.saved for choice in gained.choices())
    monkeypatch.setattr(choice, "CONVERT", 2 * saved / (2 * 16 * 20 * 20))  # of the result
    for model, count in ((layers[:1], 0), (layers, 6)):
        torch._dynamo.reset()
        assert captured(*model).apply(lower_sparse_conv) == count


def test_residual_layers_pay_once_for_what_leaves_their_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        for first, second in ((m.a, m.b), (m.c, m.d)):
            x = F.relu(second(F.relu(first(x))) + x)
        return x

    layers = {name: conv(16, 16) for name in "abcd"}
    model = prune(Function(forward, **layers))
    gained = Captured(model, X)
    gained.apply(lower_sparse_conv)
    saved = sum(choice.saved for choice in gained.choices())
    for share, count in ((0.99, 4), (1.01, 0)):
        torch._dynamo.reset()
        monkeypatch.setattr(choice, "CONVERT", share * saved / X.numel())
        assert Captured(model, X).apply(lower_sparse_conv) == count


# What is cheaper than to convert tensors twice.


def around(dense: int, *, is_open: bool = False) -> Captured:
    """So many dense 1x1 layers in a row, behind a sparse layer and (unless it is open) before one."""
    layers: list[nn.Module] = [conv(64, 64), nn.ReLU()]
    layers += [module for _ in range(dense) for module in (conv(64, 64, 1, 0), nn.ReLU())]
    model = prune(nn.Sequential(*layers, *([] if is_open else [conv(64, 64)])))
    for module in model:
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
            nn.init.kaiming_normal_(module.weight)
    return Captured(model, torch.randn(2, 64, 20, 20))


def lost_by_a_dense_layer() -> float:
    """Cycles for each element of the tensors that it reads and writes."""
    graph = around(1)
    graph.apply(lower_sparse_conv)
    (lost,) = (-c.saved for c in graph.choices() if not c.is_sparse)
    torch._dynamo.reset()
    return lost / (2 * 2 * 64 * 20 * 20)


@pytest.mark.parametrize("dense", [1, 2, 3])
@pytest.mark.parametrize("share", [0.9, 1.1])
def test_dense_layers_between_sparse_ones_go_with_them(
    dense: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "CONVERT", share * dense * lost_by_a_dense_layer())
    graph = around(dense)
    assert graph.apply(lower_sparse_conv) == (2 + dense if share > 1 else 2)
    reasons = [node.meta[CHOICE].reason for node in graph.nodes(SPARSE_CONV)]
    assert sum("with its neighbours" in reason for reason in reasons) == (dense if share > 1 else 0)


def test_dense_layers_that_no_sparse_one_follows_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "CONVERT", 1.1 * lost_by_a_dense_layer())
    assert around(2, is_open=True).apply(lower_sparse_conv) == 1


def test_first_layer_goes_with_the_next_because_its_input_needs_no_converting(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = 2 * lost_by_a_dense_layer()  # for each element of its result

    def first_is_sparse(share: float) -> bool:
        monkeypatch.setattr(choice, "CONVERT", share * lost)
        model = prune(nn.Sequential(conv(64, 64, 1, 0), nn.ReLU(), conv(64, 64)))
        nn.init.kaiming_normal_(model[0].weight)
        graph = Captured(model, torch.randn(2, 64, 20, 20))
        graph.apply(lower_sparse_conv)
        return len(graph.nodes(SPARSE_CONV)) == 2

    assert first_is_sparse(1.1) and not first_is_sparse(0.9)


def test_a_branch_is_converted_once_for_all_who_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sparse layers read what a pool leaves: one conversion, not three."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.max_pool2d(x, 3, 1, 1)
        return m.a(y) + m.b(y) + m.c(y)

    layers = {name: conv(16, 16) for name in "abc"}
    model = prune(Function(forward, **layers))
    gained = Captured(model, X)
    gained.apply(lower_sparse_conv)
    saved = sum(c.saved for c in gained.choices())
    for share, count in ((0.95, 3), (1.05, 0)):  # of the pool's result and of the sum
        torch._dynamo.reset()
        monkeypatch.setattr(choice, "CONVERT", share * saved / (2 * X.numel()))
        graph = Captured(model, X)
        assert graph.apply(lower_sparse_conv) == count
        assert any("less than converting its tensors costs" in reason for reason in graph.reasons()) == (count == 0)


def test_patterns_that_are_no_machine_code_are_chosen_for_by_what_they_take(runs_code: Callable[[bool], None]) -> None:
    """At 60 % only machine code gains."""
    model = nn.Sequential(conv(256, 256), nn.ReLU(), conv(256, 256))
    torch.manual_seed(0)
    for number, zeros in ((0, 0.95), (2, 0.6)):
        weight = model[number].weight
        weight.data[torch.rand_like(weight) < zeros] = 0
    for can_be_code, count in ((True, 2), (False, 1)):
        torch._dynamo.reset()
        runs_code(can_be_code)
        assert Captured(model, torch.randn(2, 256, 20, 20)).apply(lower_sparse_conv) == count


def test_dense_model_stays_dense_and_compiles_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled() -> None:
        raise AssertionError("kernels were compiled")

    monkeypatch.setitem(sparse_groups.choose_each.__globals__, "library", compiled)
    model = nn.Sequential(conv(64, 64), nn.ReLU(), conv(64, 64))
    Captured(model, torch.randn(2, 64, 20, 20)).check_left_alone(lower_sparse_conv, "estimated")


def test_dense_layers_by_themselves_stay_even_where_calling_them_costs_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a sparse layer elsewhere in the graph: by the estimate they would gain, but not by zeros."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return m.a(x), m.c(F.relu(m.b(F.max_pool2d(x, 3, 1, 1))))

    layers = {"a": conv(16, 16), "b": conv(16, 96, 1, 0), "c": conv(96, 16, 1, 0)}
    model = prune(Function(forward, **layers))
    for name in "bc":
        nn.init.kaiming_normal_(layers[name].weight)
    monkeypatch.setattr(choice, "CALL", 1e6)
    graph = Captured(model, X)
    assert lower_sparse_conv(graph.gm) == 1
    assert sum("none gains by itself" in reason for reason in graph.reasons()) == 2


# Groups.


def mobile(*, first: int = 1, last: int = 1) -> Captured:
    layers = [conv(16, 48, 1, 0), nn.ReLU6(), conv(48, 48, groups=48), nn.ReLU6(), conv(48, 16, 1, 0)]
    model = prune(nn.Sequential(*layers))
    nn.init.normal_(model[2].weight)
    for number, is_sparse in ((0, first), (4, last)):
        if not is_sparse:
            nn.init.normal_(model[number].weight)
    return Captured(model, X)


def test_groups_between_sparse_layers_go_with_them() -> None:
    graph = mobile()
    assert graph.apply(lower_sparse_conv) == 3
    assert [n.args[7] for n in graph.nodes(SPARSE_CONV)] == [1, 48, 1]
    assert "neighbours" in graph.nodes(SPARSE_CONV)[1].meta[CHOICE].reason


@pytest.mark.parametrize("sides", [(0, 1), (1, 0)])
def test_groups_beside_a_dense_layer_stay(sides: tuple[int, int]) -> None:
    graph = mobile(first=sides[0], last=sides[1])
    assert graph.apply(lower_sparse_conv) == 1
    assert graph.reasons().count("grouped") == 1


def test_groups_alone_stay() -> None:
    captured(conv(16, 32, groups=4)).check_left_alone(lower_sparse_conv, "grouped")


def test_groups_whose_result_is_also_returned_go_with_their_neighbours() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = F.relu(m.b(F.relu(m.a(x))))
        return m.c(y), y

    layers = {"a": conv(16, 48, 1, 0), "b": conv(48, 48, groups=48), "c": conv(48, 16, 1, 0)}
    graph = Captured(prune(Function(forward, **layers)), X)
    assert graph.apply(lower_sparse_conv) == 3
