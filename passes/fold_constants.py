"""fold_constants: a weight that the graph computes from constants alone becomes a constant itself.

So a weight that is masked (``torch.nn.utils.prune``), normalised (``weight_norm``), parametrized, or cut out of a
larger one (``nn.MultiheadAttention`` with a memory) is seen with its zeros. All else is left to Inductor, which folds
too.
"""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from autosparse_fx._compat.aot_autograd import without_autocast
from autosparse_fx._compat.eager import OpOverload
from autosparse_fx.passes.constants import LOOKED_THROUGH, constant, new_constant, remove_unused_constants

aten = torch.ops.aten
FOLDED_FROM = "autosparse_folded_from"  # the names of the constants that one was computed from
# Of the layers: where their weights and biases stand among the arguments.
_STATE: dict[Any, slice] = {
    aten.convolution.default: slice(1, 3),
    aten.mm.default: slice(0, 2),
    aten.addmm.default: slice(0, 3),
    aten._native_batch_norm_legit_no_training.default: slice(1, 5),
}


def fold_constants(gm: GraphModule) -> int:
    """Fold the weights and biases of convolutions, products and batch norms; return how many."""
    computable = computable_nodes(gm)
    sources = {node: _sources(node) for node in _computed_state(gm) if node in computable}
    wanted = set().union(*sources.values())
    values: dict[Node, Any] = {}
    for node in gm.graph.nodes:
        if node in wanted:
            values[node] = _evaluated(node, values)
    for node, known in sources.items():
        folded = new_constant(gm, f"{node.name}_folded", values[node], node)
        attributes = gm.graph.find_nodes(op="get_attr")
        folded.meta[FOLDED_FROM] = [str(source.target) for source in attributes if source in known]
        node.replace_all_uses_with(folded, _is_for_layers)
    if sources:
        remove_unused_constants(gm)
        gm.recompile()
    return len(sources)


def computable_nodes(gm: GraphModule) -> set[Node]:
    """The constants, and what can be computed from them alone."""
    computable: set[Node] = set()
    for node in gm.graph.nodes:
        if constant(node) is not None or (_may_be_evaluated(node) and computable.issuperset(node.all_input_nodes)):
            computable.add(node)
    return computable


def _computed_state(gm: GraphModule) -> Iterator[Node]:
    """What layers take for weights and biases that are no constants."""
    for node in gm.graph.nodes:
        for given in node.args[_STATE[node.target]] if node.target in _STATE else ():
            while isinstance(given, Node) and given.target in LOOKED_THROUGH and _is_for_layers(given):
                given = given.args[0]
            if isinstance(given, Node) and constant(given) is None and isinstance(given.meta.get("val"), Tensor):
                yield given


def _sources(node: Node) -> set[Node]:
    """A node and all that it is computed from."""
    found, pending = {node}, [node]
    while pending:
        new = set(pending.pop().all_input_nodes) - found
        found |= new
        pending += new
    return found


def _is_for_layers(user: Node) -> bool:
    """What else reads a weight, the caller perhaps, is not to get what kernels read."""
    return user.target in _STATE or (user.target in LOOKED_THROUGH and all(map(_is_for_layers, user.users)))


def _evaluated(node: Node, values: dict[Node, Any]) -> Any:
    """What a node computes from those values."""
    if node.op == "get_attr":
        return constant(node)
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
    return without_autocast(lambda: node.target(*args, **kwargs))  # type: ignore[operator]


def _may_be_evaluated(node: Node) -> bool:
    if node.op != "call_function" or not node.all_input_nodes:
        return False
    if node.target is operator.getitem:
        return True
    return (
        isinstance(node.target, OpOverload)
        and not node.target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in node.target.tags
    )
