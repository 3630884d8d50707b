"""sparsify: which weights are masked, rules, and tied weights."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from sparse_models import masked_names, unchanged
from torch import nn

from autosparse_fx import AutoSparse, report, sparsify, thresholds
from autosparse_fx.config import masking_exactly


class Vision(nn.Module):
    """Has one of everything that looks like a weight and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.class_token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 17, 8))
        self.layer_scale = nn.Parameter(torch.ones(8, 1))
        self.own = nn.Parameter(torch.randn(8, 8))
        self.norm = nn.LayerNorm(8)
        self.group_norm = nn.GroupNorm(2, 8)
        self.activation = nn.PReLU(8)
        self.embed = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 4)


# What is masked.


def test_default_masks_layer_weights_and_nothing_else() -> None:
    model = sparsify(Vision())
    assert masked_names(model) == {"patch.weight", "head.weight"}
    skipped = {name: why for name, (_, why) in report(model).skipped.items()}
    assert set(skipped) == {name for name, _ in Vision().named_parameters()} - masked_names(model)
    assert "norm" in skipped["norm.weight"] and "norm" in skipped["group_norm.weight"]
    assert "embedding" in skipped["embed.weight"]
    assert "bias" in skipped["head.bias"] and "bias" in skipped["patch.bias"]
    for bare in ("class_token", "positions", "layer_scale", "own"):
        assert "example_inputs" in skipped[bare]


def test_returns_the_same_object_of_the_same_class_and_parameters() -> None:
    model = Vision()
    dense = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in dense.items()}
    assert sparsify(model) is model
    assert isinstance(model.head, nn.Linear) and isinstance(model.patch, nn.Conv2d)
    after = dict(model.named_parameters())
    for name, parameter in dense.items():
        assert after[name] is parameter
        assert torch.equal(parameter, values[name])


def test_classes_keep_their_names_and_are_shared_by_like_modules() -> None:
    model = sparsify(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Bilinear(2, 2, 2)))
    assert type(model[0]) is type(model[1]) is not nn.Linear
    assert (type(model[0]).__name__, type(model[0]).__qualname__) == ("Linear", "Linear")
    assert type(model[0]).__module__ == nn.Linear.__module__
    assert repr(model[0]) == repr(nn.Linear(4, 4))
    assert type(model[0]).__doc__ == nn.Linear.__doc__


def test_thresholds_start_as_documented() -> None:
    model = sparsify(nn.Linear(6, 4), AutoSparse(threshold_init=-3.5))
    threshold, offset = model.weight_threshold, model.weight_offset
    assert isinstance(threshold, nn.Parameter) and threshold.requires_grad
    assert threshold.shape == offset.shape == (1,)
    assert threshold.dtype == offset.dtype == torch.float32
    assert threshold.item() == 0 and offset.item() == -3.5
    assert "weight_offset" in dict(model.named_buffers()) and "weight_offset" in model.state_dict()
    assert list(thresholds(model)) == ["weight"]


@pytest.mark.parametrize(
    ("layer", "channels"),
    [
        (nn.Linear(6, 4), 4),
        (nn.Conv2d(3, 5, 3), 5),
        (nn.ConvTranspose2d(3, 5, 3), 5),
        (nn.Bilinear(2, 3, 7), 7),
    ],
)
def test_channel_thresholds_have_one_value_per_output_channel(layer: nn.Module, channels: int) -> None:
    sparsify(layer, AutoSparse(granularity="channel", threshold_init=-3.0))
    assert layer.weight_threshold.shape == layer.weight_offset.shape == (channels,)
    assert thresholds(layer)["weight"].shape == (channels,)
    with torch.no_grad():
        layer.weight_offset[1] = 30.0  # cuts all of channel 1
    axis = reference.channel_axis(layer)
    zero = (layer.weight == 0).transpose(0, axis).flatten(1).all(dim=1)
    assert zero.tolist() == [i == 1 for i in range(channels)]


