"""Where boxes and edges go: dagre, the layout that the HTML page uses, run here in an embedded JavaScript engine."""

import json
from collections.abc import Sequence, Set
from dataclasses import dataclass
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Box:
    """What is to be placed; ``parent`` is the cluster that it stands in."""

    id: str
    width: float
    height: float
    parent: str | None = None


@dataclass(frozen=True)
class Region:
    """The rectangle of a cluster, or of the part of it that is in one column."""

    id: str
    part: int  # 0 for the first
    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True)
class Route:
    """The way of an edge; ``far`` is one of too many that go on in another column to lead each around."""

    source: str
    target: str
    points: tuple[tuple[float, float], ...]
    far: bool


@dataclass(frozen=True)
class Layout:
    """Positions in points, y downwards."""

    centres: dict[str, tuple[float, float]]
    regions: tuple[Region, ...]
    routes: tuple[Route, ...]
    width: float
    height: float


def asset(name: str) -> str:
    """The text of a file that the package ships beside its code."""
    return resources.files("autosparse_fx.view").joinpath("assets").joinpath(name).read_text(encoding="utf-8")


def place(
    boxes: Sequence[Box],
    clusters: Sequence[tuple[str, str | None]],
    edges: Sequence[tuple[str, str]],
    *,
    aspect: float,
    header: float,
    gap: float,
    light: Set[tuple[str, str]] = frozenset(),
) -> Layout:
    """Lay a graph out in layers, from top to bottom, wrapped into columns.

    Args:
        boxes: the nodes.
        clusters: each with the cluster around it, or None.
        edges: source and target.
        aspect: width over height to come close to.
        header: room for the heading of a cluster.
        gap: between layers.
        light: the edges that do not decide where anything goes.
    """
    from py_mini_racer import MiniRacer

    spec: dict[str, Any] = {
        "nodes": [{"id": b.id, "width": b.width, "height": b.height, "parent": b.parent} for b in boxes],
        "clusters": [{"id": cluster, "parent": parent} for cluster, parent in clusters],
        "edges": [{"source": a, "target": b, "light": (a, b) in light} for a, b in edges],
        "aspect": aspect,
        "header": header,
        "ranksep": gap,
    }
    engine = MiniRacer()
    try:
        for script in ("dagre.min.js", "layout.js"):
            engine.eval(asset(script) + "\n;0")
        found = json.loads(str(engine.eval(f"JSON.stringify(layoutGraph({json.dumps(spec)}))")))
    finally:
        engine.close()
    return Layout(
        {box.id: (x, y) for box, (x, y) in zip(boxes, found["nodes"], strict=True)},
        tuple(Region(**region) for region in found["clusters"]),
        tuple(
            Route(source, target, tuple((x, y) for x, y in route["points"]), route["far"])
            for (source, target), route in zip(edges, found["edges"], strict=True)
        ),
        found["width"],
        found["height"],
    )
