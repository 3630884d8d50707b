"""What the tests of the counts share: a module around any function, and counts as plain numbers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from autosparse_fx.flops import ModelFlops, count_flops


class Count(NamedTuple):
    """Multiply-accumulates, dense."""

    forward: int
    input_gradient: int
    weight_gradient: int


class Around(nn.Module):
    """``function(self, *inputs)`` over parameters, buffers and modules that are given by name."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def numbers(flops: ModelFlops, **sizes: int) -> Count:
    """The dense counts with every size put in."""
    dense = flops.dense
    values = [flops.evaluate(c, **sizes) for c in (dense.forward, dense.input_gradient, dense.weight_gradient)]
    assert all(isinstance(value, int) for value in values), values
    return Count(*values)  # type: ignore[arg-type]


def count(model: nn.Module, inputs: Sequence[Any] | Mapping[str, Any] | Tensor) -> Count:
    """The dense counts of a model on inputs whose sizes are all fixed."""
    return numbers(count_flops(model, inputs))
