"""Drawing: the graphs of a model as networkx graphs, those as pages, pictures and files, and what changed in one."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autosparse_fx.view.captures import capture_graphs
    from autosparse_fx.view.collapse import collapse
    from autosparse_fx.view.diff import GraphDiff, diff_graphs
    from autosparse_fx.view.graph import to_networkx

__all__ = ["GraphDiff", "capture_graphs", "collapse", "diff_graphs", "to_networkx"]
_MODULES = {
    "GraphDiff": "diff",
    "capture_graphs": "captures",
    "collapse": "collapse",
    "diff_graphs": "diff",
    "to_networkx": "graph",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the package is imported with every training, and a drawing is rarely made."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
