"""FSDP2 in two processes: weights and thresholds are sharded, and all that is counted is counted over the whole."""

from typing import Any

import pytest
import ranks
import reference
import torch
import torch.distributed as dist
from torch import nn

from autosparse_fx import AutoSparse, GradientAnnealing, report, sparsify, sparsity

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

CASES = [(model, granularity) for model in ("mlp", "recurrent") for granularity in ("layer", "channel")]


def fully_sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for child in model.children():
        if any(True for _ in child.parameters()):
            fully_shard(child)
    return fully_shard(model)


def prepared(model: str, granularity: str) -> nn.Module:
    torch.manual_seed(0)
    return sparsify(ranks.MODELS[model](), AutoSparse(0.8, granularity=granularity)).double()


def train(model: nn.Module, part: slice) -> dict[str, Any]:
    optimizer = ranks.sgd(model)
    annealer = GradientAnnealing(model, ranks.STEPS, optimizer)
    reference.train(model, optimizer, ranks.batches(part=part))
    return ranks.outcome(model, annealer)


def local_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.to_local().shape) for name, p in model.named_parameters()}  # type: ignore[operator]


def not_finite() -> str:
    model = fully_sharded(prepared("mlp", "layer"))
    optimizer = ranks.sgd(model)
    GradientAnnealing(model, ranks.STEPS, optimizer)
    with torch.no_grad():
        shard = model[2].get_parameter("weight").to_local()  # type: ignore[index, operator]
        if dist.get_rank() == 1:  # the others see nothing of it in their shards
            shard.view(-1)[-1] = torch.inf
    try:
        reference.train(model, optimizer, ranks.batches(part=ranks.own_part()))
    except RuntimeError as error:
        return str(error)
    return "no error"


def zeros_of_dense_weights() -> tuple[int, float]:
    """Of a finalized model, say, which nothing masks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    with torch.no_grad():
        model[0].weight[:, ::4] = 0
    model = fully_sharded(model)
    return report(model).layers[0].zeros, sparsity(model)


def everything() -> dict[str, Any]:
    models = [fully_sharded(prepared(*case)) for case in CASES]
    return {
        "shapes": [local_shapes(model) for model in models],
        "trained": [train(model, ranks.own_part()) for model in models],
        "not finite": not_finite(),
        "zeros": zeros_of_dense_weights(),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return ranks.run(everything, tmp_path_factory.mktemp("fsdp2"))


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(case) for case in CASES])
def test_two_processes_train_what_one_does(found: list[dict[str, Any]], case: int) -> None:
    first, second = (rank["trained"][case] for rank in found)
    ranks.assert_same(first, second, exactly=True)
    ranks.assert_same(first, train(prepared(*CASES[case]), slice(None)), exactly=False)
    assert first["sparsity"] == pytest.approx(0.8, abs=0.005) and first["alpha"] == 0


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(case) for case in CASES])
def test_weights_and_thresholds_are_sharded(found: list[dict[str, Any]], case: int) -> None:
    """Along the channels; of a threshold per layer the first rank has all, the second none."""
    plain = dict(prepared(*CASES[case]).named_parameters())
    first, second = (rank["shapes"][case] for rank in found)
    for name, p in plain.items():
        assert first[name] == (-(-len(p) // 2), *p.shape[1:]), name
        assert second[name] == (len(p) // 2, *p.shape[1:]), name


def test_weight_that_is_not_finite_is_named_on_all_ranks(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert "weight '" in rank["not finite"] and "NaN or infinite" in rank["not finite"]


def test_zeros_of_weights_that_are_not_masked_are_counted_over_all_ranks(found: list[dict[str, Any]]) -> None:
    assert [rank["zeros"] for rank in found] == [(32, 0.25)] * 2
