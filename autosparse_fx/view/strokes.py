"""What a picture is made of: edges, badges and text, on the axes of matplotlib."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

EDGE = "#7b8494"


@dataclass(frozen=True)
class Line:
    """One line of text in a box."""

    text: str
    size: float
    bold: bool = False


def draw_route(axes: Any, points: Sequence[tuple[float, float]], far: bool) -> None:
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    if far:
        curve = FancyArrowPatch(
            points[0],
            points[-1],
            connectionstyle="arc3,rad=0.12",
            arrowstyle="-|>,head_width=1.6,head_length=3",
            color=EDGE,
            alpha=0.25,
            linewidth=0.7,
            zorder=3,
        )
        axes.add_patch(curve)
        return
    vertices, codes = [points[0]], [int(Path.MOVETO)]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        vertices += [_towards(corner, before), corner, _towards(corner, after)]
        codes += [int(Path.LINETO), int(Path.CURVE3), int(Path.CURVE3)]
    vertices.append(points[-1])
    codes.append(int(Path.LINETO))
    axes.add_patch(
        FancyArrowPatch(
            path=Path(vertices, codes),
            arrowstyle="-|>,head_width=2,head_length=3.6",
            color=EDGE,
            linewidth=0.95,
            fill=False,
            shrinkA=0,
            shrinkB=0,
            zorder=3,
        )
    )


def _towards(corner: tuple[float, float], other: tuple[float, float], reach: float = 7.0) -> tuple[float, float]:
    """The point near ``corner`` on the way to ``other`` where a rounded corner begins."""
    length = math.dist(corner, other)
    share = min(reach, length / 2) / length if length else 0.0
    return corner[0] + share * (other[0] - corner[0]), corner[1] + share * (other[1] - corner[1])


def draw_badge(axes: Any, x: float, y: float, text: str, colour: str) -> None:
    axes.text(
        x,
        y,
        text,
        fontsize=5.6,
        color="white",
        weight="bold",
        ha="center",
        va="center",
        zorder=6,
        bbox={"boxstyle": "round,pad=0.28", "facecolor": colour, "edgecolor": "white", "linewidth": 0.6},
    )


def write(
    axes: Any,
    x: float,
    y: float,
    text: str,
    size: float,
    colour: str,
    *,
    bold: bool = False,
    centre: bool = False,
    right: bool = False,
    halo: str | None = None,
) -> None:
    from matplotlib.patheffects import withStroke

    where = "center" if centre else "right" if right else "left"
    weight = "bold" if bold else "normal"
    made = axes.text(x, y, text, fontsize=size, color=colour, weight=weight, ha=where, zorder=5, parse_math=False)
    if halo is not None:  # keeps it legible where an edge runs through it
        made.set_path_effects([withStroke(linewidth=3, foreground=halo)])


def width_of(line: Line) -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=line.size, weight="bold" if line.bold else "normal")
    width, _, _ = text_to_path.get_text_width_height_descent(line.text, font, ismath=False)
    return float(width)
