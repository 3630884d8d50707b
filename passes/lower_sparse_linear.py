"""lower_sparse_linear: a product with a constant weight that holds enough zeros becomes ``autosparse::sparse_linear``,
with the bias that is added and its activation.
"""

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from autosparse_fx._compat.dynamo_graphs import size_hint
from autosparse_fx.kernels import choice, ops  # noqa: F401  (the operators must exist)
from autosparse_fx.kernels.choice import DENSE_SCALE, Choice, choose, lacking
from autosparse_fx.passes.casts import drop_casts_between, is_own_cast, narrowed, widened
from autosparse_fx.passes.constants import constant, new_constant, remove_unused_constants
from autosparse_fx.passes.epilogues import VIEWS, activation_of, erase_unused, only_user
from autosparse_fx.passes.sparse_groups import choose_each, drop_groups_that_lose, sparse_ones

aten = torch.ops.aten
SPARSE_LINEAR = torch.ops.autosparse.sparse_linear.default
_PRODUCTS = (aten.mm.default, aten.addmm.default)
COLUMNS = 128  # a chunk of tokens


def lower_sparse_linear(gm: GraphModule) -> int:
    """Lower every such product, whatever the rows of its input are regrouped to before and behind it."""
    products = [node for node in gm.graph.nodes if node.target in _PRODUCTS]
    operands: dict[Node, list[Tensor | None]] = {}

    def choice_of(node: Node, runs_code: bool) -> Choice:
        found, *operands[node] = _operands(node, gm.meta.get(DENSE_SCALE, 1.0), runs_code=runs_code)
        return found

    choose_each(products, choice_of)
    drop_groups_that_lose(products, _conversion, sums=False)
    chosen = sparse_ones(products)
    for node in chosen:
        weight, bias = operands[node]
        assert weight is not None
        _lower(gm, node, weight, bias)
    if chosen:
        _drop_views_that_cancel(gm)
        drop_casts_between(gm, SPARSE_LINEAR)
        remove_unused_constants(gm)
        gm.recompile()
    return len(chosen)


def _conversion(tensor: Node) -> float:
    """Cycles for each element that sparse layers take from others or give to others, in another dtype."""
    return 0 if tensor.meta["val"].dtype == torch.float32 else choice.CAST


def _operands(node: Node, scale: float, *, runs_code: bool) -> tuple[Choice, Tensor | None, Tensor | None]:
    """The choice, the weight ``[rows, channels]`` and the bias ``[rows]`` of a product."""
    bias = None
    if node.target is aten.addmm.default:
        if node.kwargs:
            return Choice(False, "a scaled product", False), None, None
        bias = constant(node.args[0])
        if bias is None or bias.shape != node.meta["val"].shape[1:]:
            return Choice(False, "its bias is no constant vector", False), None, None
    matrix = constant(node.args[-1])
    if matrix is None or node.args[-2].meta["val"].dim() != 2:  # type: ignore[union-attr]
        return Choice(False, "its weight is no constant", False), None, None
    if reason := lacking(matrix, node.meta["val"]):
        return Choice(False, reason, False), None, None
    weight = matrix.detach().t()
    rows, channels = weight.shape
    entries = int(weight.count_nonzero())
    tokens = size_hint(node.meta["val"].shape[0])
    columns = max(1, min(tokens, COLUMNS))
    units = -(-tokens // columns)
    found = choose(
        entries=entries,
        rows=rows,
        depth=channels,
        channels=channels,
        columns=columns,
        units=units,
        is_plain=True,
        runs_code=runs_code,
        dtype=matrix.dtype,
        scale=scale,
    )
    return found, weight, bias


def _lower(gm: GraphModule, node: Node, weight: Tensor, bias: Tensor | None) -> None:
    end: Node = node
    regrouped: Node | None = None
    activation, constants = "none", list[float]()
    while (user := only_user(end)) is not None:
        if user.target in VIEWS and user.meta["val"].shape[-1] == weight.shape[0]:
            regrouped = user
        elif user.target is aten.add.Tensor and bias is None and (added := _vector(user, end, weight)) is not None:
            bias = added
        elif (found := activation_of(user)) is not None:
            activation, constants = found
            end = user
            break
        else:
            break
        end = user
    if bias is None:
        bias = weight.new_zeros(weight.shape[0])
    source: Node = node.args[-2]  # type: ignore[assignment]
    tensors = [
        widened(gm, source, end),
        new_constant(gm, f"{node.name}_weight", weight.float(), node),
        new_constant(gm, f"{node.name}_bias", bias.float(), node),
    ]
    with gm.graph.inserting_before(end):
        lowered = gm.graph.call_function(SPARSE_LINEAR, (*tensors, activation, constants))
        lowered.meta.update(node.meta)
        lowered.meta["val"] = node.meta["val"].float()
        result = narrowed(lowered, node.meta["val"].dtype, end)
        if regrouped is not None:
            result = gm.graph.call_function(aten.view.default, (result, regrouped.args[1]))
            result.meta["val"] = end.meta["val"]
    end.replace_all_uses_with(result)
    erase_unused(end)


def _vector(add: Node, summand: Node, weight: Tensor) -> Tensor | None:
    """The constant vector that is added to every row, if that is what is added."""
    if add.kwargs:
        return None
    vector = next((constant(other) for other in add.args if other is not summand), None)
    is_bias = vector is not None and vector.shape == weight.shape[:1] and vector.dtype == weight.dtype
    return vector if is_bias else None


def _drop_views_that_cancel(gm: GraphModule) -> None:
    for view in gm.graph.find_nodes(op="call_function", target=aten.view.default):
        source = view.args[0]
        while source.target in VIEWS:
            source = source.args[0]
        shapes = [[str(size) for size in node.meta["val"].shape] for node in (source, view)]
        layer = source.args[0] if is_own_cast(source) else source
        if source is not view.args[0] and shapes[0] == shapes[1] and layer.target is SPARSE_LINEAR:
            view.replace_all_uses_with(source)
