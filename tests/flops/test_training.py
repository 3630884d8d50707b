"""training_flops: the formulas of the literature, against sums over every step of a history by hand."""

import pytest
import torch
from torch import nn

from autosparse_fx import AutoSparse, GradientAnnealing, sparsify
from autosparse_fx.flops import ModelFlops, count_flops
from autosparse_fx.flops.training import training_flops

# Linear(3, 4) and Linear(4, 5) over two rows: forward and weight gradient 24 and 40 MACs, input gradient 0 and 40.
FINAL = {"0.weight": 0.5, "2.weight": 0.9}
DENSE = 64 + 40 + 64


def flops() -> ModelFlops:
    return count_flops(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5)), torch.randn(2, 3))


def step_cost(first: float, second: float, *, settled: bool) -> float:
    """Of one step at these sparsities of the two weights."""
    forward, inputs = 24 * (1 - first) + 40 * (1 - second), 40 * (1 - second)
    return forward + inputs + (forward if settled else 64)


def test_a_constant_training_costs_what_one_step_costs() -> None:
    cost = training_flops(flops(), [1, 10], [1.0, 1.0], [FINAL, FINAL])
    assert cost.dense == DENSE
    assert cost.sparse == pytest.approx(step_cost(0.5, 0.9, settled=False))
    assert cost.fraction == pytest.approx(cost.sparse / DENSE)
    settled = training_flops(flops(), [1, 10], [0.0, 0.0], [FINAL, FINAL])
    assert settled.sparse == pytest.approx(step_cost(0.5, 0.9, settled=True))
    assert training_flops(flops(), [5], [1.0], [{}]).fraction == 1


def test_the_mean_is_over_steps_and_not_over_records() -> None:
    """Between two records the cost is what lies between; before the first it is that of the first."""
    steps, alphas = [2, 4, 10], [1.0, 0.5, 0.0]
    sparsities = [{"0.weight": 0.0}, {"0.weight": 0.5}, FINAL]
    costs = [step_cost(0, 0, settled=False), step_cost(0.5, 0, settled=False), step_cost(0.5, 0.9, settled=True)]
    by_hand = (2 * costs[0] + 2 * (costs[0] + costs[1]) / 2 + 6 * (costs[1] + costs[2]) / 2) / 10
    assert training_flops(flops(), steps, alphas, sparsities).sparse == pytest.approx(by_hand)


def test_str_has_sparse_weight_gradients_throughout() -> None:
    sparsities = [{"0.weight": 0.2}, FINAL]
    costs = [step_cost(0.2, 0, settled=True), step_cost(0.5, 0.9, settled=True)]
    expected = (1 * costs[0] + 3 * (costs[0] + costs[1]) / 2) / 4
    for alphas in ([1.0, 0.5], [0.0, 0.0]):
        cost = training_flops(flops(), [1, 4], alphas, sparsities)
        assert cost.others["STR"] == pytest.approx(expected)
        assert (cost.sparse == pytest.approx(expected)) == (alphas[0] == 0)


def test_static_methods_know_the_final_sparsity_only() -> None:
    """RigL: (3 f_S * 100 + 2 f_S + f_D) / 101, with f_D the dense weight gradient. MEST: 3 f_S."""
    cost = training_flops(flops(), [1, 50], [1.0, 0.0], [{}, FINAL])
    f_s, grown = step_cost(0.5, 0.9, settled=True), step_cost(0.5, 0.9, settled=False)
    assert cost.others["RigL"] == pytest.approx((100 * f_s + grown) / 101)
    assert cost.others["MEST"] == pytest.approx(f_s)
    assert cost.other_fractions == {name: pytest.approx(macs / DENSE) for name, macs in cost.others.items()}


def test_gmp_follows_the_cubic_schedule_with_dense_weight_gradients() -> None:
    """Dense until 20 %, at the final sparsity from 80 % on, and a cubic between; integrated here in small steps."""
    points = 20_000
    total = 0.0
    for i in range(points):
        done = min(1.0, max(0.0, ((i + 0.5) / points - 0.2) / 0.6))
        reached = 1 - (1 - done) ** 3
        total += step_cost(0.5 * reached, 0.9 * reached, settled=False)
    cost = training_flops(flops(), [1, 50], [1.0, 0.0], [{}, FINAL])
    assert cost.others["GMP"] == pytest.approx(total / points, rel=1e-4)


def test_sparser_is_cheaper_in_every_method() -> None:
    costs = [training_flops(flops(), [1, 9], [1.0, 0.0], [{}, dict.fromkeys(FINAL, s)]) for s in (0.5, 0.9, 1.0)]
    for name in costs[0].others:
        assert costs[0].others[name] > costs[1].others[name] > costs[2].others[name]
    assert costs[0].sparse > costs[1].sparse > costs[2].sparse


def test_a_recorded_training() -> None:
    """From the history of an annealer, whose names are those of the counts."""
    model = sparsify(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5)), AutoSparse(target_sparsity=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    annealer = GradientAnnealing(model, 10, optimizer)
    for _ in range(10):
        model(torch.randn(2, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    records = annealer.history.records
    cost = training_flops(
        count_flops(model, torch.randn(2, 3)),
        [r.step for r in records],
        [r.alpha for r in records],
        [r.sparsity for r in records],
    )
    assert cost.others["MEST"] < cost.others["STR"] < cost.sparse < cost.dense == DENSE


def test_errors() -> None:
    counts = flops()
    with pytest.raises(ValueError, match="no records"):
        training_flops(counts, [], [], [])
    for steps in ([0, 1], [2, 2], [3, 1], [-1, 4]):
        with pytest.raises(ValueError, match="rising steps from 1"):
            training_flops(counts, steps, [1.0, 0.0], [FINAL, FINAL])
    dynamic = count_flops(nn.Linear(3, 4), torch.randn(2, 3), [{0: "n"}])
    with pytest.raises(ValueError, match="depend on n: count without dynamic_shapes"):
        training_flops(dynamic, [1], [1.0], [{}])


def test_records_of_unequal_number() -> None:
    with pytest.raises(ValueError, match=r"(2|3).*record"):
        training_flops(flops(), [1, 2, 3], [1.0, 0.5], [{}, {}, {}])


def test_a_history_of_another_model() -> None:
    """Or of the same one in a wrapper: nothing would be sparse in the result, without a word."""
    with pytest.raises(ValueError, match=r"module\.0\.weight"):
        training_flops(flops(), [1, 2], [1.0, 0.0], [{}, {f"module.{name}": s for name, s in FINAL.items()}])


def test_a_model_without_products() -> None:
    """Nothing was to be computed, and nothing was saved."""
    cost = training_flops(count_flops(nn.ReLU(), torch.randn(2, 3)), [1], [1.0], [{}])
    assert cost.fraction == 1
