"""What ``torch.compile(..., mode=..., options=...)`` may say to the backend, and what it means."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from functorch.compile import aot_module_simplified, make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch.fx import GraphModule

from autosparse_fx import AutoSparse, sparsify
from autosparse_fx._compat.inductor import inductor_option_names
from autosparse_fx.hidden.masks import Request, hidden_mask
from autosparse_fx.joint import JointPasses
from autosparse_fx.options import ONE_LINE_OPTIONS, Options, parse_options

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


# Sorting.


@pytest.mark.parametrize("options", [None, {}])
def test_nothing_asks_for_nothing(options: dict[str, Any] | None) -> None:
    assert parse_options(None, options) == Options(request=None, recompute_masks=True, inductor={})


def test_total_steps_alone_is_a_request_with_the_default_configuration() -> None:
    assert parse_options(None, {"total_steps": 7}) == Options(Request(AutoSparse(), 7), True, {})


FIELDS: dict[str, Any] = {
    "target_sparsity": 0.7,
    "alpha": 0.5,
    "decay": "linear",
    "alpha_end": 0.8,
    "threshold_init": -3.0,
    "threshold_scale": 0.2,
    "granularity": "channel",
    "ramp_end": 0.5,
    "max_layer_sparsity": 0.95,
    "rules": {"head.*": None, "body.*": {"target_sparsity": 0.5}},
}


def test_all_fields_are_tried_below() -> None:
    assert list(FIELDS) == [f.name for f in dataclasses.fields(AutoSparse)]
    assert list(ONE_LINE_OPTIONS) == ["total_steps", *FIELDS]


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_the_configuration_is_an_option(name: str) -> None:
    parsed = parse_options(None, {"total_steps": 5, name: FIELDS[name]})
    assert parsed.request == Request(AutoSparse(**{name: FIELDS[name]}), 5)
    assert parsed.inductor == {}


def test_all_fields_at_once_beside_all_else() -> None:
    options = {
        **FIELDS,
        "total_steps": 5,
        "recompute_masks": False,
        "mode": "reduce-overhead",
        "epilogue_fusion": False,
    }
    before = copy.deepcopy(options)
    parsed = parse_options(None, options)
    assert parsed.request == Request(AutoSparse(**FIELDS), 5)
    assert parsed.recompute_masks is False
    assert parsed.inductor == {**torch._inductor.list_mode_options("reduce-overhead"), "epilogue_fusion": False}
    assert options == before


def test_open_loop_can_be_asked_for() -> None:
    request = parse_options(None, {"total_steps": 5, "target_sparsity": None}).request
    assert request is not None and request.config.target_sparsity is None


def test_no_option_of_ours_hides_one_of_inductor() -> None:
    assert not {*ONE_LINE_OPTIONS, "mode", "recompute_masks"} & inductor_option_names()


def test_equal_options_make_equal_requests() -> None:
    """Several compilations of one model are one training."""
    first, second = (parse_options(None, {**FIELDS, "total_steps": 5}).request for _ in range(2))
    assert first == second
    assert first != parse_options(None, {**FIELDS, "total_steps": 6}).request


@pytest.mark.parametrize("name", ["target-sparsity", "total-steps", "recompute-masks", "max-autotune"])
def test_dashes_are_read_as_underscores(name: str) -> None:
    value = {"target-sparsity": 0.5, "total-steps": 3, "recompute-masks": False, "max-autotune": True}[name]
    given = {name: value} if name == "total-steps" else {"total_steps": 3, name: value}
    assert parse_options(None, given) == parse_options(None, {k.replace("-", "_"): v for k, v in given.items()})


# Mode.


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_mode_is_the_same_by_either_argument(mode: str) -> None:
    assert parse_options(mode, None) == parse_options(None, {"mode": mode})
    assert parse_options(mode, None).inductor == torch._inductor.list_mode_options(mode) != {}


@pytest.mark.parametrize("mode", [None, "default"])
def test_default_mode_sets_nothing(mode: str | None) -> None:
    assert parse_options(mode, None).inductor == parse_options(None, {"mode": mode}).inductor == {}


def test_option_wins_over_the_mode_and_the_rest_of_the_mode_stays() -> None:
    mode = torch._inductor.list_mode_options("max-autotune")
    parsed = parse_options("max-autotune", {"triton.cudagraphs": False})
    assert mode["triton.cudagraphs"] is True
    assert parsed.inductor == {**mode, "triton.cudagraphs": False}
    assert mode == torch._inductor.list_mode_options("max-autotune")  # not written to


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(RuntimeError, match="fast"):
        parse_options("fast", None)


# Errors.


@pytest.mark.parametrize("name", ["no_such", "sparsity", "triton.no_such", "target_sparsities", "AutoSparse"])
def test_unknown_option(name: str) -> None:
    with pytest.raises(ValueError, match=f"has no option '{name}'") as caught:
        parse_options(None, {"total_steps": 5, name: 1})
    for known in ("'mode'", "'recompute_masks'", *map(repr, ONE_LINE_OPTIONS), "list_options"):
        assert known in str(caught.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("target_sparisty", "target_sparsity"), ("totalsteps", "total_steps"), ("max_autotun", "max_autotune")],
)
def test_unknown_option_says_what_may_be_meant(name: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"has no option '{name}' \(do you mean '{meant}'"):
        parse_options(None, {"total_steps": 5, name: 1})


@pytest.mark.parametrize("name", FIELDS)
def test_total_steps_is_missing(name: str) -> None:
    with pytest.raises(ValueError, match=rf"option '{name}'.*also needs 'total_steps'"):
        parse_options(None, {name: FIELDS[name]})


UNFIT = [0, -1, True, False, 10.0, 0.5, float("nan"), "10", None, [10], np.int64(0)]
# These have __index__, and refuse it.
UNFIT += [torch.tensor(2.5), torch.ones(2), np.ones(2, dtype=int)]


@pytest.mark.parametrize("value", UNFIT, ids=str)
def test_total_steps_that_is_no_positive_number_of_steps(value: Any) -> None:
    with pytest.raises(ValueError, match=r"'total_steps' must be a positive whole number of optimizer steps, got"):
        parse_options(None, {"total_steps": value})


@pytest.mark.parametrize("value", [1, 10**9, np.int64(10), torch.tensor(10)])
def test_total_steps_of_any_whole_type(value: Any) -> None:
    request = parse_options(None, {"total_steps": value}).request
    assert request is not None and type(request.total_steps) is int and request.total_steps == int(value)


OUT_OF_RANGE: list[tuple[str, Any, type[Exception]]] = [
    ("target_sparsity", 90, ValueError),
    ("target_sparsity", 0, ValueError),
    ("target_sparsity", "0.9", TypeError),
    ("target_sparsity", 0.995, ValueError),  # above max_layer_sparsity
    ("alpha", 1.5, ValueError),
    ("alpha", True, TypeError),
    ("decay", "exponential", ValueError),
    ("alpha_end", 0, ValueError),
    ("threshold_init", float("inf"), ValueError),
    ("threshold_init", "small", ValueError),
    ("threshold_scale", 0.0, ValueError),
    ("granularity", "row", ValueError),
    ("ramp_end", 1.1, ValueError),
    ("max_layer_sparsity", 1, ValueError),
    ("rules", ["fc.weight"], TypeError),
    ("rules", {"fc.weight": {"alpha": 0.5}}, ValueError),
    ("rules", {"re:(": None}, ValueError),
]


@pytest.mark.parametrize(("name", "value", "error"), OUT_OF_RANGE)
def test_field_out_of_range_is_named(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"AutoSparse\.{name}"):
        parse_options(None, {"total_steps": 5, name: value})


@pytest.mark.parametrize("value", [None, 1, 0, "yes", "False"])
def test_recompute_masks_that_is_no_bool(value: Any) -> None:
    with pytest.raises(TypeError, match=r"'recompute_masks' must be True or False, got"):
        parse_options(None, {"recompute_masks": value})


def test_recompute_masks_needs_no_total_steps() -> None:
    """It is for prepared models as well."""
    assert parse_options(None, {"recompute_masks": False}) == Options(None, False, {})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"total_steps": 0}, "'total_steps' must be a positive whole number"),
        ({"target_sparsity": 0.9}, "also needs 'total_steps'"),
        ({"total_steps": 5, "alpha": 2}, "AutoSparse.alpha"),
        ({"total_steps": 5, "target": 0.9}, "no option 'target'"),
    ],
)
def test_error_comes_through_torch_compile(options: dict[str, Any], text: str) -> None:
    with pytest.raises(Exception) as caught:  # Dynamo wraps what a backend raises in a class of its own
        torch.compile(reference.mlp(), backend="autosparse", options=options)(X)
    assert text in str(caught.value)


# Recomputation of the masks.


def test_uuid_depends_on_recompute_masks() -> None:
    """Else a graph that was compiled with one value would be taken from the cache for the other."""
    with_tags, without = JointPasses(recompute_masks=True), JointPasses(recompute_masks=False)
    assert with_tags.uuid() == JointPasses().uuid() and without.uuid()
    assert with_tags.uuid() != without.uuid() == JointPasses(recompute_masks=False).uuid()


@pytest.fixture
def without_code_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's part but for its code: the joint graph, our pass on it, the cut in two; graphs run as they are."""

    def compile_fx(gm: GraphModule, inputs: Any, *, config_patches: dict[str, Any], **_: Any) -> Callable[..., Any]:
        def partition(joint: GraphModule, *args: Any, **kwargs: Any) -> Any:
            config_patches["joint_custom_post_pass"](joint.graph)
            return min_cut_rematerialization_partition(joint, *args, **kwargs)

        def run(gm: GraphModule, inputs: Any) -> Callable[..., Any]:
            return make_boxed_func(gm.forward)

        return aot_module_simplified(gm, inputs, fw_compiler=run, bw_compiler=run, partition_fn=partition)  # type: ignore[no-any-return]

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)


