"""ModelFlops: totals, layers and sparsities, alike for every form that a model is in."""

import math
from typing import Any

import pytest
import reference
import sympy
import torch
from flops.compare import Around, Count, numbers
from torch import Tensor, nn

import autosparse_fx
from autosparse_fx import AutoSparse
from autosparse_fx.flops import ModelFlops, count_flops
from autosparse_fx.flops.product import sparsity_symbol

X = torch.randn(2, 3)


def at(flops: ModelFlops, **sparsities: float) -> tuple[Any, Any, Any]:
    """Sparse forward, input gradient and weight gradient."""
    known = {name.replace("_", "."): value for name, value in sparsities.items()}
    sparse = flops.sparse
    return tuple(flops.evaluate(c, known) for c in (sparse.forward, sparse.input_gradient, sparse.weight_gradient))


def two() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))


def test_sparse_counts_are_expressions_in_the_sparsities_of_the_weights() -> None:
    """Forward and input gradient skip zeros; the weight gradient does so once alpha is 0."""
    flops = count_flops(two(), X)
    s, t = sparsity_symbol("0.weight"), sparsity_symbol("2.weight")
    assert flops.sparse.forward.equals(24 * (1 - s) + 40 * (1 - t))
    assert flops.sparse.input_gradient.equals(40 * (1 - t))
    assert flops.sparse.weight_gradient == 64
    assert flops.settled.weight_gradient.equals(flops.sparse.forward)
    assert flops.settled.input_gradient == flops.sparse.input_gradient
    assert flops.sparse.step.equals(flops.sparse.forward + flops.sparse.input_gradient + 64)
    assert not flops.dense.step.free_symbols


def test_evaluate() -> None:
    """A weight that is not named is dense; counts of dense weights are whole numbers."""
    flops = count_flops(two(), X)
    values = at(flops, **{"2_weight": 0.75})
    assert values == (34, 10, 64)
    assert isinstance(flops.evaluate(flops.dense.forward), int)
    assert isinstance(flops.evaluate(flops.sparse.forward), int)
    assert flops.evaluate(flops.sparse.forward, {"0.weight": 1.0, "2.weight": 1.0}) == 0


def test_evaluate_with_sizes() -> None:
    """An expression while one is missing, a number then; a size that is none is an error."""
    flops = count_flops(nn.Conv1d(3, 2, 1), torch.randn(4, 3, 5), [{0: "n", 2: "t"}])
    half = flops.evaluate(flops.sparse.forward, {"weight": 0.5}, n=2)
    assert isinstance(half, sympy.Expr)
    assert str(half) in ("6.0*t", "6*t")
    assert flops.evaluate(flops.sparse.forward, {"weight": 0.5}, n=2, t=10) == 60
    assert flops.evaluate(flops.pooling, n=2) == 0
    with pytest.raises(ValueError, match="depend on n, t, not on length"):
        flops.evaluate(flops.dense.forward, length=3)
    fixed = count_flops(nn.Linear(3, 4), X)
    with pytest.raises(ValueError, match="depend on no sizes, not on n"):
        fixed.evaluate(fixed.dense.forward, n=3)


def test_a_sparsity_of_no_weight_is_an_error() -> None:
    """A name that is misspelt, or of another model, would count a sparse model as dense."""
    flops = count_flops(two(), X)
    with pytest.raises(ValueError, match=r"by '0\.wieght' \(do you mean '0\.weight'"):
        flops.evaluate(flops.sparse.forward, {"0.wieght": 0.5})


@pytest.mark.parametrize("value", [90, -0.1, 1.01, math.nan, "0.9", None])
def test_a_sparsity_that_is_no_fraction_is_an_error(value: Any) -> None:
    """In percent it would make counts negative."""
    flops = count_flops(two(), X)
    with pytest.raises(ValueError, match=rf"sparsity of '0\.weight' must be a fraction in \[0, 1\], got {value!r}"):
        flops.evaluate(flops.sparse.forward, {"0.weight": value})


def test_layers_add_up_to_the_total() -> None:
    """Products of two activations are named by where they are made."""
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 4))
    flops = count_flops(model, torch.randn(2, 5, 8))
    assert list(flops.by_layer()) == [
        *("0.self_attn.in_proj_weight", "0.self_attn", "0.self_attn.out_proj.weight"),
        *("0.linear1.weight", "0.linear2.weight", "1.weight"),
    ]
    for sparse, total in ((False, flops.dense), (True, flops.sparse)):
        layers = flops.by_layer(sparse=sparse).values()
        assert sympy.Add(*(macs.step for macs in layers)).equals(total.step)
    assert flops.weights == tuple(name for name in flops.by_layer() if name.endswith("weight"))


