"""The joint passes as one pass of Inductor's, with the identity that keeps Inductor's caches on and honest."""

import functools
import hashlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

# Here and not in _compat, which is imported with the package: this loads Inductor. 2.11-2.15.
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

from autosparse_fx import lowering, ops
from autosparse_fx.passes import JOINT_PASSES, tag_recompute
from autosparse_fx.pipeline import run_passes


class JointPasses(CustomGraphPass):
    """Runs the user's own pass of this stage (one, or several), and then ours."""

    def __init__(self, user_pass: Any = None, *, recompute_masks: bool = True) -> None:
        self._passes = JOINT_PASSES if recompute_masks else tuple(p for p in JOINT_PASSES if p is not tag_recompute)
        self._user_passes: Sequence[Callable[[Graph], Any]] = (
            user_pass if isinstance(user_pass, (list, tuple)) else [user_pass] if user_pass is not None else []
        )

    def __call__(self, graph: Graph) -> None:
        for user_pass in self._user_passes:
            user_pass(graph)
        run_passes(graph.owning_module or GraphModule(nn.Module(), graph), self._passes, "joint")

    def uuid(self) -> Any:
        theirs = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self._user_passes]
        return None if None in theirs else (_source_hash(self._passes), *theirs)  # no uuid: Inductor does not cache


@functools.cache
def _source_hash(passes: tuple[Callable[..., int], ...]) -> str:
    """A hash of everything of ours that decides the generated code besides the graph itself."""
    sources = [lowering, ops, *(inspect.getmodule(joint_pass) for joint_pass in passes)]
    return hashlib.sha256("".join(inspect.getsource(m) for m in sources if m is not None).encode()).hexdigest()
