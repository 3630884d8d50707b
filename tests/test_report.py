"""report, sparsity and thresholds: counts against brute force, in every state of a model."""

import dataclasses
import json
import warnings
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import autosparse_fx
from autosparse_fx import AutoSparse, SparsityReport, report, sparsity, thresholds


def sparse_convnet(**config: Any) -> reference.ConvNet:
    return autosparse_fx.sparsify(reference.ConvNet(), AutoSparse(**{"threshold_init": -3.0, **config}))


def finalize(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no annealer steered these
        return autosparse_fx.finalize(model)


def by_name(result: SparsityReport) -> dict[str, Any]:
    return {layer.name: layer for layer in result.layers}


def zeros_in(weight: Tensor) -> int:
    return sum(value == 0 for value in weight.detach().reshape(-1).tolist())


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_zeros_and_elements_equal_those_that_are_counted_one_by_one(granularity: str) -> None:
    model = sparse_convnet(granularity=granularity)
    result = report(model)
    expected = {
        "conv1.weight": model.conv1.weight,
        "conv2.weight": model.conv2.weight,
        "fc.weight": model.fc.weight,
    }
    assert [layer.name for layer in result.layers] == list(expected)
    for name, weight in expected.items():
        layer = by_name(result)[name]
        assert (layer.zeros, layer.numel, layer.shape) == (zeros_in(weight), weight.numel(), tuple(weight.shape))
        assert layer.sparsity == layer.zeros / layer.numel
    assert result.zeros == sum(zeros_in(w) for w in expected.values()) > 0
    assert result.numel == sum(w.numel() for w in expected.values())
    assert result.sparsity == sparsity(model) == result.zeros / result.numel
    assert reference.total_sparsity(model) == pytest.approx(result.sparsity)


def test_parameters_are_those_of_the_dense_model() -> None:
    dense = sum(p.numel() for p in reference.ConvNet().parameters())
    assert report(sparse_convnet()).parameters == dense
    assert report(sparse_convnet(granularity="channel")).parameters == dense
    assert report(reference.ConvNet()).parameters == dense
    assert report(finalize(sparse_convnet())).parameters == dense


def test_the_report_names_cut_and_target_of_every_weight() -> None:
    model = sparse_convnet(target_sparsity=0.9, rules={"fc.weight": {"target_sparsity": None, "threshold_init": 0.0}})
    layers = by_name(report(model))
    assert layers["conv1.weight"].threshold == pytest.approx(torch.sigmoid(torch.tensor(-3.0)).item())
    assert layers["fc.weight"].threshold == pytest.approx(0.5)
    assert layers["conv1.weight"].target == 0.9 and layers["fc.weight"].target is None


def test_the_cut_of_a_channelwise_weight_is_the_mean_over_its_channels() -> None:
    model = sparse_convnet(granularity="channel")
    with torch.no_grad():
        model.fc._parameters["weight_threshold"].copy_(torch.tensor([-10.0, 0.0, 10.0, 20.0]))
    expected = torch.sigmoid(torch.tensor([-4.0, -3.0, -2.0, -1.0])).mean().item()
    assert by_name(report(model))["fc.weight"].threshold == pytest.approx(expected)


def test_a_tied_weight_is_listed_and_counted_once_with_its_aliases() -> None:
    model = autosparse_fx.sparsify(reference.Tied(), AutoSparse(threshold_init=-1.0))
    result = report(model)
    assert {layer.name for layer in result.layers} == {"embed.weight", "mid.weight"}
    assert by_name(result)["embed.weight"].tied == ("head.weight",)
    assert by_name(result)["mid.weight"].tied == ()
    assert result.numel == 50 * 32 + 32 * 32
    assert result.parameters == 50 * 32 + 32 * 32 + 32
    assert result.zeros == zeros_in(model.head.weight) + zeros_in(model.mid.weight)
    assert list(thresholds(model)) == ["embed.weight", "mid.weight"]
    assert "embed.weight = head.weight" in str(result)


def test_the_report_says_that_a_tied_embedding_is_masked() -> None:
    result = report(autosparse_fx.sparsify(reference.Tied()))
    assert result.masked_embeddings == ("embed.weight",)
    (line,) = [line for line in str(result).splitlines() if "embeddings" in line]
    assert "embed.weight" in line
    untied = report(autosparse_fx.sparsify(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))))
    assert untied.masked_embeddings == ()
    assert untied.skipped["0.weight"] == (20, "an embedding")


