"""dedupe_masks: one mask node per weight, however often the graph reads it."""

import operator

import torch
from torch.fx import GraphModule, Node

from autosparse_fx.passes.modes import is_written_to, modes

MASK = torch.ops.autosparse.threshold_mask.default

# What a read of a masked weight puts between the parameters and the mask: s = offset + scale * threshold, viewed.
_LOGIT_FUNCTIONS = frozenset({operator.mul, operator.add})
_LOGIT_METHODS = frozenset({"view"})


def dedupe_masks(gm: GraphModule) -> int:
    """Merge mask nodes that read the same weight with the same threshold, in ``gm`` and in its subgraphs.

    A mask that was read without gradients is never merged with one read with them, and nothing is merged where the
    graph writes to a weight, a threshold or a masked weight.

    Before::

        s_1 = offset + threshold * 0.1; w_1 = threshold_mask(w, s_1, alpha); ...
        s_2 = offset + threshold * 0.1; w_2 = threshold_mask(w, s_2, alpha); ...

    After::

        s_1 = offset + threshold * 0.1; w_1 = threshold_mask(w, s_1, alpha); ...

    Returns:
        The number of mask nodes that were removed.
    """
    removed = sum(dedupe_masks(child) for child in gm.children() if isinstance(child, GraphModule))
    masks = [n for n in gm.graph.nodes if is_mask(n)]
    related = {n for mask in masks for n in _logit_nodes(mask)} | set(masks)
    sources = {a for n in related for a in n.all_input_nodes if a not in related}
    if is_written_to(sources | related):
        return removed

    first: dict[object, Node] = {}
    mode_of = modes(gm.graph)
    for node in list(gm.graph.nodes):
        if node not in related:
            continue
        key = (node.op, node.target, node.args, tuple(sorted(node.kwargs.items())), mode_of[node])
        kept = first.setdefault(_hashable(key), node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            gm.graph.erase_node(node)
            removed += is_mask(node)
    if removed:
        gm.graph.lint()
        gm.recompile()
    return removed


def is_mask(node: Node) -> bool:
    """Whether ``node`` is a threshold-mask node."""
    return node.op == "call_function" and node.target is MASK


def _logit_nodes(mask: Node) -> list[Node]:
    found: list[Node] = []
    pending = [mask.args[1]]
    while pending:
        node = pending.pop()
        if isinstance(node, Node) and (
            (node.op == "call_function" and node.target in _LOGIT_FUNCTIONS)
            or (node.op == "call_method" and node.target in _LOGIT_METHODS)
        ):
            found.append(node)
            pending.extend(node.all_input_nodes)
    return found


def _hashable(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(v) for v in value)
    return value
