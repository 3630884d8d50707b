"""Runs passes in their order, and keeps what each made of the graph: in the log, in PyTorch's trace, and in memory."""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Graph, GraphModule
from torch.fx.passes.graph_transform_observer import GraphTransformObserver

from autosparse_fx._compat import dynamo

log = logging.getLogger(__name__)

Pass = Callable[[Any], int]


@dataclass(frozen=True)
class GraphVersion:
    """A graph as one pass left it."""

    stage: str  # "dynamo", "inference" or "joint"
    pass_name: str  # "captured" for the graph that the first pass was given
    changes: int
    graph: Graph


@dataclass
class Compilation:
    """The versions of one graph on its way to Inductor, in order."""

    id: str  # Dynamo's, such as "0/0", where there is one
    versions: list[GraphVersion] = field(default_factory=list)


# The last compilations of this process, oldest first: graphs only, no tensors.
compilations: deque[Compilation] = deque(maxlen=16)

# What tests hang in: called after every pass, with the graph module, the stage and the name of the pass.
checks: list[Callable[[GraphModule, str, str], None]] = []


def run_passes(gm: GraphModule, passes: Sequence[Pass], stage: str) -> dict[str, int]:
    """Run ``passes`` on ``gm`` in order, in place.

    Each goes through ``torch.fx``'s ``GraphTransformObserver``: Inductor's ``disabled_passes`` and its log of graph
    transformations know it by its name.

    Returns:
        The number of changes that each made, by name.
    """
    compilation = _compilation(stage)
    compilation.versions.append(GraphVersion(stage, "captured", 0, _copy(gm.graph)))
    counts: dict[str, int] = {}
    for graph_pass in passes:
        name = graph_pass.__name__
        changes = GraphTransformObserver(gm, name, subsystem="autosparse").apply_gm_pass(graph_pass)
        if changes is None:
            log.warning("%s is disabled by torch._inductor.config.disabled_passes", name)
            continue
        counts[name] = changes
        log.debug("compilation %s, %s graph: %s made %d changes", compilation.id, stage, name, counts[name])
        if counts[name]:
            compilation.versions.append(GraphVersion(stage, name, counts[name], _copy(gm.graph)))
            dynamo.trace_graph(f"autosparse_after_{name}", gm)
        for check in checks:
            check(gm, stage, name)
    return counts


def _compilation(stage: str) -> Compilation:
    """The one that is under way; what Dynamo does not name, as weights that are compiled anew, tells itself apart by
    going through a stage again (as joint graphs do in one compilation, subgraph by subgraph)."""
    compile_id = dynamo.current_compile_id()
    last = compilations[-1] if compilations else None
    again = last is not None and any(version.stage == stage for version in last.versions)
    if last is None or last.id != compile_id or (again and (not compile_id or stage == "dynamo")):
        compilations.append(Compilation(compile_id))
    return compilations[-1]


def _copy(graph: Graph) -> Graph:
    made = Graph()
    nodes: dict[Any, Any] = {}
    made.output(made.graph_copy(graph, nodes))
    for node in made.nodes:
        node.meta.pop("grapharg", None)  # which leads to the tensors themselves
    return made
