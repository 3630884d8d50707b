"""Inside ``dense_weights`` a masked name is the stored parameter, for reading and for writing; outside it is not."""

import copy
from collections.abc import Callable

import pytest
import reference
import torch
from masked_names import assert_masked
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from autosparse_fx import (
    AutoSparse,
    GradientAnnealing,
    dense_weights,
    sparsify,
)

CONFIG = AutoSparse(alpha=0.5, threshold_init=-2.5)


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
    model = sparsify(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), CONFIG)
    with pytest.raises(KeyError, match="mine"), dense_weights(model):
        model[1].weight = model[0].weight
        raise KeyError("mine")
    assert model[0].weight_threshold is model[1].weight_threshold
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
