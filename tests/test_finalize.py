"""``finalize`` gives back the plain model: its classes, its keys, its parameters, and the sparse model's output."""

import copy
import importlib
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn

from autosparse_fx import AutoSparse, GradientAnnealing, finalize, report, sparsify, sparsity

finalize_module = importlib.import_module("autosparse_fx.sparsify")  # the package has a function of that name

# Of torch itself, about a dense LSTM of this kind as well.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

OPEN_LOOP = AutoSparse(target_sparsity=None, threshold_init=-2.5)


class Parametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.own = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.fc(x))


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "linear": (lambda: nn.Linear(6, 4), lambda: torch.randn(3, 6)),
    "strided input": (lambda: Transposing(), lambda: torch.randn(2, 5, 8)),
    "mlp": (reference.mlp, lambda: torch.randn(3, 16)),
    "convnet": (reference.ConvNet, lambda: torch.randn(3, 1, 8, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3), lambda: torch.randn(2, 3, 5, 5)),
    "attention": (lambda: Attention(), lambda: torch.randn(2, 5, 8)),
    "encoder": (encoder, lambda: torch.randn(2, 5, 8)),
    "encoder stack": (lambda: nn.TransformerEncoder(encoder(), 2), lambda: torch.randn(2, 5, 8)),
    "lstm": (lambda: nn.LSTM(4, 6, 2, bidirectional=True), lambda: torch.randn(5, 3, 4)),
    "lstm projected": (lambda: nn.LSTM(4, 6, proj_size=3), lambda: torch.randn(5, 3, 4)),
    "gru": (lambda: nn.GRU(4, 6), lambda: torch.randn(5, 3, 4)),
    "cell": (lambda: nn.LSTMCell(4, 6), lambda: torch.randn(3, 4)),
    "tied": (reference.Tied, lambda: torch.randint(50, (2, 3))),
    "partly parametrized": (Parametrized, lambda: torch.randn(2, 6)),
    "bf16": (lambda: reference.mlp().bfloat16(), lambda: torch.randn(3, 16, dtype=torch.bfloat16)),
    "float64": (lambda: reference.mlp().double(), lambda: torch.randn(3, 16, dtype=torch.float64)),
    "channels_last": (
        lambda: reference.ConvNet().to(memory_format=torch.channels_last),
        lambda: torch.randn(3, 1, 8, 8).to(memory_format=torch.channels_last),
    ),
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.attention(x, x, x)


