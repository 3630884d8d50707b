"""fuse_sparse_programs: sparse layers that follow one another become one ``autosparse::run_program``."""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase

from autosparse_fx._compat.dynamo_graphs import size_hint
from autosparse_fx.kernels.library import library
from autosparse_fx.kernels.ops import flatten_shapes
from autosparse_fx.kernels.program import Buffer, Step, Window
from autosparse_fx.kernels.steps import as_kernel
from autosparse_fx.kernels.tuning import Task, tuned_layouts
from autosparse_fx.passes.constants import constant, new_constant, remove_unused_constants
from autosparse_fx.passes.lower_sparse_conv import SPARSE_CONV
from autosparse_fx.passes.lower_sparse_linear import SPARSE_LINEAR

AUTOTUNE = "autosparse_autotune"  # in the meta of a graph whose programs are to be measured, and not only estimated
RUN_PROGRAM = torch.ops.autosparse.run_program.default


class _LayersOfOneBatch(OperatorSupportBase):
    """Supports the layers of one kind whose inputs have one batch size."""

    def __init__(self, target: object, batch: str) -> None:
        self.target, self.batch = target, batch

    def is_node_supported(self, submodules: Mapping[str, nn.Module], node: Node) -> bool:
        return node.target is self.target and _batch(node) == self.batch


def fuse_sparse_programs(gm: GraphModule) -> int:
    """Replace every largest group of sparse layers that can run in one go.

    Where the graph's ``meta[AUTOTUNE]`` asks for it, the layout of each is measured (see ``kernels/tuning.py``).
    """
    programs = 0
    for target in (SPARSE_CONV, SPARSE_LINEAR):
        nodes = gm.graph.find_nodes(op="call_function", target=target)
        for batch in dict.fromkeys(map(_batch, nodes)):
            support = _LayersOfOneBatch(target, batch)
            for partition in CapabilityBasedPartitioner(gm, support, True).propose_partitions():
                _fuse(gm, set(partition.nodes), is_tokens=target is SPARSE_LINEAR)
                programs += 1
    if programs:
        remove_unused_constants(gm)
        gm.graph.lint()
        gm.recompile()
    return programs


def _batch(node: Node) -> str:
    return str(node.meta["val"].shape[0])


class _ProgramWriter:
    """Gathers the buffers and steps of one program."""

    def __init__(self, nodes: list[Node], *, is_tokens: bool) -> None:
        self.members = set(nodes)
        self.buffers: list[Buffer] = []
        self.numbers: dict[Node, int] = {}
        self.inputs: list[Node] = []
        self.outputs = [n for n in nodes if any(user not in self.members for user in n.users)]
        self.is_tokens = is_tokens
        self.steps = [self._step(node) for node in nodes]

    def _number(self, node: Node) -> int:
        if node not in self.numbers:
            kind, index = "arena", 0
            if node not in self.members:
                kind, index = "input", len(self.inputs)
                self.inputs.append(node)
            elif node in self.outputs:
                kind, index = "output", self.outputs.index(node)
            channels, *pixels = _sizes(node)
            self.numbers[node] = len(self.buffers)
            self.buffers.append(Buffer(kind, channels, torch.Size(pixels).numel() if pixels else 0, index))
        return self.numbers[node]

    def _step(self, node: Node) -> Step:
        arguments: tuple[Any, ...] = node.args
        if self.is_tokens:
            source, weight, bias, activation, constants = arguments
            residual, groups, window = None, 1, Window((1, 1), (1, 1))
        else:
            source, weight, bias, residual, stride, padding, dilation, groups, activation, constants = arguments
            window = Window.of(_sizes(source)[1:], _sizes(node)[1:], stride, padding, dilation)
        values = _value(weight)
        return Step(
            source=self._number(source),
            target=self._number(node),
            weight=as_kernel(values),
            bias=_value(bias),
            window=window,
            groups=groups,
            residual=-1 if residual is None else self._number(residual),
            activation=activation,
            constants=(*constants, 0.0, 0.0)[:2],
        )


def _sizes(node: Node) -> list[int]:
    """All but the batch size; where they are symbols the graph demands their values anyway."""
    return [int(size) for size in node.meta["val"].shape[1:]]


def _value(node: object) -> Tensor:
    value = constant(node)
    assert value is not None
    return value.detach()


def _fuse(gm: GraphModule, members: set[Node], *, is_tokens: bool) -> None:
    nodes = [node for node in gm.graph.nodes if node in members]
    writer = _ProgramWriter(nodes, is_tokens=is_tokens)
    kernels = library()
    size = nodes[0].meta["val"].shape[0]
    batch, tokens = size_hint(size), size if is_tokens and isinstance(size, int) else 0
    task = Task(writer.steps, writer.buffers, batch, batch // torch.get_num_threads(), is_tokens, tokens)
    layouts = tuned_layouts(task, kernels) if gm.meta.get(AUTOTUNE) else [step.layout for step in task.steps]
    laid_out = task.assemble(kernels, layouts)
    place = _place(gm, members, writer.inputs)
    program = new_constant(gm, "sparse_program", laid_out.data, place)
    shapes = flatten_shapes([_sizes(node) for node in writer.outputs])
    with gm.graph.inserting_before(place):
        call = gm.graph.call_function(RUN_PROGRAM, (program, writer.inputs, laid_out.any_layout, shapes))
        call.meta["val"] = [node.meta["val"] for node in writer.outputs]
        for number, node in enumerate(writer.outputs):
            item = gm.graph.call_function(operator.getitem, (call, number))
            item.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in members)
    for node in reversed(nodes):
        gm.graph.erase_node(node)


def _place(gm: GraphModule, members: set[Node], inputs: list[Node]) -> Node:
    """The first node behind all inputs and placeholders; what uses the outputs is moved behind it where it must be."""
    order = {node: number for number, node in enumerate(gm.graph.nodes)}
    last = max([*inputs, *gm.graph.find_nodes(op="placeholder")], key=order.__getitem__)
    place: Node = last.next
    # Users of outputs that stand before the last input (they do not lead to it, or the group were no partition).
    late: set[Node] = set()
    for node in gm.graph.nodes:
        if order[node] >= order[place]:
            break
        if node not in members and any(source in members or source in late for source in node.all_input_nodes):
            late.add(node)
    for node in sorted(late, key=order.__getitem__):
        place.prepend(node)
    if late:
        place = min(late, key=order.__getitem__)
    return place
