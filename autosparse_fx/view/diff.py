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
    """Each node of ``after`` that was there before, with what it was then: what is surest first."""
    matching = _Matching(before)
    while any(matching.sweep(after, at_least) for at_least in (2.0, 1.01, 0.01)):
        pass
    return matching.old_of


class _Matching:
    def __init__(self, before: Graph) -> None:
        self.old_of: dict[Node, Node] = {}
        self._free = {node.name: node for node in before.nodes}
        self._same: dict[Any, list[Node]] = {}  # by what they do, and on which inputs
        for node in before.nodes:
            self._same.setdefault((_does(node), tuple(_inputs(node))), []).append(node)

    def sweep(self, after: Graph, at_least: float) -> bool:
        """Match what does the same on the same inputs, and what is as like as ``at_least``; return whether any was.

        Where that is little, only the first: what follows it may then be the same.
        """
        found = False
        for node in after.nodes:
            if node in self.old_of:
                continue
            candidates = self._candidates(node)
            best = max(candidates, key=lambda old: self._likeness(node, old), default=None)
            if best is None or self._likeness(node, best) < at_least:
                continue
            is_sure = self._likeness(node, best) >= 2
            self.old_of[node] = best
            del self._free[best.name]
            if not is_sure:
                return True
            found = True
        return found

    def _candidates(self, node: Node) -> list[Node]:
        """What a node may have been: of the same name, on the same inputs, or on one of them."""
        kept = [self.old_of.get(used) for used in _inputs(node)]
        named = [self._free[node.name]] if node.name in self._free else []
        same = self._same.get((_does(node), tuple(kept)), [])
        users = [user for old in kept if old is not None for user in old.users]
        candidates = dict.fromkeys([*named, *same, *users])
        return [old for old in candidates if old.name in self._free and (old.op, old.target) == (node.op, node.target)]

    def _likeness(self, node: Node, old: Node) -> float:
        """From 0 to 3, which is the same under the same name, and 2.5 under another."""
        kept, theirs = [self.old_of.get(used) for used in _inputs(node)], _inputs(old)
        if kept == theirs and _does(node) == _does(old):
            return 2.5 + 0.5 * (node.name == old.name)
        shared = sum(ours is then for ours, then in zip(kept, theirs, strict=False))
        return 1.4 * shared / max(len(kept), len(theirs), 1) + (node.name == old.name)


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
