"""What the one-line form refuses, and what it leaves as it is."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from hidden.compare import INIT, check, error, one_line, without_inductor
from hidden.compare import eager as hidden_eager
from torch import Tensor, nn

from autosparse_fx import AutoSparse, finalize, sparsify, thresholds

# All of torch itself: where a compiled graph begins with a computed tensor.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
MLP = {"0.weight", "2.weight", "4.weight"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_inductor(monkeypatch)


class Broken(nn.Module):
    """``body``, a graph break, ``head``."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, width), nn.Linear(width, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.body(x))
        torch._dynamo.graph_break()
        return self.head(x)


def test_mode_is_accepted_beside_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def compile_fx(gm: Any, inputs: Any, *, config_patches: dict[str, Any], **_: Any) -> Callable[..., Any]:
        seen.append(config_patches)
        return gm.forward  # type: ignore[no-any-return]

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    model = reference.mlp()
    assert check(model, X, call=one_line(model, mode="max-autotune-no-cudagraphs")) == MLP
    assert seen[0]["max_autotune"] is True


def test_prepared_model_with_options_is_refused() -> None:
    model = sparsify(reference.mlp(), AutoSparse(threshold_init=INIT))
    text = error(one_line(model), X)
    assert "was prepared with sparsify" in text and "without the options total_steps" in text
    model = sparsify(Broken(), AutoSparse(threshold_init=INIT, rules={"body.weight": None}))
    assert "was prepared with sparsify" in error(one_line(model), X)  # by the second graph: the first has no mask


def test_training_without_options_is_refused_with_the_cure() -> None:
    text = error(torch.compile(reference.mlp(), backend="autosparse"), X)
    assert "not sparse" in text and "total_steps" in text and "autosparse_fx.sparsify" in text


def test_eager_call_stays_dense() -> None:
    """Documented: hidden masks are in compiled graphs only."""
    model = reference.mlp()
    dense = copy.deepcopy(model)
    assert not torch.equal(one_line(model)(X), dense(X))
    assert torch.equal(model(X), dense(X))


def test_model_without_any_weight_runs() -> None:
    model = nn.Sequential(nn.Embedding(5, 8), nn.LayerNorm(8), nn.PReLU())
    ids = torch.arange(5)
    torch.testing.assert_close(one_line(model)(ids), model(ids))
    assert not thresholds(model)


def test_finalized_model_compiled_without_options_trains_as_it_is() -> None:
    model = reference.mlp()
    step = one_line(model, target_sparsity=None)
    expected = step(X)
    finalize(model)
    torch.testing.assert_close(step(X), expected)
    torch._dynamo.reset()
    plain = torch.compile(model, backend="autosparse")
    torch.testing.assert_close(plain(X), expected)
    plain(X).sum().backward()
    assert (model[0].weight.grad != 0).any() and torch.equal(plain(X), model(X)) and not thresholds(model)


# Weights of other kinds.


class Product(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 4)
        self.odd = nn.Parameter(torch.ones(4, 4, dtype=dtype), requires_grad=dtype.is_complex)

    def forward(self, x: Tensor) -> Tensor:
        return (self.fc(x).to(self.odd.dtype) @ self.odd).real


def test_integer_weights_are_left_alone() -> None:
    model = Product(torch.int32)
    one_line(model)(X)
    assert set(thresholds(model)) == {"fc.weight"}


def test_complex_weights_are_refused_by_name() -> None:
    model = Product(torch.complex64)
    text = error(one_line(model), X)
    assert "'odd'" in text and "complex64" in text and "rules" in text and not thresholds(model)


def test_cure_for_complex_weights_by_a_rule_works() -> None:
    model = Product(torch.complex64)
    one_line(model, rules={"odd": None})(X)
    assert set(thresholds(model)) == {"fc.weight"}


def test_gradients_by_torch_func_inside_the_region_are_refused_by_name() -> None:
    model = reference.mlp()

    def loss(p: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, p, (X,)).square().sum()  # type: ignore[no-any-return]

    text = error(one_line(lambda p: torch.func.grad(loss)(p)), dict(model.named_parameters()))
    assert "torch.func differentiates with respect to the weight" in text and "sparsify(model)" in text
    y = one_line(lambda x: torch.func.vmap(model)(x))(X)  # with respect to other tensors it works
    torch.testing.assert_close(y, hidden_eager(model)(X))


def test_weight_of_a_tensor_subclass_is_refused() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model = nn.Linear(16, 4)
    model.weight = nn.Parameter(TwoTensor(model.weight.detach(), model.weight.detach().clone()))
    text = error(one_line(model), X)
    assert "'weight'" in text and "TwoTensor" in text and not thresholds(model)


def test_compiling_a_graph_anew_forgets_nothing() -> None:
    """Dynamo begins the second graph again when ``p`` changes, and tells the backend so by raising."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor, p: float) -> Tensor:
            return F.dropout(torch.compiler.disable(self.head)(self.body(x)), p)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = one_line(model)
    for p in (0.5, 0.25):
        compiled(X, p).sum().backward()
    assert set(thresholds(model)) == {"body.weight"}
    assert "weight 'head.weight' [16, 16] is trained, but no compiled graph has masked it" in error(optimizer.step)


def test_a_rule_that_names_a_module_says_how_to_name_its_weights() -> None:
    text = error(one_line(nn.Sequential(reference.mlp()), rules={"0": None}), X)
    assert "options: rules: '0' matches no parameter of the model: '0' is a module: write '0.*'" in text


def test_a_cut_that_was_taken_for_a_logit_is_told() -> None:
    with pytest.warns(UserWarning, match=r"weight '0\.weight' begins with only zeros.*threshold_init=0\.5 is a logit"):
        one_line(reference.mlp(), threshold_init=0.5)(X)
