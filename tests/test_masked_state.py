"""The state of a sparse model goes through all that moves, copies, saves, loads or swaps the state of a module."""

import contextlib
import copy
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from autosparse_fx import AutoSparse, GradientAnnealing, dense_weights, finalize, sparsify

CONFIG = AutoSparse(alpha=0.5, threshold_init=-2.5)


class Everything(nn.Module):
    """One of each kind of masked module, with batch norm's buffers, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.lstm = nn.LSTM(8, 8, batch_first=True, bidirectional=True)
        self.mix = nn.Bilinear(8, 8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.norm(self.conv(x.transpose(1, 2))).transpose(1, 2)
        x = self.encoder(x)
        y, _ = self.lstm(x)
        return self.head(self.mix(y[..., :8].contiguous(), y[..., 8:].contiguous()))


IDS = torch.arange(12).reshape(2, 6) % 11


def sparse_model(config: AutoSparse = CONFIG) -> Everything:
    """A model whose every piece of state differs from its initial value."""
    model = sparsify(Everything(), config)
    with torch.no_grad():
        for name, t in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("_threshold"):
                t.normal_()
            elif name.endswith("_offset"):
                t.add_(torch.randn(t.shape) / 4)
            elif name.endswith("running_var"):
                t.uniform_(0.5, 1.5)
    return model.eval()


def alphas(model: nn.Module) -> list[Tensor]:
    found = {id(b): b for name, b in model.named_buffers(remove_duplicate=False) if "alpha" in name}
    return list(found.values())


def own_state(model: nn.Module) -> list[tuple[str, Tensor]]:
    named = (*model.named_parameters(), *model.named_buffers())
    return [(name, t) for name, t in named if name.endswith(("_threshold", "_offset"))]


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    a, b = found.state_dict(), expected.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name
    with torch.no_grad():
        assert torch.equal(found(IDS), expected(IDS))


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


# Copies.


def through_pickle(model: nn.Module, protocol: int) -> nn.Module:
    return pickle.loads(pickle.dumps(model, protocol=protocol))  # type: ignore[no-any-return]


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "torch.save": through_torch_save,
    **{f"pickle {p}": lambda m, p=p: through_pickle(m, p) for p in range(pickle.HIGHEST_PROTOCOL + 1)},  # type: ignore[misc]
    "deepcopy of a pickle": lambda m: copy.deepcopy(through_pickle(m, 4)),
}


@pytest.mark.parametrize("name", COPIES)
def test_copy_is_equal_and_independent(name: str) -> None:
    model = sparse_model()
    made = COPIES[name](model)
    assert made is not model
    assert_same(made, model)
    assert [type(m) for m in made.modules()] == [type(m) for m in model.modules()]
    expected = model(IDS).detach()
    with torch.no_grad():
        for t in (*made.parameters(), *made.buffers()):
            t.add_(1)
    assert torch.equal(model(IDS), expected)


@pytest.mark.parametrize("name", COPIES)
def test_copy_keeps_what_was_shared(name: str) -> None:
    model = COPIES[name](sparse_model())
    assert len(alphas(model)) == 1
    assert model.embed.weight_threshold is model.head.weight_threshold
    assert model.embed.weight_offset is model.head.weight_offset
    assert model.embed._parameters["weight"] is model.head._parameters["weight"]


@pytest.mark.parametrize("name", COPIES)
def test_copy_can_be_trained_annealed_and_finalized(name: str) -> None:
    model = sparse_model(AutoSparse(target_sparsity=None, alpha=0.5))
    made = COPIES[name](model).train()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    annealer = GradientAnnealing(made, 4, optimizer)
    made(IDS).square().sum().backward()
    optimizer.step()
    assert [a.item() for a in alphas(made)] == [pytest.approx(annealer.alpha)]
    assert [a.item() for a in alphas(model)] == [0.5]
    finalize(made)
    assert list(made.state_dict()) == list(Everything().state_dict())
    assert len(alphas(model)) == 1  # the original is still sparse


def test_copy_of_a_submodule_stands_on_its_own() -> None:
    model = sparse_model()
    conv = copy.deepcopy(model.conv)
    x = torch.randn(1, 8, 6)
    assert torch.equal(conv(x), model.conv(x))
    finalize_quietly(conv)
    assert type(conv) is nn.Conv1d and type(model.conv) is not nn.Conv1d


def finalize_quietly(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        finalize(model)


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


# .to().


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["to", "method", "apply twice"])
def test_cast_leaves_thresholds_offsets_and_alpha_in_float32(dtype: torch.dtype, how: str) -> None:
    model = sparse_model()
    before = [(name, t.clone()) for name, t in own_state(model)]
    if how == "to":
        model.to(dtype)
    elif how == "method":
        model = model.bfloat16() if dtype == torch.bfloat16 else model.half()
    else:
        model.to(dtype).float().to(dtype)
    assert model.conv._parameters["weight"].dtype == dtype and model.norm.running_mean.dtype == dtype
    assert [name for name, _ in own_state(model)] == [name for name, _ in before]
    for (name, t), (_, value) in zip(own_state(model), before, strict=True):
        assert t.dtype == torch.float32, name
        assert torch.equal(t, value), name
    (alpha,) = alphas(model)
    assert alpha.dtype == torch.float32 and alpha.item() == 0.5
    assert model.embed.weight_threshold is model.head.weight_threshold
    assert model.embed.weight_offset is model.head.weight_offset
    if dtype == torch.bfloat16:
        assert model(IDS).dtype == dtype


def test_double_works_and_comes_back() -> None:
    model = sparse_model()
    expected = model(IDS)
    model.double()
    (alpha,) = alphas(model)
    assert alpha.dtype == torch.float32
    assert all(t.dtype in (torch.float32, torch.float64) for _, t in own_state(model))
    assert model.embed.weight_offset is model.head.weight_offset
    out = model(IDS)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.float(), expected, rtol=1e-4, atol=1e-5)
    model.float()
    assert all(t.dtype == torch.float32 for _, t in own_state(model))
    torch.testing.assert_close(model(IDS), expected)


def test_double_then_half_gives_float32_thresholds() -> None:
    model = sparse_model().double().half()
    assert {t.dtype for _, t in own_state(model)} == {torch.float32}


def test_gradients_of_thresholds_stay_float32_through_a_cast() -> None:
    model = sparse_model()
    model(IDS).sum().backward()
    grad = model.conv.weight_threshold.grad.clone()
    model.bfloat16()
    assert model.conv.weight_threshold.grad.dtype == torch.float32
    assert torch.equal(model.conv.weight_threshold.grad, grad)


def test_move_to_another_device_takes_everything_along_and_shares_it_again() -> None:
    model = sparse_model().to("meta")
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert len(alphas(model)) == 1
    assert model.embed.weight_offset is model.head.weight_offset
    assert model(IDS.to("meta")).is_meta


def test_alpha_is_shared_per_device_by_modules_that_are_moved_one_by_one() -> None:
    model = sparse_model()
    model.conv.to("meta")
    model.mix.to("meta")
    assert len(alphas(model)) == 2
    assert alphas(model.conv)[0] is alphas(model.mix)[0]
    assert {a.device.type for a in alphas(model)} == {"cpu", "meta"}


def test_annealer_reaches_every_alpha_after_a_move() -> None:
    model = sparsify(reference.mlp(), AutoSparse(target_sparsity=None, alpha=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    annealer = GradientAnnealing(model, 4, optimizer)
    model.to(torch.bfloat16)
    model(torch.randn(2, 16, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert [a.item() for a in alphas(model)] == [pytest.approx(annealer.alpha)]
    assert 0 < annealer.alpha < 0.5


def test_channels_last_weights_stay_so() -> None:
    model = sparsify(reference.ConvNet(), CONFIG).to(memory_format=torch.channels_last)
    assert model.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    assert model.conv2._parameters["weight"].grad is not None


def test_share_memory_keeps_the_state() -> None:
    model = sparse_model()
    expected = model(IDS)
    model.share_memory()
    assert all(t.is_shared() for t in (*model.parameters(), *model.buffers()))
    assert torch.equal(model(IDS), expected)


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


# The meta device.


def to_empty_filled_with_nan(model: nn.Module) -> nn.Module:
    """``to_empty`` with memory that is sure to be rubbish."""
    torch.use_deterministic_algorithms(True)
    try:
        return model.to_empty(device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)


def meta_model(config: AutoSparse = CONFIG) -> Everything:
    with torch.device("meta"):
        return sparsify(Everything(), config)


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_meta_model_then_to_empty_then_a_sparse_checkpoint(granularity: str) -> None:
    config = AutoSparse(alpha=0.5, threshold_init=-2.5, granularity=granularity)
    source = sparse_model(config)
    model = meta_model(config).to_empty(device="cpu").eval()
    model.load_state_dict(source.state_dict())
    assert_same(model, source)
    assert [a.item() for a in alphas(model)] == [0.5]


def test_meta_model_then_to_empty_sets_thresholds_offsets_and_alpha_again() -> None:
    model = to_empty_filled_with_nan(meta_model())
    for name, t in own_state(model):
        assert not t.is_meta and t.dtype == torch.float32
        assert torch.equal(t, torch.full_like(t, 0.0 if name.endswith("_threshold") else -2.5)), name
    (alpha,) = alphas(model)
    assert alpha.item() == 0.5 and alpha.dtype == torch.float32


def test_meta_model_then_to_empty_then_a_dense_checkpoint_has_the_auto_thresholds_of_its_weights() -> None:
    dense = Everything()
    model = meta_model(AutoSparse()).to_empty(device="cpu")
    with pytest.warns(UserWarning, match="no thresholds"):
        model.load_state_dict(dense.state_dict())
    expected = sparsify(copy.deepcopy(dense)).state_dict()
    for name, t in model.state_dict().items():
        assert torch.equal(t, expected[name]), name


@pytest.mark.parametrize("rubbish", [7.0, 0.0, float("nan")])
def test_meta_model_then_to_empty_then_initialised_gets_the_auto_thresholds_from_the_annealer(
    rubbish: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was in the memory that ``to_empty`` found says nothing about the weights to come."""
    with torch.device("meta"):
        model = sparsify(nn.Linear(64, 64))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda t, device: torch.randn(t.shape, device=device) * rubbish)
        model.to_empty(device="cpu")
    with torch.no_grad():
        model._parameters["weight"].normal_(std=3.0)
        model._parameters["bias"].zero_()
    expected = nn.Linear(64, 64)
    with torch.no_grad():
        expected.weight.copy_(model._parameters["weight"])
    sparsify(expected)
    GradientAnnealing(model, 10)
    assert torch.equal(model.weight_offset, expected.weight_offset)