def test_alpha_is_one_float32_tensor_of_the_device_and_not_in_the_state_dict() -> None:
    model = sparsify(reference.ConvNet(), AutoSparse(alpha=0.4))
    alphas = {id(b): b for name, b in model.named_buffers(remove_duplicate=False) if b.dim() == 0 and "alpha" in name}
    assert len(alphas) == 1
    (alpha,) = alphas.values()
    assert alpha.dtype == torch.float32 and alpha.item() == pytest.approx(0.4)
    assert not any("alpha" in key for key in model.state_dict())


def test_frozen_weights_are_masked_and_stay_frozen() -> None:
    model = nn.Linear(6, 4)
    model.weight.requires_grad_(False)
    sparsify(model, AutoSparse(threshold_init=-1.0))
    assert not model._parameters["weight"].requires_grad and not model.weight_threshold.requires_grad
    model.requires_grad_(True)
    assert model.weight_threshold.requires_grad
    meta = sparsify(nn.Linear(6, 4, device="meta").requires_grad_(False))
    with pytest.warns(UserWarning, match="no thresholds"):
        meta.load_state_dict(nn.Linear(6, 4).state_dict(), assign=True)
    assert not meta.weight_threshold.requires_grad
    assert (model.weight == 0).any()


def test_every_dtype_of_weight_gets_float32_thresholds() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model = sparsify(nn.Linear(6, 4, dtype=dtype))
        assert model.weight.dtype == dtype
        assert model.weight_threshold.dtype == model.weight_offset.dtype == torch.float32


def test_nan_and_infinite_weights_are_passed_on() -> None:
    model = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        model.weight[0, 0], model.weight[1, 1] = float("nan"), float("inf")
    sparsify(model, AutoSparse(threshold_init=-1.0))
    assert model.weight[0, 0].isnan() and model.weight[1, 1].isinf()
    assert not model.weight[0, 1:].isnan().any()


# Rules.


def model_with_blocks() -> nn.Module:
    model = nn.Sequential()
    model.stem = nn.Conv2d(3, 4, 3)
    model.block = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    model.fc = nn.Linear(4, 2)
    return model


EVERYTHING = {"stem.weight", "block.0.weight", "block.1.0.weight", "fc.weight"}


@pytest.mark.parametrize(
    ("pattern", "dense"),
    [
        ("fc.weight", {"fc.weight"}),
        ("block.*", {"block.0.weight", "block.1.0.weight"}),
        ("block.*.weight", {"block.0.weight", "block.1.0.weight"}),  # a star crosses dots
        ("*", EVERYTHING - {"stem.weight"}),
        (r"re:block\.\d\.weight", {"block.0.weight"}),
        (r"re:.*\.0\.weight", {"block.0.weight", "block.1.0.weight"}),
    ],
)
def test_rule_of_none_leaves_what_it_matches_dense(pattern: str, dense: set[str]) -> None:
    rules: dict[str, Any] = {"stem.weight": {}} if pattern == "*" else {}
    model = sparsify(model_with_blocks(), AutoSparse(rules={**rules, pattern: None}))
    assert masked_names(model) == EVERYTHING - dense
    skipped = report(model).skipped
    for name in dense:
        assert repr(pattern) in skipped[name][1]


def test_first_matching_rule_wins() -> None:
    rules = {"block.0.weight": {"threshold_init": -1.0}, "block.*": None, "*": {"threshold_init": -2.0}}
    model = sparsify(model_with_blocks(), AutoSparse(rules=rules))
    found = {name: s.item() for name, s in thresholds(model).items()}
    assert found == {"stem.weight": -2.0, "block.0.weight": -1.0, "fc.weight": -2.0}


BEGINS = (
    r"weight '0\.weight' begins with only zeros \(2 such weights in all\): threshold_init={} is a logit, whose cut "
)


