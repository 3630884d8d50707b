"""Layers that are reset, resized, replaced or moved inside ``dense_weights`` have fitting masks afterwards."""

import pytest
import reference
import torch
from masked_names import assert_masked, masked_names
from torch import nn

from autosparse_fx import (
    AutoSparse,
    GradientAnnealing,
    dense_weights,
    finalize,
    sparsify,
    sparsity,
)
from autosparse_fx.masked_state import alpha_of

CONFIG = AutoSparse(alpha=0.5, threshold_init=-2.5)


@pytest.mark.parametrize(("channels", "kept"), [(6, 4), (4, 4), (3, 3)])
def test_channel_thresholds_follow_a_resized_weight(channels: int, kept: int) -> None:
    model = sparsify(nn.Sequential(nn.Linear(6, 4)), AutoSparse(threshold_init=-2.5, granularity="channel"))
    with torch.no_grad():
        model[0].weight_threshold.copy_(torch.arange(4.0))
        model[0].weight_offset.copy_(-torch.arange(1.0, 5.0))
    with dense_weights(model):
        model[0].weight = nn.Parameter(torch.randn(channels, 6) / 4)
        model[0].bias = nn.Parameter(torch.zeros(channels))
        model[0].out_features = channels
    module = model[0]
    assert module.weight_threshold.shape == module.weight_offset.shape == (channels,)
    assert module.weight_threshold.tolist() == [*range(kept), *[0.0] * (channels - kept)]
    assert module.weight_offset.tolist() == [*(-1.0 - i for i in range(kept)), *[-2.5] * (channels - kept)]
    assert model(torch.randn(2, 6)).shape == (2, channels)
    assert_masked(model)


def trained(target: float = 0.9) -> nn.Module:
    """With thresholds that have come far from where they began."""
    model = sparsify(reference.mlp(), AutoSparse(target_sparsity=target))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    GradientAnnealing(model, 20, optimizer)
    for _ in range(20):
        model(torch.randn(8, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def zeros_in(weight: torch.Tensor) -> float:
    return float((weight == 0).float().mean())


def zeros(layer: nn.Module) -> float:
    return zeros_in(layer.weight)


def test_weights_that_are_initialised_anew_have_the_masks_of_new_ones() -> None:
    model, fresh = trained(), sparsify(reference.mlp(), AutoSparse(target_sparsity=0.9))
    with dense_weights(model):
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    assert sparsity(model) == pytest.approx(sparsity(fresh), abs=0.02)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    annealer = GradientAnnealing(model, 200, optimizer)
    model(torch.randn(8, 16)).sum().backward()
    optimizer.step()
    assert annealer.scheduled_sparsity < 0.05  # it begins anew


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0])
def test_module_that_takes_the_place_of_another_is_as_sparse(scale: float) -> None:
    """Whatever the scale of its weights; a copy of the old one is masked exactly as that was."""
    model = trained()
    old, offset = model[2], model[2].weight_offset.clone()
    new = nn.Linear(64, 64)
    with torch.no_grad():
        new.weight.copy_(scale * old._parameters["weight"])
    before = old.weight.detach().clone()
    with dense_weights(model):
        model[2] = new
    torch.testing.assert_close(model[2].weight.detach(), scale * before, rtol=1e-4, atol=1e-6)
    assert (scale == 1) == torch.equal(model[2].weight_offset, offset)
    with dense_weights(model):
        model[2] = nn.Linear(64, 64)
    assert 0.3 < zeros(model[2]) < 0.99


def test_module_of_another_sparse_model_brings_its_thresholds() -> None:
    model, other = trained(), trained(0.5)
    expected, alpha = other[2].weight.detach().clone(), alpha_of(model[0])
    with dense_weights(model):
        model[2] = other[2]
    assert torch.equal(model[2].weight, expected)
    assert model[2]._autosparse.plan is model[0]._autosparse.plan and alpha_of(model[2]) is alpha


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_module_with_several_weights_brings_all_thresholds(scale: float) -> None:
    model, other = (
        sparsify(nn.Sequential(nn.LSTM(8, 8)), AutoSparse(target_sparsity=None, threshold_init=-2.5, threshold_scale=s))
        for s in (0.1, scale)
    )
    with torch.no_grad():
        for name, p in other.named_parameters():
            if name.endswith("_threshold"):
                p.fill_(5.0)
    expected = [p.clone() for p in (other[0].weight_ih_l0.detach(), other[0].weight_hh_l0.detach())]
    with dense_weights(model):
        model[0] = other[0]
    torch.testing.assert_close([model[0].weight_ih_l0.detach(), model[0].weight_hh_l0.detach()], expected)
    assert zeros_in(expected[0]) > 0.3
    GradientAnnealing(model, 10)


def test_layers_that_are_moved_keep_their_masks_and_places_keep_their_rules() -> None:
    rules = {"2.weight": {"target_sparsity": 0.5}}
    model = sparsify(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), AutoSparse(threshold_init=-2.5, rules=rules))
    with torch.no_grad():
        for i, layer in enumerate(model):
            layer.weight_offset.add_(0.3 * i)
    first, second, third = model
    masked = {layer: layer.weight.detach().clone() for layer in model}
    with dense_weights(model):
        model[0], model[1], model[2] = third, first, second
    for layer, expected in masked.items():
        assert torch.equal(layer.weight, expected)
    weights = [layer._autosparse.weights["weight"] for layer in model]
    assert [(w.name, w.config.target_sparsity) for w in weights] == [
        ("0.weight", 0.8),
        ("1.weight", 0.8),
        ("2.weight", 0.5),
    ]
    model = sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), AutoSparse(threshold_init=-2.5))
    masked = {layer: layer.weight.detach().clone() for layer in model}
    new = nn.Linear(8, 8)
    with torch.no_grad():
        new.weight.mul_(0.1)
    with dense_weights(model):
        model.insert(0, new)  # and all others are one further
    assert all(torch.equal(layer.weight, expected) for layer, expected in masked.items())
    assert 0 < zeros(model[0]) < 1
    assert len({id(layer._parameters["weight_threshold"]) for layer in model}) == 3
    assert len({id(layer._autosparse.weights["weight"]) for layer in model}) == 3


