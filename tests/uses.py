"""What ``find_weights`` finds in the graphs of a function of an input and one parameter, or several."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from autosparse_fx.passes.find_weights import find_weights


def found_in(function: Callable[..., Any], x: Tensor, *weights: Tensor, **buffers: Tensor) -> dict[str, int]:
    """``{name: axis}`` of what is found in the Dynamo graphs of ``function(x, w, ...)``, where ``w`` is a parameter.

    The parameters of the function are called ``w``, ``w1``, ``w2``, ... here; ``buffers`` are passed by name.
    """
    names = ["w", *(f"w{i}" for i in range(1, len(weights)))]

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, weight in zip(names, weights, strict=True):
                setattr(self, name, nn.Parameter(weight))
            for name, buffer in buffers.items():
                self.register_buffer(name, buffer)

        def forward(self, x: Tensor) -> Any:
            held = {name: getattr(self, name) for name in buffers}
            return function(x, *(getattr(self, name) for name in names), **held)

    found: dict[str, int] = {}

    def backend(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def is_parameter(node: Node) -> bool:
            return isinstance(node.meta.get("example_value"), nn.Parameter)

        for node, axis in find_weights(gm, is_parameter).items():
            found[next(name for name in sorted(names, reverse=True) if f"_{name}_" in f"{node.name}_")] = axis
        return gm.forward

    torch.compile(Holder(), backend=backend, fullgraph=True)(x)
    return found


def axis_of(function: Callable[[Tensor, Tensor], Any], x: Tensor, w: Tensor) -> int | None:
    """The axis that is found for ``w``, or None."""
    return found_in(function, x, w).get("w")
