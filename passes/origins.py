"""origins: the placeholders that a tensor is viewed, copied, joined or computed from, and where an axis of it was."""

import math
from collections.abc import Iterator, Sequence, Set
from typing import Any

from torch import Tensor
from torch.fx import Node

from autosparse_fx._compat.dynamo_graphs import share_storage
from autosparse_fx._compat.eager import tree_leaves
from autosparse_fx.passes.modes import VIEWS, bare_name, function_name

# Through these and through VIEWS the first operand is still the same weight. They copy it.
_COPIES = frozenset(
    {
        *("clone", "to_copy", "index_select", "repeat", "tile", "repeat_interleave", "pad", "constant_pad_nd"),
        *("unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", "add_batch_dim"),  # the last is vmap's
        *("flip", "fliplr", "flipud", "roll", "rot90", "tril", "triu", "masked_fill"),
        *("dropout", "alpha_dropout", "feature_dropout", "normalize", "batch_norm"),
        *("abs", "neg", "negative", "pos", "positive", "sign", "round", "relu", "tanh"),
        *("clamp", "clip", "clamp_min", "clamp_max"),
    }
)
# Arithmetic between a weight and scales, shifts, masks and other weights. What does not keep a zero where it is
# (exp, softplus, sigmoid, softmax) is missing here and above: a mask on such a parameter makes nothing sparse.
_ARITHMETIC = frozenset(
    {
        *(prefix + op for prefix in ("", "i", "r") for op in ("add", "sub", "mul", "truediv", "div")),
        *("subtract", "multiply", "divide", "true_divide", "addcmul", "addcdiv", "lerp", "where"),
    }
)
_JOININGS = frozenset(
    {"cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "row_stack", "column_stack", "block_diag"}
)
_LOOK_UPS = frozenset({"getitem", "index_select"})
# Of these arguments only the shape, the dtype or the device counts.
_LIKE = frozenset({"to", "type_as", "view_as", "reshape_as", "expand_as"})


def origins(tensor: Node, axis: int | None, inputs: Set[Node], *, is_weight: bool) -> Iterator[tuple[Node, int | None]]:
    """Follow ``tensor`` back to the placeholders and get_attr nodes that it is made of.

    What is passed on the way: views and copies of any kind, casts, padding, joinings (``cat``, ``stack``), and
    arithmetic, where an operand of the size of the result counts and a smaller one is a scale or a shift. A weight that
    is joined to or combined with what depends on the model's inputs is one of their terms, unless that happens in the
    place where a layer takes its weight.

    Args:
        tensor: an operand of a product.
        axis: an axis of it (negative: counted from the end); None for none.
        inputs: the nodes that depend on inputs of the model.
        is_weight: whether the product is a layer that takes a weight at this place.

    Yields:
        Each such node and that axis of it; None where it is not known.
    """
    seen: set[Node] = set()
    pending = [(tensor, _value(tensor), axis)]
    while pending:
        node, value, axis = pending.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if axis is not None and isinstance(value, Tensor):
            axis = max(axis + value.dim(), 0) if axis < 0 else axis
        if node.op in ("placeholder", "get_attr"):
            yield node, axis
        elif node.op in ("call_function", "call_method"):
            for operand in _passed_on(node, value, inputs, is_weight):
                before = _value(operand)
                if isinstance(before, (list, tuple)):  # of chunk and its like, before an element of it is taken
                    pending.append((operand, value, axis))
                else:
                    pending.append((operand, before, _axis_before(node, before, value, axis)))


def depending_on(inputs: Set[Node], nodes: Sequence[Node]) -> set[Node]:
    """The tensors among ``inputs`` and, of all ``nodes`` (in order), those that are computed from them."""
    found = {node for node in inputs if _is_tensor(_value(node))}
    for node in nodes:
        if node.op in ("placeholder", "get_attr") or not _is_tensor(_value(node)):
            continue
        used = node.all_input_nodes
        name = bare_name(node)
        if name.endswith("_like") or name.startswith("new_"):
            used = []
        elif name in _LIKE:
            used = used[:1]
        if any(operand in found for operand in used):
            found.add(node)
    return found


def _passed_on(node: Node, value: Any, inputs: Set[Node], is_weight: bool) -> list[Node]:
    """The operands of ``node`` that its result is still made of."""
    name = bare_name(node)
    if name in _JOININGS:
        joined = [n for n in tree_leaves((node.args[:1], dict(node.kwargs))) if isinstance(n, Node)]
        return joined if is_weight or not any(n in inputs for n in joined) else []
    if name in _ARITHMETIC:
        terms = [n for n in node.all_input_nodes if _may_be_weight(_value(n))]
        return [
            n for n in terms if _fills(n, value) and (is_weight or not any(m in inputs for m in terms if m is not n))
        ]
    first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    if not isinstance(first, Node):
        return []
    before = _value(first)
    if name in _LOOK_UPS and not is_weight and any(n in inputs for n in node.all_input_nodes if n is not first):
        return [first] if isinstance(before, Tensor) and before.dim() > 2 else []  # of matrices, and not of vectors
    if name in VIEWS or name in _COPIES:
        return [first]
    is_view = isinstance(value, Tensor) and isinstance(before, Tensor) and share_storage(value, before)
    return [first] if is_view and not function_name(node).endswith("_") else []


def _fills(operand: Node, result: Any) -> bool:
    """Whether arithmetic gives each element of ``operand`` a place of its own in the result, or in each of a batch of
    matrices that the result is."""
    value = _value(operand)
    if not isinstance(value, Tensor) or not isinstance(result, Tensor):
        return True
    missing = result.dim() - value.dim()
    dims = [d for d in range(result.dim()) if not _is(result.shape[d], 1)]
    repeated = [d for d in dims if d < missing or _is(value.shape[d - missing], 1) or _is(value.stride(d - missing), 0)]
    own = [d for d in dims if d not in repeated]
    return not repeated or (len(own) > 1 and max(repeated) < min(own))


def _axis_before(node: Node, before: Any, after: Any, axis: int | None) -> int | None:
    """Where an axis of the result of ``node`` lies in its operand: the dimension with which both walk through memory.

    A view is compared with its base as both lie there, and a copy as if both were contiguous, unless it has as many
    dimensions as the operand, which it has then kept in order.
    """
    if axis is None or not isinstance(before, Tensor) or not isinstance(after, Tensor) or axis >= after.dim():
        return None
    if share_storage(before, after):
        step: Any = after.stride(axis) * after.element_size()
        steps: list[Any] = [stride * before.element_size() for stride in before.stride()]
    elif before.dim() == after.dim() and (_same_shape(before, after) or bare_name(node) not in VIEWS):
        return axis
    else:
        step, steps = _product(after.shape[axis + 1 :]), [_product(before.shape[d + 1 :]) for d in range(before.dim())]
    for d, size in enumerate(before.shape):
        known = isinstance(step, int) and isinstance(steps[d], int) and isinstance(size, int)
        if known and size > 1 and steps[d] <= step < steps[d] * size:
            return d
    return None


# Sizes may be symbols. They are not compared with anything, which would guard on them.


def _product(sizes: Sequence[Any]) -> Any:
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


def _is(size: Any, number: int) -> bool:
    return isinstance(size, int) and size == number


def _same_shape(a: Tensor, b: Tensor) -> bool:
    pairs = zip(a.shape, b.shape, strict=True)
    return a.dim() == b.dim() and all(_is(m, n) if isinstance(n, int) else not isinstance(m, int) for m, n in pairs)


def _value(node: Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def _is_tensor(value: Any) -> bool:
    """Whether a node holds tensors, as far as is known."""
    return value is None or any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _may_be_weight(value: Any) -> bool:
    return value is None or (isinstance(value, Tensor) and value.is_floating_point())