def test_copy_that_has_grown_is_cut_as_it_was() -> None:
    model = trained()
    old, masked = model[4], model[4].weight.detach().clone()
    grown = nn.Linear(64, 20)
    with torch.no_grad():
        grown.weight.copy_(old._parameters["weight"].mean(0, keepdim=True))
        grown.weight[: len(masked)] = old._parameters["weight"]
    with dense_weights(model):
        model[4] = grown
    assert torch.equal(model[4].weight[: len(masked)], masked)


def test_finalized_inside_is_finalized() -> None:
    for whole in (True, False):
        model = sparsify(reference.mlp(), AutoSparse(target_sparsity=None, threshold_init=-2.5))
        with dense_weights(model):
            finalize(model if whole else model[0])
            model[4] = nn.Linear(64, 10)
        assert masked_names(model) == (set() if whole else {"2.weight", "4.weight"})


def test_state_that_is_loaded_inside_by_assignment_stays() -> None:
    model, other = trained(), trained(0.5)
    state = {name: t.clone() for name, t in other.state_dict().items()}
    with dense_weights(model):
        model.load_state_dict(state, assign=True)
    for name, t in model.state_dict().items():
        assert torch.equal(t, state[name]), name
    assert_masked(model)


def test_meta_model_that_becomes_real_inside() -> None:
    with torch.device("meta"):
        model = sparsify(reference.mlp(), CONFIG)
    with dense_weights(model):
        model.to_empty(device="cpu")
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert_masked(model)


def test_replaced_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = sparsify(reference.mlp(), CONFIG)
        with dense_weights(model):
            model[4] = nn.Linear(64, 10)
    assert "4.weight" in masked_names(model) and model[4].weight.is_meta


def test_weights_tied_to_the_outside_of_a_part_stay_known() -> None:
    model = nn.ModuleDict({"enc": nn.Sequential(nn.Linear(16, 16)), "dec": nn.Sequential(nn.Linear(16, 16))})
    model["dec"][0].weight = model["enc"][0].weight
    sparsify(model, AutoSparse(target_sparsity=None, threshold_init=-2.5))
    with dense_weights(model["dec"]):
        pass
    with pytest.raises(ValueError, match=r"tied to one of a Linear outside"):
        finalize(model["dec"])
    with dense_weights(model):
        model["dec"][0].weight = nn.Parameter(model["enc"][0].weight.detach().clone())
    finalize(model["dec"])
    assert masked_names(model) == {"enc.0.weight"}


def test_replaced_module_is_masked_in_its_place() -> None:
    model = sparsify(reference.mlp(), CONFIG)
    with dense_weights(model):
        model[4] = nn.Linear(64, 10)
    assert type(model[4]) is type(model[0])
    assert masked_names(model) == {"0.weight", "2.weight", "4.weight"}
    assert "4.weight_threshold" in model.state_dict()
    assert_masked(model)


def test_module_replaced_by_another_kind_is_treated_as_what_it_is() -> None:
    """A norm that takes the place of a linear layer is a norm."""
    model = sparsify(reference.mlp(), CONFIG)
    with dense_weights(model):
        model[0] = nn.Identity()
        model[2] = nn.LayerNorm(64)
    assert masked_names(model) == {"4.weight"}
    assert type(model[2]) is nn.LayerNorm


def test_removed_module_is_simply_gone() -> None:
    model = sparsify(reference.mlp(), CONFIG)
    with dense_weights(model):
        del model[2:]
    assert masked_names(model) == {"0.weight"}
    assert_masked(model)


def test_layer_left_dense_by_a_rule_stays_dense() -> None:
    model = sparsify(reference.mlp(), AutoSparse(threshold_init=-2.5, rules={"2.weight": None}))
    with dense_weights(model):
        nn.init.ones_(model[2].weight)
    assert masked_names(model) == {"0.weight", "4.weight"}


def test_thresholds_stay_the_same_objects_where_nothing_changed() -> None:
    model = sparsify(reference.ConvNet(), CONFIG)
    before = [(n, id(p)) for n, p in model.named_parameters()] + [(n, id(b)) for n, b in model.named_buffers()]
    classes = [type(m) for m in model.modules()]
    with dense_weights(model):
        pass
    assert [(n, id(p)) for n, p in model.named_parameters()] + [(n, id(b)) for n, b in model.named_buffers()] == before
    assert [type(m) for m in model.modules()] == classes


def test_layer_of_another_kind_in_the_same_place_is_masked_along_its_own_channels() -> None:
    model = sparsify(nn.Sequential(nn.ConvTranspose2d(4, 6, 3)), AutoSparse(granularity="channel", threshold_init=-2.5))
    assert model[0].weight_threshold.shape == (6,)
    with dense_weights(model):
        model[0] = nn.Conv2d(4, 6, 3)  # axis 0 where the other had 1
    assert model[0].weight_threshold.shape == (6,)
    assert_masked(model)
    assert model[0]._autosparse_slots[0].axis == 0
