"""A graph with its modules folded into boxes, few enough of them for a picture."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import networkx as nx

from autosparse_fx.view.graph import FOLDED, Module

MOST_BOXES = 130
_MOST_RESULTS = 8  # an output that collects more than this (the gradients) would draw an edge across everything


@dataclass
class Collapsed:
    """One box: a module, an operation, or a chain of those of which only the first reads a weight."""

    name: str
    type: str = ""
    kind: str = "op"
    parent: str | None = None  # the module that it is drawn in
    nodes: list[str] = field(default_factory=list)
    followers: list[str] = field(default_factory=list)  # what was merged into the end of it
    weights: dict[str, tuple[int, float]] = field(default_factory=dict)  # numel and sparsity of each
    shapes: list[str] = field(default_factory=list)  # of those
    shape: str = ""  # of the last result
    masks: int = 0
    gradients: int = 0
    flops: int = 0
    backward: bool = True  # all of it

    @property
    def sparsity(self) -> float | None:
        """Zeros over the weights in the box, or None where it has none."""
        numel = sum(n for n, _ in self.weights.values())
        return sum(n * s for n, s in self.weights.values()) / numel if numel else None


def visible(graph: nx.DiGraph) -> nx.DiGraph:
    """What is drawn of ``graph``: not parameters, thresholds and saved tensors, nor what is joined to those alone."""
    made = graph.copy()
    for name, data in graph.nodes(data=True):
        if data["kind"] in FOLDED or (data["kind"] == "output" and graph.in_degree(name) > _MOST_RESULTS):
            made.remove_node(name)
    made.remove_nodes_from([name for name in nx.isolates(made) if made.nodes[name]["kind"] == "op" and len(made) > 1])
    return made


def ancestors(modules: Mapping[str, Module], module: str) -> list[str]:
    """The calls of modules around and including ``module``, outermost first."""
    chain: list[str] = []
    current: str | None = module or None
    while current is not None:
        chain.append(current)
        current = modules[current].parent
    return chain[::-1]


def collapse(graph: nx.DiGraph, depth: int | None = None) -> nx.DiGraph:
    """Fold each module that calls no other one, and all below ``depth`` levels, into one box.

    Args:
        graph: of :func:`~autosparse_fx.view.graph.to_networkx`.
        depth: how many levels of modules stay open; None for as many as leave a legible number of boxes.

    Returns:
        A graph whose nodes carry a :class:`Collapsed` as ``box``; its ``graph["modules"]`` are those that stay open.
    """
    deepest = max((len(ancestors(graph.graph["modules"], m)) for m in graph.graph["modules"]), default=0)
    levels = [depth] if depth is not None else range(deepest, -1, -1)
    for level in levels:
        made = _merge_followers(_fold(visible(graph), level))
        if len(made) <= MOST_BOXES:
            break
    return made


def light_edges(graph: nx.DiGraph) -> set[tuple[str, str]]:
    """Edges across everything, which a layout had better not follow: reads of a mask that another layer made, and what
    the backward pass reads of the forward pass, but for the one at which it begins: that puts the one behind the other.
    """
    boxes: dict[str, Collapsed] = dict(graph.nodes(data="box"))
    across = [(a, b) for a, b in graph.edges if boxes[b].backward and not boxes[a].backward]
    ends = [a for a in boxes if not boxes[a].backward and all(boxes[b].backward for b in graph.successors(a))]
    last = next((a for a in reversed(ends) if boxes[a].kind != "input"), None)
    light = {(a, b) for a, b in across if a != last and not (a in ends and boxes[a].kind == "input")}
    shared = {(a, b) for a, b, only_masks in graph.edges(data="only_masks") if only_masks}
    return light | {(a, b) for a, b in shared if boxes[a].kind != "mask" or boxes[a].parent != boxes[b].parent}


def _fold(graph: nx.DiGraph, depth: int) -> nx.DiGraph:
    modules: dict[str, Module] = graph.graph["modules"]
    inhabited = {a for _, data in graph.nodes(data=True) for a in ancestors(modules, data["module"])}
    open_ones = {modules[m].parent for m in inhabited}
    boxes: dict[str, Collapsed] = {}
    owner: dict[str, str] = {}
    for name, data in graph.nodes(data=True):
        chain = ancestors(modules, data["module"])
        shut = next((m for i, m in enumerate(chain) if m not in open_ones or i >= depth), None)
        key = f"module {shut}" if shut else f"node {name}"
        owner[name] = key
        if key not in boxes:
            parent = modules[shut].parent if shut else (chain[-1] if chain else None)
            title = modules[shut].label if shut else data["label"]
            boxes[key] = Collapsed(title, modules[shut].type if shut else "", "op" if shut else data["kind"], parent)
        box = boxes[key]
        box.nodes.append(name)
        box.shape = data.get("shape", box.shape)
        box.masks += data["is_mask"]
        box.gradients += data["is_gradient"]
        box.flops += data.get("flops", 0)
        box.backward &= data["backward"]
        if "weight" in data:
            box.weights[data["weight"]] = (data["numel"], data["sparsity"])
            if data["weight_shape"] not in box.shapes:
                box.shapes.append(data["weight_shape"])
    made = nx.DiGraph(**graph.graph)
    made.add_nodes_from((key, {"box": box}) for key, box in boxes.items())
    for a, b in graph.edges:
        if owner[a] != owner[b]:
            others = made.get_edge_data(owner[a], owner[b], {}).get("only_masks", True)
            made.add_edge(owner[a], owner[b], only_masks=others and graph.nodes[a]["is_mask"])
    kept = {a for box in boxes.values() if box.parent for a in ancestors(modules, box.parent)}
    made.graph["modules"] = {key: module for key, module in modules.items() if key in kept}
    return made


def _merge_followers(graph: nx.DiGraph) -> nx.DiGraph:
    """Merge what only carries on from one box, and reads no weight, into that box: batch norms, activations, views."""
    for key in list(nx.topological_sort(graph)) if nx.is_directed_acyclic_graph(graph) else list(graph):
        box: Collapsed = graph.nodes[key]["box"]
        if graph.in_degree(key) != 1 or box.weights or box.kind != "op":
            continue
        (before,) = graph.predecessors(key)
        first: Collapsed = graph.nodes[before]["box"]
        if graph.out_degree(before) != 1 or first.parent != box.parent or first.kind == "input":
            continue
        first.followers += [box.type if box.name.rpartition(".")[2].isdigit() else box.name, *box.followers]
        first.nodes += box.nodes
        first.shape = box.shape or first.shape
        first.flops += box.flops
        first.backward &= box.backward
        graph.add_edges_from((before, after) for after in list(graph.successors(key)))
        graph.remove_node(key)
    return graph
