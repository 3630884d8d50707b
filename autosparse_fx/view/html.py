"""A graph as one HTML page that needs nothing else: the scripts that draw it are in it."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx

from autosparse_fx.view.layout import asset

_SCRIPTS = {"cytoscape": "cytoscape.min.js", "dagre": "dagre.min.js", "layout": "layout.js", "view": "view.js"}


def page(
    graphs: Sequence[tuple[str, Mapping[str, nx.DiGraph]]], *, version: str, note: str = "", depth: int | None = None
) -> str:
    """Return a page on which the modules of ``graphs`` open and close.

    Args:
        graphs: each with its title, by version.
        version: the one to show first.
        note: what stands below the title.
        depth: levels of modules that are open at first; None for as many as stay legible.
    """
    data = {
        "version": version,
        "note": note,
        "depth": depth,
        "graphs": [
            {"title": title, "versions": {name: _plain(graph) for name, graph in versions.items()}}
            for title, versions in graphs
        ],
    }
    parts = {
        "title": html.escape(graphs[0][0]),
        "css": asset("view.css"),
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),  # no name can end the element
        **{name: _script(file) for name, file in _SCRIPTS.items()},
    }
    return re.sub(r"@(\w+)@", lambda match: parts[match[1]], asset("page.html"))


def _plain(graph: nx.DiGraph) -> dict[str, Any]:
    return {
        "nodes": [{"id": name, **data} for name, data in graph.nodes(data=True)],
        "edges": list(graph.edges),
        "modules": {
            key: {"path": m.path, "label": m.label, "type": m.type, "parent": m.parent, "backward": m.backward}
            for key, m in graph.graph["modules"].items()
        },
    }


def _script(file: str) -> str:
    text = "".join(line for line in asset(file).splitlines(keepends=True) if not line.startswith("//# sourceMapping"))
    assert "</script" not in text, file
    return text