def density(function: Any, x: Tensor) -> sympy.Expr:
    """Fraction of the forward MACs that are left at sparsity 1/2 of ``w``, [6, 4], and 0 of all else."""
    flops = count_flops(Around(function, w=nn.Parameter(torch.randn(6, 4)), v=nn.Parameter(torch.randn(2, 4))), x)
    sparsities = {name: 0.5 for name in flops.weights if name == "w"}
    return flops.evaluate(flops.sparse.forward, sparsities) / flops.evaluate(flops.dense.forward)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda self, x: x @ self.w.T, 0.5),
        (lambda self, x: x @ self.w.view(2, 3, 4).mT, 0.5),
        (lambda self, x: x.double() @ self.w.double().T, 0.5),
        (lambda self, x: x @ self.w.clone().contiguous()[:3].T, 0.5),
        (lambda self, x: x @ (-self.w).flip(0).T, 0.5),
        (lambda self, x: x @ torch.cat([self.w, self.v]).T, 1 - 12 / 32),
        (lambda self, x: x @ self.w.repeat(2, 1).T, 0.5),
        (lambda self, x: x @ self.w.view(3, 2, 4).transpose(0, 1).reshape(6, 4).T, 0.5),
        (lambda self, x: torch.einsum("bi,hdi->bhd", x, self.w.view(3, 2, 4).transpose(0, 1)), 0.5),
        (lambda self, x: x @ self.w[torch.tensor([4, 0, 2])].T, 0.5),
        (lambda self, x: x @ self.w.index_select(0, torch.tensor([4, 0, 2])).T, 0.5),
        (lambda self, x: x @ (2 * self.w / 3).T, 0.5),
        (lambda self, x: x @ (torch.ones(6, 4) * self.w / torch.ones(4)).T, 0.5),
        (lambda self, x: x @ (self.w * (self.w.abs() > 0.1)).T, 0.5),
        (lambda self, x: x @ (self.w * self.v[:1]).T, 1.0),  # whose zeros are not known
        (lambda self, x: x @ (self.v[:1] / self.w).T, 1.0),
        (lambda self, x: x @ (self.w * x[:1]).T, 1.0),
        (lambda self, x: x @ (2 / self.w).T, 1.0),
        (lambda self, x: x @ (self.w + 1).T, 1.0),  # no zeros any more
        (lambda self, x: x @ self.w.cumsum(0).T, 1.0),
    ],
    ids=[
        "t",
        "view",
        "cast",
        "slice",
        "flip",
        "cat",
        "repeat",
        "copying reshape",
        "einsum",
        "index",
        "index_select",
        "scaled",
        "times a mask",
        "times its own mask",
        "times a weight",
        "divisor",
        "times data",
        "inverse",
        "sum",
        "cumsum",
    ],
)
def test_zeros_are_followed_through_what_keeps_them(function: Any, expected: float) -> None:
    assert density(function, torch.randn(5, 4)) == expected


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: x @ torch.cat([self.w, torch.ones(2, 4)]).T,
        lambda self, x: x @ torch.cat([self.w, x[:2]]).T,
        lambda self, x: x @ torch.stack([self.w, torch.ones(6, 4)]).mT,
    ],
    ids=["constant", "activation", "stack"],
)
def test_what_is_beside_a_weight_is_dense(function: Any) -> None:
    assert density(function, torch.randn(5, 4)) > 0.5


FORMS = ("dense", "prepared", "wrapped", "compiled in place", "finalized")


def in_form(form: str) -> nn.Module:
    model: nn.Module = reference.ConvNet()
    if form == "dense":
        return model
    autosparse_fx.sparsify(model, AutoSparse(target_sparsity=None, rules={"conv1.weight": None}))
    if form == "wrapped":
        return torch.compile(model, backend="eager")  # type: ignore[return-value]
    if form == "compiled in place":
        model.compile(backend="eager")
    return autosparse_fx.finalize(model) if form == "finalized" else model


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_model_has_the_same_counts(form: str) -> None:
    """Also in evaluation; a rule that leaves a weight dense changes nothing."""
    model, x = in_form(form), torch.randn(2, 1, 8, 8)
    first, second, head = 2 * 64 * 16 * 9, 2 * 16 * 32 * 16 * 9, 2 * 512 * 4
    for _ in range(2):
        flops = count_flops(model, x)
        assert numbers(flops) == Count(first + second + head, second + head, first + second + head)
        assert len(flops.weights) == 3
        assert len(flops.sparse.forward.free_symbols) == 3
        model.eval()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_model_has_the_same_names(form: str) -> None:
    """Those that report() and the history know the weights by."""
    flops = count_flops(in_form(form), torch.randn(2, 1, 8, 8))
    assert flops.weights == ("conv1.weight", "conv2.weight", "fc.weight")


def one_line() -> tuple[nn.Module, Any]:
    model = reference.mlp()
    step = torch.compile(model, backend="autosparse", options={"target_sparsity": 0.5, "total_steps": 5})
    return model, step


def test_one_line_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first call and after it, and while it trains: hidden thresholds are no part of the graph."""
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, **_: gm.forward)
    model, step = one_line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = count_flops(reference.mlp(), torch.randn(8, 16))
    for _ in range(2):
        flops = count_flops(model, torch.randn(8, 16))
        assert flops == expected
        step(torch.randn(8, 16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert set(autosparse_fx.thresholds(model)) == set(flops.weights)


def test_prepared_weights_have_the_names_of_the_report() -> None:
    """So that the sparsities of a report can be put in."""
    model = autosparse_fx.sparsify(nn.Sequential(nn.LSTM(3, 5, 2, batch_first=True), Around(lambda self, x: x[0])))
    flops = count_flops(model, torch.randn(2, 7, 3))
    layers = autosparse_fx.report(model).layers
    assert flops.weights == tuple(layer.name for layer in layers)
    sparse = flops.evaluate(flops.sparse.forward, {layer.name: layer.sparsity for layer in layers})
    assert sparse == pytest.approx(14 * sum(layer.numel - layer.zeros for layer in layers))


class MaskedThenScaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale


def test_masks_and_thresholds_are_not_counted() -> None:
    model, x = MaskedThenScaled(), X
    dense = count_flops(model, x)
    prepared = count_flops(autosparse_fx.sparsify(model, AutoSparse(granularity="channel")), x)
    assert numbers(prepared) == numbers(dense) == (24, 0, 24)
    assert [p.op for p in prepared.products] == [p.op for p in dense.products]


def test_nothing_to_count() -> None:
    flops = count_flops(nn.ReLU(), X)
    assert (flops.weights, flops.sizes, flops.by_layer()) == ((), (), {})
    assert math.isclose(flops.evaluate(flops.sparse.step), 0)
