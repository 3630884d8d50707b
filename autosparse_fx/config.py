"""AutoSparse: what to make sparse, how far, and how the gradients of masked weights are annealed."""

import dataclasses
import fnmatch
import math
import numbers
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from autosparse_fx.arguments import unknown_names
from autosparse_fx.decay import DECAYS

__all__ = ["AutoSparse"]

# The fields that a rule may set: alpha and everything about time belong to the whole model.
RULE_FIELDS = ("target_sparsity", "threshold_init", "granularity")
GRANULARITIES = ("layer", "channel")
# A float32 still tells hundredths of the lowest apart, and the sigmoid of the highest from 1.
LOGITS = (-1e5, 16.0)


class _Rules(Mapping[str, "AutoSparse | None"]):
    """Rules that cannot be changed: a mapping with a hash, in which the order counts."""

    def __init__(self, rules: "Mapping[str, AutoSparse | None]") -> None:
        self._rules = dict(rules)

    def __getitem__(self, pattern: str) -> "AutoSparse | None":
        return self._rules[pattern]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and list(self.items()) == list(other.items())

    def __hash__(self) -> int:
        return hash(tuple(self.items()))

    def __repr__(self) -> str:
        return repr(self._rules)


@dataclass(frozen=True)
class AutoSparse:
    """Configuration of AutoSparse training (arXiv:2304.06941); checked when it is made, and immutable.

    Args:
        target_sparsity: fraction in (0, 1) of the masked weights that are zero at the end of the training; the
            annealer steers all thresholds there. ``None`` is the paper's open loop: the gradients alone decide.
        alpha: initial factor, in [0, 1], on the gradients of masked weights. 0 is STR, 1 is straight-through.
        decay: how alpha falls over the training: ``"fixed"``, ``"linear"``, ``"cosine"``, ``"sigmoid"`` or
            ``"sigmoid_cosine"``.
        alpha_end: fraction in (0, 1] of the training after which alpha is exactly 0.
        threshold_init: initial logit ``s`` of every threshold (the cut is ``sigmoid(s)``), 16 at most, or ``"auto"``: a
            small cut relative to the standard deviation of each layer's own weights.
        threshold_scale: positive factor between the trained parameter and the logit,
            ``s = offset + threshold_scale * parameter``; it makes the weights' learning rate right for thresholds.
        granularity: one threshold per ``"layer"`` or per output ``"channel"``.
        ramp_end: fraction in (0, 1] of the training at which the sparsity has reached the target, along a cubic.
        max_layer_sparsity: no layer becomes sparser than this by steering, a fraction in (0, 1).
        rules: exceptions, an ordered mapping from a pattern for the full names of parameters to ``None`` (leave
            dense) or to other values of ``target_sparsity``, ``threshold_init`` and ``granularity``; the first
            match wins. A pattern is a name, a glob (``*`` crosses dots) or ``"re:"`` with a regular expression that
            matches the whole name. Weights with the same target are steered together.

    Raises:
        TypeError, ValueError: naming the field, its value and what it accepts.

    Example::

        AutoSparse(target_sparsity=0.9, rules={"fc.weight": None, "layer1.*": {"target_sparsity": 0.5}})
    """

    target_sparsity: float | None = 0.8
    alpha: float = 0.75
    decay: str = "sigmoid_cosine"
    alpha_end: float = 0.9
    threshold_init: float | str = "auto"
    threshold_scale: float = 0.1
    granularity: str = "layer"
    ramp_end: float = 0.6
    max_layer_sparsity: float = 0.99
    rules: Mapping[str, "Mapping[str, Any] | AutoSparse | None"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.target_sparsity is not None:
            self._check_number("target_sparsity", lambda x: 0 < x < 1, "a fraction in (0, 1), or None")
        self._check_number("alpha", lambda x: 0 <= x <= 1, "a number in [0, 1]")
        self._check_choice("decay", tuple(DECAYS))
        self._check_number("alpha_end", lambda x: 0 < x <= 1, "a fraction in (0, 1]")
        logit = f'a logit in [{LOGITS[0]:.0f}, {LOGITS[1]:.0f}], whose sigmoid is the cut, or "auto"'
        if isinstance(self.threshold_init, str):
            self._check_choice("threshold_init", ("auto",), logit)
        else:
            self._check_number("threshold_init", lambda x: LOGITS[0] <= x <= LOGITS[1], logit)
        self._check_number("threshold_scale", lambda x: 0 < x < math.inf, "a positive finite number")
        self._check_choice("granularity", GRANULARITIES)
        self._check_number("ramp_end", lambda x: 0 < x <= 1, "a fraction in (0, 1]")
        self._check_number("max_layer_sparsity", lambda x: 0 < x < 1, "a fraction in (0, 1)")
        if self.target_sparsity is not None and self.target_sparsity > self.max_layer_sparsity:
            raise ValueError(
                f"AutoSparse.target_sparsity is {self.target_sparsity}, but no layer may become sparser than "
                f"max_layer_sparsity={self.max_layer_sparsity}: raise max_layer_sparsity above the target"
            )
        if not isinstance(self.rules, Mapping):
            raise TypeError(f"AutoSparse.rules must be a mapping from pattern to rule, got {type(self.rules).__name__}")
        object.__setattr__(self, "rules", _Rules({p: self._as_rule(p, r) for p, r in self.rules.items()}))

    def _check_number(self, name: str, accepts: Callable[[float], bool], what: str) -> None:
        value: Any = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"AutoSparse.{name} must be {what}, got {value!r}")
        number: Any = value
        if not isinstance(number, int):
            number = float(number)  # NumPy's numbers are no JSON
            object.__setattr__(self, name, number)
        if not accepts(number):
            raise ValueError(f"AutoSparse.{name} must be {what}, got {value!r}")

    def _check_choice(self, name: str, choices: tuple[str, ...], what: str = "") -> None:
        value = getattr(self, name)
        if value not in choices:
            what = what or f"one of {', '.join(map(repr, choices))}"
            raise ValueError(f"AutoSparse.{name} must be {what}, got {value!r}")

    def _as_rule(self, pattern: object, rule: object) -> "AutoSparse | None":
        """The complete configuration of the weights that ``pattern`` matches."""
        if not isinstance(pattern, str):
            raise TypeError(f"AutoSparse.rules: a pattern must be a string, got {pattern!r}")
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ValueError(f"AutoSparse.rules: {pattern!r} is not a regular expression: {error}") from error
        if rule is None:
            return None
        common = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in RULE_FIELDS}
        common["rules"] = {}
        if isinstance(rule, Mapping):
            foreign = [name for name in rule if name not in RULE_FIELDS]
            if foreign:
                raise ValueError(
                    f"AutoSparse.rules[{pattern!r}] sets {unknown_names(foreign, RULE_FIELDS)}; "
                    f"a rule may set {', '.join(RULE_FIELDS)}"
                )
            inherited = {name: getattr(self, name) for name in RULE_FIELDS}
            return _rule_of(pattern, {**common, **inherited, **rule})
        if isinstance(rule, AutoSparse):
            for f in dataclasses.fields(rule):
                value, default = getattr(rule, f.name), getattr(_DEFAULT, f.name)
                if f.name not in RULE_FIELDS and value not in (default, common[f.name]):
                    raise ValueError(
                        f"AutoSparse.rules[{pattern!r}] sets {f.name}={value!r}; "
                        f"a rule may set {', '.join(RULE_FIELDS)}"
                    )
            return _rule_of(pattern, {**common, **{name: getattr(rule, name) for name in RULE_FIELDS}})
        raise TypeError(
            f"AutoSparse.rules[{pattern!r}] must be None, a mapping of {', '.join(RULE_FIELDS)}, or an AutoSparse; "
            f"got {rule!r}"
        )

    def rule_for(self, names: Sequence[str]) -> "tuple[str | None, AutoSparse | None]":
        """Return the first pattern that matches one of ``names`` (the aliases of one tensor), and its configuration.

        ``(None, self)`` where no pattern matches; a configuration of ``None`` means: leave dense.
        """
        for pattern, rule in self.rules.items():
            if any(matches(pattern, name) for name in names):
                return pattern, rule  # type: ignore[return-value]  # normalised in __post_init__
        return None, self

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain values, fit for JSON; :meth:`from_dict` takes them back."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["rules"] = {
            pattern: None if rule is None else {name: getattr(rule, name) for name in RULE_FIELDS}
            for pattern, rule in self.rules.items()
        }
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AutoSparse":
        """Return the configuration that :meth:`to_dict` wrote.

        Raises:
            ValueError: naming every key that is not a field.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ValueError(
                f"AutoSparse has no field {unknown_names(unknown, known)}; its fields are {', '.join(known)}"
            )
        return cls(**values)


def _rule_of(pattern: str, values: dict[str, Any]) -> AutoSparse:
    try:
        return AutoSparse(**values)
    except (TypeError, ValueError) as error:
        raise type(error)(f"AutoSparse.rules[{pattern!r}]: {error}") from error


def check_config(config: object, function: str) -> None:
    """Raise a TypeError that names the function, where its configuration is none."""
    if isinstance(config, AutoSparse):
        return
    is_number = isinstance(config, numbers.Real) and not isinstance(config, bool)
    cure = f": pass AutoSparse(target_sparsity={config!r})" if is_number else ""
    cure = ": pass AutoSparse(**config)" if isinstance(config, Mapping) else cure
    raise TypeError(f"{function} takes an AutoSparse as its configuration, got {type(config).__name__}{cure}")


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` (a name, a glob, or ``re:`` and a regular expression) matches a parameter's full name."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return pattern == name or fnmatch.fnmatchcase(name, pattern)


_DEFAULT = AutoSparse()


def masking_exactly(thresholds: Mapping[str, Tensor], scale: float | None = None) -> AutoSparse:
    """What masks the weights of these names and no others, each as its saved threshold tells: ``[1]`` or ``[C]``."""
    rules: dict[str, Any] = {
        name: {"granularity": "channel" if threshold.numel() > 1 else "layer"} for name, threshold in thresholds.items()
    }
    made = AutoSparse(target_sparsity=None, threshold_init=-20.0, rules={**rules, "*": None})
    return made if scale is None else dataclasses.replace(made, threshold_scale=scale)