@pytest.mark.parametrize("how", ["meta", "meta, assigned", "zero-initialised"])
def test_thresholds_that_were_loaded_survive_a_new_annealer(how: str) -> None:
    """Resuming: the model is prepared, loaded, and only then given its annealer."""
    source = sparsify(nn.Linear(8, 8))
    with torch.no_grad():
        source.weight_threshold.fill_(1.5)
        source.weight_offset.fill_(-3.0)
    made = nn.Linear(8, 8, device="cpu" if how == "zero-initialised" else "meta")
    if how == "zero-initialised":
        nn.init.zeros_(made.weight)
    model = sparsify(made)
    if how == "meta":
        model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict(), assign=how == "meta, assigned")
    GradientAnnealing(model, 10)
    assert (model.weight_threshold.item(), model.weight_offset.item()) == (1.5, -3.0)


def test_meta_model_takes_a_sparse_checkpoint_by_assignment() -> None:
    source = sparse_model()
    model = meta_model().eval()
    model.load_state_dict(source.state_dict(), assign=True)
    assert not any(b.is_meta for b in model.buffers())
    assert_same(model, source)
    assert {a.item() for a in alphas(model)} == {0.5}


def test_meta_model_takes_a_dense_checkpoint_by_assignment() -> None:
    dense = Everything().eval()
    model = meta_model(AutoSparse(threshold_init=-2.5)).eval()
    with pytest.warns(UserWarning, match="no thresholds"):
        model.load_state_dict(dense.state_dict(), assign=True)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    expected = sparsify(copy.deepcopy(dense), AutoSparse(threshold_init=-2.5))
    assert_same(model, expected)


