"""The operators that a run in eager mode calls, as a graph: of what Dynamo leaves to eager mode there is no other."""

import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils.weak import WeakTensorKeyDictionary

from autosparse_fx._compat.dynamo_graphs import mark_module_state, share_storage
from autosparse_fx._compat.eager import TorchDispatchMode, tree_leaves, tree_map


@contextmanager
def recorded(state: Iterable[Tensor]) -> Iterator[tuple[GraphModule, dict[Node, Tensor]]]:
    """Record the operators of ATen that are called within it, without a tensor of theirs being kept alive.

    Args:
        state: parameters and buffers.

    Yields:
        The graph, which is complete at the end, and the tensors of ``state`` by the nodes for them.
    """
    gm = GraphModule(torch.nn.Module(), Graph())
    run = _Run(gm.graph)
    held = {run.input(tensor, is_state=True): tensor for tensor in state}
    with run:
        yield gm, held


class _Run(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph
        self._nodes = WeakTensorKeyDictionary()

    def input(self, tensor: Tensor, *, is_state: bool = False) -> Node:
        node = self._graph.placeholder(f"input_{len(self._graph.nodes)}")
        if is_state:
            mark_module_state(node)
        self._nodes[tensor] = node
        node.meta["val"] = self._described(tensor)
        return node

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tree_map(self._node_of, (args, kwargs))
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        out = function(*args, **kwargs)
        node = self._graph.call_function(function, *given)
        node.meta["val"] = tree_map(lambda value: self._described(value, inputs), out)
        if isinstance(out, Tensor):
            self._nodes[out] = node
        for number, part in enumerate(out if isinstance(out, (list, tuple)) else ()):
            if isinstance(part, Tensor):
                taken = self._graph.call_function(operator.getitem, (node, number))
                taken.meta["val"] = node.meta["val"][number]
                self._nodes[part] = taken
        return out

    def _node_of(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return self._nodes[value] if value in self._nodes else self.input(value)

    def _described(self, value: Any, inputs: Sequence[Tensor] = ()) -> Any:
        """A tensor without data for one, a view of that of an input where it is a view of the input."""
        if not isinstance(value, Tensor):
            return value
        if not _is_strided(value):
            return None
        base = next((i for i in inputs if _is_strided(i) and share_storage(i, value)), None)
        storage = torch.UntypedStorage(value.untyped_storage().nbytes(), device="meta")
        if base is not None:
            storage = self._nodes[base].meta["val"].untyped_storage()
        made = torch.empty(0, dtype=value.dtype, device="meta")
        return made.set_(storage, value.storage_offset(), value.shape, value.stride())


def _is_strided(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested
