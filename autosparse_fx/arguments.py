"""What the arguments of the public functions must be, said in the same words by all of them."""

import difflib
import math
import numbers
import operator
from collections.abc import Iterable

from torch import nn


def check_module(model: object, function: str) -> None:
    """Raise a TypeError that names the function, where its model is none."""
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"{function} takes a torch.nn.Module, got {given}")


def check_bool(value: object, name: str) -> None:
    """Raise a TypeError that names the argument, where it is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {_shown(value)}")


def whole_steps(value: object, name: str) -> int:
    """A positive number of optimizer steps, given as a whole number of any type, as a plain one.

    Raises:
        ValueError: naming the argument, if it is none.
    """
    is_bool = isinstance(value, bool)
    try:
        steps = 0 if is_bool else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        steps = 0
    if steps <= 0:
        is_number = isinstance(value, numbers.Real) and not is_bool and 1 <= float(value) < math.inf
        cure = f": pass int({value!r})" if is_number else ""
        raise ValueError(f"{name} must be a positive whole number of optimizer steps, got {_shown(value)}{cure}")
    return steps


def is_fraction(value: object) -> bool:
    """Whether it is a number in [0, 1]."""
    return isinstance(value, numbers.Real) and 0 <= float(value) <= 1


def unknown_names(names: Iterable[object], known: Iterable[str]) -> str:
    """Names that nothing is known by, each with those that it may be a slip of."""
    known = list(known)
    shown = []
    for name in names:
        close = difflib.get_close_matches(str(name), known)
        shown.append(f"{name!r} (do you mean {', '.join(map(repr, close))}?)" if close else repr(name))
    return ", ".join(shown)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"a value of type {type(value).__name__}"
