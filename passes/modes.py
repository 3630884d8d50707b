"""Under which grad and inference mode each node of a Dynamo graph runs, and which tensors the graph writes to."""

import inspect
from collections.abc import Iterable
from types import FunctionType
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from autosparse_fx._compat.dynamo_graphs import (
    HigherOrderOperator,
    enter_inference_mode,
    exit_inference_mode,
    set_grad_enabled,
)
from autosparse_fx._compat.eager import OpOverload, OpOverloadPacket

# The operations that may give a view of a tensor, by their bare names: through these a write reaches the tensor that
# they were taken of.
VIEWS = frozenset(
    {
        *("alias", "as_strided", "chunk", "detach", "diagonal", "flatten", "narrow", "permute", "ravel", "reshape"),
        *("select", "split", "split_with_sizes", "squeeze", "swapaxes", "swapdims", "t", "transpose", "unbind"),
        *("unflatten", "unfold", "unsqueeze", "view", "view_as", "reshape_as", "expand", "expand_as", "broadcast_to"),
        *("tensor_split", "hsplit", "vsplit", "dsplit", "movedim", "moveaxis", "adjoint", "numpy_T", "mT", "mH", "H"),
        *("matrix_H", "getitem", "slice", "getattr", "get_data_attr", "view_as_real", "view_as_complex"),
        *("real", "imag"),
        *("contiguous", "to", "type", "float", "double", "half", "bfloat16"),  # where there is nothing to convert
        *("type_as", "cpu", "cuda"),
    }
)
# a += b and its like, as functions (operator.iadd) and as methods (__iadd__).
_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "matmul", "pow", "and", "or", "xor")
_IN_PLACE = frozenset(
    {"setitem", "__setitem__", *(f"i{op}" for op in _OPERATORS), *(f"__i{op}__" for op in _OPERATORS)}
)


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


def is_written_to(nodes: Iterable[Node]) -> bool:
    """Whether the graph writes to one of these tensors in place, itself or through a view of it."""
    found = set(nodes)
    pending = list(found)
    while pending:
        node = pending.pop()
        if any(_writes(user, node) for user in node.users):
            return True
        views = {user for user in node.users if user not in found and bare_name(user) in VIEWS}
        found |= views
        pending.extend(views)
    return False


def _writes(user: Node, node: Node) -> bool:
    """Whether ``user`` is an in-place operation on ``node``."""
    if isinstance(user.target, HigherOrderOperator):
        return any(is_written_to([inner]) for inner in _inside(user, node))
    out = user.kwargs.get("out")
    if node is out or (isinstance(out, (list, tuple)) and node in out):
        return True
    if node in _written_by_schema(user):
        return True
    name = function_name(user)
    arguments = _arguments(user)
    if arguments.get("inplace") is True and node in (arguments.get("input"), *user.args[:1]):
        return True
    if name == "embedding" and arguments.get("max_norm") is not None and arguments.get("weight") is node:
        return True
    first = user.args[0] if user.args else None
    if first is not node and not (name.startswith("_foreach_") and isinstance(first, (list, tuple)) and node in first):
        return False
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def _written_by_schema(user: Node) -> list[object]:
    """What an operator writes to, as custom ones declare it."""
    target: Any = user.target
    if isinstance(target, OpOverloadPacket) and target.overloads() == ["default"]:
        target = target.default
    if not isinstance(target, OpOverload) or not target._schema.is_mutable:
        return []
    arguments = target._schema.arguments
    given = {a.name: value for a, value in zip(arguments, user.args, strict=False)} | dict(user.kwargs)
    written = [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return [value for found in written for value in (found if isinstance(found, (list, tuple)) else [found])]


def _arguments(user: Node) -> dict[str, object]:
    """The arguments of a call by name, where the function tells their names."""
    if user.op != "call_function" or not isinstance(user.target, FunctionType):
        return dict(user.kwargs)
    try:
        return dict(inspect.signature(user.target).bind_partial(*user.args, **user.kwargs).arguments)
    except TypeError:
        return dict(user.kwargs)


def _inside(user: Node, node: Node) -> list[Node]:
    """The placeholders of a higher-order op's subgraphs that receive ``node``, taken to be passed in order, last."""
    owner = user.graph.owning_module
    operands = [a for arg in user.args for a in (arg if isinstance(arg, (list, tuple)) else [arg])]
    found = []
    for arg in user.args[:1] if is_autograd_function(user) else user.args:
        subgraph = getattr(owner, str(arg.target), None) if isinstance(arg, Node) and arg.op == "get_attr" else None
        if isinstance(subgraph, GraphModule):
            placeholders = [n for n in subgraph.graph.nodes if n.op == "placeholder"]
            passed = operands[len(operands) - len(placeholders) :]
            found += [p for p, operand in zip(placeholders, passed, strict=False) if operand is node]
    return found


def is_autograd_function(node: Node) -> bool:
    """Whether a node calls an ``autograd.Function``: its first graph gets the operands, its backward one does not."""
    return isinstance(node.target, HigherOrderOperator) and str(node.target) == "autograd_function_apply"


def function_name(node: Node) -> str:
    """The bare name of the function or method that a node calls."""
    if isinstance(node.target, str):
        return node.target if node.op == "call_method" else ""
    name = str(getattr(node.target, "__name__", node.target)).removeprefix("aten.")
    return name.partition(".")[0]  # without the overload


def bare_name(node: Node) -> str:
    """What the function, the method and the operator of aten for one operation have in common: the name of it without
    the namespace (``linalg_``) and without the underscores that mark operators, writes in place and private names."""
    return function_name(node).removeprefix("linalg_").strip("_")