class Various(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.norm = nn.LayerNorm(8)
        self.owned = weight_norm(nn.Linear(8, 8))
        self.left = nn.Linear(8, 8)
        self.fc = nn.Linear(8, 4)
        self.token = nn.Parameter(torch.zeros(1, 8))


def test_what_was_skipped_is_named_with_its_size_and_reason() -> None:
    model = autosparse_fx.sparsify(Various(), AutoSparse(rules={"left.*": None}))
    result = report(model)
    skipped = result.skipped
    assert [layer.name for layer in result.layers] == ["fc.weight"]
    assert skipped["embed.weight"] == (40, "an embedding")
    assert skipped["norm.weight"] == (8, "a normalization")
    assert skipped["fc.bias"] == (4, "a bias")
    assert skipped["left.weight"] == (64, "left dense by the rule 'left.*'")
    assert skipped["token"][0] == 8 and "example_inputs" in skipped["token"][1]
    owned = {name: why for name, (_, why) in skipped.items() if name.startswith("owned.parametrizations")}
    assert owned and set(owned.values()) == {"owned by torch.nn.utils.parametrize"}
    assert result.parameters == sum(p.numel() for p in Various().parameters())
    assert result.numel + sum(numel for numel, _ in skipped.values()) == result.parameters
    text = str(result)
    for why in {why for _, why in skipped.values()}:
        assert why in text


def test_a_report_of_a_part_keeps_the_reasons() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2))
    autosparse_fx.sparsify(model, AutoSparse(rules={"0.1.weight": None}))
    skipped = report(model[0]).skipped
    assert skipped["1.weight"][1] == "left dense by the rule '0.1.weight'"
    assert skipped["0.bias"][1] == skipped["1.bias"][1] == "a bias"


def test_a_name_that_ends_like_another_keeps_its_own_reason() -> None:
    layers = [nn.Linear(4, 4) for _ in range(12)]
    model = autosparse_fx.sparsify(
        nn.Sequential(layers[0], nn.LayerNorm(4), *layers[2:]), AutoSparse(rules={"11.*": None})
    )
    skipped = report(model).skipped
    assert skipped["1.weight"][1] == "a normalization"
    assert skipped["11.weight"][1] == "left dense by the rule '11.*'"


def test_parts_of_two_preparations_keep_their_own_reasons() -> None:
    model = nn.ModuleDict(
        {
            "a": autosparse_fx.sparsify(
                nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), AutoSparse(rules={"1.weight": None})
            ),
            "b": autosparse_fx.sparsify(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))),
        }
    )
    skipped = report(model).skipped
    assert skipped["a.1.weight"][1] == "left dense by the rule '1.weight'"
    assert skipped["b.1.weight"][1] == "a normalization"


def test_a_dense_model_lists_the_weights_of_known_layers() -> None:
    model = reference.ConvNet()
    with torch.no_grad():
        model.fc.weight[0] = 0
    result = report(model)
    assert [layer.name for layer in result.layers] == ["conv1.weight", "conv2.weight", "fc.weight"]
    assert result.zeros == model.fc.weight.shape[1]
    assert sparsity(model) == result.zeros / result.numel
    assert all(layer.threshold is None and layer.target is None for layer in result.layers)
    assert thresholds(model) == {}


def test_a_finalized_model_reports_the_zeros_that_it_had_as_a_sparse_one() -> None:
    model = sparse_convnet()
    before = report(model)
    after = report(finalize(model))
    assert (after.zeros, after.numel, after.parameters) == (before.zeros, before.numel, before.parameters)
    for one, other in zip(before.layers, after.layers, strict=True):
        assert dataclasses.replace(one, threshold=None, target=None) == other


def test_a_model_without_weights_has_no_sparsity_and_still_prints() -> None:
    result = report(nn.ReLU())
    assert (result.layers, result.parameters, result.sparsity) == ((), 0, 0.0)
    assert sparsity(nn.ReLU()) == 0.0
    assert "all these weights" in str(result)


def test_an_empty_weight_divides_by_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch: initialising an empty tensor
        model = autosparse_fx.sparsify(nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 2)))
    assert by_name(report(model))["0.weight"].sparsity == 0.0


