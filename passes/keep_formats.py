"""keep_formats: outputs lie in memory as they were traced to, whatever the layers in front of them do."""

import operator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

aten = torch.ops.aten


def keep_formats(gm: GraphModule) -> int:
    """Copy every computed output to the memory format that it has been traced with.

    What calls the graph may rely on it, as a ``view`` does, and sparse kernels give images back channel by channel.
    Inductor drops the copies that change nothing.

    Returns:
        The number of outputs that are copied.
    """
    output = gm.graph.output_node()
    copied = 0
    for node in output.all_input_nodes:
        wanted = _format(node)
        if wanted is None:
            continue
        with gm.graph.inserting_before(output):
            copy = gm.graph.call_function(aten.clone.default, (node,), {"memory_format": wanted})
        copy.meta.update(node.meta)
        output.replace_input_with(node, copy)
        copied += 1
    if copied:
        gm.recompile()
    return copied


def _format(node: Node) -> torch.memory_format | None:
    """The format of an output that a pass may change; None where it lies in the memory of an input."""
    source = node
    while getattr(source.target, "is_view", False) or source.target is operator.getitem:
        source = source.all_input_nodes[0]
    value = node.meta.get("val")
    is_copy = node.target is aten.clone.default and "memory_format" in node.kwargs
    if source.op != "call_function" or not isinstance(value, Tensor) or is_copy:
        return None
    if value.is_contiguous():
        return torch.contiguous_format
    if value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return None
