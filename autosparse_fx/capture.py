"""Capture the graphs of a model on example inputs, without leaving a trace in it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from autosparse_fx import _compat
from autosparse_fx.passes.find_weights import find_weights


def multiplied_parameters(
    model: nn.Module, example_inputs: Sequence[Any] | Mapping[str, Any] | Tensor
) -> dict[int, int]:
    """Return the ids of the parameters that ``model`` multiplies by when called on ``example_inputs``, and the axis of
    the output channels of each.

    The model runs once, without gradients, in the mode that it is in. Its buffers and the random state are restored.
    """
    used: dict[int, int] = {}

    def backend(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        for node, axis in find_weights(gm, lambda n: placeholder_parameter(n) is not None).items():
            used.setdefault(id(placeholder_parameter(node)), axis)
        return gm.forward

    args, kwargs = _as_call(example_inputs)
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        for module in compiled:  # a model compiled by Module.compile() would hide its code from ours
            module._compiled_call_impl = None
        with torch.random.fork_rng(devices=list(devices)), torch.no_grad(), _compat.without_recompile_limit():
            torch.compile(model, backend=backend)(*args, **kwargs)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} could not be run on the example_inputs ({type(error).__name__}: {error}); they "
            "must be the arguments of one call of the model: a tensor, a tuple, or a dict of keyword arguments"
        ) from error
    finally:
        for module, implementation in compiled.items():
            module._compiled_call_impl = implementation
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    return used


def placeholder_parameter(node: Node) -> nn.Parameter | None:
    """The real parameter behind a placeholder (or get_attr node) of a Dynamo graph, while its backend runs."""
    if node.op == "get_attr":
        owner: Any = node.graph.owning_module
        for atom in str(node.target).split("."):
            owner = getattr(owner, atom, None)
        return owner if isinstance(owner, nn.Parameter) else None
    argument = node.meta.get("grapharg")
    example = getattr(argument, "example", None) if argument is not None else None
    return example if isinstance(example, nn.Parameter) else None


def _as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}