def test_to_empty_of_a_real_model_keeps_alpha() -> None:
    """alpha is not in the state_dict, so the load that has to follow could not bring it back."""
    source = sparse_model()
    state = source.state_dict()
    copied = {name: t.clone() for name, t in state.items()}
    model = to_empty_filled_with_nan(sparse_model())
    model.load_state_dict(copied)
    assert {a.item() for a in alphas(model)} == {0.5}


# Assignment and functional calls.


def test_assigned_parameter_becomes_the_stored_weight() -> None:
    model = sparsify(nn.Linear(6, 4), CONFIG)
    new = nn.Parameter(torch.randn(4, 6))
    model.weight = new
    assert model._parameters["weight"] is new and dict(model.named_parameters())["weight"] is new
    _, _, _, s = next(reference.masked_parameters(model))
    assert torch.equal(model.weight == 0, new.abs() <= torch.sigmoid(s))


def test_assigned_parameter_of_a_recurrent_layer_becomes_the_stored_weight() -> None:
    model = sparsify(nn.LSTM(4, 3), CONFIG)
    new = nn.Parameter(torch.zeros(12, 4))
    model.weight_ih_l0 = new
    assert model._parameters["weight_ih_l0"] is new
    x = torch.randn(5, 2, 4)
    assert torch.equal(model(x)[0], model(-x)[0])  # the input has no influence any more


