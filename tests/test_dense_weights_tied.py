"""Weights that are tied or untied inside ``dense_weights`` have one mask each afterwards."""

import copy
import warnings

import pytest
import torch
from masked_names import assert_masked, masked_names
from torch import Tensor, nn

from autosparse_fx import (
    AutoSparse,
    dense_weights,
    finalize,
    report,
    sparsify,
    thresholds,
)

CONFIG = AutoSparse(alpha=0.5, threshold_init=-2.5)


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
