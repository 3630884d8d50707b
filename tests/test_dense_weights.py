"""Inside ``dense_weights`` a masked name is the stored parameter, for reading and for writing; outside it is not."""

import copy
import warnings
from collections.abc import Callable

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from autosparse_fx import (
    AutoSparse,
    GradientAnnealing,
    dense_weights,
    finalize,
    report,
    sparsify,
    sparsity,
    thresholds,
)
from autosparse_fx.masked_state import alpha_of

CONFIG = AutoSparse(alpha=0.5, threshold_init=-2.5)


def masked_names(model: nn.Module) -> set[str]:
    return {name for name, *_ in reference.masked_parameters(model)}


def assert_masked(model: nn.Module) -> None:
    """Every masked name reads as the reference says."""
    for name, module, weight, s in reference.masked_parameters(model):
        read = getattr(module, name.rpartition(".")[2])
        assert torch.equal(read, reference.masked(weight, s, 0.0)), name
        assert (read == 0).any() and not torch.equal(read, weight), name


def test_reads_are_the_stored_parameters_inside_and_masked_again_outside() -> None:
    model = sparsify(nn.Sequential(nn.Linear(6, 4), nn.LSTM(4, 4)), CONFIG)
    assert_masked(model)
    with dense_weights(model) as inside:
        assert inside is model
        for name, module, weight, _ in reference.masked_parameters(model):
            assert getattr(module, name.rpartition(".")[2]) is weight
        assert all(a is b for a, b in zip(model[1]._flat_weights[:2], list(model[1].parameters())[:2], strict=True))
    assert_masked(model)


def test_forward_is_dense_inside() -> None:
    dense = reference.mlp()
    model = sparsify(copy.deepcopy(dense), CONFIG)
    x = torch.randn(3, 16)
    with dense_weights(model):
        assert torch.equal(model(x), dense(x))
    assert not torch.equal(model(x), dense(x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model_is_dense_inside_too(backend: str) -> None:
    dense = reference.mlp()
    model = sparsify(copy.deepcopy(dense), CONFIG)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(3, 16)
    outside = compiled(x)
    with dense_weights(model):
        torch.testing.assert_close(compiled(x), dense(x))
    torch.testing.assert_close(compiled(x), outside)
    assert not torch.allclose(outside, dense(x))


WRITES: dict[str, Callable[[nn.Linear], object]] = {
    "nn.init": lambda m: nn.init.constant_(m.weight, 2.0),
    "data": lambda m: m.weight.data.fill_(2.0),
    "data assignment": lambda m: setattr(m.weight, "data", torch.full_like(m.weight, 2.0)),
    "in place": lambda m: m.weight.fill_(2.0),
    "slice": lambda m: m.weight.__setitem__(slice(None), 2.0),
    "copy": lambda m: m.weight.copy_(torch.full_like(m.weight, 2.0)),
    "assignment": lambda m: setattr(m, "weight", nn.Parameter(torch.full((4, 6), 2.0))),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_inside_reach_the_stored_weight(name: str) -> None:
    model = sparsify(nn.Sequential(nn.Linear(6, 4)), CONFIG)
    threshold = model[0].weight_threshold
    with dense_weights(model), torch.no_grad():
        WRITES[name](model[0])
    assert torch.equal(model.state_dict()["0.weight"], torch.full((4, 6), 2.0))
    assert model[0].weight_threshold is threshold
    torch.testing.assert_close(model[0].weight, torch.full((4, 6), 2.0 - torch.sigmoid(torch.tensor(-2.5)).item()))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 4),
    "conv": lambda: nn.Conv2d(3, 4, 3),
    "bilinear": lambda: nn.Bilinear(3, 4, 5),
    "lstm": lambda: nn.LSTM(4, 3, 2, bidirectional=True),
    "gru_cell": lambda: nn.GRUCell(4, 3),
    "conv_transpose": lambda: nn.ConvTranspose1d(3, 4, 3),
}


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("name", LAYERS)
def test_reset_parameters_inside_is_that_of_the_dense_layer(name: str, granularity: str) -> None:
    """All of it: the weights and biases of the dense layer, and nothing of thresholds and offsets."""
    dense = LAYERS[name]()
    model = sparsify(copy.deepcopy(dense), AutoSparse(threshold_init=-2.5, granularity=granularity))
    own = {n: t.clone() for n, t in model.state_dict().items() if n.endswith(("_threshold", "_offset"))}
    torch.manual_seed(7)
    dense.reset_parameters()
    torch.manual_seed(7)
    with dense_weights(model):
        model.reset_parameters()
    state = model.state_dict()
    for n, t in own.items():
        assert torch.equal(state[n], t), n
    for n, t in dense.state_dict().items():
        assert torch.equal(state[n], t), n
    assert_masked(model)


@pytest.mark.parametrize("name", LAYERS)
def test_reset_parameters_outside_is_refused_by_name(name: str) -> None:
    model = sparsify(LAYERS[name](), CONFIG)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"reset_parameters.*dense_weights"):
        model.reset_parameters()
    for n, t in model.state_dict().items():
        assert torch.equal(t, before[n]), n


