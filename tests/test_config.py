"""AutoSparse: checked, frozen, with rules, and the same after a round trip through JSON."""

import copy
import dataclasses
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest

from autosparse_fx import AutoSparse

VALID: list[tuple[str, Any]] = [
    ("target_sparsity", None),
    ("target_sparsity", 1e-9),
    ("target_sparsity", 0.99),
    ("alpha", 0),
    ("alpha", 1),
    ("alpha", 0.5),
    ("decay", "fixed"),
    ("decay", "linear"),
    ("decay", "cosine"),
    ("decay", "sigmoid"),
    ("decay", "sigmoid_cosine"),
    ("alpha_end", 1),
    ("alpha_end", 1e-9),
    ("threshold_init", "auto"),
    ("threshold_init", -5),
    ("threshold_init", -3200.0),
    ("threshold_init", -100000),
    ("threshold_init", 0),
    ("threshold_init", 16.0),
    ("threshold_scale", 1e-9),
    ("threshold_scale", 100),
    ("granularity", "layer"),
    ("granularity", "channel"),
    ("ramp_end", 1),
    ("ramp_end", 1e-9),
    ("max_layer_sparsity", 0.8),
    ("max_layer_sparsity", 0.9999),
    ("rules", {}),
]

OUT_OF_RANGE: list[tuple[str, Any]] = [
    ("target_sparsity", 0),
    ("target_sparsity", 1),
    ("target_sparsity", 90),
    ("target_sparsity", -0.1),
    ("target_sparsity", math.nan),
    ("target_sparsity", math.inf),
    ("alpha", -0.1),
    ("alpha", 1.1),
    ("alpha", math.nan),
    ("decay", "exponential"),
    ("decay", ""),
    ("decay", None),
    ("decay", 3),
    ("alpha_end", 0),
    ("alpha_end", 1.01),
    ("alpha_end", 90),
    ("alpha_end", math.nan),
    ("threshold_init", math.inf),
    ("threshold_init", -math.inf),
    ("threshold_init", math.nan),
    ("threshold_init", 16.5),
    ("threshold_init", 150.0),
    ("threshold_init", -100001),
    ("threshold_init", -1e39),
    ("threshold_init", "small"),
    ("threshold_scale", 0),
    ("threshold_scale", -1),
    ("threshold_scale", math.inf),
    ("threshold_scale", math.nan),
    ("granularity", "weight"),
    ("granularity", None),
    ("ramp_end", 0),
    ("ramp_end", 1.5),
    ("max_layer_sparsity", 0),
    ("max_layer_sparsity", 1),
    ("max_layer_sparsity", 99),
]

WRONG_TYPE: list[tuple[str, Any]] = [
    ("target_sparsity", "0.9"),
    ("target_sparsity", True),
    ("target_sparsity", [0.9]),
    ("alpha", None),
    ("alpha", "1"),
    ("alpha", False),
    ("alpha_end", None),
    ("alpha_end", True),
    ("threshold_init", None),
    ("threshold_init", True),
    ("threshold_init", [-5.0]),
    ("threshold_scale", None),
    ("threshold_scale", "0.1"),
    ("ramp_end", None),
    ("max_layer_sparsity", None),
    ("rules", None),
    ("rules", [("fc.*", None)]),
    ("rules", "fc.*"),
]


def test_the_defaults_are_those_that_the_documentation_names() -> None:
    config = AutoSparse()
    assert config.target_sparsity == 0.8
    assert config.threshold_scale == 0.1
    assert config.threshold_init == "auto"
    assert config.decay == "sigmoid_cosine"
    assert config.max_layer_sparsity == 0.99
    assert config.rules == {}


@pytest.mark.parametrize(("field", "value"), VALID, ids=str)
def test_values_in_range_are_taken(field: str, value: Any) -> None:
    assert getattr(AutoSparse(**{field: value}), field) == value


@pytest.mark.parametrize(("field", "value"), OUT_OF_RANGE, ids=str)
def test_a_value_out_of_range_is_refused_by_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError) as error:
        AutoSparse(**{field: value})
    assert f"AutoSparse.{field} " in str(error.value)
    assert ("must be one of" in str(error.value)) == (field in ("decay", "granularity"))
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(("field", "value"), WRONG_TYPE, ids=str)
def test_a_value_of_the_wrong_type_is_refused_by_field(field: str, value: Any) -> None:
    with pytest.raises(TypeError) as error:
        AutoSparse(**{field: value})
    assert f"AutoSparse.{field} " in str(error.value)
    assert (type(value).__name__ if field == "rules" else repr(value)) in str(error.value)


