"""Which layers run sparse in the company that they are in: tensors are converted where sparse layers meet others."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor
from torch.fx import Node

from autosparse_fx._compat.dynamo_graphs import size_hint
from autosparse_fx.kernels import choice
from autosparse_fx.kernels.choice import CHOICE
from autosparse_fx.passes.constants import constant
from autosparse_fx.passes.epilogues import VIEWS, activation_of

aten = torch.ops.aten


def take_close_ones(layers: Sequence[Node], *, runs_code: bool) -> None:
    """Take in the layers about as fast on a sparse kernel that lie between such as gain, behind some and before others.

    Their tensors would be converted twice. None where all of them together cost half of what the others gain.

    Args:
        layers: all of one kind, in the order of the graph.
        runs_code: whether patterns can be machine code here.
    """
    gain = sparse_ones(layers)
    choices = {node: node.meta[CHOICE] for node in layers}
    close = {n for n, c in choices.items() if c.is_close and (runs_code or not c.needs_code)}.difference(gain)
    behind, before = set(gain), set(gain)
    for node in layers:  # in the order of the graph
        if node in close and not behind.isdisjoint(_sources(node)):
            behind.add(node)
    for node in reversed(layers):
        if node in before:
            before.update(close.intersection(_sources(node)))
    between = close & behind & before
    gained = sum(node.meta[CHOICE].saved for node in gain)
    if -sum(node.meta[CHOICE].saved for node in between) > gained / 2:
        return
    for node in between:
        node.meta[CHOICE] = replace(node.meta[CHOICE], is_sparse=True, reason="between layers that run sparse")


def drop_groups_that_lose(layers: Sequence[Node], cycles: Callable[[torch.dtype], float], *, sums: bool = True) -> None:
    """Leave those dense that gain less, with those that they hand their tensors to, than being called for costs.

    Args:
        layers: all of one kind, in the order of the graph.
        cycles: that each element costs which goes into such a group or comes out of it, by its dtype there.
        sums: whether the layers compute sums with other tensors than constants along.
    """
    import networkx as nx  # takes as long as a tenth of torch

    chosen = sparse_ones(layers)
    homes = _homes(chosen, sums=sums)
    links = nx.Graph()
    links.add_nodes_from(chosen)
    edges: dict[Node, set[Node]] = {node: set() for node in chosen}
    for node, home in homes.items():
        sources = [_input(node)] if node is home else _summands(node)
        links.add_edges_from((home, homes[source]) for source in sources if source in homes)
        edges[home].update(source for source in sources if source not in homes)
        if not homes.keys() >= node.users.keys():
            edges[home].add(node)
    for group in nx.connected_components(links):
        tensors = [node.meta["val"] for node in set().union(*(edges[node] for node in group))]
        costs = choice.PROGRAM + sum(cycles(value.dtype) * prod(map(size_hint, value.shape)) for value in tensors)
        if sum(node.meta[CHOICE].saved for node in group) < costs:
            for node in group:
                reason = f"{node.meta[CHOICE].reason}, less than calling it costs"
                node.meta[CHOICE] = replace(node.meta[CHOICE], is_sparse=False, reason=reason)


def sparse_ones(layers: Sequence[Node]) -> list[Node]:
    return [node for node in layers if node.meta[CHOICE].is_sparse]


def _is_between(node: Node, *, sums: bool = True) -> bool:
    """Whether a node is computed along with a layer before it, or costs nothing."""
    if node.target is aten.add.Tensor:
        return sums or any(constant(summand) is not None for summand in node.args)
    return node.target in VIEWS or activation_of(node) is not None


def _input(node: Node) -> Node:
    """The tensor that a layer multiplies by its weight."""
    return node.args[1] if node.target is aten.addmm.default else node.args[0]  # type: ignore[return-value]


def _sources(node: Node) -> set[Node]:
    """The layers whose results a layer reads, added to others or activated."""
    found, seen, todo = set(), set(), [_input(node)]
    while todo:
        source = todo.pop()
        if source in seen:
            continue
        seen.add(source)
        if CHOICE in source.meta:
            found.add(source)
        elif _is_between(source):
            todo.extend(source.all_input_nodes)
    return found


def _homes(chosen: Sequence[Node], *, sums: bool) -> dict[Node, Node]:
    """The layer that computes a tensor, be it the sum or activation of its result: of several the last."""
    homes: dict[Node, Node] = {}
    position = {node: number for number, node in enumerate(chosen)}
    for node in chosen[0].graph.nodes if chosen else ():
        if node in position:
            homes[node] = node
        elif _is_between(node, sums=sums):
            owners = [homes[source] for source in node.all_input_nodes if source in homes]
            if owners:
                homes[node] = max(owners, key=position.__getitem__)
    return homes


def _summands(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if n.op != "get_attr" and isinstance(n.meta["val"], Tensor)]