def saved_weights(model: nn.Module, options: dict[str, Any]) -> tuple[list[tuple[int, ...]], list[Tensor | None]]:
    """Shapes of what a forward keeps that is as large as the middle weight and is no parameter; and the gradients."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, ...]] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own and t.numel() == 64 * 64:
            kept[t.untyped_storage().data_ptr()] = tuple(t.shape)
        return t

    torch._dynamo.reset()
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = torch.compile(model, backend="autosparse", options=options)(X).square().sum()
    loss.backward()
    return list(kept.values()), [p.grad for p in model.parameters()]


@pytest.mark.usefixtures("without_code_generation")
@pytest.mark.parametrize("prepared", [True, False])
def test_masked_weights_are_kept_for_backward_only_on_demand(prepared: bool) -> None:
    model = sparsify(reference.mlp(), AutoSparse(threshold_init=-2.5)) if prepared else reference.mlp()
    options = {} if prepared else {"total_steps": 10, "threshold_init": -2.5}
    recomputed, expected = saved_weights(model, options)
    expected = [None if grad is None else grad.clone() for grad in expected]
    said, _ = saved_weights(model, {**options, "recompute_masks": True})
    kept, found = saved_weights(model, {**options, "recompute_masks": False})
    assert recomputed == said == []
    assert kept == [(64, 64)]
    torch.testing.assert_close(found, expected)


# The cure that an error names.


class Writing(nn.Module):
    """Writes to its own weight in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.clipped = nn.Linear(16, 16)
        self.other = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.clipped.weight.clamp_(-0.01, 0.01)
        return self.other(self.clipped(x))


