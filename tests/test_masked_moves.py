"""A masked module moves to other devices and dtypes, the meta device included."""

import copy

import pytest
import reference
import torch
from masked_models import CONFIG, IDS, Everything, alphas, assert_same, own_state, sparse_model
from torch import nn

from autosparse_fx import AutoSparse, GradientAnnealing, sparsify

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