@pytest.mark.parametrize("value", [torch.ones(4, 6), 3.0], ids=["tensor", "number"])
def test_assigned_tensor_is_refused_by_name(value: Any) -> None:
    model = sparsify(nn.Linear(6, 4), CONFIG)
    before = model._parameters["weight"]
    with pytest.raises((TypeError, RuntimeError), match="weight"):
        model.weight = value
    assert model._parameters["weight"] is before


def test_deleting_a_masked_weight_is_refused_by_name() -> None:
    model = sparsify(nn.Sequential(nn.Linear(6, 4)), CONFIG)
    with pytest.raises(RuntimeError, match=r"weight '0\.weight' \[4, 6\] of Linear is masked"):
        del model[0].weight
    assert "weight" in model[0]._parameters
    del model[0].bias  # what is not masked can go


def test_functional_call_masks_the_parameters_that_it_is_given() -> None:
    model = sparse_model()
    others = {name: torch.randn_like(t) if t.is_floating_point() else t for name, t in model.state_dict().items()}
    for name in others:
        if name.endswith("_offset"):
            others[name] = torch.full_like(others[name], -2.0)
        elif name.endswith("running_var"):
            others[name] = others[name].abs() + 0.5
    for name in ("weight", "weight_threshold", "weight_offset"):
        others[f"head.{name}"] = others[f"embed.{name}"]
    expected = copy.deepcopy(model)
    expected.load_state_dict(others)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    torch.testing.assert_close(functional_call(model, others, (IDS,)), expected(IDS))
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name


def test_func_grad_gives_the_gradients_of_backward() -> None:
    model = sparsify(reference.mlp(), CONFIG)
    x = torch.randn(3, 16)
    model(x).square().sum().backward()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    grads = torch.func.grad(lambda p: functional_call(model, p, (x,)).square().sum())(parameters)
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, msg=name)


def test_vmap_over_an_ensemble_masks_each_member_by_its_own_thresholds() -> None:
    members = [sparsify(reference.mlp(), AutoSparse(threshold_init=-2.0 - i)) for i in range(3)]
    state = torch.func.stack_module_state(members)
    x = torch.randn(4, 16)
    found = torch.func.vmap(lambda p, b: functional_call(members[0], (p, b), (x,)))(*state)
    torch.testing.assert_close(found, torch.stack([m(x) for m in members]))
