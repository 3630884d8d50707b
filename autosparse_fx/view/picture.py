"""A picture of a graph, collapsed to its layers: SVG or PNG, by matplotlib."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import networkx as nx

from autosparse_fx.view.collapse import Collapsed, collapse, light_edges
from autosparse_fx.view.graph import Module
from autosparse_fx.view.layout import Box, Layout, Region, place
from autosparse_fx.view.strokes import Line, draw_badge, draw_route, width_of, write

_TITLE, _NAME, _NOTE, _HEADER = 13.0, 8.5, 7.0, 7.5  # font sizes, in points
_MARGIN, _HEAD = 16.0, 52.0
_INK, _QUIET = "#1f2430", "#5f6775"
_PLAIN, _PLAIN_EDGE = "#f4f5f7", "#c3c9d2"
_SHADES = ("#fafbfc", "#f0f2f6", "#e7ebf1", "#dfe4ec")
_MASK, _GRADIENT = "#e8590c", "#c2255c"
_DPI, _MOST_PIXELS = 120, 5200


@dataclass(frozen=True)
class Panel:
    """One graph of a picture."""

    graph: nx.DiGraph
    title: str
    note: str = ""


def require() -> None:
    """Raise an ImportError that names the cure where what draws pictures is not installed."""
    for package in ("matplotlib", "py_mini_racer"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"a picture needs {package}, which is not installed: pip install 'autosparse-fx[plot]', or write "
                ".html, .dot or .graphml, which need nothing else"
            )


def draw(panels: Sequence[Panel], file: IO[bytes], suffix: str, depth: int | None = None) -> None:
    """Draw ``panels`` one below the other into ``file``.

    Args:
        panels: the graphs.
        file: open for writing bytes.
        suffix: ``".svg"`` or ``".png"``.
        depth: as for :func:`~autosparse_fx.view.collapse.collapse`.
    """
    require()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    drawn = [_laid_out(collapse(panel.graph, depth)) for panel in panels]
    width = max(max(layout.width for _, _, layout in drawn) + 2 * _MARGIN, 520.0)
    heights = [layout.height + _HEAD + 2 * _MARGIN for _, _, layout in drawn]
    figure = Figure(figsize=(width / 72, sum(heights) / 72))
    top = sum(heights)
    for panel, (graph, lines, layout), height in zip(panels, drawn, heights, strict=True):
        top -= height
        axes = figure.add_axes((0, top / sum(heights), 1, height / sum(heights)))
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        _draw_panel(axes, panel, graph, lines, layout, width)
    canvas = FigureCanvasSVG(figure) if suffix == ".svg" else FigureCanvasAgg(figure)
    dpi = min(_DPI, _MOST_PIXELS * 72 / max(width, sum(heights)))
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "autosparse"}
    with matplotlib.rc_context(settings):
        if suffix == ".svg":
            canvas.print_figure(file, format="svg", dpi=72, metadata={"Date": None})
        else:
            canvas.print_figure(file, format="png", dpi=dpi)


def _laid_out(graph: nx.DiGraph) -> tuple[nx.DiGraph, dict[str, list[Line]], Layout]:
    modules: Mapping[str, Module] = graph.graph["modules"]
    lines = {key: _text(data["box"], modules) for key, data in graph.nodes(data=True)}
    boxes = [
        Box(
            key,
            max(width_of(line) for line in lines[key]) + (34 if data["box"].masks or data["box"].gradients else 14),
            sum(line.size * 1.32 for line in lines[key]) + 8,
            data["box"].parent,
        )
        for key, data in graph.nodes(data=True)
    ]
    layout = place(
        boxes,
        [(key, module.parent) for key, module in modules.items()],
        list(graph.edges),
        aspect=1.45,
        header=18,
        gap=20,
        light=light_edges(graph),
    )
    return graph, lines, layout


def _text(box: Collapsed, modules: Mapping[str, Module]) -> list[Line]:
    around = modules[box.parent].path + "." if box.parent else ""
    lines = [Line(box.name.removeprefix(around), _NAME, bold=True)]
    about = " ".join(part for part in (box.type, _times(box.shapes[0]) if len(box.shapes) == 1 else "") if part)
    if about and not (about == box.type and not box.weights and box.name.lower().endswith(box.type.lower())):
        lines.append(Line(about, _NOTE))
    if box.sparsity is not None:
        flops = f" · {_short(box.flops)}FLOPs" if box.flops else ""
        lines.append(Line(f"{box.sparsity:.1%} zeros{flops}", _NOTE))
    if box.kind == "input" and box.shape:
        lines.append(Line(_times(box.shape), _NOTE))
    if box.followers:
        names = [name.removeprefix(around).partition(" (call")[0] for name in box.followers]
        more = f" + {len(names) - 3} more" if len(names) > 4 else ""
        lines.append(Line("then " + ", ".join(names[: 3 if more else 4]) + more, _NOTE))
    return lines


def _draw_panel(
    axes: Any, panel: Panel, graph: nx.DiGraph, lines: Mapping[str, list[Line]], layout: Layout, width: float
) -> None:
    import matplotlib
    from matplotlib.patches import FancyBboxPatch

    colours = matplotlib.colormaps["viridis_r"]
    x0, y0 = (width - layout.width) / 2, _MARGIN + _HEAD
    _draw_head(axes, panel, width, colours)
    modules: Mapping[str, Module] = graph.graph["modules"]
    for region in sorted(layout.regions, key=lambda r: _depth(modules, r.id)):
        _draw_region(axes, region, modules, x0, y0)
    for route in layout.routes:
        draw_route(axes, [(x + x0, y + y0) for x, y in route.points], route.far)
    sizes = {key: (sum(line.size * 1.32 for line in lines[key]) + 8) for key in lines}
    for key, data in graph.nodes(data=True):
        box: Collapsed = data["box"]
        x, y = layout.centres[key][0] + x0, layout.centres[key][1] + y0
        marks = bool(box.masks or box.gradients)
        w, h = max(width_of(line) for line in lines[key]) + (34 if marks else 14), sizes[key]
        fill: Any = _PLAIN
        ink, quiet = _INK, _QUIET
        if box.sparsity is not None:
            fill = colours(box.sparsity)
            ink, quiet = (_INK, "#3d4350") if _is_light(fill) else ("white", "#e9ecf2")
        round_ = h / 2 if box.kind in ("input", "output") else 4
        edge = _PLAIN_EDGE if box.sparsity is None else (0, 0, 0, 0.35)
        axes.add_patch(
            FancyBboxPatch(
                (x - w / 2, y - h / 2),
                w,
                h,
                boxstyle=f"round,pad=0,rounding_size={round_}",
                facecolor=fill,
                edgecolor=edge,
                linewidth=0.8,
                zorder=4,
            )
        )
        at = y - h / 2 + 4
        for line in lines[key]:
            at += line.size * 1.32
            write(
                axes,
                x - w / 2 + 7,
                at - line.size * 0.36,
                line.text,
                line.size,
                ink if line.bold else quiet,
                bold=line.bold,
            )
        badges = [("M", _MASK)] * bool(box.masks) + [("GA", _GRADIENT)] * bool(box.gradients)
        for i, (text, colour) in enumerate(badges):
            draw_badge(axes, x + w / 2 - 12, y - h / 2 + 10 + 13 * i, text, colour)


def _draw_head(axes: Any, panel: Panel, width: float, colours: Any) -> None:
    write(axes, _MARGIN, 22, panel.title, _TITLE, _INK, bold=True)
    if panel.note:
        write(axes, _MARGIN, 40, panel.note, _NOTE + 1, _QUIET)
    x, y, length = width - _MARGIN - 150, 56, 132
    axes.imshow(
        [[i / 255 for i in range(256)]], cmap=colours, extent=(x, x + length, y, y - 8), aspect="auto", zorder=3
    )
    axes.set(xlim=(0, width), ylim=axes.get_ylim())
    for share in (0, 0.5, 1):
        write(axes, x + share * length, y + 9, f"{share:.0%}", _NOTE, _QUIET, centre=True)
    write(axes, x - 6, y - 1, "zeros", _NOTE + 0.5, _QUIET, right=True)
    is_shown = {data["kind"] for _, data in panel.graph.nodes(data=True)}
    x -= 40
    for kind, text, colour, meaning in (
        ("gradient", "GA", _GRADIENT, "gradient annealed"),
        ("mask", "M", _MASK, "threshold mask"),
    ):
        if kind in is_shown:
            x -= width_of(Line(meaning, _NOTE + 0.5)) + 10
            write(axes, x + 12, y - 1, meaning, _NOTE + 0.5, _QUIET)
            draw_badge(axes, x, y - 4, text, colour)
            x -= 24


def _draw_region(axes: Any, region: Region, modules: Mapping[str, Module], x0: float, y0: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    module = modules[region.id]
    depth = _depth(modules, region.id)
    axes.add_patch(
        FancyBboxPatch(
            (region.x0 + x0, region.y0 + y0),
            region.x1 - region.x0,
            region.y1 - region.y0,
            boxstyle="round,pad=0,rounding_size=6",
            facecolor=_SHADES[min(depth, len(_SHADES) - 1)],
            edgecolor="#ccd3dd",
            linewidth=0.8,
            zorder=1 + 0.1 * depth,
        )
    )
    around = modules[module.parent].path + "." if module.parent else ""
    head = module.label.removeprefix(around) + (", continued" if region.part else "")
    for text in (f"{head}  {module.type}", head):  # the class only where there is room
        if width_of(Line(text, _HEADER, bold=True)) < region.x1 - region.x0 - 10:
            break
    shade = _SHADES[min(depth, len(_SHADES) - 1)]
    write(axes, region.x0 + x0 + 6, region.y0 + y0 + 12, text, _HEADER, _QUIET, bold=True, halo=shade)


def _depth(modules: Mapping[str, Module], key: str) -> int:
    parent = modules[key].parent
    return 0 if parent is None else 1 + _depth(modules, parent)


def _is_light(colour: Sequence[float]) -> bool:
    red, green, blue = colour[:3]
    return 0.299 * red + 0.587 * green + 0.114 * blue > 0.5


def _times(shape: str) -> str:
    return shape.replace("x", "\u00d7")


def _short(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g} "