def test_a_target_that_no_layer_may_reach_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target_sparsity is 0.995.*max_layer_sparsity=0.99.*raise"):
        AutoSparse(target_sparsity=0.995)
    assert AutoSparse(target_sparsity=0.995, max_layer_sparsity=0.999).target_sparsity == 0.995
    assert AutoSparse(target_sparsity=None, max_layer_sparsity=0.1).target_sparsity is None


def test_a_field_that_does_not_exist_is_refused() -> None:
    with pytest.raises(TypeError, match="sparsity_target"):
        AutoSparse(sparsity_target=0.9)  # type: ignore[call-arg]


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(AutoSparse)])
def test_every_field_is_frozen(field: str) -> None:
    config = AutoSparse()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, field, getattr(config, field))
    with pytest.raises(dataclasses.FrozenInstanceError):
        delattr(config, field)


def test_the_rules_do_not_change_with_the_mapping_that_they_came_from() -> None:
    rules: dict[str, Any] = {"fc.weight": None}
    config = AutoSparse(rules=rules)
    rules["conv.weight"] = None
    assert list(config.rules) == ["fc.weight"]


def test_equal_fields_make_equal_configurations() -> None:
    assert AutoSparse(target_sparsity=0.9, rules={"a": None}) == AutoSparse(target_sparsity=0.9, rules={"a": None})
    assert AutoSparse(target_sparsity=0.9) != AutoSparse(target_sparsity=0.91)
    assert AutoSparse(rules={"a": None}) != AutoSparse(rules={"b": None})
    assert AutoSparse(rules={"a": None}) != AutoSparse(rules={"a": {"target_sparsity": 0.5}})


def test_a_rule_as_mapping_equals_the_same_rule_as_configuration() -> None:
    as_mapping = AutoSparse(rules={"a": {"target_sparsity": 0.5, "granularity": "channel", "threshold_init": -4.0}})
    as_config = AutoSparse(rules={"a": AutoSparse(target_sparsity=0.5, granularity="channel", threshold_init=-4.0)})
    assert as_mapping == as_config


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_equal(copied: Any) -> None:
    config = AutoSparse(target_sparsity=0.7, rules={"fc.*": None, "conv*": {"target_sparsity": 0.4}})
    assert copied(config) == config


def test_replace_keeps_the_rules() -> None:
    config = AutoSparse(rules={"fc.*": None, "conv*": {"target_sparsity": 0.4}})
    changed = dataclasses.replace(config, alpha=0.5)
    assert changed.alpha == 0.5
    assert changed.rules["fc.*"] is None
    assert changed.rule_for(["conv1.weight"])[1] == dataclasses.replace(changed, target_sparsity=0.4, rules={})


# rules


def rule(config: AutoSparse, *names: str) -> AutoSparse | None:
    return config.rule_for(names)[1]


@pytest.mark.parametrize(
    ("pattern", "matched", "others"),
    [
        ("fc.weight", ["fc.weight"], ["head.fc.weight", "fc.weight2", "fcxweight", "fc"]),
        ("layer1.*", ["layer1.weight", "layer1.0.conv.weight"], ["layer10.weight", "a.layer1.weight", "layer1"]),
        ("*.weight", ["a.weight", "a.b.c.weight"], ["weight", "a.bias"]),
        ("*", ["a", "a.b.c"], []),
        ("layer?.weight", ["layer1.weight", "layerx.weight"], ["layer.weight", "layer12.weight"]),
        ("layer[12].weight", ["layer1.weight", "layer2.weight"], ["layer3.weight"]),
        ("FC.weight", ["FC.weight"], ["fc.weight"]),
        (r"re:layer[12]\..*", ["layer1.a.weight", "layer2.weight"], ["layer3.weight", "xlayer1.weight"]),
        ("re:fc", ["fc"], ["fc.weight", "a.fc"]),
        ("re:.*fc.*", ["fc.weight", "a.fc.weight"], ["conv.weight"]),
        (r"re:a\.weight", ["a.weight"], ["axweight"]),
    ],
)
def test_a_pattern_matches_whole_names_as_name_glob_or_regular_expression(
    pattern: str, matched: list[str], others: list[str]
) -> None:
    config = AutoSparse(rules={pattern: None})
    for name in matched:
        assert config.rule_for([name]) == (pattern, None), name
    for name in others:
        assert config.rule_for([name]) == (None, config), name


def test_a_name_with_glob_characters_in_it_matches_itself() -> None:
    assert rule(AutoSparse(rules={"blocks[0].weight": None}), "blocks[0].weight") is None


def test_the_first_match_wins() -> None:
    config = AutoSparse(rules={"fc.weight": None, "fc.*": {"target_sparsity": 0.5}, "*": {"target_sparsity": 0.6}})
    assert rule(config, "fc.weight") is None
    assert rule(config, "fc.other").target_sparsity == 0.5
    assert rule(config, "conv.weight").target_sparsity == 0.6
    turned = AutoSparse(rules={"*": {"target_sparsity": 0.6}, "fc.weight": None})
    assert rule(turned, "fc.weight").target_sparsity == 0.6


def test_any_alias_of_a_tied_weight_matches() -> None:
    config = AutoSparse(rules={"head.weight": None})
    assert rule(config, "embed.weight", "head.weight") is None
    assert rule(config, "embed.weight") == config


def test_a_mapping_changes_what_it_names_and_inherits_the_rest() -> None:
    config = AutoSparse(
        target_sparsity=0.9,
        threshold_init=-6.0,
        granularity="channel",
        alpha=0.5,
        rules={"a": {"target_sparsity": 0.5}},
    )
    expected = AutoSparse(target_sparsity=0.5, threshold_init=-6.0, granularity="channel", alpha=0.5)
    assert rule(config, "a") == expected
    assert rule(config, "b") == config


def test_an_empty_mapping_is_the_configuration_itself() -> None:
    config = AutoSparse(target_sparsity=0.9, rules={"a": {}})
    assert rule(config, "a") == AutoSparse(target_sparsity=0.9)


def test_a_rule_may_leave_a_weight_to_the_open_loop() -> None:
    config = AutoSparse(rules={"a": {"target_sparsity": None}})
    assert rule(config, "a").target_sparsity is None
    assert rule(config, "b").target_sparsity == 0.8


def test_a_configuration_as_rule_sets_target_init_and_granularity_and_takes_the_rest_from_the_model() -> None:
    config = AutoSparse(alpha=0.3, decay="linear", ramp_end=0.5, rules={"a": AutoSparse(target_sparsity=0.6)})
    assert rule(config, "a") == AutoSparse(target_sparsity=0.6, alpha=0.3, decay="linear", ramp_end=0.5)


FOREIGN: list[tuple[str, Any]] = [
    ("alpha", 0.1),
    ("decay", "linear"),
    ("alpha_end", 0.5),
    ("threshold_scale", 1.0),
    ("ramp_end", 0.1),
    ("max_layer_sparsity", 0.9),
    ("rules", {"b": None}),
]


@pytest.mark.parametrize(("field", "value"), FOREIGN, ids=str)
@pytest.mark.parametrize("as_config", [False, True])
def test_a_rule_that_sets_what_belongs_to_the_whole_model_is_refused(field: str, value: Any, as_config: bool) -> None:
    exception = AutoSparse(**{field: value}) if as_config else {field: value}
    with pytest.raises(ValueError) as error:
        AutoSparse(rules={"fc.*": exception})
    for part in ("'fc.*'", field, "target_sparsity", "threshold_init", "granularity"):
        assert part in str(error.value)


