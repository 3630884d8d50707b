"""What was tied, untied, added or replaced after sparsify, outside of dense_weights."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import autosparse_fx
from autosparse_fx import AutoSparse, GradientAnnealing, dense_weights, finalize, report, sparsify


class Tied(nn.Module):
    """An embedding, and a head of the same shape that may share its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(12, 6), nn.Linear(6, 6), nn.Linear(6, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(x)))


def to_embedding(model: Tied) -> None:
    model.head.weight = model.embedding.weight


def two_layers() -> nn.Module:
    return sparsify(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))


def tied_to_embedding() -> nn.Module:
    model = sparsify(Tied())
    to_embedding(model)
    return model


def tied_to_each_other() -> nn.Module:
    model = two_layers()
    model[2].weight = dict(model.named_parameters())["0.weight"]
    return model


def untied() -> nn.Module:
    model = Tied()
    to_embedding(model)
    sparsify(model).embedding.weight = nn.Parameter(torch.randn(12, 6))
    return model


BROKEN = {
    "to an embedding": (
        tied_to_embedding,
        "'embedding.weight' .12, 6. is masked, but reads as it is",
    ),
    "to each other": (tied_to_each_other, "'0.weight' .4, 4. is masked by several thresholds"),
    "untied": (untied, "'embedding.weight' and 'head.weight' .12, 6. share the state of a mask"),
}


@pytest.mark.parametrize("use", [report, finalize, lambda model: GradientAnnealing(model, 10)])
@pytest.mark.parametrize("case", BROKEN)
def test_ties_that_masks_do_not_follow_are_refused(case: str, use: Callable[[nn.Module], object]) -> None:
    make, message = BROKEN[case]
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message) as caught:
        use(model)
    assert "dense_weights" in str(caught.value)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("case", BROKEN)
def test_the_cure_of_the_message_works(case: str) -> None:
    model = BROKEN[case][0]()
    with dense_weights(model):
        pass
    GradientAnnealing(model, 10)
    masked = [layer.name for layer in report(model).layers]
    assert len(masked) == len(set(masked))
    thresholds = {name for name, _ in model.named_parameters() if name.endswith("_threshold")}
    assert len(thresholds) == len(masked)


@pytest.mark.parametrize("tie", [None, to_embedding])
def test_ties_that_are_older_than_the_masks_are_in_order(tie: Callable[[Tied], None] | None) -> None:
    model = Tied()
    if tie is not None:
        tie(model)
    sparsify(model)
    assert report(model).layers
    GradientAnnealing(model, 10)


def test_a_layer_that_comes_late_is_warned_of_and_reported() -> None:
    model = two_layers()
    model[2] = nn.Linear(4, 4)
    with pytest.warns(UserWarning, match=r"2\.weight came into the model after sparsify"):
        GradientAnnealing(model, 10)
    assert "was no part of the model" in report(model).skipped["2.weight"][1]


def test_what_was_left_dense_or_lies_outside_is_not_late() -> None:
    body = sparsify(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), AutoSparse(rules={"1.weight": None}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GradientAnnealing(nn.Sequential(body, nn.Linear(4, 4)), 10)


def test_a_weight_that_was_removed_stops_finalize_before_it_changes_anything() -> None:
    model = two_layers()
    model[2].weight = None
    before = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match="'2' has lost its weight 'weight'"):
        finalize(model)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("use", [autosparse_fx.report, autosparse_fx.sparsity, finalize])
def test_weights_on_the_meta_device_have_no_zeros(use: Callable[[nn.Module], object]) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"'0\.weight' .4, 4. is on the meta device.*to_empty"):
        use(sparsify(model))


def test_lazy_layers_are_named() -> None:
    lazy = nn.Sequential(nn.LazyLinear(4))
    for use in (autosparse_fx.report, lambda m: sparsify(m, example_inputs=torch.randn(2, 3)), sparsify):
        with pytest.raises(ValueError, match=r"'0\.weight' belongs to a lazy module.*run one forward"):
            use(lazy)


def shared_memory(kind: str) -> nn.Module:
    """Two layers whose parameters are two tensors in the same memory, or only next to each other."""
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 6, bias=False))
    flat = torch.randn(8, 6)
    if kind == "transposed":
        model[2].weight = nn.Parameter(model[0].weight.detach().t())
    elif kind == "same":
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight.data = model[0].weight.data
    elif kind == "rows":
        model[0].weight, model[2].weight = nn.Parameter(flat[:4]), nn.Parameter(flat[4:].t())
    else:
        model = nn.Sequential(nn.Linear(3, 8), nn.Linear(3, 8))
        model[0].weight, model[1].weight = nn.Parameter(flat[:, ::2]), nn.Parameter(flat[:, 1::2])
    return model


@pytest.mark.parametrize("use", [report, finalize, lambda model: GradientAnnealing(model, 10)])
@pytest.mark.parametrize("kind", ["transposed", "same"])
def test_parameters_in_the_same_memory_are_refused(kind: str, use: Callable[[nn.Module], object]) -> None:
    model = sparsify(shared_memory(kind), AutoSparse(threshold_init=-2.5))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"'0\.weight' .* and '[12]\.weight' .* two parameters in the same memory.*clone"
    ):
        use(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_parameters_next_to_each_other_in_memory_are_in_order(kind: str) -> None:
    model = sparsify(shared_memory(kind), AutoSparse(target_sparsity=None, threshold_init=-0.5))
    layers = model[0], model[-1]
    expected = [layer(torch.eye(layer.in_features)) for layer in layers]
    assert report(model).sparsity > 0.1
    finalize(model)
    for layer, y in zip(layers, expected, strict=True):
        assert torch.equal(layer(torch.eye(layer.in_features)), y)


def test_parameters_in_the_same_memory_that_are_not_masked_are_nobodys_business() -> None:
    model = shared_memory("transposed")
    model.append(nn.Linear(6, 4))
    sparsify(model, AutoSparse(rules={"0.weight": None, "2.weight": None}))
    assert report(model).layers[0].name == "3.weight"


def test_parameters_of_other_kinds_in_a_model_are_nobodys_business() -> None:
    flat = torch.randn(64)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LazyBatchNorm1d())
    model[1].weight = nn.Parameter(flat[:16].view(4, 4))
    model[1].bias = nn.Parameter(flat[16:].view(torch.bfloat16)[:4].detach())  # another dtype, behind it in memory
    model.register_parameter("adjacency", nn.Parameter(torch.eye(3).to_sparse()))
    sparsify(model)
    GradientAnnealing(model, 10)
