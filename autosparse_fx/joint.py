"""The joint passes as one pass of Inductor's, with the identity that keeps Inductor's caches on and honest."""

import functools
import hashlib
import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

import autosparse_fx.lowering
import autosparse_fx.ops
import autosparse_fx.passes.tag_recompute
from autosparse_fx.passes import JOINT_PASSES

# What decides the generated code besides the graph itself.
_SOURCES: tuple[ModuleType, ...] = (autosparse_fx.lowering, autosparse_fx.ops, autosparse_fx.passes.tag_recompute)


class JointPasses(CustomGraphPass):
    """Runs the user's own pass of this stage (one, or several), and then ours."""

    def __init__(self, user_pass: Any = None) -> None:
        self._user_passes: Sequence[Callable[[Graph], Any]] = (
            user_pass if isinstance(user_pass, (list, tuple)) else [user_pass] if user_pass is not None else []
        )

    def __call__(self, graph: Graph) -> None:
        for user_pass in self._user_passes:
            user_pass(graph)
        for joint_pass in JOINT_PASSES:
            joint_pass(graph)

    def uuid(self) -> Any:
        theirs = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self._user_passes]
        return None if None in theirs else (_source_hash(), *theirs)  # no uuid: Inductor does not cache


@functools.cache
def _source_hash() -> str:
    return hashlib.sha256("".join(inspect.getsource(m) for m in _SOURCES).encode()).hexdigest()