def test_a_rule_with_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'fc\.\*'.*'sparsity' \(do you mean 'target_sparsity'"):
        AutoSparse(rules={"fc.*": {"sparsity": 0.5}})


@pytest.mark.parametrize(
    ("exception", "error"),
    [
        ({"target_sparsity": 2}, ValueError),
        ({"target_sparsity": "0.5"}, TypeError),
        ({"granularity": "row"}, ValueError),
        ({"threshold_init": math.nan}, ValueError),
        ({"target_sparsity": 0.999}, ValueError),
    ],
    ids=str,
)
def test_a_value_out_of_range_in_a_rule_is_refused_by_pattern_field_and_value(
    exception: dict[str, Any], error: type[Exception]
) -> None:
    ((field, value),) = exception.items()
    with pytest.raises(error) as raised:
        AutoSparse(rules={"conv.*": None, "fc.*": exception})
    message = str(raised.value)
    assert field in message and str(value) in message
    assert "fc.*" in message and "conv.*" not in message


@pytest.mark.parametrize("exception", [0.5, "dense", False, [("target_sparsity", 0.5)]], ids=str)
def test_a_rule_that_is_no_configuration_is_refused(exception: Any) -> None:
    with pytest.raises(TypeError) as error:
        AutoSparse(rules={"fc.*": exception})
    assert "'fc.*'" in str(error.value) and repr(exception) in str(error.value)


def test_a_pattern_that_is_no_string_is_refused() -> None:
    with pytest.raises(TypeError, match="pattern must be a string, got 3"):
        AutoSparse(rules={3: None})  # type: ignore[dict-item]


def test_a_broken_regular_expression_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match=r"'re:fc\(' is not a regular expression"):
        AutoSparse(rules={"re:fc(": None})


# to_dict and from_dict

CONFIGS = [
    AutoSparse(),
    AutoSparse(target_sparsity=None, threshold_init=-5.0, granularity="channel"),
    AutoSparse(alpha=1, decay="linear", alpha_end=0.5, threshold_scale=1.0, ramp_end=0.3, max_layer_sparsity=0.95),
    AutoSparse(
        target_sparsity=0.9,
        alpha=0.25,
        rules={
            "fc.weight": None,
            "layer1.*": {"target_sparsity": 0.5},
            "re:head.*": AutoSparse(target_sparsity=None, granularity="channel"),
            "*": {"threshold_init": -4.0},
        },
    ),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_a_round_trip_through_json_gives_the_same_configuration(config: AutoSparse) -> None:
    text = json.dumps(config.to_dict(), allow_nan=False)
    again = AutoSparse.from_dict(json.loads(text))
    assert again == config
    assert list(again.rules) == list(config.rules)
    assert json.dumps(again.to_dict()) == text


def test_to_dict_names_every_field_and_gives_no_access_to_the_configuration() -> None:
    config = AutoSparse(rules={"fc.*": {"target_sparsity": 0.5}})
    values = config.to_dict()
    assert set(values) == {f.name for f in dataclasses.fields(AutoSparse)}
    values["rules"]["conv.*"] = None
    values["rules"]["fc.*"]["target_sparsity"] = 0.1
    assert config == AutoSparse(rules={"fc.*": {"target_sparsity": 0.5}})


def test_from_dict_fills_missing_fields_with_defaults() -> None:
    assert AutoSparse.from_dict({"alpha": 0.5}) == AutoSparse(alpha=0.5)
    assert AutoSparse.from_dict({}) == AutoSparse()


def test_from_dict_refuses_unknown_keys_by_name() -> None:
    with pytest.raises(ValueError) as error:
        AutoSparse.from_dict({"alpha": 0.5, "tempo": 1, "backward_sparsity": True})
    message = str(error.value)
    assert "'tempo'" in message and "'backward_sparsity'" in message and "'alpha'" not in message
    assert "target_sparsity" in message


def test_from_dict_checks_values_as_the_constructor_does() -> None:
    with pytest.raises(ValueError, match="target_sparsity"):
        AutoSparse.from_dict({"target_sparsity": 80})


def test_rules_cannot_be_changed_and_count_in_their_order() -> None:
    config = AutoSparse(rules={"a.*": None, "b": {"target_sparsity": 0.5}})
    with pytest.raises(TypeError):
        config.rules["c"] = None  # type: ignore[index]
    same = AutoSparse.from_dict(config.to_dict())
    assert same == config and hash(same) == hash(config)
    assert config != AutoSparse(rules={"b": {"target_sparsity": 0.5}, "a.*": None})
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_numbers_of_numpy_are_numbers() -> None:
    config = AutoSparse(target_sparsity=np.float32(0.5), alpha=np.float64(0.25))
    assert json.loads(json.dumps(config.to_dict()))["target_sparsity"] == 0.5