def test_reset_of_an_attention_layer_outside_is_refused() -> None:
    """Its name has an underscore, but it is what is called to initialise the layer anew."""
    model = sparsify(nn.MultiheadAttention(8, 2), CONFIG)
    before = model.state_dict()["in_proj_weight"].clone()
    with pytest.raises(RuntimeError, match="dense_weights"):
        model._reset_parameters()
    with dense_weights(model):
        model._reset_parameters()
    assert not torch.equal(model.state_dict()["in_proj_weight"], before)


def test_apply_of_an_init_function_inside() -> None:
    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight)
            nn.init.zeros_(module.bias)

    dense = reference.mlp()
    model = sparsify(copy.deepcopy(dense), CONFIG)
    for m in (dense, model):
        torch.manual_seed(1)
        with dense_weights(m):
            m.apply(init)
    for n, t in dense.state_dict().items():
        assert torch.equal(model.state_dict()[n], t), n


# Tying.


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.first = nn.Linear(6, 7, bias=False)
        self.second = nn.Linear(6, 7, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.first(x) + self.second(x)


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_weights_tied_inside_share_one_threshold(granularity: str) -> None:
    model = sparsify(TwoHeads(), AutoSparse(threshold_init=-2.5, granularity=granularity))
    with dense_weights(model):
        model.second.weight = model.first.weight
        model.embed.weight = model.first.weight
    assert model.first._parameters["weight"] is model.second._parameters["weight"] is model.embed._parameters["weight"]
    assert model.first.weight_threshold is model.second.weight_threshold is model.embed.weight_threshold
    assert model.first.weight_offset is model.embed.weight_offset
    assert torch.equal(model.embed.weight, model.first.weight)
    assert sum("threshold" in name for name, _ in model.named_parameters()) == 1
    assert_masked(model)
    (layer,) = report(model).layers
    assert {layer.name, *layer.tied} == {"embed.weight", "first.weight", "second.weight"}
    model(torch.arange(5)).sum().backward()
    finalize_quietly(model)
    assert type(model.embed) is nn.Embedding
    assert list(model.state_dict()) == list(TwoHeads().state_dict())


def finalize_quietly(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        finalize(model)


def test_weights_untied_inside_have_thresholds_of_their_own() -> None:
    model = TwoHeads()
    model.second.weight = model.first.weight
    sparsify(model, CONFIG)
    with torch.no_grad():
        model.first.weight_threshold.fill_(3.0)
    with dense_weights(model):
        model.second.weight = nn.Parameter(model.second.weight.detach().clone())
    assert model.first._parameters["weight"] is not model.second._parameters["weight"]
    assert model.first.weight_threshold is not model.second.weight_threshold
    assert model.first.weight_offset is not model.second.weight_offset
    assert model.second.weight_threshold.item() == 3.0  # each goes on from where it was
    assert masked_names(model) == {"first.weight", "second.weight"}
    names = {layer.name: layer.tied for layer in report(model).layers}
    assert names == {"first.weight": (), "second.weight": ()}
    assert_masked(model)


def test_embedding_untied_inside_is_an_embedding_again() -> None:
    """Embeddings are masked only while they are tied to a masked weight."""
    model = TwoHeads()
    model.first.weight = model.embed.weight
    sparsify(model, CONFIG)
    with dense_weights(model):
        model.embed.weight = nn.Parameter(model.embed.weight.detach().clone())
    assert masked_names(model) == {"first.weight", "second.weight"}
    assert model.embed.weight is model.embed._parameters["weight"]


# Replacing and resizing.


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


# The context itself.


def test_contexts_nest() -> None:
    model = sparsify(reference.mlp(), CONFIG)
    stored = model[0]._parameters["weight"]
    with dense_weights(model):
        with dense_weights(model[0]):
            assert model[0].weight is stored
        assert model[0].weight is stored
    assert model[0].weight is not stored
    assert_masked(model)


def test_context_ends_with_an_exception_and_lets_it_through() -> None:
    model = sparsify(TwoHeads(), CONFIG)
    with pytest.raises(KeyError, match="mine"), dense_weights(model):
        model.second.weight = model.first.weight
        raise KeyError("mine")
    assert model.first.weight_threshold is model.second.weight_threshold
    assert_masked(model)


def test_copy_made_inside_is_masked_outside() -> None:
    model = sparsify(reference.mlp(), CONFIG)
    with dense_weights(model):
        made = copy.deepcopy(model)
        assert torch.equal(made[0].weight, made[0]._parameters["weight"])
    assert_masked(made)


def test_copy_made_inside_has_a_context_of_its_own_afterwards() -> None:
    model = sparsify(reference.mlp(), CONFIG)
    with dense_weights(model):
        made = copy.deepcopy(model)
    with dense_weights(model):
        assert_masked(made)
    with dense_weights(made):
        assert_masked(model)


def test_another_model_is_not_affected() -> None:
    model, other = sparsify(reference.mlp(), CONFIG), sparsify(reference.mlp(), CONFIG)
    with dense_weights(model):
        assert_masked(other)


def test_training_goes_on_after_it() -> None:
    model = sparsify(reference.mlp(), AutoSparse(0.8))
    with dense_weights(model):
        nn.init.xavier_uniform_(model[0].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    GradientAnnealing(model, 40, optimizer)
    reference.train(model, optimizer, reference.classification_batches(40))
    assert abs(reference.total_sparsity(model) - 0.8) < 0.005


# Fusing.


def test_conv_bn_fusion_is_exact_inside() -> None:
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    model = sparsify(nn.Sequential(conv, norm), CONFIG).eval()
    dense = fuse_conv_bn_eval(plain_copy(model)[0], norm)
    with dense_weights(model):
        fused = fuse_conv_bn_eval(model[0], model[1])
        stored = fused._parameters["weight"]
        model[0], model[1] = fused, nn.Identity()
        x = torch.randn(2, 3, 8, 8)
        assert torch.equal(model(x), dense(x))
    assert torch.equal(model.state_dict()["0.weight"], dense.weight) and torch.equal(stored, dense.weight)
    assert_masked(model)


def plain_copy(model: nn.Sequential) -> nn.Sequential:
    """The dense model with the stored weights."""
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    plain.load_state_dict({name: t for name, t in model.state_dict().items() if name in plain.state_dict()})
    return plain


def test_a_weight_that_was_found_by_its_use_stays_masked() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.mix = nn.Embedding(8, 4), nn.ParameterDict({"w": torch.randn(4, 4)})

        def forward(self, x: Tensor) -> Tensor:
            return (self.tokens(x) @ self.mix["w"]) @ self.tokens.weight.t()

    model = sparsify(Tied(), example_inputs=torch.arange(8))
    names = {"tokens.weight", "mix.w"}
    assert set(thresholds(model)) == names
    with dense_weights(model):
        pass
    assert set(thresholds(model)) == names
    with dense_weights(model):
        model.mix = copy.deepcopy(model.mix)
    assert set(thresholds(model)) == names


def test_weights_found_by_their_use_that_are_untied_stay_masked_but_for_an_embedding() -> None:
    class Head(nn.Module):
        def __init__(self, w: nn.Parameter) -> None:
            super().__init__()
            self.w = w

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w.t()

    embedding = nn.Embedding(4, 4)
    model = nn.Sequential(embedding, Head(embedding.weight), Head(nn.Parameter(torch.randn(4, 4))))
    model.append(Head(model[2].w))
    sparsify(model, example_inputs=torch.arange(4))
    assert set(thresholds(model)) == {"0.weight", "2.w"}
    with dense_weights(model):
        for head in (model[1], model[3]):
            head.w = nn.Parameter(head.w.detach().clone())
    for _ in range(2):
        assert set(thresholds(model)) == {"1.w", "2.w", "3.w"}
        with dense_weights(model):
            pass


def test_layer_of_another_kind_in_the_same_place_is_masked_along_its_own_channels() -> None:
    model = sparsify(nn.Sequential(nn.ConvTranspose2d(4, 6, 3)), AutoSparse(granularity="channel", threshold_init=-2.5))
    assert model[0].weight_threshold.shape == (6,)
    with dense_weights(model):
        model[0] = nn.Conv2d(4, 6, 3)  # axis 0 where the other had 1
    assert model[0].weight_threshold.shape == (6,)
    assert_masked(model)
    assert model[0]._autosparse_slots[0].axis == 0


class Mixer(nn.Module):
    """Multiplies by a weight of its own, and by one that a linear layer holds too."""

    def __init__(self, tied: nn.Parameter) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 6)), tied

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a @ self.b


def test_other_weights_of_a_module_stay_masked_when_one_is_untied() -> None:
    linear = nn.Linear(6, 6)
    model = sparsify(nn.Sequential(linear, Mixer(linear.weight)), CONFIG, example_inputs=torch.randn(2, 6))
    with dense_weights(model):
        model[1].b = nn.Parameter(model[1].b.detach().clone())
    assert "1.a" in masked_names(model) and "0.weight" in masked_names(model)
    assert_masked(model)
    model(torch.randn(2, 6)).sum().backward()
    finalize_quietly(model)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_classes_that_were_derived_since_stay_where_nothing_changes() -> None:
    model = sparsify(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)), CONFIG)
    nn.utils.parametrize.register_parametrization(model[0], "bias", Doubled())
    x = torch.randn(3, 6)
    expected, derived = model(x), type(model[0])
    with dense_weights(model):
        pass
    assert type(model[0]) is derived
    assert torch.equal(model(x), expected)
