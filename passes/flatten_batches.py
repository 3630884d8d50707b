"""flatten_batches: a batched product by one matrix, computed from constants, becomes a product of two matrices.

So ``bmm`` by a weight runs sparse, and ``einsum``, which makes a batch of one of it.
"""

from typing import Any

import torch
from torch.fx import GraphModule, Node

from autosparse_fx._compat.aot_autograd import without_autocast
from autosparse_fx.passes.epilogues import VIEWS, only_user
from autosparse_fx.passes.fold_constants import computable_nodes

aten = torch.ops.aten


def flatten_batches(gm: GraphModule) -> int:
    """Flatten every such product; all that regroups its rows before or behind it becomes one view."""
    computable = computable_nodes(gm)
    flattened = 0
    for node in list(gm.graph.nodes):
        if node.target not in (aten.bmm.default, aten.baddbmm.default) or node.kwargs:
            continue
        matrix = _one_of(node.args[-1])
        if matrix in computable and all(_are_ones(bias, but=1) for bias in node.args[:-2]):
            _flatten(gm, node, matrix)
            flattened += 1
    if flattened:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return flattened


def _one_of(matrices: Node) -> Node | None:
    """The one matrix that all of a batch are copies of."""
    node = matrices
    while not _are_ones(node, but=2):
        before: Any = node.args[0] if node.target in (*VIEWS, aten.expand.default) else None
        sizes = [] if before is None else [*before.meta["val"].shape[-2:], *node.meta["val"].shape[-2:]]
        if len(sizes) < 4 or not all(isinstance(size, int) for size in sizes) or sizes[:2] != sizes[2:]:
            return None
        node = before
    return node


def _are_ones(node: Node, *, but: int) -> bool:
    """Whether all sizes of a tensor are 1, but the last ones."""
    shape = node.meta["val"].shape
    return len(shape) >= but and all(isinstance(size, int) and size == 1 for size in shape[: len(shape) - but])


def _flatten(gm: GraphModule, node: Node, matrix: Node) -> None:
    *biases, batch, _ = node.args
    rows, columns = matrix.meta["val"].shape[-2:]
    end = _end_of_regrouping(node)
    source: Any = batch
    while _regroups_rows(source):
        source = source.args[0]
    view = aten.view.default if source.meta["val"].is_contiguous() else aten.reshape.default
    with gm.graph.inserting_before(end):
        sizes: Any = [_size(gm, batch, 0), _size(gm, batch, 1), columns] if end is node else end.args[1]
        operands = [_call(gm, view, source, [-1, rows]), _call(gm, aten.view.default, matrix, [rows, columns])]
        added = [_call(gm, aten.expand.default, _call(gm, aten.view.default, bias, [-1]), [columns]) for bias in biases]
        product = _call(gm, aten.addmm.default if added else aten.mm.default, *added, *operands)
        result = _call(gm, aten.view.default, product, sizes)
    product.meta.update({key: value for key, value in node.meta.items() if key != "val"})
    end.replace_all_uses_with(result)


def _end_of_regrouping(node: Node) -> Node:
    """The last view of what only regroups the rows of a result, or the node itself."""
    end, user = node, only_user(node)
    while user is not None and _regroups_rows(user):
        end = user if user.target in VIEWS else end
        user = only_user(user)
    return end


def _regroups_rows(node: Node) -> bool:
    """Whether a node gives its input another shape, with the elements in the same order."""
    if node.target is aten.permute.default:
        order: Any = node.args[1]
        sizes = node.args[0].meta["val"].shape  # type: ignore[union-attr]
        moved = [axis % len(sizes) for axis in order if not (isinstance(sizes[axis], int) and sizes[axis] == 1)]
        return moved == sorted(moved)
    return node.target in (*VIEWS, aten.unsqueeze.default)


def _size(gm: GraphModule, tensor: Any, axis: int) -> Any:
    size = tensor.meta["val"].shape[axis]
    return size if isinstance(size, int) else _call(gm, aten.sym_size.int, tensor, axis)


def _call(gm: GraphModule, target: Any, *arguments: Any) -> Node:
    node = gm.graph.call_function(target, arguments)
    node.meta["val"] = without_autocast(lambda: target(*torch.fx.map_arg(arguments, lambda given: given.meta["val"])))
    return node
