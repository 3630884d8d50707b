"""Constants of an inference graph: the tensors that its ``get_attr`` nodes stand for."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from autosparse_fx._compat.dynamo_graphs import FakeTensor, copy_graph_module

aten = torch.ops.aten
LOOKED_THROUGH = (aten.t.default, aten.permute.default, aten.transpose.int, aten._to_copy.default)


def with_constants(graph: GraphModule, tensors: dict[int, Tensor]) -> GraphModule:
    """A copy of an ATen graph in which some placeholders are attributes that hold these tensors."""
    made = copy_graph_module(graph)
    placeholders = [node for node in made.graph.nodes if node.op == "placeholder"]
    for number, tensor in tensors.items():
        node = placeholders[number]
        name = f"constant_{number}"
        made.register_buffer(name, tensor.detach())
        with made.graph.inserting_before(node):
            attribute = made.graph.get_attr(name)
        attribute.meta.update(node.meta)
        node.replace_all_uses_with(attribute)
        made.graph.erase_node(node)
    made.recompile()
    return made


def constant(node: object) -> Tensor | None:
    """The tensor behind a ``get_attr`` node, looked at through transposes and casts; None for everything else."""
    if not isinstance(node, Node):
        return None
    if node.op == "get_attr":
        value = getattr(node.graph.owning_module, str(node.target), None)
        return value if isinstance(value, Tensor) else None
    if node.target not in LOOKED_THROUGH or (node.kwargs and node.kwargs.keys() != {"dtype"}):
        return None
    value = constant(node.args[0])
    target: Any = node.target
    return None if value is None else target(value, *node.args[1:], **node.kwargs)


def constant_node(node: object) -> Node | None:
    """The ``get_attr`` node that :func:`constant` looks at."""
    while isinstance(node, Node) and node.op != "get_attr" and node.all_input_nodes and constant(node) is not None:
        node = node.all_input_nodes[0]
    return node if isinstance(node, Node) and node.op == "get_attr" else None


def new_constant(gm: GraphModule, name: str, value: Tensor, before: Node) -> Node:
    """Register ``value`` under a free name that starts with ``name``, and return a node for it."""
    free, number = name, 0
    while hasattr(gm, free):
        number += 1
        free = f"{name}_{number}"
    gm.register_buffer(free, value.detach().contiguous())
    with gm.graph.inserting_before(before):
        node = gm.graph.get_attr(free)
    value = getattr(gm, free)
    node.meta["val"] = _fake_mode(gm).from_tensor(value, static_shapes=True)
    return node


def _fake_mode(gm: GraphModule) -> Any:
    values = (node.meta.get("val") for node in gm.graph.nodes)
    return next(value.fake_mode for value in values if isinstance(value, FakeTensor))


def remove_unused_constants(gm: GraphModule) -> None:
    """Drop nodes that nothing uses, and the tensors that no node stands for any more."""
    gm.graph.eliminate_dead_code()
    used = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    for name in [*gm._buffers, *gm._parameters]:
        if name not in used:
            delattr(gm, name)
