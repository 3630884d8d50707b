"""Whether a parameter that a graph trains belongs to a model that was prepared, the original or a copy of it."""

import gc
from collections.abc import Iterable

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

_finalized = WeakIdKeyDictionary()


def remember_finalized(parameters: Iterable[Tensor]) -> None:
    """Note that these parameters are of a model that was sparse: to tune it further is no mistake."""
    for parameter in parameters:
        _finalized[parameter] = True


def is_prepared(parameter: Tensor) -> bool:
    """Whether a module that holds the parameter, or any module around it, holds a masked weight, or did.

    Slow, because it asks the garbage collector for the holders: for graphs that train weights and mask none of them.
    """
    return parameter in _finalized or any(_prepared_beside(module) for module in _holders(parameter))


def _prepared_beside(module: nn.Module) -> bool:
    """Whether ``module``, or any module around it, holds a masked one: so do copies that ``sparsify`` never saw."""
    pending, seen = [module], set()
    while pending:
        module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if any("_autosparse" in vars(m) for m in module.modules()):
            return True
        pending.extend(_holders(module))
    return False


def _holders(value: object) -> list[nn.Module]:
    """The modules that hold a parameter or a module."""
    tables = [d for d in gc.get_referrers(value) if isinstance(d, dict)]
    owners = [o for table in tables for o in gc.get_referrers(table)]
    owners += [o for d in owners if isinstance(d, dict) for o in gc.get_referrers(d)]
    return [o for o in owners if isinstance(o, nn.Module)]
