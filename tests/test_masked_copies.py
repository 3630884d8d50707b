"""A masked module is copied, pickled and called functionally as a dense one is."""

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import reference
import torch
from masked_models import CONFIG, IDS, Everything, alphas, assert_same, sparse_model
from torch import Tensor, nn
from torch.func import functional_call

from autosparse_fx import AutoSparse, GradientAnnealing, finalize, sparsify

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


def test_class_of_a_masked_layer_makes_plain_layers() -> None:
    model = sparsify(nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4)))
    made = type(model[0])(3, 5, bias=False)
    assert type(made) is nn.Linear and made.weight.shape == (5, 3) and made.bias is None
    assert type(type(model[1])(4, 8)) is nn.LSTM
    own = sparsify(nn.Sequential(Own()), example_inputs=torch.randn(2, 4))
    assert type(type(own[0])()) is Own and not hasattr(type(own[0])(), "w_threshold")


class Own(nn.Module):
    """Takes no arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class Copied(nn.Linear):
    """Copies itself as many classes do."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width, width)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Copied":
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made


class Reduced(nn.Linear):
    """Says itself how it is copied and pickled."""

    def __reduce__(self) -> Any:
        return Reduced, (self.in_features, self.out_features), self.__dict__


class Stateless(nn.Linear):
    def __reduce__(self) -> Any:
        return Stateless, (self.in_features, self.out_features)


def test_class_that_copies_itself_without_its_state_is_refused() -> None:
    model = sparsify(nn.Sequential(Stateless(4, 4)))
    with pytest.raises(RuntimeError, match=r"keeps nothing of its threshold: copy it before sparsify"):
        copy.deepcopy(model)


class ReducedByType(nn.Linear):
    def __reduce__(self) -> Any:
        return type(self), (self.in_features, self.out_features), self.__dict__


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("make", [Copied, lambda: Reduced(4, 4), lambda: ReducedByType(4, 4)])
def test_copies_that_a_class_makes_of_itself_are_masked(make: Any, copied: Any) -> None:
    model = sparsify(nn.Sequential(make()), AutoSparse(target_sparsity=None, threshold_init=-1.0))
    made = copied(model)
    assert type(made[0]) is type(model[0]) and torch.equal(made[0].weight, model[0].weight)
    assert bool((made[0].weight == 0).any())


class Registered(nn.Linear):
    """Keeps the classes that derive from it, by a key that they must give."""

    known: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, *, key: str, **kwargs: Any) -> None:
        Registered.known[key] = cls


def test_base_that_registers_its_subclasses_does_not_see_ours() -> None:
    model = sparsify(nn.Sequential(Registered(4, 4)))
    assert isinstance(model[0], Registered) and not Registered.known
    assert (model[0](torch.randn(2, 4)).shape) == (2, 4)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.w)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_graph_module_that_holds_a_masked_weight_itself_is_not_copied_without_its_threshold(copied: Any) -> None:
    x = torch.randn(2, 4)
    model = sparsify(torch.fx.symbolic_trace(Functional()), example_inputs=x)
    with pytest.raises(RuntimeError, match=r"'w' \[4, 4\] .* copy it before sparsify or after finalize"):
        copied(model)
    plain = type(model)(nn.Module(), torch.fx.Graph())
    assert isinstance(plain, torch.fx.GraphModule) and not hasattr(plain, "_autosparse_slots")
    finalize_quietly(model)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_classes_live_as_long_as_modules_of_them() -> None:
    """And those that a GraphModule makes for itself no longer."""
    kept, model = sparse_layer(), sparsify(torch.fx.symbolic_trace(Functional()), example_inputs=torch.randn(2, 4))
    classes = [weakref.ref(type(model)), weakref.ref(type(model)._autosparse_base)]
    assert type(sparse_layer()) is type(copy.deepcopy(kept)) is type(through_pickle(kept, 4)) is type(kept)
    del model
    torch._dynamo.reset()  # which has captured it
    gc.collect()
    gc.collect()  # the base, which is part of the key of its subclass
    assert [cls() for cls in classes] == [None, None]
    stored = pickle.dumps(kept)
    del kept
    gc.collect()
    assert type(pickle.loads(stored)) is type(sparse_layer())


def sparse_layer() -> nn.Module:
    return sparsify(nn.Linear(4, 4), AutoSparse(target_sparsity=None))
