"""What sparsify leaves to other tools, and what it refuses."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from sparse_models import masked_names, unchanged
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import autosparse_fx
from autosparse_fx import AutoSparse, dense_weights, finalize, report, sparsify

# Weights that other tools own.


def test_parametrized_and_pruned_weights_stay_dense_with_their_reason() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    parametrizations.weight_norm(model[0])
    parametrizations.spectral_norm(model[1])
    prune.l1_unstructured(model[2], "weight", amount=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old function is deprecated
        nn.utils.weight_norm(model[3])
    x = torch.randn(2, 4)
    model.eval()
    expected = [model[i](x) for i in range(4)]
    sparsify(model, AutoSparse(threshold_init=-1.0))
    assert masked_names(model) == {"4.weight"}
    assert all(torch.equal(model[i](x), expected[i]) for i in range(4))
    skipped = {name: why for name, (_, why) in report(model).skipped.items()}
    assert "parametrize" in skipped["0.parametrizations.weight.original0"]
    assert "parametrize" in skipped["1.parametrizations.weight.original"]
    assert "prune" in skipped["2.weight_orig"]
    assert "weight_norm" in skipped["3.weight_g"] and "weight_norm" in skipped["3.weight_v"]


def test_old_spectral_norm_stays_dense_with_its_own_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.spectral_norm(model[0])
    sparsify(model)
    assert masked_names(model) == {"1.weight"}
    assert "spectral_norm" in report(model).skipped["0.weight_orig"][1]


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


REPARAMETRIZATIONS: dict[str, Callable[[nn.Module], object]] = {
    "parametrize": lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "prune": lambda m: prune.l1_unstructured(m, "weight", amount=0.5),
    "prune custom": lambda m: prune.custom_from_mask(m, "weight", torch.ones(4, 4)),
}


@pytest.mark.filterwarnings(
    "ignore:.*weight_norm.*is deprecated:FutureWarning", "ignore:.*spectral_norm.*:FutureWarning"
)
@pytest.mark.parametrize("name", REPARAMETRIZATIONS)
def test_reparametrizing_a_masked_weight_is_refused_by_name(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    sparsify(model, AutoSparse(threshold_init=-2.0))
    x = torch.randn(2, 4)
    expected = model(x)
    with unchanged(model):
        with pytest.raises(RuntimeError, match=r"weight '0\.weight'.*masked by autosparse_fx"):
            REPARAMETRIZATIONS[name](model[0])
        assert not model[0]._forward_pre_hooks
    assert torch.equal(model(x), expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["parametrize", "weight_norm", "spectral_norm", "prune", "old weight_norm"])
def test_other_parameters_of_a_masked_module_can_be_parametrized(name: str) -> None:
    """What is not masked is none of our business: the bias of a masked layer."""
    model = sparsify(nn.Sequential(nn.Linear(4, 4)), AutoSparse(threshold_init=-2.0))
    expected = model[0].weight.clone()
    {
        "parametrize": lambda: parametrize.register_parametrization(model[0], "bias", Doubled()),
        "weight_norm": lambda: parametrizations.weight_norm(model[0], "bias"),
        "spectral_norm": lambda: parametrizations.spectral_norm(model[0], "bias"),
        "prune": lambda: prune.random_unstructured(model[0], "bias", amount=0.5),
        "old weight_norm": lambda: nn.utils.weight_norm(model[0], "bias"),
    }[name]()
    assert torch.equal(model[0].weight, expected)
    model(torch.randn(2, 4)).sum().backward()


# Bad input.


def test_sparsify_again_with_the_same_config_does_nothing() -> None:
    model = sparsify(reference.mlp(), AutoSparse(0.9))
    with unchanged(model):
        assert sparsify(model, AutoSparse(0.9)) is model


@pytest.mark.parametrize("part", ["model", "parent", "child"])
def test_sparsify_again_with_another_config_is_refused(part: str) -> None:
    model = sparsify(reference.mlp(), AutoSparse(0.9))
    again = {"model": model, "parent": nn.Sequential(model, nn.Linear(4, 4)), "child": model[0]}[part]
    with unchanged(again), unchanged(model), pytest.raises(ValueError, match=r"sparse already.*finalize"):
        sparsify(again, AutoSparse(0.8))


def test_parts_that_a_second_call_adds_are_not_left_dense_silently() -> None:
    """The same config on a larger model: either everything is masked then, or the call is refused."""
    part = sparsify(nn.Linear(4, 4), AutoSparse(0.9))
    model = nn.Sequential(part, nn.Linear(4, 4))
    try:
        sparsify(model, AutoSparse(0.9))
    except ValueError as error:
        assert "sparse already" in str(error)
    else:
        assert masked_names(model) == {"0.weight", "1.weight"}


@pytest.mark.parametrize(
    "model",
    [
        nn.ReLU(),
        nn.Sequential(nn.LayerNorm(4), nn.Embedding(3, 4)),
        nn.Sequential(),
        nn.ParameterList([torch.ones(3, 3)]),
    ],
)
def test_model_with_nothing_to_mask_is_refused(model: nn.Module) -> None:
    with unchanged(model), pytest.raises(ValueError, match=r"no weights to mask.*example_inputs"):
        sparsify(model)


def test_rules_that_leave_nothing_are_refused() -> None:
    model = reference.mlp()
    with unchanged(model), pytest.raises(ValueError, match=r"no weights to mask.*rule"):
        sparsify(model, AutoSparse(rules={"*": None}))


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_weight_that_is_not_real_floating_point_is_refused_by_name(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(torch.ones(4, 4, dtype=dtype), requires_grad=False)
    with unchanged(model), pytest.raises(TypeError, match=rf"'1\.weight'.*{dtype}.*rules"):
        sparsify(model)
    sparsify(model, AutoSparse(rules={"1.weight": None}))  # the cure
    assert masked_names(model) == {"0.weight"}


def test_quantized_tensor_subclass_is_refused_by_name() -> None:
    class Quantized(Tensor):
        pass

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(torch.ones(4, 4).as_subclass(Quantized))
    assert type(model[1].weight) is not nn.Parameter
    with unchanged(model), pytest.raises(TypeError, match=r"'1\.weight'.*Quantized"):
        sparsify(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch.ao itself
def test_dynamically_quantized_model_is_refused() -> None:
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises((TypeError, ValueError), match=r"no weights to mask|quantiz"):
        sparsify(quantized)


@pytest.mark.parametrize("lazy", [nn.LazyLinear(3), nn.LazyConv2d(3, 3)])
def test_lazy_module_is_refused_by_name_until_it_has_seen_an_input(lazy: nn.Module) -> None:
    model = nn.Sequential(lazy)
    with unchanged(model), pytest.raises(ValueError, match=r"'0\.weight'.*lazy.*forward"):
        sparsify(model)
    model(torch.randn(1, 2, 5, 5))
    sparsify(model)
    assert masked_names(model) == {"0.weight"}


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.ModuleList([m])], ids=["root", "inside"])
def test_data_parallel_is_refused(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(nn.DataParallel(reference.mlp()))
    with unchanged(model), pytest.raises(ValueError, match=r"DataParallel.*DistributedDataParallel"):
        sparsify(model)


def test_replicating_a_sparse_model_for_data_parallel_is_refused() -> None:
    model = sparsify(reference.mlp())
    with unchanged(model), pytest.raises(RuntimeError, match=r"DataParallel.*DistributedDataParallel"):
        model[0]._replicate_for_data_parallel()  # what DataParallel calls on every module


@pytest.mark.parametrize("model", [None, torch.ones(3), [nn.Linear(2, 2)], nn.Linear])
def test_what_is_not_a_module_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        sparsify(model)


@pytest.mark.parametrize(
    ("config", "got"),
    [
        (0.9, r"float: pass AutoSparse\(target_sparsity=0\.9\)"),
        ({"target_sparsity": 0.9}, r"dict: pass AutoSparse\(\*\*config\)"),
        (AutoSparse, "type"),
        ("0.9", "str"),
    ],
)
def test_what_is_not_a_config_is_refused(config: Any, got: str) -> None:
    model = reference.mlp()
    with unchanged(model), pytest.raises(TypeError, match=f"^sparsify takes an AutoSparse .*, got {got}$"):
        sparsify(model, config)


@pytest.mark.parametrize("name", ["weight_threshold", "weight_offset"])
def test_attribute_in_the_way_is_refused_by_name(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].register_buffer(name, torch.ones(1))
    with unchanged(model), pytest.raises(ValueError, match=rf"'1\.weight'.*'{name}'"):
        sparsify(model)


@pytest.mark.parametrize(
    "function",
    [finalize, autosparse_fx.param_groups, lambda m: autosparse_fx.GradientAnnealing(m, 10)],
    ids=["finalize", "param_groups", "GradientAnnealing"],
)
def test_what_needs_a_sparse_model_refuses_a_dense_one(function: Callable[[nn.Module], object]) -> None:
    model = reference.mlp()
    with unchanged(model), pytest.raises(ValueError, match="is not sparse"):
        function(model)


def test_dense_weights_of_a_dense_model_does_nothing() -> None:
    model = reference.mlp()
    with unchanged(model), dense_weights(model) as inside:
        assert inside is model


def test_error_inside_a_read_is_not_answered_with_the_dense_weight() -> None:
    model = sparsify(nn.Linear(4, 3))
    del model._buffers["weight_offset"]
    with pytest.raises((RuntimeError, KeyError), match="weight"):
        _ = model.weight
    with pytest.raises((RuntimeError, KeyError), match="weight"):
        model(torch.randn(2, 4))


def test_attribute_error_in_a_read_becomes_a_runtime_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """``nn.Module.__getattr__`` would answer an AttributeError of a property with the dense parameter."""
    model = sparsify(nn.Linear(4, 3))

    def broken(*args: object) -> Tensor:
        raise AttributeError("broken on purpose")

    monkeypatch.setattr("autosparse_fx.masked.threshold_mask", broken)
    with pytest.raises(RuntimeError, match=r"'weight'.*broken on purpose"):
        _ = model.weight


def test_weight_without_a_threshold_reads_as_the_plain_parameter() -> None:
    model = sparsify(nn.Linear(4, 3), AutoSparse(threshold_init=-1.0))
    model._parameters["weight_threshold"] = None
    assert model.weight is model._parameters["weight"]


class Unchanging(nn.Linear):
    """Lets no other class take the place of its own."""

    @property
    def __class__(self) -> Any:
        return Unchanging

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise TypeError("mine")


def test_a_layer_that_cannot_be_masked_leaves_those_before_it_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4), Unchanging(4, 4))
    with unchanged(model), pytest.raises(TypeError, match="mine"):
        sparsify(model)
    assert masked_names(model) == set()
    assert type(model[0]) is nn.Linear and type(model[1]) is nn.LSTM


class UnchangingLSTM(nn.LSTM):
    @property
    def __class__(self) -> Any:
        return UnchangingLSTM

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise TypeError("mine")


def test_a_recurrent_layer_that_cannot_be_masked_still_runs() -> None:
    model = UnchangingLSTM(4, 4)
    with unchanged(model), pytest.raises(TypeError, match="mine"):
        sparsify(model)
    assert model(torch.randn(3, 4))[0].shape == (3, 4)