@pytest.mark.parametrize("make", [sparse_convnet, reference.ConvNet, lambda: autosparse_fx.sparsify(Various())])
def test_to_dict_is_json_and_holds_what_the_report_holds(make: Any) -> None:
    result = report(make())
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert values["sparsity"] == result.sparsity
    assert (values["zeros"], values["numel"], values["parameters"]) == (result.zeros, result.numel, result.parameters)
    assert [layer["name"] for layer in values["layers"]] == [layer.name for layer in result.layers]
    assert [layer["zeros"] for layer in values["layers"]] == [layer.zeros for layer in result.layers]
    assert {name: (v["numel"], v["reason"]) for name, v in values["skipped"].items()} == result.skipped


def test_the_table_holds_every_layer_and_the_totals() -> None:
    result = report(sparse_convnet())
    lines = str(result).splitlines()
    for layer in result.layers:
        (line,) = [line for line in lines if line.startswith(layer.name)]
        for part in ("x".join(map(str, layer.shape)), f"{layer.numel:,}", f"{layer.zeros:,}", f"{layer.sparsity:.4f}"):
            assert part in line
    (masked,) = [line for line in lines if line.startswith("all masked weights")]
    assert f"{result.numel:,}" in masked and f"{result.zeros:,}" in masked and f"{result.sparsity:.4f}" in masked
    (total,) = [line for line in lines if line.startswith("all parameters")]
    assert f"{result.parameters:,}" in total and f"{result.zeros / result.parameters:.4f}" in total
    assert not [line for line in lines if line != line.rstrip()]


def test_the_report_is_frozen_and_changes_nothing() -> None:
    model = sparse_convnet()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    versions = [p._version for p in model.parameters()]
    result = report(model)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.parameters = 0  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.layers[0].zeros = 0
    assert [p._version for p in model.parameters()] == versions
    for name, t in model.state_dict().items():
        assert torch.equal(t, state[name])
    assert all(p.grad is None for p in model.parameters())


# thresholds


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_thresholds_are_the_logits_of_every_masked_weight(granularity: str) -> None:
    model = sparse_convnet(granularity=granularity)
    with torch.no_grad():
        model.fc._parameters["weight_threshold"].add_(5.0)
    found = thresholds(model)
    assert list(found) == ["conv1.weight", "conv2.weight", "fc.weight"]
    for name, logit in found.items():
        assert logit.shape == (
            (model.get_submodule(name.split(".")[0])._parameters["weight"].shape[0],)
            if granularity == "channel"
            else (1,)
        )
        assert logit.dtype == torch.float32 and not logit.requires_grad
        torch.testing.assert_close(logit, torch.full_like(logit, -2.5 if name == "fc.weight" else -3.0))


def test_thresholds_are_copies() -> None:
    model = sparse_convnet(threshold_init=0.0)
    thresholds(model)["fc.weight"].fill_(50.0)
    assert thresholds(model)["fc.weight"].item() == 0.0


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_the_cut_masks_exactly_what_the_report_counts(granularity: str) -> None:
    model = sparse_convnet(granularity=granularity)
    layers = by_name(report(model))
    for name, logit in thresholds(model).items():
        weight = model.get_submodule(name.removesuffix(".weight"))._parameters["weight"]
        cut = torch.sigmoid(logit).view([-1] + [1] * (weight.dim() - 1))
        assert int((weight.abs() <= cut).sum()) == layers[name].zeros


def test_a_compiled_model_is_reported_under_its_own_names() -> None:
    model = sparse_convnet()
    compiled = torch.compile(model, backend="eager")
    assert "_orig_mod.fc.weight" in dict(compiled.named_parameters())
    assert thresholds(compiled) == thresholds(model) and list(thresholds(model))[-1] == "fc.weight"
    assert report(compiled) == report(model)
    assert sparsity(compiled) == sparsity(model) > 0


def test_a_wrapped_model_is_reported_under_the_names_of_the_wrapper() -> None:
    wrapped = nn.ModuleDict({"net": sparse_convnet()})
    assert [layer.name for layer in report(wrapped).layers] == ["net.conv1.weight", "net.conv2.weight", "net.fc.weight"]
    assert list(thresholds(wrapped)) == ["net.conv1.weight", "net.conv2.weight", "net.fc.weight"]
    assert report(wrapped).skipped["net.bn1.weight"] == (16, "a normalization")
