"""The graphs of a model that a drawing shows, before and after the passes, as networkx graphs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch import Tensor, nn
from torch.fx import Graph
from torch.fx.node import map_arg

from autosparse_fx._compat import aot_autograd
from autosparse_fx.capture import Capture, CapturedGraph, capture
from autosparse_fx.passes import JOINT_PASSES
from autosparse_fx.passes.insert_masks import STATE
from autosparse_fx.report import LayerReport, report
from autosparse_fx.sparsity_report import UNITS
from autosparse_fx.view.graph import to_networkx
from autosparse_fx.view.names import input_name
from autosparse_fx.view.visualize import VERSIONS


@dataclass
class Captures:
    """Every graph of one call of a model."""

    model: str
    kind: str  # "forward", "joint" or "backward"
    graphs: list[dict[str, nx.DiGraph]]  # each by its version
    breaks: list[str]
    numel: int  # of the weights that can be sparse
    sparsity: float

    @property
    def note(self) -> str:
        """What stands below the titles: how sparse the model is, and why there is more than one graph."""
        known = [f"{self.sparsity:.1%} of {self.numel:,} weights are zero"] if self.numel else []
        if len(self.graphs) > 1:
            known.append("graph breaks: " + ("; ".join(self.breaks) or "no reason is known"))
        return ". ".join(known)

    def title(self, index: int) -> str:
        """What the drawing of one graph is headed with."""
        several = f", graph {index + 1} of {len(self.graphs)}" if len(self.graphs) > 1 else ""
        return f"{self.model}: {self.kind} graph{several}"


def capture_graphs(
    model: nn.Module, example_inputs: Sequence[Any] | Mapping[str, Any] | Tensor, kind: str = "forward"
) -> Captures:
    """Capture the graphs of ``model`` on ``example_inputs``.

    Args:
        model: sparse or dense, in the mode in which it is to be drawn.
        example_inputs: the arguments of one call.
        kind: ``"forward"`` for Dynamo's graphs; ``"joint"`` for AOTAutograd's of forward and backward together;
            ``"backward"`` for what is cut from those.

    Raises:
        ValueError: if the model cannot be run on the inputs, or has no backward graph.
    """
    captured = capture(model, example_inputs)
    summary = report(model)
    if kind == "forward":
        counted = _flops(captured, summary.layers)
        graphs = [_forward(graph, summary.layers, flops) for graph, flops in zip(captured.graphs, counted, strict=True)]
    else:
        graphs = [_with_backward(graph, kind, summary.layers) for graph in captured.graphs]
    drawn = [versions for versions in graphs if versions]
    if not drawn:
        why = "none of its parameters and inputs needs a gradient" if graphs else "it calls no operation of torch"
        raise ValueError(
            f"{type(model).__name__} has no {kind} graph: {why}" + ("; draw graph='forward'" if graphs else "")
        )
    return Captures(type(model).__name__, kind, drawn, captured.breaks, summary.numel, summary.sparsity)


def _forward(
    captured: CapturedGraph, layers: Sequence[LayerReport], flops: Mapping[str, tuple[int, int | None]]
) -> dict[str, nx.DiGraph]:
    return {
        version: to_networkx(gm.graph, names=captured.calls, layers=layers, flops=flops)
        for version, gm in zip(VERSIONS, (captured.gm, captured.rewritten), strict=True)
    }


def _with_backward(captured: CapturedGraph, kind: str, layers: Sequence[LayerReport]) -> dict[str, nx.DiGraph]:
    joint = aot_autograd.joint_graph(captured.rewritten)
    if joint is None:
        return {}
    names, inputs = _names_of_primals(captured, joint.graph)
    made: dict[str, nx.DiGraph] = {}
    for version in VERSIONS:
        if version == "after":
            for joint_pass in JOINT_PASSES:
                joint_pass(joint)
        graph = aot_autograd.cut_joint_graph(joint)[1].graph if kind == "backward" else joint.graph
        made[version] = to_networkx(
            graph,
            names=names,
            layers=layers,
            flops=_aten_flops(graph),
            saved_from=joint.graph,
            inputs=inputs,
            backward=kind == "backward",
        )
    return made


def _names_of_primals(captured: CapturedGraph, joint: Graph) -> tuple[list[dict[str, str]], dict[str, str]]:
    """The names of tensors and of inputs: AOTAutograd renames the inputs of a graph, and keeps their order."""
    inputs = [node for node in captured.rewritten.graph.nodes if node.op == "placeholder"]
    primals = [node.name for node in joint.nodes if node.op == "placeholder" and node.name.startswith("primals")]
    by_input = {node.name: primal for node, primal in zip(inputs, primals, strict=False)}
    calls = []
    for call in captured.calls:
        names = dict(call)
        for node in inputs:
            weight, field = node.meta.get(STATE, (None, None))
            if weight in call:
                names[node.name] = f"{call[weight]}_{field}"
        calls.append({by_input[node]: name for node, name in names.items() if node in by_input})
    return calls, {primal: input_name(name) for name, primal in by_input.items()}


def _flops(captured: Capture, layers: Sequence[LayerReport]) -> list[dict[str, tuple[int, int]]]:
    """For each graph: FLOPs by the name of the node, of dense weights and without their zeros."""
    from autosparse_fx.flops.count import count_captured

    flops_per_mac = UNITS["flops"][1]
    sparsities = {layer.name: layer.sparsity for layer in layers}
    found: list[dict[str, tuple[int, int]]] = [{} for _ in captured.graphs]
    for product in count_captured(captured).products:
        if product.call == 0 and not product.pooling:
            dense, sparse = found[product.graph].get(product.node, (0, 0))
            dense += flops_per_mac * int(product.macs)
            sparse += round(flops_per_mac * product.forward_at(sparsities))
            found[product.graph][product.node] = dense, sparse
    return found


def _aten_flops(graph: Graph) -> dict[str, tuple[int, int | None]]:
    """FLOPs of the operators of ATen, forward and backward, as PyTorch's own counter has them."""
    from torch.utils.flop_counter import flop_registry

    found: dict[str, tuple[int, int | None]] = {}
    for node in graph.nodes:
        formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
        if formula is not None:
            args, kwargs = map_arg((node.args, node.kwargs), lambda used: used.meta.get("val"))
            found[node.name] = int(formula(*args, **kwargs, out_val=node.meta.get("val"))), None
    return found