@pytest.mark.parametrize("alpha", [0.0, 0.75])
@pytest.mark.parametrize(
    ("init", "words"),
    [
        (0.01, r"sigmoid\(0\.01\) = 0\.502 .*, and -4\.6 has the cut 0\.01;"),
        (0.0, r"sigmoid\(0\.0\) = 0\.5 is above all of it; "),
    ],
)
def test_a_cut_that_is_given_for_its_logit_is_told(init: float, words: str, alpha: float) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4), nn.Linear(4, 1))
    nn.init.ones_(model[2].weight)
    with pytest.warns(UserWarning, match=BEGINS.format(init) + words) as told:
        sparsify(model, AutoSparse(threshold_init=init, alpha=alpha))
    assert [warning.filename for warning in told] == [__file__]


def test_layers_that_begin_with_some_weights_or_with_zeros_of_their_own_are_no_matter() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    nn.init.zeros_(model[1].weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for init in ("auto", -5.0, -3.0):
            sparsify(copy.deepcopy(model), AutoSparse(threshold_init=init))
            sparsify(copy.deepcopy(model).to("meta"), AutoSparse(threshold_init=init))
        config = AutoSparse(threshold_init=0.01, rules={"*": {"threshold_init": "auto"}})
        saved = thresholds(sparsify(model, config))
        sparsify(nn.Sequential(nn.Linear(10**6, 1), nn.Linear(1, 2)), masking_exactly({"0.weight": saved["0.weight"]}))


def test_rule_sets_init_granularity_and_target() -> None:
    config = AutoSparse(
        0.7,
        threshold_init=-4.0,
        rules={"fc.*": {"granularity": "channel", "threshold_init": -1.0, "target_sparsity": 0.5}},
    )
    model = sparsify(model_with_blocks(), config)
    assert thresholds(model)["fc.weight"].tolist() == [-1.0, -1.0]
    assert thresholds(model)["stem.weight"].tolist() == [-4.0]
    assert {layer.name: layer.target for layer in report(model).layers} == {
        "stem.weight": 0.7,
        "block.0.weight": 0.7,
        "block.1.0.weight": 0.7,
        "fc.weight": 0.5,
    }


@pytest.mark.parametrize("alias", ["embed.weight", "head.weight", "re:head.*", "emb*"])
def test_any_alias_of_a_tied_weight_matches(alias: str) -> None:
    model = sparsify(reference.Tied(), AutoSparse(rules={alias: None}))
    assert masked_names(model) == {"mid.weight"}


@pytest.mark.parametrize("pattern", ["fc.weigth", "block", "re:fc", "re:weight", "Fc.weight", "FC.*"])
def test_rule_that_matches_nothing_is_refused(pattern: str) -> None:
    model = model_with_blocks()
    with unchanged(model), pytest.raises(ValueError, match="matches no parameter") as error:
        sparsify(model, AutoSparse(rules={pattern: None}))
    assert repr(pattern) in str(error.value) and "block.1.0.weight" in str(error.value)


def test_rule_that_matches_nothing_says_what_may_be_meant() -> None:
    model = model_with_blocks()
    for pattern, words in (
        ("block", r"'block' matches no parameter of the model: 'block' is a module: write 'block\.\*';"),
        ("block.1", r"write 'block\.1\.\*';"),
        ("fc.weigth", r"'fc\.weigth' \(do you mean 'fc\.weight'"),
        ("module.stem.weight", r"do you mean 'stem\.weight'"),
        ("blokc.*", r"do you mean 'block\.\*'"),
        ("nothing", r"'nothing' matches no parameter of the model; its weights are"),
    ):
        with pytest.raises(ValueError, match=words):
            sparsify(model, AutoSparse(rules={pattern: None}))
    sparsify(model, AutoSparse(rules={"block.*": None}))


def test_rule_that_configures_only_dense_parameters_is_refused() -> None:
    model = Vision()
    with unchanged(model), pytest.raises(ValueError, match=r"'norm\.weight'.*normalization"):
        sparsify(model, AutoSparse(rules={"norm.weight": {"threshold_init": -2.0}}))


def test_rule_that_never_comes_first_is_refused() -> None:
    model = model_with_blocks()
    with unchanged(model), pytest.raises(ValueError, match=r"'fc\.weight'"):
        sparsify(model, AutoSparse(rules={"f*": None, "fc.weight": {"threshold_init": -2.0}}))


# Tied weights.


def test_tied_weight_has_one_threshold_and_one_mask() -> None:
    model = sparsify(reference.Tied(), AutoSparse(threshold_init=-1.0))
    assert model.embed.weight_threshold is model.head.weight_threshold
    assert model.embed.weight_offset is model.head.weight_offset
    assert model.embed._parameters["weight"] is model.head._parameters["weight"]
    assert torch.equal(model.embed.weight, model.head.weight) and (model.head.weight == 0).any()
    assert sum("threshold" in name for name, _ in model.named_parameters()) == 2  # mid and the tied one


def test_tied_weight_is_one_mask_node_in_the_captured_graph() -> None:
    from autosparse_fx.passes import dedupe_masks

    model = sparsify(reference.Tied())
    graphs: list[torch.fx.GraphModule] = []

    def capture(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch.compile(model, backend=capture, fullgraph=True)(torch.randint(50, (2, 3)))
    (gm,) = graphs
    dedupe_masks(gm)
    masks = gm.graph.find_nodes(op="call_function", target=torch.ops.autosparse.threshold_mask.default)
    assert len(masks) == 2
    assert len({node.args[0] for node in masks}) == 2


def test_tied_weight_aliases_in_the_state_dict() -> None:
    state = sparsify(reference.Tied()).state_dict()
    for name in ("weight", "weight_threshold", "weight_offset"):
        assert state[f"embed.{name}"].data_ptr() == state[f"head.{name}"].data_ptr()


def test_embedding_tied_to_a_head_is_masked_and_the_report_says_so() -> None:
    found = report(sparsify(reference.Tied()))
    (layer,) = (layer for layer in found.layers if layer.name == "embed.weight")
    assert layer.tied == ("head.weight",)
    assert found.numel == 50 * 32 + 32 * 32  # counted once
    text = str(found)
    assert "embed.weight" in text and "head.weight" in text
    assert "embed.weight" not in found.skipped


def test_gradients_of_a_tied_weight_add_up() -> None:
    model = reference.Tied()
    dense = copy.deepcopy(model)
    sparsify(model, AutoSparse(alpha=0.5, threshold_init=-1.0))
    held = dict(dense.named_parameters())
    with torch.no_grad():
        for name, _, w, s in reference.masked_parameters(model):
            held[name].copy_(reference.masked(w, s, 0.5))
    ids = torch.randint(50, (4, 6))
    for m in (model, dense):
        m(ids).square().sum().backward()
    incoming = dense.embed.weight.grad
    assert incoming is not None
    _, _, w, s = next(reference.masked_parameters(model))
    _, dw, ds = reference.gradients(w, s, 0.5, incoming)
    torch.testing.assert_close(w.grad, dw.float())
    torch.testing.assert_close(model.head.weight_threshold.grad, 0.1 * ds.float())


def test_shared_module_is_masked_once() -> None:
    shared = nn.Linear(4, 4)
    model = sparsify(nn.Sequential(shared, nn.ReLU(), shared))
    assert len(report(model).layers) == 1
    assert sum("threshold" in name for name, _ in model.named_parameters()) == 1


def test_weight_tied_between_layers_with_different_channel_axes_reads_the_same_in_both() -> None:
    """A transposed convolution tied to a convolution (a tied autoencoder) has its channels on the other axis."""

    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Conv2d(3, 5, 3)
            self.decode = nn.ConvTranspose2d(5, 3, 3)
            self.decode.weight = self.encode.weight

    model = sparsify(Autoencoder(), AutoSparse(granularity="channel", threshold_init=-2.0))
    with torch.no_grad():
        model.encode.weight_offset.uniform_(-4, -1)
    assert torch.equal(model.encode.weight, model.decode.weight)
