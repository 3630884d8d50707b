"""The state of a masked module: its keys, and what of it loads."""

import contextlib
import copy
import io
import pickle
import weakref
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from masked_models import CONFIG, Everything, alphas, assert_same, own_state, sparse_model
from torch import Tensor, nn

from autosparse_fx import AutoSparse, GradientAnnealing, dense_weights, sparsify, thresholds

# Keys.


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_state_dict_is_that_of_the_dense_model_plus_thresholds_and_offsets(granularity: str) -> None:
    dense = Everything().state_dict()
    model = sparsify(Everything(), AutoSparse(granularity=granularity))
    masked = {f"{name}{kind}" for name in MASKED for kind in ("_threshold", "_offset")}
    assert set(model.state_dict()) == set(dense) | masked
    assert [key for key in model.state_dict() if key in dense] == list(dense)
    assert set(dict(model.named_parameters())) == set(dict(Everything().named_parameters())) | {
        f"{name}_threshold" for name in MASKED if name != "head.weight"
    }


MASKED = [
    "embed.weight",
    "conv.weight",
    "encoder.self_attn.in_proj_weight",
    "encoder.self_attn.out_proj.weight",
    "encoder.linear1.weight",
    "encoder.linear2.weight",
    "lstm.weight_ih_l0",
    "lstm.weight_hh_l0",
    "lstm.weight_ih_l0_reverse",
    "lstm.weight_hh_l0_reverse",
    "mix.weight",
    "head.weight",
]


def test_state_dict_holds_the_stored_weights_and_not_the_masked_ones() -> None:
    dense = Everything()
    expected = {name: t.clone() for name, t in dense.state_dict().items()}
    state = sparsify(dense, AutoSparse(threshold_init=-1.0)).state_dict()
    for name, t in expected.items():
        assert torch.equal(state[name], t), name


@pytest.mark.parametrize("where", ["plain", "no_grad", "frozen", "dense_weights", "lstm"])
def test_weight_norm_is_refused_before_it_takes_anything_away(where: str) -> None:
    layer = nn.LSTM(3, 3) if where == "lstm" else nn.Linear(3, 3)
    sparsify(layer.requires_grad_(where != "frozen"))
    before = list(layer.state_dict())
    contexts = {"no_grad": torch.no_grad(), "dense_weights": dense_weights(layer)}
    with (
        contexts.get(where, contextlib.nullcontext()),
        pytest.warns(FutureWarning),
        pytest.raises(RuntimeError, match="cannot be pruned or normalised"),
    ):
        torch.nn.utils.weight_norm(layer, "weight_ih_l0" if where == "lstm" else "weight")
    assert list(layer.state_dict()) == before


def test_autocast_does_not_keep_the_casts_of_masked_weights() -> None:
    layer = sparsify(nn.Linear(4, 4))
    kept: list[weakref.ref[Tensor]] = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            weight = layer.weight
            F.linear(torch.randn(2, 4), weight)
            kept.append(weakref.ref(weight))
            del weight
            assert kept[-1]() is None


def test_state_that_lost_both_parts_of_a_mask_is_refused() -> None:
    model = sparsify(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    state = model.state_dict()
    del state["0.weight_threshold"], state["0.weight_offset"]
    with pytest.raises(RuntimeError, match=r"0\.weight_threshold and 0\.weight_offset are missing"):
        model.load_state_dict(state)


def test_thresholds_stay_float32_when_a_bfloat16_state_is_assigned() -> None:
    model = sparsify(nn.Sequential(nn.Linear(3, 3)))
    model.load_state_dict({key: value.bfloat16() for key, value in model.state_dict().items()}, assign=True)
    assert model[0].weight_threshold.dtype == model[0].weight_offset.dtype == torch.float32
    assert isinstance(model[0].weight_threshold, nn.Parameter)
    assert model(torch.randn(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_pickled_bytes_name_the_original_class() -> None:
    """Whoever reads the file needs this package, but finds no class that exists in one process only."""
    data = pickle.dumps(sparsify(nn.Linear(3, 2)))
    assert b"torch.nn.modules.linear" in data


# Loading.


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_sparse_checkpoint_loads_exactly(granularity: str, assign: bool) -> None:
    config = AutoSparse(threshold_init=-2.5, granularity=granularity)
    source = sparse_model(config)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    model = sparsify(Everything(), config).eval()
    result = model.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert result.missing_keys == [] and result.unexpected_keys == []
    assert_same(model, source)
    assert len(alphas(model)) == 1


def test_training_that_is_resumed_from_a_checkpoint_equals_the_uninterrupted_one() -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, GradientAnnealing]:
        torch.manual_seed(3)
        model = sparsify(reference.mlp(), AutoSparse(0.8))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, GradientAnnealing(model, 20, optimizer)

    def run(parts: tuple[nn.Module, torch.optim.Optimizer, GradientAnnealing], batches: list[Any]) -> None:
        reference.train(parts[0], parts[1], iter(batches))

    batches = list(reference.classification_batches(20))
    whole = start()
    run(whole, batches)
    first = start()
    run(first, batches[:9])
    saved = copy.deepcopy([part.state_dict() for part in first])
    resumed = start()
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    run(resumed, batches[9:])
    for name, t in whole[0].state_dict().items():
        assert torch.equal(t, resumed[0].state_dict()[name]), name


@pytest.mark.parametrize("strict", [True, False])
def test_dense_checkpoint_loads_after_sparsify_with_one_warning(strict: bool) -> None:
    dense = Everything().eval()
    model = sparse_model(AutoSparse(threshold_init=-2.5, granularity="channel"))
    with pytest.warns(UserWarning, match="no thresholds.*initial values") as caught:
        result = model.load_state_dict(dense.state_dict(), strict=strict)
    assert len(caught) == 1
    assert result.missing_keys == [] and result.unexpected_keys == []
    for name, t in own_state(model):
        assert torch.equal(t, torch.full_like(t, 0.0 if name.endswith("_threshold") else -2.5)), name
    for name, t in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], t), name
    model.load_state_dict(dense.state_dict())  # the second time it is no news


