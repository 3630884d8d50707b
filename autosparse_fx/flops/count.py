"""count_flops: the products of a model, found by running its captured graphs on fake tensors."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils.weak import WeakIdKeyDictionary

from autosparse_fx._compat import dynamo_graphs, eager
from autosparse_fx._compat.eager import TorchDispatchMode, tree_leaves
from autosparse_fx.capture import Capture, CapturedGraph, capture
from autosparse_fx.flops.formulas import LAYERS, POOLING, PRODUCTS, Formula, Term, size
from autosparse_fx.flops.model import ModelFlops
from autosparse_fx.flops.product import Operand, Product, size_symbol

aten = torch.ops.aten
# Beside views, the operators after which a zero of a weight is still a zero.
_KEEPS_ZEROS = frozenset(
    {
        *(torch.ops.autosparse.threshold_mask, aten.clone, aten._to_copy, aten.copy, aten.cat, aten.stack),
        *(aten.constant_pad_nd, aten.neg, aten.flip, aten.roll, aten.repeat, aten.index_select, aten.index),
        aten._unsafe_view,
    }
)
_SCALES = frozenset({aten.mul, aten.div})  # and these, by numbers and by masks


def count_flops(
    model: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any] | Tensor,
    dynamic_shapes: Sequence[Any] | Mapping[str, Any] | None = None,
) -> ModelFlops:
    """Count what one call of ``model`` multiplies, forward and backward, from its captured graphs.

    Counted are convolutions, matrix products, attention and recurrent layers, and the additions of average pooling
    apart; a multiply-accumulate (MAC) is 2 FLOPs. Normalizations, activations, embeddings, the masks themselves and
    the optimizer are not. A causal mask saves nothing; of the branches of ``torch.cond`` each is counted, and of a
    ``while_loop`` one step.

    Args:
        model: dense, prepared, one-line or finalized, in training or eval mode as it is.
        example_inputs: the arguments of one call: a tensor, a tuple, or a dict of keyword arguments.
        dynamic_shapes: for each input ``{dimension: name}`` or None, as for ``torch.export``; the counts are
            expressions in these names.

    Raises:
        ValueError: if the model cannot be run on the inputs, or a dynamic dimension cannot stay a symbol.
    """
    return count_captured(capture(model, example_inputs, dynamic_shapes))


def count_captured(captured: Capture) -> ModelFlops:
    """Count the products of graphs that were captured before."""
    products: list[Product] = []
    for index, graph in enumerate(captured.graphs):
        counted = _count_graph(graph, index) if graph.calls else []
        for call, names in enumerate(graph.calls):
            products += [_named(product, call, names) for product in counted]
    names = {symbol: size_symbol(name) for symbol, name in captured.names.items()}
    _refuse_fixed_sizes(captured)
    products = [replace(p, macs=_readable(p.macs.xreplace(names))) for p in products]
    unknown = {str(size) for p in products for size in p.macs.free_symbols} - set(captured.names.values())
    if unknown:
        raise ValueError(
            f"the model multiplies by tensors whose sizes depend on what it computes ({', '.join(sorted(unknown))}): "
            "what that costs cannot be counted"
        )
    return ModelFlops(tuple(products), len(captured.graphs), tuple(captured.breaks), captured.sizes)


def _count_graph(graph: CapturedGraph, index: int) -> list[Product]:
    """The products of one graph, with weights by the names of their nodes: each call has weights of its own."""
    placeholders = [node for node in graph.gm.graph.nodes if node.op == "placeholder"]
    inputs = [node.meta.get("example_value") for node in placeholders]
    fake_mode = next((value.fake_mode for value in inputs if isinstance(value, dynamo_graphs.FakeTensor)), None)
    if fake_mode is None:  # no tensors
        return []
    recorder = _Recorder(index)
    for node, value in zip(placeholders, inputs, strict=True):
        recorder.start(node.name, value, data=node.name not in graph.calls[0])
    with fake_mode, eager.python_dispatcher(), torch.inference_mode(False), torch.enable_grad(), recorder:
        _Runner(graph.gm, recorder, fake_mode).run(*inputs, enable_io_processing=False)
    return recorder.products


class _Runner(Interpreter):
    """Runs a Dynamo graph node by node, so that each operator is known to belong to a node."""

    def __init__(self, gm: GraphModule, recorder: "_Recorder", fake_mode: Any, *, has_backward: bool = False) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self._has_backward = has_backward  # of its own, and runs without gradients for that
        self._recorder = recorder
        self._fake_mode = fake_mode

    def run_node(self, n: Node) -> Any:
        if n.op in ("call_function", "call_method"):
            self._recorder.node = n
            self._recorder.grad_enabled = self._has_backward or torch.is_grad_enabled()
        value = super().run_node(n)
        if n.op == "get_attr" and isinstance(value, Tensor) and not isinstance(value, dynamo_graphs.FakeTensor):
            value = self._fake_mode.from_tensor(value)
            self._recorder.start(n.name, value, data=False)
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        formula = LAYERS.get(target) or POOLING.get(target)
        if formula is not None:
            return self._call_layer(formula, target, args, kwargs)
        if isinstance(target, dynamo_graphs.HigherOrderOperator):
            return self._call_subgraphs(args)
        return super().call_function(target, args, kwargs)

    def _call_layer(self, formula: Formula, target: Any, args: Any, kwargs: Any) -> Any:
        recorder = self._recorder
        assert recorder.node is not None
        if isinstance(target, dynamo_graphs.HigherOrderOperator):
            out = recorder.node.meta["example_value"]
        else:
            recorder.paused = True
            try:
                out = super().call_function(target, args, kwargs)
            finally:
                recorder.paused = False
        name = getattr(target, "__name__", str(target))
        recorder.add(name, formula(args, kwargs, out), pooling=target in POOLING)
        recorder.follow(None, tree_leaves((args, kwargs)), out)
        return out

    def _call_subgraphs(self, args: Sequence[Any]) -> Any:
        """Run what a higher-order op calls, a checkpointed block for instance, for what it multiplies."""
        node = self._recorder.node
        assert node is not None
        graphs = [arg for arg in args if isinstance(arg, GraphModule)]
        repeats: Any = 1
        if str(node.target) == "scan":  # its graph, what it carries, what it goes through step by step, and the rest
            repeats = size(args[2][0])[0]
            args = (args[0], args[1], [x.select(0, 0) for x in args[2]], *args[3:])
        operands = [leaf for leaf in tree_leaves(args) if not isinstance(leaf, (GraphModule, str))]
        before = len(self._recorder.products)
        has_backward = str(node.target) == "autograd_function_apply"
        for gm in graphs[:1] if has_backward else graphs:  # the second is its backward pass
            wanted = sum(inner.op == "placeholder" for inner in gm.graph.nodes)
            if wanted <= len(operands):
                inputs = operands[len(operands) - wanted :]
                runner = _Runner(gm, self._recorder, self._fake_mode, has_backward=has_backward)
                runner.run(*inputs, enable_io_processing=False)
            self._recorder.node = node
        inside = self._recorder.products[before:]
        self._recorder.products[before:] = [replace(product, macs=product.macs * repeats) for product in inside]
        out = node.meta["example_value"]
        self._recorder.grad_enabled = torch.is_grad_enabled()
        self._recorder.follow(None, tree_leaves(args), out)
        return out


def _refuse_fixed_sizes(captured: Capture) -> None:
    for graph in captured.graphs[:1]:  # where there are names there is one graph
        for node in graph.gm.graph.nodes:
            shape = getattr(node.meta.get("example_value"), "shape", ()) if node.op == "placeholder" else ()
            for dim in shape:
                name = captured.names.get(dim.node.expr) if isinstance(dim, torch.SymInt) else None
                if name is not None and dynamo_graphs.is_fixed(dim, captured.sizes[name]):
                    raise ValueError(
                        f"the model fixes {name!r} to {captured.sizes[name]}: leave it out of dynamic_shapes"
                    )


@dataclass(frozen=True)
class _Trace:
    """What is known of a tensor."""

    weights: tuple[tuple[str, int], ...] = ()  # whose zeros it has
    parameter: bool = False  # made of parameters
    data: bool = False  # made of the inputs
    needs_grad: bool = False


class _Recorder(TorchDispatchMode):
    """Sees every ATen operator: notes the products, and follows the weights through views and casts."""

    supports_higher_order_operators = True

    def __init__(self, graph: int) -> None:
        super().__init__()
        self.node: Node | None = None
        self.grad_enabled = True  # at the node: inside an operator with a backward of its own it never is
        self.paused = False
        self.products: list[Product] = []
        self._graph = graph
        self._traces = WeakIdKeyDictionary()

    def start(self, name: str, value: Any, *, data: bool) -> None:
        """Enter an input of the graph."""
        if isinstance(value, nn.Parameter):
            self._traces[value] = _Trace(((name, value.numel()),), parameter=True, needs_grad=value.requires_grad)
        elif isinstance(value, Tensor):
            self._traces[value] = _Trace(data=data, needs_grad=value.requires_grad)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "overloadpacket", None)
        formula = PRODUCTS.get(packet) or PRODUCTS.get(str(packet))
        if formula is None and torch.is_inference_mode_enabled() and getattr(func, "namespace", "") == "aten":
            with self:  # there operators come as the user called them
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if not self.paused and hasattr(func, "overloadpacket"):
            if formula is not None:
                self.add(str(func.overloadpacket), formula(args, kwargs, out), pooling=False)
            self.follow(func, tree_leaves((args, kwargs)), out)
        return out

    def add(self, op: str, terms: Iterable[Term], *, pooling: bool) -> None:
        """Note the products of the present node."""
        assert self.node is not None
        place = module_path(self.node) or self.node.name
        inner = Operand()
        for term in terms:
            operands = tuple(inner if t is None else self._operand(t) for t in term.operands)
            inner = Operand(needs_grad=inner.needs_grad or any(operand.needs_grad for operand in operands))
            self.products.append(Product(self._graph, 0, self.node.name, op, place, term.macs, operands, pooling))

    def follow(self, func: Any, inputs: Iterable[Any], outputs: Any) -> None:
        """Derive what is known of the outputs of an operator from what is known of its inputs."""
        packet = getattr(func, "overloadpacket", None)
        tensors = [t for t in inputs if isinstance(t, Tensor)]
        traces = [self._trace(t) for t in tensors]
        weights: tuple[tuple[str, int], ...] = ()
        if packet is torch.ops.autosparse.threshold_mask:
            weights = traces[0].weights
        elif func is not None and (packet in _KEEPS_ZEROS or func.is_view):
            # all of what is joined, and of what is indexed without the indices
            kept = [trace for trace, t in zip(traces, tensors, strict=True) if t.is_floating_point() or t.is_complex()]
            if all(trace.weights for trace in kept):
                weights = tuple(dict.fromkeys(weight for trace in kept for weight in trace.weights))
        elif packet in _SCALES and not any(trace.data for trace in traces):
            # of one weight alone, which is not what is divided by: a zero of two factors may be that of either
            own = [trace for trace in traces if trace.weights]
            weights = own[0].weights if len(own) == 1 and (packet is aten.mul or own[0] is traces[0]) else ()
        data = any(trace.data for trace in traces)
        parameter = not data and any(trace.parameter for trace in traces)
        needs_grad = self.grad_enabled and any(trace.needs_grad for trace in traces) and packet is not aten.detach
        for out in tree_leaves(outputs):
            if isinstance(out, Tensor):
                floating = out.is_floating_point() or out.is_complex()
                self._traces[out] = _Trace(weights, parameter, data, needs_grad and floating)

    def _operand(self, tensor: Tensor) -> Operand:
        trace = self._trace(tensor)
        return Operand(trace.weights, trace.parameter, trace.needs_grad and self.grad_enabled)

    def _trace(self, tensor: Tensor) -> _Trace:
        return self._traces.get(tensor, _Trace())  # type: ignore[no-any-return]


def _named(product: Product, call: int, names: Mapping[str, str]) -> Product:
    """A product as one call of the graph makes it, with that call's weights."""
    operands = tuple(
        replace(o, weights=tuple((names.get(node, node), numel) for node, numel in o.weights)) for o in product.operands
    )
    weights = [name for operand in operands for name, _ in operand.weights]
    return replace(product, call=call, operands=operands, layer=" + ".join(weights) or product.layer)


def _readable(expression: sympy.Expr) -> sympy.Expr:
    """With sympy's own floor in place of the compiler's integer division."""
    return expression.replace(
        lambda e: type(e).__name__ in ("FloorDiv", "CleanDiv") and len(e.args) == 2,
        lambda e: sympy.floor(e.args[0] / e.args[1]),
    )


def module_path(node: Node) -> str:
    """Where a node stands in the model, such as "layer1.0.conv1"; empty in the model's own forward."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return dynamo_graphs.module_name(stack[-1][0]) if stack else ""
