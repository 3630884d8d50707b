"""insert_masks: a weight that was marked is read through a threshold-mask node, wherever the graph uses it."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from autosparse_fx.passes.modes import is_written_to, modes

MASK = torch.ops.autosparse.threshold_mask.default
NAMING_USES = (MASK, torch.autograd.grad)  # which take the weight itself
WEIGHT = "autosparse_weight"  # key of the MaskSpec in the meta of a weight's placeholder (or get_attr node)
STATE = "autosparse_state"  # key of (name of the weight's node, field) in the meta of a placeholder that was added
FIELDS = ("threshold", "offset", "alpha")


@dataclass(frozen=True)
class MaskSpec:
    """How the weight of one node is to be masked."""

    scale: float  # s = offset + scale * threshold
    axis: int = 0  # the dimension of the weight that a per-channel threshold follows
    channels: int | None = None  # None: one threshold for the whole weight


def insert_masks(gm: GraphModule) -> int:
    """Mask every weight whose node carries a :class:`MaskSpec` under ``meta[WEIGHT]``.

    Threshold, offset and alpha of each become placeholders behind all others, static inputs without a source, marked
    with ``meta[STATE]``. The mask stands right before the first use, not at the top of the graph: hoisted, all weights
    would be used at once there, and ``DistributedDataParallel`` could not overlap its communication. Uses under
    another grad mode get a mask of their own. What takes gradients with respect to a weight goes on to name the weight
    itself. A weight that the graph writes to is left alone: the write would be lost in a masked copy.

    Before::

        y = linear(x, weight)

    After::

        s = offset + threshold * 0.1; masked = threshold_mask(weight, s, alpha); y = linear(x, masked)

    Returns:
        The number of mask nodes that were inserted.
    """
    graph = gm.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    mode_of = modes(graph)
    last = [node for node in order if node.op == "placeholder"][-1:]
    inserted = 0
    for weight in [node for node in order if WEIGHT in node.meta]:
        uses = [user for user in weight.users if user.target not in NAMING_USES]
        if not uses or is_written_to([weight]):
            continue
        groups: dict[tuple[object, ...], list[Node]] = {}
        for user in sorted(uses, key=order.__getitem__):
            groups.setdefault(mode_of[user], []).append(user)
        state = _state_placeholders(gm, weight, last)
        last = [state[-1]]
        for users in groups.values():
            masked = _insert_mask(gm, weight, state, users[0])
            for user in users:
                user.replace_input_with(weight, masked)
            inserted += 1
    if inserted:
        graph.lint()
        gm.recompile()
    return inserted


def _state_placeholders(gm: GraphModule, weight: Node, last: list[Node]) -> tuple[Node, Node, Node]:
    """Add them behind the ``last`` placeholder, if there is one."""
    spec: MaskSpec = weight.meta[WEIGHT]
    value = weight.meta["example_value"]
    found = []
    for field, shape in zip(FIELDS, ((spec.channels or 1,), (spec.channels or 1,), ()), strict=True):
        with gm.graph.inserting_after(last[0]) if last else gm.graph.inserting_before():
            node = gm.graph.placeholder(f"{weight.name}_{field}")
        with value.fake_mode:
            node.meta["example_value"] = torch.empty(shape, dtype=torch.float32, device=value.device)
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        node.meta[STATE] = (weight.name, field)
        node._dynamo_source = None  # AOTAutograd takes such inputs as they are
        last = [node]
        found.append(node)
    return found[0], found[1], found[2]


def _insert_mask(gm: GraphModule, weight: Node, state: tuple[Node, Node, Node], before: Node) -> Node:
    spec: MaskSpec = weight.meta[WEIGHT]
    threshold, offset, alpha = state
    graph = gm.graph
    with graph.inserting_before(before):
        scaled = graph.call_function(operator.mul, (threshold, spec.scale))
        logit = graph.call_function(operator.add, (offset, scaled))
        made = [scaled, logit]
        if spec.channels is not None:
            dims = weight.meta["example_value"].dim()
            made.append(graph.call_method("view", (logit, *(-1 if d == spec.axis else 1 for d in range(dims)))))
        made.append(graph.create_node("call_function", MASK, (weight, made[-1], alpha), name=f"{weight.name}_masked"))
    for node in made:
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in before.meta:
                node.meta[key] = before.meta[key]
        args: list[Any] = [a.meta["example_value"] if isinstance(a, Node) else a for a in node.args]
        with torch.no_grad():
            value = args[0].view(*args[1:]) if node.op == "call_method" else node.target(*args)  # type: ignore[operator]
        node.meta["example_value"] = value
    return made[-1]