def test_dense_checkpoint_loaded_before_or_after_gives_the_same_model() -> None:
    state = {name: t * 3 for name, t in Everything().state_dict().items()}
    before = Everything()
    before.load_state_dict(state)
    sparsify(before)  # threshold_init="auto": looks at the weights
    after = sparsify(Everything())
    with pytest.warns(UserWarning, match="no thresholds"):
        after.load_state_dict(state)
    for name, t in before.state_dict().items():
        assert torch.equal(t, after.state_dict()[name]), name


def test_loading_a_dense_checkpoint_keeps_the_annealed_alpha() -> None:
    """The annealer decides about alpha, and a checkpoint without thresholds says nothing about it."""
    model = sparsify(reference.mlp(), AutoSparse(target_sparsity=None, alpha=0.5, decay="linear"))
    annealer = GradientAnnealing(model, 10)
    annealer.load_state_dict({"steps": 5, "total_steps": 10})
    expected = annealer.alpha
    assert 0 < expected < 0.5
    with pytest.warns(UserWarning, match="no thresholds"):
        model.load_state_dict(reference.mlp().state_dict())
    assert [a.item() for a in alphas(model)] == [pytest.approx(expected)]


def test_sparse_checkpoint_does_not_load_into_a_dense_model() -> None:
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_threshold"):
        nn.Linear(4, 3).load_state_dict(sparsify(nn.Linear(4, 3)).state_dict())


@pytest.mark.parametrize("lost", ["threshold", "offset"])
@pytest.mark.parametrize("strict", [True, False])
def test_sparse_checkpoint_that_lost_a_part_is_refused_by_name(lost: str, strict: bool) -> None:
    state = sparse_model().state_dict()
    del state[f"conv.weight_{lost}"]
    kept = "offset" if lost == "threshold" else "threshold"
    with pytest.raises(RuntimeError, match=rf"conv\.weight_{lost} is missing although conv\.weight_{kept}"):
        sparsify(Everything(), CONFIG).load_state_dict(state, strict=strict)


@pytest.mark.parametrize("part", ["threshold", "offset"])
@pytest.mark.parametrize("shape", [(2,), (8, 1), (0,)])
def test_sparse_checkpoint_with_a_misshapen_part_is_refused_by_name(part: str, shape: tuple[int, ...]) -> None:
    state = sparse_model().state_dict()
    state[f"conv.weight_{part}"] = torch.zeros(shape)
    with pytest.raises(RuntimeError, match=rf"size mismatch for conv\.weight_{part}"):
        sparsify(Everything(), CONFIG).load_state_dict(state)


def test_checkpoint_of_the_other_granularity_is_refused_by_name() -> None:
    state = sparsify(nn.Linear(4, 3), AutoSparse(granularity="channel")).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for weight_threshold"):
        sparsify(nn.Linear(4, 3)).load_state_dict(state)


def test_sparse_checkpoint_without_the_weights_is_refused_by_name() -> None:
    state = sparse_model().state_dict()
    for kind in ("", "_threshold", "_offset"):
        del state[f"mix.weight{kind}"]
    with pytest.raises(RuntimeError, match=r"Missing key.*mix\.weight"):
        sparsify(Everything(), CONFIG).load_state_dict(state)


def test_partial_load_that_is_not_strict_leaves_the_rest_alone() -> None:
    model = sparse_model()
    expected = {name: t.clone() for name, t in model.state_dict().items()}
    model.load_state_dict({"norm.running_mean": torch.ones(8)}, strict=False)
    for name, t in model.state_dict().items():
        assert torch.equal(t, torch.ones(8) if name == "norm.running_mean" else expected[name]), name


@pytest.mark.parametrize("assign", [False, True])
def test_thresholds_of_another_scale_mean_the_same_cuts(assign: bool) -> None:
    saved, model = (sparsify(nn.Linear(6, 4), AutoSparse(threshold_scale=scale)) for scale in (0.1, 1.0))
    with torch.no_grad():
        saved.weight_threshold.fill_(10.0)
    state = saved.state_dict()
    model.load_state_dict(state, assign=assign)
    torch.testing.assert_close(thresholds(model)["weight"], thresholds(saved)["weight"])
    assert torch.equal(model.weight, saved.weight)
    assert float(state["weight_threshold"]) == 10.0
    model.load_state_dict(model.state_dict())
    torch.testing.assert_close(thresholds(model)["weight"], thresholds(saved)["weight"])
