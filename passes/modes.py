"""Under which grad and inference mode each node of a Dynamo graph runs, and which nodes write to their input."""

import torch
from torch.fx import Graph, Node

from autosparse_fx._compat import enter_inference_mode, exit_inference_mode, set_grad_enabled


def modes(graph: Graph) -> dict[Node, tuple[object, ...]]:
    """Return, for each node, a key that is equal for nodes that run under the same modes.

    The graph starts in the grad mode of the caller, which is the one in which a backend runs.
    """
    found: dict[Node, tuple[object, ...]] = {}
    with_grad = torch.is_grad_enabled()
    inference: list[object] = []
    for node in graph.nodes:
        if node.target is set_grad_enabled:
            with_grad = bool(node.args[0])
        elif node.target is enter_inference_mode:
            inference.append(node)
        elif node.target is exit_inference_mode:
            inference.remove(node.args[0])
        found[node] = (with_grad, *inference)
    return found


def writes(user: Node, node: Node) -> bool:
    """Whether ``user`` is an in-place operation on ``node``."""
    if node in user.kwargs.values() and user.kwargs.get("out") is node:
        return True
    if not user.args or user.args[0] is not node:
        return False
    name = function_name(user)
    if user.op == "call_function" and getattr(user.target, "__module__", "") == "_operator":
        return name in ("setitem", "iadd", "isub", "imul", "itruediv", "imatmul", "ipow")
    return name.endswith("_") and not name.endswith("__")


def function_name(node: Node) -> str:
    """The bare name of the function or method that a node calls."""
    if isinstance(node.target, str):
        return node.target if node.op == "call_method" else ""
    return str(getattr(node.target, "__name__", node.target)).removeprefix("aten.")
