"""Models for the tests of sparsify."""

import contextlib
from collections.abc import Iterator
from typing import Any

import reference
import torch
from torch import Tensor, nn


def masked_names(model: nn.Module) -> set[str]:
    return {name for name, *_ in reference.masked_parameters(model)}


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """The block changes neither classes, nor state, nor which objects the model consists of."""

    def classes() -> list[type]:
        return [type(m) for m in model.modules()]

    def parts() -> dict[str, int]:
        return {name: id(t) for m in model.modules() for name, t in (*m._parameters.items(), *m._buffers.items())}

    before = classes(), parts(), [set(vars(m)) for m in model.modules()]
    state = {name: t.detach().clone() for name, t in model.state_dict().items() if is_ordinary(t)}
    yield
    assert (classes(), parts(), [set(vars(m)) for m in model.modules()]) == before
    after = {name: t for name, t in model.state_dict().items() if is_ordinary(t)}
    assert list(after) == list(state)
    for name, t in after.items():
        assert torch.equal(t, state[name]), name


def is_ordinary(t: Any) -> bool:
    return isinstance(t, Tensor) and not isinstance(t, nn.parameter.UninitializedTensorMixin)
