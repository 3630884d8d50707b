"""Casts around sparse layers: those compute in float32, and what they stand among may be of half precision."""

import torch
from torch.fx import GraphModule, Node

from autosparse_fx.passes.constants import constant, new_constant

TO_COPY = torch.ops.aten._to_copy.default
_OURS = "autosparse_cast"


def widened(gm: GraphModule, node: Node, before: Node) -> Node:
    """``node`` in float32: itself, a constant in front of ``before``, or a cast, the same for all who ask for it."""
    if node.meta["val"].dtype == torch.float32:
        return node
    value = constant(node)
    if value is not None:
        return new_constant(gm, f"{node.name}_wide", value.float(), before)
    for user in node.users:
        if is_own_cast(user):
            return user
    behind = node.next
    while behind.op == "placeholder":
        behind = behind.next
    return _cast(node, torch.float32, behind)


def narrowed(node: Node, dtype: torch.dtype, before: Node) -> Node:
    """``node``, which is in float32, in ``dtype``: itself, or a cast in front of ``before``."""
    return node if dtype == torch.float32 else _cast(node, dtype, before)


def _cast(node: Node, dtype: torch.dtype, before: Node) -> Node:
    with before.graph.inserting_before(before):
        cast = before.graph.call_function(TO_COPY, (node,), {"dtype": dtype})
    cast.meta.update({"val": node.meta["val"].to(dtype), _OURS: True})
    return cast


def is_own_cast(node: Node) -> bool:
    """Whether a cast was made here: those of a model itself round or truncate, and stay."""
    return _OURS in node.meta


def drop_casts_between(gm: GraphModule, layer: object) -> None:
    """Let what layers of this kind hand to one another stay in float32."""
    for node in gm.graph.find_nodes(op="call_function", target=TO_COPY):
        narrow = node.args[0]
        if not is_own_cast(node) or not is_own_cast(narrow) or narrow.args[0].target is not layer:
            continue
        if narrow.args[0].meta["val"].dtype == node.meta["val"].dtype:
            node.replace_all_uses_with(narrow.args[0])
    gm.graph.eliminate_dead_code()
