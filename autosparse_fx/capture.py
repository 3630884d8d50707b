"""Capture the graphs of a model on example inputs, without leaving a trace in it."""

import copy
import logging
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils.rnn import PackedSequence

from autosparse_fx._compat import dynamo, dynamo_graphs, eager
from autosparse_fx.hidden.graph import mark_weights
from autosparse_fx.passes import DYNAMO_PASSES
from autosparse_fx.passes.find_weights import find_weights
from autosparse_fx.recorded import recorded

log = logging.getLogger(__name__)


@dataclass(eq=False)
class CapturedGraph:
    """One Dynamo graph, and every call of it: Dynamo runs one graph for all instances of a class that look alike."""

    gm: GraphModule  # a copy; the fake tensors are in node.meta["example_value"]
    rewritten: GraphModule  # a copy, as the Dynamo passes leave it
    calls: list[dict[str, str]] = field(default_factory=list)  # of each call: name of a node -> full name of its tensor


@dataclass
class Capture:
    """The graphs of one call of a model, in the order in which they first ran."""

    graphs: list[CapturedGraph] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)  # why there is more than one
    names: dict[sympy.Symbol, str] = field(default_factory=dict)  # what dynamic_shapes calls the symbols in the shapes
    sizes: dict[str, int] = field(default_factory=dict)  # of the example inputs, by the names in dynamic_shapes


def capture(
    model: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any] | Tensor,
    dynamic_shapes: Sequence[Any] | Mapping[str, Any] | None = None,
) -> Capture:
    """Capture what ``model`` does when it is called on ``example_inputs``, in training or eval mode as it is.

    The model runs once, with gradients enabled. Its buffers and the random state are restored.

    Args:
        model: any module; recurrent layers are captured too.
        example_inputs: the arguments of one call: a tensor, a tuple, or a dict of keyword arguments.
        dynamic_shapes: for each input (in a sequence, or by keyword) ``{dimension: name}`` or None, as for
            ``torch.export``: those sizes stay symbols. Two dimensions of one name are one symbol.

    Raises:
        ValueError: if the model cannot be run on the inputs, or a dynamic dimension cannot stay a symbol.
    """
    model = eager.without_wrapper(model)
    found = Capture()
    at_first = _full_names(model)
    own = weakref.ref(model)  # which compiled code is not to hold

    def full_names(tensors: Iterable[Any]) -> dict[int, str]:
        inside = own()
        if inside is None or all(id(t) in at_first for t in tensors if isinstance(t, nn.Parameter)):
            return at_first
        return at_first | _full_names(inside)  # FSDP puts others in the place of its parameters while a layer runs

    inputs, symbols = _mark_dynamic(example_inputs, dynamic_shapes)
    fixed_sizes: list[str] = []

    def backend(gm: GraphModule, _: list[Any]) -> Callable[..., Any]:
        captured = CapturedGraph(dynamo_graphs.copy_dynamo_graph(gm), _rewritten(gm))
        found.graphs.append(captured)
        sources = {
            n.name: dynamo_graphs.placeholder_tensor(n) for n in gm.graph.nodes if n.op in ("placeholder", "get_attr")
        }
        tensors = full_names(sources.values())
        held = {name: tensors[id(t)] for name, t in sources.items() if id(t) in tensors}
        placeholders = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
        for node in captured.gm.graph.nodes:
            tensor = sources.get(node.name)
            for dimension, name in symbols.get(id(tensor), {}).items():
                size = node.meta["example_value"].shape[dimension]
                found.sizes[name] = tensor.shape[dimension]  # type: ignore[union-attr]
                symbolic = isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol)
                if symbolic and not dynamo_graphs.is_fixed(size, found.sizes[name]):
                    found.names[size.node.expr] = name
                else:
                    fixed_sizes.append(f"{name!r} (dimension {dimension}, {found.sizes[name]})")

        for node in [*captured.gm.graph.nodes, *captured.rewritten.graph.nodes]:
            node.meta.pop("grapharg", None)  # which leads to the tensors themselves

        def call(*args: Any) -> Any:
            tensors = full_names(args)
            passed = {name: tensors[id(t)] for name, t in zip(placeholders, args, strict=True) if id(t) in tensors}
            captured.calls.append(held | passed)
            return gm.forward(*args)

        return call

    with dynamo.graph_break_reasons() as reasons, torch.inference_mode(False), torch.enable_grad():
        run_captured(model, inputs, backend, layers=True)
    found.breaks = reasons
    if fixed_sizes:
        raise ValueError(
            f"{type(model).__name__} fixes {', '.join(fixed_sizes)}, so that it cannot stay a symbol: leave it out of "
            "dynamic_shapes"
        )
    if symbols and len(found.graphs) > 1:
        raise ValueError(
            f"dynamic_shapes need one graph, and {type(model).__name__} breaks into {len(found.graphs)} "
            f"({'; '.join(reasons)}): remove the graph breaks, or leave dynamic_shapes out"
        )
    return found


