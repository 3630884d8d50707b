"""keep_formats: outputs lie in memory as they were traced to, whatever the layers in front of them do."""

import operator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

aten = torch.ops.aten


def keep_formats(gm: GraphModule) -> int:
    """Copy what is computed for an output to the memory format that it has been traced with.

    What calls the graph may rely on it, as a ``view`` does, and sparse kernels give images back channel by channel.
    Where an output is a view, as a slice is, what it is a view of is copied, if that has a format; or else the first of
    the views that has one. Inductor drops the copies that change nothing.

    Returns:
        The number of outputs that are copied, or are views of copies.
    """
    output = gm.graph.output_node()
    copies: dict[Node, Node] = {}
    kept = 0
    for node in output.all_input_nodes:
        chain = _views(node)
        known = [number for number, link in enumerate(chain) if _format(link) is not None]
        if not known or not _may_be_copied(chain[0]):
            continue
        source, *views = chain[known[0] :]
        wanted = _format(source)
        if source not in copies:
            with gm.graph.inserting_after(source):
                copy = gm.graph.call_function(aten.clone.default, (source,), {"memory_format": wanted})
            copy.meta.update(source.meta)
            copies[source] = copy
        with gm.graph.inserting_before(output):
            for view in views:
                if view not in copies:
                    copies[view] = gm.graph.node_copy(view, lambda given: copies.get(given, given))
        output.replace_input_with(node, copies[node])
        kept += 1
    if kept:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return kept


def _views(node: Node) -> list[Node]:
    """What an output is a view of, and the views that lead from there to it."""
    chain = [node]
    while _is_view(chain[0]):
        chain.insert(0, chain[0].all_input_nodes[0])
    return chain


def _is_view(node: Node) -> bool:
    if node.target is operator.getitem:
        return _is_view(node.all_input_nodes[0])
    return getattr(node.target, "is_view", False)


def _may_be_copied(source: Node) -> bool:
    """Not an input, whose views are to stay that, nor what the graph copies to a format itself."""
    is_copy = source.target is aten.clone.default and "memory_format" in source.kwargs
    return source.op == "call_function" and not is_copy


def _format(node: Node) -> torch.memory_format | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    if value.is_contiguous():
        return torch.contiguous_format
    if value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return None
