"""Models that live calls of ``torch.compile(..., options={...})`` were to make sparse, called or not.

Dynamo tells a backend of the graphs that it captures. Of a model of which it captures none (an ``nn.LSTM``, a graph
break in a loop) the backend never hears, so the garbage collector is asked what was compiled, once in a while.
"""

import gc
import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from torch import nn

from autosparse_fx._compat import dynamo
from autosparse_fx.hidden.registration import unmasked_in, unseen_in
from autosparse_fx.options import parse_options
from autosparse_fx.ownership import live_objects


@dataclass
class _Calls:
    """What is known of the calls of ``torch.compile``, with options for this backend and others."""

    count: int = 0
    latest: object = None  # the objects themselves, since the id of one that is gone may be another's
    asking: list[object] = field(default_factory=list)  # those with options for this backend
    number: int = 0


_calls = _Calls()


def calls() -> int:
    """A number that changes when ``torch.compile`` is given options for this backend."""
    backends = dynamo.compiling_backends()
    latest = backends[next(reversed(backends))] if backends else None
    if len(backends) != _calls.count or latest is not _calls.latest:
        _calls.count, _calls.latest = len(backends), latest
        given = [(backend, dynamo.backend_arguments(backend, "autosparse")) for backend in list(backends.values())]
        asking = [backend for backend, arguments in given if arguments and arguments.get("options")]
        if list(map(id, asking)) != list(map(id, _calls.asking)):
            _calls.asking = asking
            _calls.number += 1
    return _calls.number


def uncaptured(held: set[int]) -> tuple[dict[nn.Parameter, str], dict[nn.Parameter, str]]:
    """The weights that are to be sparse and that no graph masks, and the parameters that may be weights and that no
    graph holds, each with their names, of all models that hold one of the parameters with these ids.

    Raises:
        TypeError, ValueError: if the options of such a model are not valid, which Dynamo may have swallowed.
    """
    found = _uncaptured(held)
    if any(found):
        gc.collect()  # a compiled model that nobody holds any more has asked for nothing
        found = _uncaptured(held)
    return found


def _uncaptured(held: set[int]) -> tuple[dict[nn.Parameter, str], dict[nn.Parameter, str]]:
    unmasked: dict[nn.Parameter, str] = {}
    unseen: dict[nn.Parameter, str] = {}
    for compiled, arguments in _compiled():
        for module in _modules(compiled):
            if any(id(parameter) in held for parameter in module.parameters()):
                request = parse_options(arguments.get("mode"), arguments.get("options")).request
                if request is not None:
                    unmasked.update(unmasked_in(module, request))
                    unseen.update(unseen_in(module, request))
    return unmasked, unseen


def _compiled() -> Iterator[tuple[Callable[..., Any], dict[str, Any]]]:
    closures = [weakref.ref(o) for o in live_objects() if type(o) is FunctionType and o.__closure__]
    for reference in closures:
        closure = reference()
        compiled = None if closure is None else dynamo.compiled_by(closure, "autosparse")
        if compiled is not None and compiled[1].get("options"):
            yield compiled


def _modules(compiled: Callable[..., Any]) -> list[nn.Module]:
    """The module that was compiled, or those that a compiled function or method refers to."""
    while not isinstance(compiled, nn.Module):
        owner = getattr(compiled, "__self__", None)
        if isinstance(owner, nn.Module):
            return [owner]
        if not hasattr(compiled, "__wrapped__"):
            try:
                variables = inspect.getclosurevars(compiled)
            except (TypeError, ValueError):  # not written in Python; a variable that has no value yet
                return []
            values = (variables.nonlocals, variables.globals, getattr(owner, "__dict__", {}))
            # By type and not by isinstance, which would wake lazily loaded proxies.
            return [value for found in values for value in found.values() if issubclass(type(value), nn.Module)]
        compiled = compiled.__wrapped__  # type: ignore[attr-defined]
    return [compiled]
