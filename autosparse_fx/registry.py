"""The parameters of models that were prepared, so that the backend can tell a part of one from an unprepared model."""

from collections.abc import Iterable

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_prepared = WeakIdKeyDictionary()


def remember(parameters: Iterable[Tensor]) -> None:
    """Note that these parameters belong to a model that ``sparsify`` prepared."""
    for parameter in parameters:
        _prepared[parameter] = True


def is_prepared(parameter: Tensor) -> bool:
    """Whether the parameter belongs to a prepared model, masked or not."""
    return parameter in _prepared
