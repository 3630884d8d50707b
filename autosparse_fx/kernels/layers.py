"""The layers of a model that sparse kernels could run, as a compiled graph under no_grad has them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from autosparse_fx.capture import run_captured, unmarked
from autosparse_fx.inference import inference_graph, with_state_as_inputs
from autosparse_fx.kernels.choice import CHOICE, Choice
from autosparse_fx.kernels.program import Window
from autosparse_fx.passes import (
    INFERENCE_PASSES,
    flatten_batches,
    fold_constants,
    fuse_sparse_programs,
    open_encoder_layers,
)
from autosparse_fx.passes.constants import constant_node, with_constants
from autosparse_fx.passes.fold_constants import FOLDED_FROM
from autosparse_fx.passes.lower_sparse_conv import window_arguments

aten = torch.ops.aten
# Where the weight stands among the arguments.
_WEIGHT: dict[Any, int] = {aten.convolution.default: 1, aten.mm.default: 1, aten.addmm.default: 2}
_NAME = "autosparse_weight_name"


@dataclass(frozen=True)
class Layer:
    """A weight, where it is used last.

    Attributes:
        name: the full name of the parameter.
        choice: whether it runs sparse as it is, and why.
        shape: of the weight, ``[rows, channels / groups, ...]``.
        units, columns: images and pixels of the output, or 1 and tokens.
        window: of a convolution in one or two dimensions; None for a product.
        groups: of a convolution.
        dtype: that it computes in where it runs dense.
    """

    name: str
    choice: Choice
    shape: tuple[int, ...]
    units: int
    columns: int
    window: Window | None
    groups: int
    dtype: torch.dtype


def layers(model: nn.Module, example_inputs: Sequence[Any] | Mapping[str, Any] | Tensor) -> list[Layer]:
    """List the weights that a convolution or a product of a graph under no_grad multiplies by.

    The model runs once, in the mode that it is in. Its buffers and the random state are restored.

    Raises:
        ValueError: if the model cannot be run on the inputs.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: list[Layer] = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        gm, state = with_state_as_inputs(gm)
        graph = inference_graph(gm, state.values())
        if isinstance(graph, str):
            weights = {names[id(t)]: t for t in state.values() if t.dim() > 1 and id(t) in names}
            found.extend(_dense(name, weight, graph) for name, weight in weights.items())
        else:
            by_size = sorted(state.items(), key=lambda item: (item[1].numel(), item[1].dim()), reverse=True)
            by_constant = {f"constant_{number}": names.get(id(tensor), "") for number, tensor in by_size}
            found.extend(_layers(with_constants(graph, state), by_constant))
        return gm.forward

    with torch.no_grad():
        run_captured(model, unmarked(example_inputs), backend)
    return found


def _dense(name: str, weight: Tensor, reason: str) -> Layer:
    return Layer(name, Choice(False, reason, False), tuple(weight.shape), 1, 1, None, 1, weight.dtype)


def _layers(graph: GraphModule, names: dict[str, str]) -> list[Layer]:
    geometries = {}
    open_encoder_layers(graph)
    flatten_batches(graph)
    fold_constants(graph)
    for node in graph.graph.nodes:
        if node.target in _WEIGHT:
            name = _name(node.args[_WEIGHT[node.target]], names)
            node.meta[_NAME] = name
            geometries[name] = _geometry(node)
    for graph_pass in INFERENCE_PASSES:
        if graph_pass is not fuse_sparse_programs:
            graph_pass(graph)
    chosen = {
        node.meta[_NAME]: node.meta[CHOICE]
        for node in graph.graph.nodes
        if CHOICE in node.meta and node.meta.get(_NAME)
    }
    return [Layer(name, chosen[name], *geometries[name]) for name in geometries if name in chosen]


def _name(weight: object, names: dict[str, str]) -> str:
    """The parameter that a weight is, or the first in ``names`` of those that it was computed from."""
    node = constant_node(weight)
    sources = [] if node is None else node.meta.get(FOLDED_FROM, [str(node.target)])
    return next((name for source, name in names.items() if name and source in sources), "")


def _geometry(node: Node) -> tuple[tuple[int, ...], int, int, Window | None, int, torch.dtype]:
    arguments: tuple[Any, ...] = node.args
    weight, value = arguments[_WEIGHT[node.target]].meta["val"], node.meta["val"]
    if node.target is not aten.convolution.default:
        return tuple(int(size) for size in reversed(weight.shape)), 1, int(value.shape[0]), None, 1, value.dtype
    shape = tuple(int(size) for size in weight.shape)
    source, groups = arguments[0], arguments[8]
    units, columns = int(value.shape[0]), int(value[0, 0].numel())
    if value.dim() not in (3, 4):
        return shape, units, columns, None, groups, value.dtype
    window = Window.of(source.meta["val"].shape[2:], value.shape[2:], *window_arguments(node))
    return shape, units, columns, window, groups, value.dtype
