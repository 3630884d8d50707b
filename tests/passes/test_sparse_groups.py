"""sparse_groups: which convolutions run sparse because of others, and which stay dense although they gain alone."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernels.graphs import SPARSE_CONV, Captured, Function, conv, prune
from torch import Tensor, nn

from autosparse_fx.kernels import choice
from autosparse_fx.kernels.choice import CHOICE
from autosparse_fx.kernels.library import library
from autosparse_fx.passes import lower_sparse_conv

X = torch.randn(2, 16, 20, 20, generator=torch.Generator().manual_seed(0))


def captured(*layers: nn.Module) -> Captured:
    return Captured(prune(nn.Sequential(*layers)), X)


# What converting tensors costs.


def test_layer_that_gains_less_than_converting_its_tensors_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prune(conv())
    gained = Captured(model, X)
    gained.apply(lower_sparse_conv)
    (saved,) = (choice.saved for choice in gained.choices())
    elements = 2 * (16 + 32) * 20 * 20
    for cycles, count in ((0.99 * saved / elements, 1), (1.01 * saved / elements, 0)):
        torch._dynamo.reset()
        monkeypatch.setattr(choice, "CONVERT", cycles)
        graph = Captured(model, X)
        assert graph.apply(lower_sparse_conv) == count
        assert any("less than calling it costs" in reason for reason in graph.reasons()) == (count == 0)


def test_layers_in_a_row_share_what_converting_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [module for _ in range(6) for module in (conv(16, 16), nn.ReLU())]
    gained = captured(conv(16, 16))
    gained.apply(lower_sparse_conv)
    (saved,) = (choice.saved for choice in gained.choices())
    monkeypatch.setattr(choice, "CONVERT", 2 * saved / (2 * 32 * 20 * 20))
    for model, count in ((layers[:1], 0), (layers, 6)):
        torch._dynamo.reset()
        assert captured(*model).apply(lower_sparse_conv) == count


def test_residual_layers_pay_for_what_enters_and_leaves_their_program(monkeypatch: pytest.MonkeyPatch) -> None:
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
        monkeypatch.setattr(choice, "CONVERT", share * saved / (2 * X.numel()))
        assert Captured(model, X).apply(lower_sparse_conv) == count


# Layers without zeros.


def around(dense: int, *, is_open: bool = False) -> Captured:
    """So many dense 1x1 layers in a row, behind a sparse layer and (unless it is open) before one."""
    layers: list[nn.Module] = [conv(64, 64), nn.ReLU()]
    layers += [module for _ in range(dense) for module in (conv(64, 64, 1, 0), nn.ReLU())]
    model = prune(nn.Sequential(*layers, *([] if is_open else [conv(64, 64)])))
    for module in model:
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
            nn.init.kaiming_normal_(module.weight)
    return Captured(model, torch.randn(2, 64, 20, 20))


@pytest.mark.parametrize("dense", [1, 2])
def test_dense_layers_between_sparse_ones_go_with_them(dense: int) -> None:
    if not library().machine.runs_code:
        pytest.skip("patterns are no machine code here")
    graph = around(dense)
    assert graph.apply(lower_sparse_conv) == 2 + dense
    reasons = [node.meta[CHOICE].reason for node in graph.nodes(SPARSE_CONV)]
    assert reasons.count("between layers that run sparse") == dense
    assert sum(node.meta[CHOICE].saved for node in graph.nodes(SPARSE_CONV)) > 0


def test_dense_layers_stay_where_patterns_are_no_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    without = SimpleNamespace(machine=replace(library().machine, runs_code=False))
    monkeypatch.setitem(lower_sparse_conv.__globals__, "library", lambda: without)
    assert around(1).apply(lower_sparse_conv) == 2


def test_layers_with_few_zeros_go_with_them_without_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    without = SimpleNamespace(machine=replace(library().machine, runs_code=False))
    monkeypatch.setitem(lower_sparse_conv.__globals__, "library", lambda: without)
    monkeypatch.setattr(choice, "library", lambda: without)
    torch.manual_seed(0)
    model = nn.Sequential(*(module for _ in range(3) for module in (conv(256, 256, 1, 0), nn.ReLU())))
    for number, zeros in ((0, 0.9), (2, 0.5), (4, 0.9)):
        weight = model[number].weight
        weight.data[torch.rand_like(weight) < zeros] = 0
    graph = Captured(model, torch.randn(2, 256, 20, 20))
    assert graph.apply(lower_sparse_conv) == 3
    assert [c.reason for c in graph.choices()].count("between layers that run sparse") == 1


def test_dense_layers_that_no_sparse_one_follows_stay() -> None:
    assert around(2, is_open=True).apply(lower_sparse_conv) == 1


def test_dense_layers_that_would_cost_what_the_others_gain_stay() -> None:
    assert around(100).apply(lower_sparse_conv) == 2


def test_dense_model_stays_dense_and_compiles_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled() -> None:
        raise AssertionError("kernels were compiled")

    monkeypatch.setattr(choice, "library", compiled)
    model = nn.Sequential(conv(64, 64), nn.ReLU(), conv(64, 64))
    Captured(model, torch.randn(2, 64, 20, 20)).check_left_alone(lower_sparse_conv, "estimated")


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
    assert "between" in graph.nodes(SPARSE_CONV)[1].meta[CHOICE].reason


@pytest.mark.parametrize("sides", [(0, 1), (1, 0)])
def test_groups_beside_a_dense_layer_stay(sides: tuple[int, int]) -> None:
    graph = mobile(first=sides[0], last=sides[1])
    assert graph.apply(lower_sparse_conv) == 1
    assert graph.reasons().count("grouped") == 1


def test_groups_alone_stay() -> None:
    captured(conv(16, 32, groups=4)).check_left_alone(lower_sparse_conv, "grouped")


def test_groups_whose_result_is_also_returned_stay() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = F.relu(m.b(F.relu(m.a(x))))
        return m.c(y), y

    layers = {"a": conv(16, 48, 1, 0), "b": conv(48, 48, groups=48), "c": conv(48, 16, 1, 0)}
    graph = Captured(prune(Function(forward, **layers)), X)
    assert graph.apply(lower_sparse_conv) == 2