class Transposing(nn.Module):
    """Without gradients torch multiplies a strided input by another kernel if the weight requires none."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.transpose(0, 1))


def flat(output: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor)]


def masked_model(name: str, granularity: str = "layer") -> tuple[nn.Module, nn.Module, Any]:
    """``(dense, sparse, input)``, about half of the weights of the sparse one masked."""
    make, inputs = MODELS[name]
    dense = make()
    model = sparsify(
        copy.deepcopy(dense), AutoSparse(target_sparsity=None, threshold_init=-2.5, granularity=granularity)
    )
    with torch.no_grad():
        for t_name, t in model.named_parameters():
            if t_name.endswith("_threshold"):
                t.normal_()
    return dense, model, inputs()


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", MODELS)
def test_output_is_unchanged_to_the_last_bit(name: str, grad: bool, training: bool, granularity: str) -> None:
    _, model, x = masked_model(name, granularity)
    model.train(training)
    final = finalize(copy.deepcopy(model))
    with torch.set_grad_enabled(grad):
        for a, b in zip(flat(final(x)), flat(model(x)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", MODELS)
def test_classes_keys_and_parameters_are_those_of_the_dense_model(name: str) -> None:
    dense, model, _ = masked_model(name)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert finalize(model) is model
    assert all(type(a) is type(b) or "Parametrized" in type(a).__name__ for a, b in pairs(model, dense))
    assert list(model.state_dict()) == list(dense.state_dict())
    assert list(dict(model.named_buffers())) == list(dict(dense.named_buffers()))
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(dict(dense.named_parameters(remove_duplicate=False)))
    assert all(after[n] is parameters[n] for n in after)
    for module, plain in pairs(model, dense):
        assert set(vars(module)) == set(vars(plain))
        assert module._non_persistent_buffers_set == plain._non_persistent_buffers_set
    assert {n: (t.dtype, t.shape, t.stride()) for n, t in model.state_dict().items()} == {
        n: (t.dtype, t.shape, t.stride()) for n, t in dense.state_dict().items()
    }


def pairs(model: nn.Module, dense: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    return zip(model.modules(), dense.modules(), strict=True)


@pytest.mark.parametrize("name", MODELS)
def test_zeros_are_real_and_what_was_not_masked_is_untouched(name: str) -> None:
    dense, model, _ = masked_model(name)
    expected = {n: reference.masked(w.detach().clone(), s, 0.0) for n, _, w, s in reference.masked_parameters(model)}
    counts = reference.zero_counts(model)
    finalize(model)
    state = dict(model.named_parameters())
    for n, value in expected.items():
        torch.testing.assert_close(state[n], value.to(state[n].dtype))
        assert int((state[n] == 0).sum()) == counts[n][0] > 0
        assert not torch.signbit(state[n][state[n] == 0]).any()  # +0
    for n, t in dense.named_parameters():
        if n not in expected:
            assert torch.equal(t, state[n]), n


def test_report_and_sparsity_stay_the_same() -> None:
    _, model, _ = masked_model("convnet")
    before, found = sparsity(model), report(model)
    finalize(model)
    assert sparsity(model) == before > 0
    assert [(x.name, x.zeros) for x in report(model).layers] == [(x.name, x.zeros) for x in found.layers]


@pytest.mark.parametrize("one_line", [False, True])
def test_weights_that_no_layer_multiplies_by_are_reported_as_before(one_line: bool) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.shift = nn.Parameter(torch.randn(16, 16) / 4), nn.Parameter(torch.zeros(4, 16))
            self.head = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x @ self.kernel + self.shift)

    model, x = Own(), torch.randn(4, 16)
    assert [layer.name for layer in report(model).layers] == ["head.weight"]
    if one_line:
        options = {"target_sparsity": None, "threshold_init": -2.5, "total_steps": 10}
        torch.compile(model, backend="autosparse", options=options)(x)
    else:
        sparsify(model, OPEN_LOOP, example_inputs=x)
    before = report(model)
    assert {layer.name for layer in before.layers} == {"kernel", "head.weight"}
    after = report(finalize(model))
    assert [(layer.name, layer.zeros) for layer in after.layers] == [(x.name, x.zeros) for x in before.layers]
    assert after.sparsity == before.sparsity == sparsity(model) > 0


@pytest.mark.parametrize("name", ["mlp", "lstm", "tied", "encoder"])
def test_finalized_model_is_an_ordinary_one(name: str) -> None:
    dense, model, x = masked_model(name)
    finalize(model)
    dense.load_state_dict(model.state_dict())  # strict, into a model that never heard of us
    assert all(torch.equal(a, b) for a, b in zip(flat(dense(x)), flat(model(x)), strict=True))
    assert b"autosparse" not in pickle.dumps(model)
    file = io.BytesIO()
    torch.save(model, file)
    sum(t.sum() for t in flat(model(x))).backward()
    assert all(p.grad is not None for p in model.parameters())
    if hasattr(model, "reset_parameters"):
        model.reset_parameters()


@pytest.mark.parametrize("name", ["mlp", "lstm", "tied"])
def test_finalized_model_can_be_made_sparse_again(name: str) -> None:
    _, model, x = masked_model(name)
    finalize(model)
    sparsify(model, AutoSparse(0.9, granularity="channel", threshold_init=-2.0))
    _, fresh, _ = masked_model(name)
    assert set(model.state_dict()) == set(fresh.state_dict())
    assert reference.total_sparsity(model) > 0
    flat(model(x))


def test_finalizing_twice_is_refused() -> None:
    _, model, _ = masked_model("mlp")
    finalize(model)
    with pytest.raises(ValueError, match=r"Sequential is not sparse.*nothing to finalize"):
        finalize(model)


@pytest.mark.parametrize("value", ["no", 0, None])
def test_reach_target_that_is_no_bool_is_refused(value: Any) -> None:
    model = sparsify(nn.Linear(8, 4))
    with pytest.raises(TypeError, match=f"^reach_target must be True or False, got {value!r}$"):
        finalize(model, reach_target=value)
    assert "weight_threshold" in model.state_dict()


def test_part_of_a_model_can_be_finalized() -> None:
    _, model, x = masked_model("mlp")
    expected = model(x)
    finalize(model[0])
    assert type(model[0]) is nn.Linear and type(model[2]) is not nn.Linear
    assert torch.equal(model(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing came late
        assert torch.equal(finalize(model)(x), expected)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head.weight = self.body.weight


def test_part_whose_weight_is_tied_outside_of_it_is_refused_and_unchanged() -> None:
    model, x = sparsify(Tied(), AutoSparse(target_sparsity=None, threshold_init=-2.5)), torch.randn(3, 6)
    before, whole = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"'body\.weight' \[6, 6\] is tied to one of a Linear outside"):
        finalize(model.head)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    copied = copy.deepcopy(model.head)  # tied to nothing
    expected = copied(x)
    assert torch.equal(finalize(copied)(x), expected)
    expected = whole.head(x)
    assert torch.equal(finalize(whole).head(x), expected)


def test_layers_that_were_never_masked_are_a_warning() -> None:
    model = sparsify(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)), AutoSparse(target_sparsity=None))
    model[1] = nn.Linear(6, 3)
    with pytest.warns(UserWarning, match=r"1\.weight came into the model after sparsify, and is not masked"):
        finalize(model)


def test_lstm_is_flattened_and_follows_its_parameters_again() -> None:
    _, model, x = masked_model("lstm")
    finalize(model)
    assert all(a is b for a, b in zip(model._flat_weights, model.parameters(), strict=True))
    with torch.no_grad():
        model.weight_ih_l0.zero_()
    before = model(x)[0]
    model.weight_ih_l0 = nn.Parameter(torch.ones_like(model.weight_ih_l0))
    assert not torch.equal(model(x)[0], before)


# Warnings.


def trained(config: AutoSparse, steps: int, total_steps: int) -> nn.Module:
    model = sparsify(reference.mlp(), config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    GradientAnnealing(model, total_steps, optimizer)
    reference.train(model, optimizer, reference.classification_batches(steps))
    return model


def test_no_warning_where_the_target_was_reached() -> None:
    finalize(trained(AutoSparse(0.8), 40, 40))


def test_no_warning_in_the_open_loop() -> None:
    finalize(sparsify(reference.mlp(), OPEN_LOOP))


def test_warns_of_a_missed_target_with_both_figures() -> None:
    model = trained(AutoSparse(0.9), 10, 100)
    reached = reference.total_sparsity(model)
    with pytest.warns(UserWarning, match=rf"{reached:.4f}.*target 0\.9000.*train to the end of total_steps"):
        finalize(model)
    assert type(model[0]) is nn.Linear  # it is done all the same


def test_warns_where_no_annealer_ever_stepped() -> None:
    model = sparsify(reference.mlp(), AutoSparse(0.9))
    with pytest.warns(UserWarning, match="no GradientAnnealing ever stepped"):
        finalize(model)


def test_warns_of_each_target_apart() -> None:
    model = sparsify(reference.mlp(), AutoSparse(0.9, rules={"4.weight": {"target_sparsity": 0.5}}))
    with pytest.warns(UserWarning) as caught:
        finalize(model)
    texts = sorted(str(w.message) for w in caught)
    assert len(texts) == 2
    assert any("0.5000" in t and "4.weight" in t for t in texts) and any("0.9000" in t for t in texts)


def test_warning_points_at_the_caller() -> None:
    model = sparsify(reference.mlp(), AutoSparse(0.9))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        finalize(model)
    assert [w.filename for w in caught] == [__file__]


def test_an_interrupted_call_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each weight is either masked as before, or written and plain."""
    model = sparsify(nn.Sequential(*(nn.Linear(6, 6) for _ in range(4))), OPEN_LOOP)
    x = torch.randn(3, 6)
    expected, calls = model(x), iter([True, True, False])
    read = finalize_module.masked_value

    def interrupted(*args: Any) -> Tensor:
        if not next(calls):
            raise KeyboardInterrupt
        return read(*args)

    with monkeypatch.context() as patch:
        patch.setattr(finalize_module, "masked_value", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finalize(model)
    assert [type(layer) is nn.Linear for layer in model] == [True, True, False, False]
    assert torch.equal(model(x), expected)
    finalize(model)
    assert all(type(layer) is nn.Linear for layer in model)
    assert torch.equal(model(x), expected)