def _full_names(model: nn.Module) -> dict[int, str]:
    """The names of buffers and parameters, by the ids of these."""
    return {id(t): name for name, t in [*model.named_buffers(), *model.named_parameters()]}


def multiplied_parameters(
    model: nn.Module, example_inputs: Sequence[Any] | Mapping[str, Any] | Tensor
) -> dict[int, int]:
    """Return the ids of the parameters that ``model`` multiplies by when called on ``example_inputs``, and the axis of
    the output channels of each.

    The model runs once, in the mode that it is in: without gradients, or with them if it cannot, as one that
    differentiates in its forward. Once more where Dynamo left some of it to eager mode. Its buffers, gradients and the
    random state are restored.
    """
    used: dict[int, int] = {}
    seen: set[int] = set()  # by any graph

    def backend(gm: GraphModule, _: list[Any]) -> Callable[..., Any]:
        seen.update(id(parameter) for parameter in map(dynamo_graphs.placeholder_parameter, gm.graph.nodes))
        for node, axis in find_weights(gm, lambda n: dynamo_graphs.placeholder_parameter(n) is not None).items():
            used.setdefault(id(dynamo_graphs.placeholder_parameter(node)), axis)
        return gm.forward

    inputs = unmarked(example_inputs)
    again = _copied(inputs)  # a model may write to its inputs
    gradients = [(p, p.grad) for p in model.parameters()]
    with_grad = False
    try:
        with dynamo.graph_break_reasons() as breaks:
            try:
                with torch.no_grad():
                    run_captured(model, inputs, backend)
            except ValueError:
                with_grad = True
                with torch.enable_grad():
                    run_captured(model, _copied(again), backend)
        if breaks or any(p.dim() > 1 and id(p) not in seen for p in model.parameters()):
            with torch.set_grad_enabled(with_grad):
                used = {**_multiplied_in_eager_mode(model, again), **used}
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
    return used


def _copied(example_inputs: Any) -> Any:
    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone().requires_grad_(value.requires_grad)
        try:
            return copy.deepcopy(value)
        except Exception:  # a lock or a generator, say, which the model then gets as it is
            return value

    return eager.tree_map(copied, example_inputs)


def _multiplied_in_eager_mode(model: nn.Module, example_inputs: Any) -> dict[int, int]:
    args, kwargs = _as_call(example_inputs)
    state = [*model.parameters(), *model.buffers()]
    try:
        with _restored(model), warnings.catch_warnings(), recorded(state) as (gm, held):
            warnings.simplefilter("ignore")
            model(*args, **kwargs)
    except Exception as error:  # the model has just run: what cannot be recorded is no reason to stop
        log.info("products outside of graphs were not looked for: %s: %s", type(error).__name__, error)
        return {}
    found = find_weights(gm, lambda node: isinstance(held.get(node), nn.Parameter))
    return {id(held[node]): axis for node, axis in found.items()}


def _rewritten(gm: GraphModule) -> GraphModule:
    """What the backend makes of a graph of this model, before Inductor gets it."""
    graph = dynamo_graphs.copy_dynamo_graph(gm)
    mark_weights(graph, None)
    for graph_pass in DYNAMO_PASSES:
        graph_pass(graph)
    return graph


