"""What changed between two versions of a graph: before and after one pass, or one compilation and the next."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node
from torch.fx.node import map_arg

from autosparse_fx.view.names import target_name


@dataclass(frozen=True)
class GraphDiff:
    """Nodes by name: as in the graph after, but for those that were removed."""

    added: Mapping[str, str]  # name -> what it calls on what
    removed: Mapping[str, str]
    rewired: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]  # name -> inputs before and after
    altered: Mapping[str, tuple[str, str]]  # name -> arguments before and after, where only constants are others
    renamed: Mapping[str, str]  # name -> name before; no change by itself

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.rewired or self.altered)

    def __str__(self) -> str:
        lines = [f"+ {name} = {call}" for name, call in self.added.items()]
        lines += [f"- {name} = {call}" for name, call in self.removed.items()]
        lines += [f"~ {name}: ({', '.join(old)}) -> ({', '.join(new)})" for name, (old, new) in self.rewired.items()]
        lines += [f"~ {name}: {old} -> {new}" for name, (old, new) in self.altered.items()]
        return "\n".join(lines) or "no change"


def diff_graphs(before: Graph, after: Graph) -> GraphDiff:
    """Compare two graphs, for instance those of two of ``pipeline.GraphVersion``.

    Nodes that do the same on the same inputs are the same, whatever they are called, those of one name first. What is
    left is matched by name and by how much of its inputs it kept, and is rewired.
    """
    old_of = _match(before, after)
    matched = set(old_of.values())
    rewired, altered = {}, {}
    for node, old in old_of.items():
        if [old_of.get(used) for used in _inputs(node)] != _inputs(old):
            rewired[node.name] = (_names(_inputs(old)), _names(_inputs(node)))
        elif _does(node) != _does(old):
            altered[node.name] = (_arguments(old), _arguments(node))
    return GraphDiff(
        added={node.name: _call(node) for node in after.nodes if node not in old_of},
        removed={node.name: _call(node) for node in before.nodes if node not in matched},
        rewired=rewired,
        altered=altered,
        renamed={node.name: old.name for node, old in old_of.items() if node.name != old.name},
    )


def _match(before: Graph, after: Graph) -> dict[Node, Node]:
    """Each node of ``after`` that was there before, with what it was then."""
    old_of: dict[Node, Node] = {}
    free = dict.fromkeys(before.nodes)  # in order
    while True:
        _match_same(after, old_of, free)
        best = max(
            (
                (score, -index, node, old)
                for index, node in enumerate(after.nodes)
                if node not in old_of
                for old in free
                if (score := _likeness(node, old, old_of)) > 0
            ),
            key=lambda found: found[:2],
            default=None,
        )
        if best is None:
            return old_of
        old_of[best[2]] = best[3]
        del free[best[3]]


def _match_same(after: Graph, old_of: dict[Node, Node], free: dict[Node, None]) -> None:
    """Match what does the same on inputs that are the same."""
    by_key: dict[Any, list[Node]] = {}
    for old in free:
        by_key.setdefault((_does(old), tuple(_inputs(old))), []).append(old)
    for node in after.nodes:
        if node in old_of:
            continue
        candidates = by_key.get((_does(node), tuple(old_of.get(used) for used in _inputs(node))), [])
        candidates = [old for old in candidates if old in free]
        if candidates:
            old_of[node] = next((old for old in candidates if old.name == node.name), candidates[0])
            del free[old_of[node]]


def _likeness(node: Node, old: Node, old_of: Mapping[Node, Node]) -> float:
    """How much a node is like an earlier one whose inputs are others: 0 for not at all."""
    if (node.op, node.target) != (old.op, old.target):
        return 0.0
    ours, theirs = _inputs(node), _inputs(old)
    kept = sum(old_of.get(used) is then for used, then in zip(ours, theirs, strict=False))
    return 2 * kept / max(len(ours), len(theirs), 1) + (node.name == old.name)


def _does(node: Node) -> tuple[Any, ...]:
    """What a node computes, leaving its inputs open."""
    constants = map_arg((node.args, node.kwargs), lambda used: None)
    return node.op, node.target, repr(constants)


def _inputs(node: Node) -> list[Node]:
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def _arguments(node: Node) -> str:
    return f"({', '.join([*map(str, node.args), *(f'{key}={value}' for key, value in node.kwargs.items())])})"


def _names(nodes: list[Node]) -> tuple[str, ...]:
    return tuple(node.name for node in nodes)


def _call(node: Node) -> str:
    target = node.op if node.op in ("placeholder", "output") else target_name(node)
    return f"{target}({', '.join(_names(_inputs(node)))})"
