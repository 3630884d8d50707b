"""The joint passes as one pass of Inductor's, with the identity that keeps Inductor's caches on and honest."""

import functools
import hashlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

# Here and not in _compat.py, which is imported with the package: this loads Inductor. 2.11-2.15.
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from autosparse_fx import lowering, ops
from autosparse_fx.passes import JOINT_PASSES


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
    """A hash of everything of ours that decides the generated code besides the graph itself."""
    sources = [lowering, ops, *(inspect.getmodule(joint_pass) for joint_pass in JOINT_PASSES)]
    return hashlib.sha256("".join(inspect.getsource(m) for m in sources if m is not None).encode()).hexdigest()
