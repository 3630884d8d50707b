"""Which layers run sparse in the company that they are in: tensors are converted where sparse layers meet others."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor
from torch.fx import Node

from autosparse_fx._compat import cpu
from autosparse_fx._compat.dynamo_graphs import size_hint
from autosparse_fx.kernels import choice
from autosparse_fx.kernels.choice import CHOICE, Choice
from autosparse_fx.kernels.library import library
from autosparse_fx.passes.constants import constant
from autosparse_fx.passes.epilogues import VIEWS, activation_of

aten = torch.ops.aten


def choose_each(layers: Sequence[Node], choice_of: Callable[[Node, bool], Choice]) -> None:
    """Note for each layer what it gains by itself.

    Args:
        layers: all of one kind.
        choice_of: the choice for a layer, where patterns can be machine code, or cannot.
    """
    runs_code = cpu.has_avx512()
    for node in layers:
        node.meta[CHOICE] = choice_of(node, runs_code)
    # The library is compiled when it is first asked for, which takes a while: not for layers that all stay dense.
    if runs_code and sparse_ones(layers) and not library().machine.runs_code:
        for node in layers:
            node.meta[CHOICE] = choice_of(node, False)


def choose_together(layers: Sequence[Node], cycles: Callable[[Node], float]) -> None:
    """Choose for all convolutions so that they and the conversions between them cost least: a minimum cut.

    One side runs sparse. A layer costs what it would gain on the other side, and each tensor that one side computes and
    the other reads is converted once.

    Args:
        layers: in the order of the graph.
        cycles: that converting each element of a tensor costs.
    """
    if not sparse_ones(layers):
        return
    import networkx as nx  # takes as long as a tenth of torch

    members, network = set(layers), nx.DiGraph()
    network.add_nodes_from(("sparse", "dense"))
    for node in layers:
        found: Choice = node.meta[CHOICE]
        if not found.is_supported:
            network.add_edge(node, "dense")  # whose capacity has no limit
        elif found.saved > 0:
            network.add_edge("sparse", node, capacity=int(found.saved))
        else:
            network.add_edge(node, "dense", capacity=1 + int(-found.saved))

    def side(node: Node) -> Node | str:
        return node if node in members or _is_between(node) else "dense"

    constants: set[Node] = set()
    for tensor in layers[0].graph.nodes:
        sources = tensor.all_input_nodes
        if tensor.op == "get_attr" or (sources and constants.issuperset(sources)):
            constants.add(tensor)
        if tensor in constants or not isinstance(tensor.meta.get("val"), Tensor):
            continue
        cost = int(cycles(tensor) * _elements(tensor))
        for_dense, for_sparse = (tensor, "for dense"), (tensor, "for sparse")
        for reader in {side(user) for user in tensor.users}:
            network.add_edge(for_dense, reader)
            if reader != "dense":
                network.add_edge(reader, for_sparse)
        network.add_edge(side(tensor), for_dense, capacity=cost)
        network.add_edge(for_sparse, side(tensor), capacity=cost)
    _, (together, _) = nx.minimum_cut(network, "sparse", "dense", flow_func=nx.flow.boykov_kolmogorov)
    for node in layers:
        found = node.meta[CHOICE]
        if node in together and not found.is_sparse:
            reason = f"{found.reason}, with its neighbours"
            node.meta[CHOICE] = replace(found, is_sparse=True, reason=reason)
        elif node not in together and found.is_sparse:
            reason = f"{found.reason}, less than converting its tensors costs"
            node.meta[CHOICE] = replace(found, is_sparse=False, reason=reason)


def drop_groups_that_lose(layers: Sequence[Node], cycles: Callable[[Node], float], *, sums: bool = True) -> None:
    """Leave those dense that gain less, with those that they hand their tensors to, than being called for costs.

    And those among which none gains by itself.

    Args:
        layers: all of one kind, in the order of the graph.
        cycles: that each element costs of a tensor which goes into such a group or comes out of it.
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
        tensors: set[Node] = set().union(*(edges[node] for node in group))
        costs = choice.PROGRAM + sum(cycles(tensor) * _elements(tensor) for tensor in tensors)
        choices: list[Choice] = [node.meta[CHOICE] for node in group]
        why = ""
        if sum(found.saved for found in choices) < costs:
            why = "less than calling it costs"
        elif not any(found.gains_alone for found in choices):
            why = "where none gains by itself"
        for node, found in zip(group, choices, strict=True):
            if why:
                node.meta[CHOICE] = replace(found, is_sparse=False, reason=f"{found.reason}, {why}")


def _elements(node: Node) -> int:
    return prod(map(size_hint, node.meta["val"].shape))


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