def compile_with_the_rule(model: Writing) -> None:
    """The write takes place, and only the other weight is masked."""
    torch._dynamo.reset()
    options = {"total_steps": 9, "rules": {"clipped.weight": None}, "threshold_init": -2.5}
    found = torch.compile(model, backend="autosparse", options=options)(X)
    assert model.clipped.weight.abs().max() <= 0.01
    assert hidden_mask(model.clipped.weight) is None and hidden_mask(model.other.weight) is not None
    w, cut = model.other.weight, torch.sigmoid(torch.tensor(-2.5))
    masked = w - w.clamp(-cut, cut)
    assert 0 < (masked == 0).sum() < w.numel()
    torch.testing.assert_close(found, torch.nn.functional.linear(model.clipped(X), masked, model.other.bias))


@pytest.mark.usefixtures("without_code_generation")
def test_weight_that_is_written_to_can_be_left_dense_by_a_rule() -> None:
    compile_with_the_rule(Writing())


@pytest.mark.usefixtures("without_code_generation")
def test_same_model_can_be_compiled_with_other_options_after_a_refusal() -> None:
    """The first attempt trained nothing and compiled nothing."""
    model = Writing()
    cure = r"options=\{'rules': \{'clipped\.weight': None\}"
    with pytest.raises(Exception, match=rf"writes to its weight 'clipped\.weight'.*{cure}"):
        torch.compile(model, backend="autosparse", options={"total_steps": 9})(X)
    assert hidden_mask(model.clipped.weight) is None and hidden_mask(model.other.weight) is None
    compile_with_the_rule(model)
