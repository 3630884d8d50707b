"""Graphs as files for other tools: DOT and GraphML, every node with all that is known of it."""

import dataclasses
import json
from collections.abc import Sequence
from typing import IO, Any

import networkx as nx

from autosparse_fx.view.graph import Module

_COLOURS = {"mask": "#e8590c", "gradient": "#c2255c"}
_NAMES_IN_DOT = {"source": "tooltip", "shape": "tensor_shape"}  # to Graphviz the shape is that of the node


def write_graphml(graphs: Sequence[nx.DiGraph], titles: Sequence[str], file: IO[bytes]) -> None:
    """Write one GraphML graph; where there are several, names begin with ``graph1/`` and so on."""
    made = _together(graphs)
    modules = {key: dataclasses.asdict(module) for key, module in made.graph["modules"].items()}
    made.graph = {"title": "; ".join(titles), "modules": json.dumps(modules)}
    nx.write_graphml(made, file)


def write_dot(graphs: Sequence[nx.DiGraph], titles: Sequence[str], file: IO[bytes]) -> None:
    """Write one DOT graph in which each module is a cluster."""
    made = _together(graphs)
    modules: dict[str, Module] = made.graph["modules"]
    clusters: dict[str | None, list[str]] = {None: []}
    for key, module in modules.items():
        clusters.setdefault(module.parent, []).append(key)
    nodes: dict[str | None, list[str]] = {}
    for name, data in made.nodes(data=True):
        nodes.setdefault(data["module"] or None, []).append(name)

    def block(cluster: str | None, indent: str) -> list[str]:
        lines = [f"{indent}{_quoted(name)} [{_attributes(made.nodes[name])}];" for name in nodes.get(cluster, [])]
        for inner in clusters.get(cluster, []):
            module = modules[inner]
            label = f"{module.label} {module.type}".strip()
            lines.append(f"{indent}subgraph {_quoted('cluster_' + inner)} {{")
            lines.append(f"{indent}  label={_quoted(label)};")
            lines += [*block(inner, indent + "  "), f"{indent}}}"]
        return lines

    lines = ["digraph {", f"  label={_quoted('; '.join(titles))};", "  node [shape=box, style=filled];"]
    lines += block(None, "  ")
    lines += [f"  {_quoted(a)} -> {_quoted(b)};" for a, b in made.edges]
    file.write("\n".join([*lines, "}", ""]).encode())


def _together(graphs: Sequence[nx.DiGraph]) -> nx.DiGraph:
    if len(graphs) == 1:
        return graphs[0].copy()
    made = nx.DiGraph(modules={})
    for index, graph in enumerate(graphs):
        start = f"graph{index + 1}/"
        for name, data in graph.nodes(data=True):
            made.add_node(start + name, **{**data, "module": start + data["module"] if data["module"] else ""})
        made.add_edges_from((start + a, start + b) for a, b in graph.edges)
        for key, module in graph.graph["modules"].items():
            parent = None if module.parent is None else start + module.parent
            made.graph["modules"][start + key] = dataclasses.replace(module, parent=parent)
    return made


def _attributes(data: dict[str, Any]) -> str:
    shown = {_NAMES_IN_DOT.get(key, key): value for key, value in data.items() if key != "module"}
    shown["fillcolor"] = "#ffffff"
    if "sparsity" in data:  # hue, saturation, value: from white to blue
        shown["fillcolor"] = f"0.6 {0.7 * data['sparsity']:.3f} 1.0"
    if data["kind"] in _COLOURS:
        shown |= {"color": _COLOURS[data["kind"]], "penwidth": 3}
    return ", ".join(f"{key}={_quoted(str(value))}" for key, value in shown.items())


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
