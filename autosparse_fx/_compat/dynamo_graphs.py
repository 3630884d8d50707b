"""Private parts of the graphs that Dynamo makes: what nodes stand for, sizes, and copies."""

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor as FakeTensor  # what Dynamo traces with. 2.11-2.15.
from torch.autograd.grad_mode import _enter_inference_mode, _exit_inference_mode
from torch.fx import Graph, GraphModule, Node

# What checkpointed blocks and control flow are called by in a graph. 2.11-2.15.
HigherOrderOperator = torch._ops.HigherOrderOperator
# What Dynamo puts into a graph where the grad mode or the inference mode changes. 2.11-2.15.
set_grad_enabled = torch._C._set_grad_enabled
enter_inference_mode, exit_inference_mode = _enter_inference_mode, _exit_inference_mode

_STATIC = "_dynamo_static_input_type"


def copy_dynamo_graph(gm: GraphModule) -> GraphModule:
    """A copy of Dynamo's graph that may get more placeholders: Dynamo reads its own again afterwards. 2.11-2.15."""
    graph = Graph()
    nodes: dict[Node, Node] = {}
    output = graph.output(graph.graph_copy(gm.graph, nodes))
    output.meta = dict(gm.graph.output_node().meta)
    for node, copy in nodes.items():
        if hasattr(node, "_dynamo_source"):
            copy._dynamo_source = node._dynamo_source
    made = GraphModule(gm, graph)
    made.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        made._param_name_to_source = gm._param_name_to_source
    return made


def with_tensors_as_inputs(gm: GraphModule) -> tuple[GraphModule, list[Tensor]]:
    """A copy of Dynamo's graph whose weights are all placeholders, and those that were attributes. 2.11-2.15.

    They are where Inductor's ``freezing`` is on for the whole process, without gradients. Their placeholders come last.
    """
    made = copy_dynamo_graph(gm)
    sources = getattr(gm, "_param_name_to_source", {})
    lifted: dict[str, Node] = {}
    tensors = []
    first = next(node for node in made.graph.nodes if node.op not in ("placeholder", "get_attr"))
    for node in made.graph.find_nodes(op="get_attr"):
        tensor, name = placeholder_tensor(node), str(node.target)
        if tensor is None:
            continue
        if name not in lifted:
            with made.graph.inserting_before(first):
                lifted[name] = made.graph.placeholder(name.replace(".", "_"))
            lifted[name].meta = dict(node.meta)
            if name in sources:
                lifted[name]._dynamo_source = sources[name]
            tensors.append(tensor)
        node.replace_all_uses_with(lifted[name])
        made.graph.erase_node(node)
    if lifted:
        rest: Any = {name: source for name, source in sources.items() if name not in lifted}
        made._param_name_to_source = rest
        made.recompile()
    return made, tensors


def copy_graph_module(gm: GraphModule) -> GraphModule:
    graph = Graph()
    nodes: dict[Node, Node] = {}
    output = graph.output(graph.graph_copy(gm.graph, nodes))
    output.meta = dict(gm.graph.output_node().meta)
    made = GraphModule(gm, graph)
    made.meta = dict(gm.meta)
    return made


def graph_inputs(gm: GraphModule) -> list[Any]:
    """What the placeholders of a Dynamo graph were traced with: fake tensors, and symbols for sizes. 2.11-2.15."""
    return [node.meta["example_value"] for node in gm.graph.nodes if node.op == "placeholder"]


def placeholder_parameter(node: Node) -> nn.Parameter | None:
    """The parameter behind a placeholder (or get_attr node) of a Dynamo graph, while its backend runs. 2.11-2.15."""
    tensor = placeholder_tensor(node)
    return tensor if isinstance(tensor, nn.Parameter) else None


def placeholder_tensor(node: Node) -> Tensor | None:
    """The tensor behind a placeholder (or get_attr node) of a Dynamo graph, while its backend runs. 2.11-2.15."""
    if node.op == "get_attr":
        owner: Any = node.graph.owning_module
        for atom in str(node.target).split("."):
            owner = getattr(owner, atom, None)
        return owner if isinstance(owner, Tensor) else None
    argument = node.meta.get("grapharg")
    example = getattr(argument, "example", None) if argument is not None else None
    return example if isinstance(example, Tensor) else None


def is_module_state(node: Node) -> bool:
    """Whether a placeholder of a Dynamo graph is a parameter or buffer of a module. 2.11-2.15."""
    return _STATIC in node.meta.get("tensor_dict", {})


def mark_module_state(node: Node) -> None:
    """Make a placeholder of another graph one of those. 2.11-2.15."""
    node.meta["tensor_dict"] = {_STATIC: "unguarded"}


def module_name(path: str) -> str:
    """The full name of a module, without what Dynamo's ``nn_module_stack`` calls the model itself. 2.11-2.15."""
    return re.sub(r"^L\['[^']*'\](\[\d+\])*\.?", "", path)


def storage_id(tensor: Tensor) -> int:
    """A number of the memory that a tensor lies in, fake ones too. 2.11-2.15."""
    return int(tensor.untyped_storage()._cdata)


def share_storage(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors, fake ones too, are views of the same memory; not known of those within vmap. 2.11-2.15."""
    try:
        return storage_id(a) == storage_id(b)
    except (NotImplementedError, RuntimeError):
        return False


def is_fixed(size: torch.SymInt, example: int) -> bool:
    """Whether a graph demands of one of its sizes that it stay as it was in the example. 2.11-2.15.

    ``size`` is a symbol, and a guard that is an equation does not hold for twice its value.
    """
    import sympy

    symbol, shape_env = size.node.expr, size.node.shape_env
    assert shape_env is not None
    if symbol in shape_env.replacements:
        return True
    equations = [guard.expr for guard in shape_env.guards if isinstance(guard.expr, sympy.Eq)]
    return any(e.free_symbols == {symbol} and not e.subs(symbol, 2 * example) for e in equations)


def is_static(value: Any) -> bool:
    """Whether an example input has no symbols, in its sizes or for itself. 2.11-2.15."""
    sizes = (*value.shape, *value.stride()) if isinstance(value, Tensor) else (value,)
    return not any(isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) for size in sizes)


def size_hint(size: int | torch.SymInt) -> int:
    """A size, or what a symbolic one was when its graph was captured; nothing is guarded. 2.11-2.15."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if hint is not None else 8
