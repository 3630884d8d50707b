"""visualize: the graphs of a model, as a page, a picture, or a file for another tool."""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from torch import Tensor, nn

from autosparse_fx.arguments import check_module
from autosparse_fx.files import checked_path, written

if TYPE_CHECKING:  # imported when they are needed: networkx alone takes as long as a tenth of torch
    import networkx as nx

    from autosparse_fx.view.captures import Captures

GRAPHS = ("forward", "joint", "backward")
VERSIONS = ("before", "after")
_SUFFIXES = (".html", ".svg", ".png", ".dot", ".graphml")


def visualize(
    model: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any] | Tensor,
    path: str | os.PathLike[str],
    *,
    graph: str = "forward",
    version: str = "after",
    depth: int | None = None,
) -> "list[nx.DiGraph]":
    """Draw the graphs that the compiler sees of ``model``: masks and annealed gradients marked, coloured by sparsity.

    The suffix of ``path`` says what is written. ``.html`` is a page that needs no network: modules open and close,
    layers are found by name, both versions are in it. ``.svg`` and ``.png`` are pictures of the layers, for which the
    extra ``plot`` has to be installed. ``.dot`` and ``.graphml`` have every node with all that is known of it.

    The model runs once, in the mode that it is in; its buffers and the random state are restored.

    Args:
        model: sparse, finalized or dense.
        example_inputs: the arguments of one call: a tensor, a tuple, or a dict of keyword arguments.
        path: where to write; its directory has to exist.
        graph: ``"forward"``, ``"joint"`` for forward and backward together, or ``"backward"``. The latter two are
            AOTAutograd's, before Inductor takes operations apart.
        version: ``"after"`` the passes of this package, or ``"before"`` them; on a page, the one to show first.
        depth: levels of modules that are drawn open; None for as many as stay legible.

    Returns:
        The graphs that were drawn, in that version, one for each graph that the model breaks into, with plain values
        as attributes. A warning says so where there are several.

    Raises:
        ValueError: if the suffix or an option is unknown, or the model cannot be run on the inputs.
        FileNotFoundError: if the directory is not there.
        ImportError: if a picture is asked for and the extra is not installed.
    """
    target = checked_path(path, _SUFFIXES)
    _check(model, target, graph, version, depth)
    from autosparse_fx.view.captures import capture_graphs

    captures = capture_graphs(model, example_inputs, graph)
    if len(captures.graphs) > 1:
        warnings.warn(
            f"{captures.model} breaks into {len(captures.graphs)} graphs, each of which is drawn on its own: "
            f"{'; '.join(captures.breaks) or 'no reason is known'}",
            stacklevel=2,
        )
    with written(target) as partial, partial.open("wb") as file:
        _write(captures, file, target.suffix.lower(), version, depth)
    return [versions[version] for versions in captures.graphs]


def _check(model: nn.Module, path: Path, graph: str, version: str, depth: int | None) -> None:
    """Refuse what cannot be drawn before anything is computed."""
    check_module(model, "visualize")
    for name, value, known in (("graph", graph, GRAPHS), ("version", version, VERSIONS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    if depth is not None and (not isinstance(depth, int) or depth < 0):
        raise ValueError(f"depth must be a number of levels, 0 or more, or None, got {depth!r}")
    if path.suffix.lower() in (".svg", ".png"):
        from autosparse_fx.view.picture import require

        require()


def _write(captures: "Captures", file: IO[bytes], suffix: str, version: str, depth: int | None) -> None:
    from autosparse_fx.view import files, html, picture

    graphs = [versions[version] for versions in captures.graphs]
    titles = [captures.title(index) for index in range(len(graphs))]
    if suffix == ".html":
        named = list(zip(titles, captures.graphs, strict=True))
        file.write(html.page(named, version=version, note=captures.note, depth=depth).encode())
    elif suffix in (".svg", ".png"):
        panels = [picture.Panel(graph, title, captures.note) for graph, title in zip(graphs, titles, strict=True)]
        picture.draw(panels, file, suffix, depth)
    else:
        write = files.write_dot if suffix == ".dot" else files.write_graphml
        write(graphs, titles, file)