def run_captured(model: nn.Module, example_inputs: Any, backend: Callable[..., Any], *, layers: bool = False) -> None:
    """Call the model under ``backend``, and put back what that changed.

    The inputs are taken as they are, with the dynamic dimensions that are marked on them (see :func:`unmarked`). With
    ``layers`` also those are captured that Dynamo would leave to eager mode where code between graphs calls them.
    """
    args, kwargs = _as_call(example_inputs)
    with _restored(model), dynamo.capturing_everything(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is to be said of the model is said where it is used
        for module in model.modules() if layers else ():
            if not module._modules and type(module).__module__.startswith(("torch.nn.", "autosparse_fx.")):
                captured = dynamo.compile_apart(_calling(module._call_impl), backend)
                if isinstance(module, nn.RNNBase):
                    captured = _unpacking(module, captured)
                module._compiled_call_impl = captured
        try:
            dynamo.compile_apart(_calling(model), backend)(*args, **kwargs)
        except Exception as error:
            first = str(error).strip().partition("\n\n")[0]
            raise ValueError(
                f"{type(model).__name__} could not be run on the example_inputs ({type(error).__name__}: {first}); "
                "they must be the arguments of one call of the model: a tensor, a tuple, or a dict of keyword arguments"
            ) from error


def _calling(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function around one of torch's own, which Dynamo would leave alone where it is called on its own."""
    return lambda *args, **kwargs: function(*args, **kwargs)


def _unpacking(layer: nn.RNNBase, captured: Callable[..., Any]) -> Callable[..., Any]:
    """A call of a recurrent layer which captures, of a packed sequence, as many steps in a single one: what the layer
    multiplies is the same, and Dynamo cannot look into the packed one."""

    def call(input: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(input, PackedSequence):
            return captured(input, *args, **kwargs)
        captured(input.data.unsqueeze(0 if layer.batch_first else 1))
        return layer._call_impl(input, *args, **kwargs)

    made: Callable[..., Any] = torch.compiler.disable(call)
    return made


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    held = [(m, dict(m._buffers)) for m in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    key = "_compiled_call_impl"  # set on a module that was compiled in place, which would hide its code from ours
    compiled = {m: m.__dict__.pop(key) for m in model.modules() if key in m.__dict__}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for module, _ in held:
            module.__dict__.pop(key, None)
        for module, implementation in compiled.items():
            module.__dict__[key] = implementation
        for module, own in held:  # a model may put new tensors in their place
            module._buffers.update(own)
        with torch.no_grad():
            for buffer, value in buffers:
                is_plain = buffer.layout == torch.strided and not buffer.is_meta
                if not (is_plain and torch.equal(buffer, value)):  # or it would count as written to
                    buffer.copy_(value)


def _as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def unmarked(example_inputs: Any) -> Any:
    """The inputs without what a training may have marked as dynamic: all sizes are those of the example. Inference
    tensors are copied, since autograd cannot keep them."""

    def view(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_inference():
            with torch.inference_mode(False):
                return x.clone()
        is_marked = isinstance(x, Tensor) and any(name.startswith("_dynamo_") for name in vars(x))
        return x.detach().requires_grad_(x.requires_grad) if is_marked else x

    return eager.tree_map(view, example_inputs)


def _mark_dynamic(example_inputs: Any, dynamic_shapes: Any) -> tuple[Any, dict[int, dict[int, str]]]:
    """Views of the inputs with their dynamic dimensions marked, and the names of those by the id of the view."""
    example_inputs = unmarked(example_inputs)
    if dynamic_shapes is None:
        return example_inputs, {}
    args, kwargs = _as_call(example_inputs)
    inputs: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    if not isinstance(dynamic_shapes, Mapping):
        shapes: dict[Any, Any] = dict(enumerate(dynamic_shapes))
    elif len(args) == 1 and all(isinstance(name, str) for name in dynamic_shapes.values()):
        shapes = {0: dynamic_shapes}  # of the only input
    else:
        shapes = dict(dynamic_shapes)
    unknown = [key for key in shapes if key not in inputs]
    if unknown:
        raise ValueError(f"dynamic_shapes names the inputs {unknown}, and the example_inputs are {list(inputs)}")
    symbols: dict[int, dict[int, str]] = {}
    examples: dict[str, int] = {}
    for key, names in shapes.items():
        if not names:
            continue
        known = isinstance(names, Mapping) and all(isinstance(name, str) for name in names.values())
        if not known or not isinstance(inputs[key], Tensor):
            raise ValueError(
                f"dynamic_shapes[{key!r}] must be {{dimension: name}} for an input that is a tensor, got {names!r} for "
                f"{type(inputs[key]).__name__}"
            )
        view = inputs[key].detach().requires_grad_(inputs[key].requires_grad)
        for dimension, name in names.items():
            if not isinstance(dimension, int) or not -view.dim() <= dimension < view.dim():
                raise ValueError(f"dynamic_shapes[{key!r}]: {dimension!r} is no dimension of {list(view.shape)}")
            if view.shape[dimension] < 2:
                raise ValueError(
                    f"dynamic_shapes[{key!r}]: {name!r} is {view.shape[dimension]} in the example_inputs, and sizes 0 "
                    "and 1 are special to the compiler: give an example of at least 2"
                )
            if examples.setdefault(name, view.shape[dimension]) != view.shape[dimension]:
                raise ValueError(
                    f"dynamic_shapes[{key!r}]: {name!r} is {view.shape[dimension]} here and {examples[name]} in "
                    "another place of the example_inputs: give them two names, or one size"
                )
            torch._dynamo.maybe_mark_dynamic(view, dimension % view.dim())
            symbols.setdefault(id(view), {})[dimension % view.dim()] = name
        inputs[key] = view
    return (inputs if kwargs else tuple(inputs.values())), symbols
