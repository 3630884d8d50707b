"""Private parts of AOTAutograd: the graphs that it makes of Dynamo's."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from autosparse_fx._compat.dynamo_graphs import FakeTensor, copy_dynamo_graph, copy_graph_module, graph_inputs
from autosparse_fx._compat.eager import OpOverload

aten = torch.ops.aten


def joint_graph(gm: GraphModule) -> GraphModule | None:
    """The graph of forward and backward together that AOTAutograd makes of a Dynamo graph, with its metadata, or None
    where nothing needs a gradient. 2.11-2.15.

    Without decompositions: one node for an operation that autograd knows, where Inductor would break it up.
    """
    from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_compiler
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    found: list[GraphModule] = []

    def partition(joint: GraphModule, inputs: Any, **kwargs: Any) -> Any:
        found.append(copy_graph_module(joint))
        found[0].meta["partition"] = (inputs, kwargs)
        return min_cut_rematerialization_partition(joint, inputs, **kwargs)

    compiler = make_boxed_compiler(lambda graph, _: graph.forward)
    values = graph_inputs(gm)
    with torch.enable_grad(), tracing_again(values):
        aot_module_simplified(
            copy_dynamo_graph(gm), values, fw_compiler=compiler, bw_compiler=compiler, partition_fn=partition
        )
    return found[0] if found else None


def cut_joint_graph(joint: GraphModule) -> tuple[GraphModule, GraphModule]:
    """Cut what :func:`joint_graph` gave in two: the forward and the backward graph. 2.11-2.15."""
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    inputs, kwargs = joint.meta["partition"]
    return min_cut_rematerialization_partition(copy_graph_module(joint), inputs, **kwargs)


def inference_graph(gm: GraphModule) -> GraphModule | str:
    """The functional graph of ATen operators that AOTAutograd makes of a Dynamo graph under no_grad, not decomposed.

    Its placeholders are those of the Dynamo graph, in order, and so are its outputs. Why there is none where that
    cannot be. 2.11-2.15.
    """
    from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_compiler
    from torch._guards import TracingContext

    found: list[GraphModule] = []
    halves: list[GraphModule] = []  # of a graph with a backward pass

    def compiler(kept: list[GraphModule]) -> Any:
        def keep(graph: GraphModule, _: Any) -> Callable[..., Any]:
            kept.append(copy_graph_module(graph))
            return graph.forward

        return make_boxed_compiler(keep)

    inputs = graph_inputs(gm)
    half = compiler(halves)
    with tracing_again(inputs):
        aot_module_simplified(
            copy_dynamo_graph(gm), inputs, fw_compiler=half, bw_compiler=half, inference_compiler=compiler(found)
        )
        metadata = TracingContext.get().fw_metadata
    if halves:
        return "its graph computes gradients (torch.enable_grad)"
    if len(found) != 1 or metadata is None or metadata.mutated_inp_runtime_indices or metadata.num_intermediate_bases:
        return "its graph writes to an input or a buffer"
    without_autocast(lambda: _correct_formats(found[0]))
    return found[0]


def _correct_formats(graph: GraphModule) -> None:
    """Correct the fake values of group norms, contiguous where the real ones lie like their input, and of what is
    computed from them. 2.15; those of 2.11 are right.
    """
    from torch._prims_common import suggest_memory_format

    corrected: set[Node] = set()
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.target is aten.native_group_norm.default:
            given = node.args[0].meta["val"]
            made = torch.empty_like(given, memory_format=suggest_memory_format(given))
            if made.stride() == value[0].stride():
                continue
            node.meta["val"] = (made, *value[1:])
        elif corrected.isdisjoint(node.all_input_nodes) or not _has_a_format(node):
            continue
        else:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda given: given.meta["val"])
            # A view may have been traced where only a copy can be.
            target: Any = aten.reshape.default if node.target is aten.view.default else node.target
            node.meta["val"] = target(*args, **kwargs)
        corrected.add(node)


def _has_a_format(node: Node) -> bool:
    """Whether the fake value of a node is a tensor that can be computed from those of others."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, OpOverload) or torch.Tag.dynamic_output_shape in node.target.tags:
        return False
    return isinstance(node.meta.get("val"), (Tensor, tuple, list))


def without_autocast(work: Callable[[], Any]) -> Any:
    """Do something as if no autocast were on: with a graph in which its casts are nodes already. 2.11-2.15."""
    with torch._C._DisableAutocast():
        return work()


def called_without_autocast(compile_function: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """Compile such a graph; Dynamo compiles anew where autocast is switched on or off. 2.11-2.15."""
    function: Callable[..., Any] = without_autocast(compile_function)
    if not torch._C._is_any_autocast_enabled():
        return function
    return lambda *args: without_autocast(lambda: function(*args))


def tracing_again(inputs: Sequence[Any]) -> Any:
    """Within it a graph is traced and compiled apart from any compilation, for fake inputs of one. 2.11-2.15."""
    from torch._guards import TracingContext, tracing

    modes = [value.fake_mode for value in inputs if isinstance(value, FakeTensor)]
    return tracing(TracingContext(modes[0] if modes else None))
