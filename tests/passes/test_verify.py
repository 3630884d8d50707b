"""verify_masked_graph: good graphs pass, and every rule refuses a graph that breaks it and nothing else, by name."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from autosparse_fx import AutoSparse, sparsify
from autosparse_fx._compat.dynamo_graphs import set_grad_enabled
from autosparse_fx.passes import insert_masks, tag_recompute
from autosparse_fx.passes.insert_masks import STATE, WEIGHT, MaskSpec
from autosparse_fx.passes.verify import verify_masked_graph

MASK = torch.ops.autosparse.threshold_mask.default
GRADIENT = torch.ops.autosparse.anneal_gradient.default
aten = torch.ops.aten


class Built:
    """A graph made by hand, with an input for each name in ``shapes``."""

    def __init__(self, key: str = "example_value", **shapes: tuple[int, ...] | None) -> None:
        self.graph = Graph()
        self.mode = FakeTensorMode()
        self.key = key
        self.nodes = {name: self.placeholder(name, shape) for name, shape in shapes.items()}

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def placeholder(self, name: str, shape: tuple[int, ...] | None) -> Node:
        node = self.graph.placeholder(name)
        if shape is not None:
            with self.mode:
                node.meta[self.key] = torch.empty(shape)
        return node

    def call(self, target: Callable[..., Any], *args: Any, name: str | None = None) -> Node:
        return self.graph.create_node("call_function", target, args, name=name)

    def mask(self, *names: str) -> Node:
        return self.call(MASK, *(self.nodes[name] for name in names))

    def module(self, *outputs: Node) -> GraphModule:
        self.graph.output(outputs)
        return GraphModule(nn.Module(), self.graph)


def inserted(weights: int = 2) -> GraphModule:
    """``x @ w.T`` for each of several weights, as insert_masks leaves it."""
    built = Built(x=(3, 6), **{f"w{i}": (6, 6) for i in range(weights)})
    for i in range(weights):
        built[f"w{i}"].meta[WEIGHT] = MaskSpec(0.1)
    gm = built.module(*(built.call(F.linear, built["x"], built[f"w{i}"]) for i in range(weights)))
    assert insert_masks(gm) == weights
    return gm


def node(gm: GraphModule, name: str) -> Node:
    (found,) = (n for n in gm.graph.nodes if n.name == name)
    return found


def refused(gm: GraphModule, match: str, **which: bool) -> None:
    with pytest.raises(AssertionError, match=match):
        verify_masked_graph(gm, **which)


# Good graphs.


def test_graph_without_masks_is_good() -> None:
    built = Built(x=(3, 6), w=(6, 6))
    verify_masked_graph(built.module(built.call(F.linear, built["x"], built["w"])), deduped=True, tagged=True)


@pytest.mark.parametrize("weights", [1, 3])
def test_graph_of_insert_masks_is_good(weights: int) -> None:
    verify_masked_graph(inserted(weights), deduped=True)


def test_graph_of_a_prepared_model_is_good() -> None:
    model = sparsify(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), AutoSparse(granularity="channel"))
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch.compile(model, backend=backend, fullgraph=True)(torch.ones(2, 6))
    verify_masked_graph(graphs[0], deduped=True)
    refused(graphs[0], "threshold_mask", tagged=True)


# Order, placeholders.


def test_use_before_definition() -> None:
    gm = inserted(1)
    mask = node(gm, "w0_masked")
    mask.next.append(mask)  # behind the linear layer that reads it
    refused(gm, r"'w0_masked'.*used before it has been defined")


def test_ordinary_input_behind_the_placeholders_of_masks() -> None:
    gm = inserted(1)
    with gm.graph.inserting_after(node(gm, "w0_alpha")):
        gm.graph.placeholder("late")
    refused(gm, "late stands behind the placeholders of masks")


@pytest.mark.parametrize(("name", "field"), [("w0_offset", "threshold"), ("w1_alpha", "offset"), ("w0_alpha", "beta")])
def test_fields_of_the_state_in_disorder(name: str, field: str) -> None:
    gm = inserted()
    weight, wanted = node(gm, name).meta[STATE]
    node(gm, name).meta[STATE] = (weight, field)
    refused(gm, rf"{name} is \('{weight}', '{field}'\) where \('{weight}', '{wanted}'\) must stand")


def test_state_without_its_first() -> None:
    gm = inserted(1)
    del node(gm, "w0_threshold").meta[STATE]  # now an ordinary input in front of two
    refused(gm, r"w0_offset is .* where \('w0', 'threshold'\) must stand")


def test_state_without_its_last() -> None:
    gm = inserted(1)
    alpha = node(gm, "w0_alpha")
    with gm.graph.inserting_before(node(gm, "w0_threshold")):
        other = gm.graph.placeholder("other")
    other.meta["example_value"] = alpha.meta["example_value"]
    alpha.replace_all_uses_with(other)
    gm.graph.erase_node(alpha)
    refused(gm, "w0_offset is the last placeholder of a mask that lacks others")


def test_state_of_two_weights_mixed() -> None:
    gm = inserted()
    for name, weight in (("w0_offset", "w1"), ("w1_offset", "w0")):
        node(gm, name).meta[STATE] = (weight, "offset")
    refused(gm, r"w0_offset is \('w1', 'offset'\) where \('w0', 'offset'\) must stand")


@pytest.mark.parametrize("operand", [1, 2])
def test_mask_with_the_state_of_another_weight(operand: int) -> None:
    gm = inserted()
    first, second = node(gm, "w0_masked"), node(gm, "w1_masked")
    last = second.prev  # the logit of the second, computed before both
    for n in (last, last.prev):
        first.prepend(n) if n is last else last.prepend(n)
    a, b = first.args[operand], second.args[operand]
    first.update_arg(operand, b)
    second.update_arg(operand, a)
    refused(gm, "w0_masked masks w0 with w1_(threshold|offset|alpha), which belongs to w1")


def test_state_that_no_mask_uses() -> None:
    gm = inserted()
    mask = node(gm, "w1_masked")
    mask.replace_all_uses_with(mask.args[0])
    for _ in range(3):  # the mask and its logit
        mask, before = mask.prev, mask
        gm.graph.erase_node(before)
    refused(gm, "w1_threshold is used by no mask")


# Operands.


def test_operand_that_is_no_node() -> None:
    built = Built(w=(6, 6), s=(1,))
    mask = built.call(MASK, built["w"], built["s"], 0.5)
    refused(built.module(mask), f"{mask.name}: operands must be nodes")


@pytest.mark.parametrize("operands", [("w", "s"), ("w", "s", "alpha", "alpha")])
@pytest.mark.parametrize("gradient", [False, True])
def test_wrong_number_of_operands(operands: tuple[str, ...], gradient: bool) -> None:
    built = Built(w=(6, 6), s=(1,), alpha=())
    nodes = [built[name] for name in operands]
    found = built.call(GRADIENT, built["w"], *nodes) if gradient else built.call(MASK, *nodes)
    refused(built.module(found), f"{found.name} has {len(operands)} operands")


@pytest.mark.parametrize("key", ["example_value", "val"])
@pytest.mark.parametrize("alpha", [(1,), (6, 6)])
def test_alpha_with_dimensions(key: str, alpha: tuple[int, ...]) -> None:
    built = Built(key, w=(6, 6), s=(1,), alpha=alpha)
    mask = built.mask("w", "s", "alpha")
    refused(built.module(mask), f"{mask.name}: alpha must have no dimensions")


SHAPES = [
    ((6, 4), (1,), True),
    ((6, 4), (6, 1), True),
    ((6, 4), (1, 4), True),
    ((6, 4), (4,), True),  # broadcasts, along the last dimension
    ((6, 4), (), True),
    ((6,), (6,), True),
    ((), (1,), True),  # a weight without dimensions has a threshold of one element
    ((6, 4), (6,), False),
    ((6, 4), (4, 1), False),
    ((6, 4), (1, 1, 1), False),
    ((6, 1), (6, 4), False),
    ((6, 4, 3), (6, 1), False),
]


@pytest.mark.parametrize(("weight", "threshold", "good"), SHAPES)
def test_threshold_must_broadcast_to_the_weight(
    weight: tuple[int, ...], threshold: tuple[int, ...], good: bool
) -> None:
    built = Built(w=weight, s=threshold, alpha=())
    mask = built.mask("w", "s", "alpha")
    gm = built.module(mask)
    if good:
        verify_masked_graph(gm)
    else:
        refused(gm, f"{mask.name}: threshold .* does not broadcast to weight")


def test_unknown_shapes_are_not_held_against_a_graph() -> None:
    built = Built(w=None, s=(6,), alpha=None)
    verify_masked_graph(built.module(built.mask("w", "s", "alpha")))


def test_shape_of_an_inserted_threshold_is_checked() -> None:
    gm = inserted(1)
    with node(gm, "w0").meta["example_value"].fake_mode:
        for name in ("w0_threshold", "w0_offset"):
            node(gm, name).meta["example_value"] = torch.empty(5)
        node(gm, "w0_masked").args[1].meta["example_value"] = torch.empty(5)
    refused(gm, r"w0_masked: threshold \(5,\) does not broadcast")


def gradient(grad: tuple[int, ...], threshold: tuple[int, ...], alpha: tuple[int, ...]) -> tuple[GraphModule, str]:
    built = Built("val", g=grad, w=(6, 4), s=threshold, alpha=alpha)
    found = built.call(GRADIENT, *(built[name] for name in ("g", "w", "s", "alpha")))
    return built.module(found), found.name


def test_gradient_node() -> None:
    verify_masked_graph(gradient((6, 4), (6, 1), ())[0])


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        (((4, 6), (6, 1), ()), "gradient and weight differ in shape"),
        (((6, 1), (6, 1), ()), "gradient and weight differ in shape"),
        (((6, 4), (6,), ()), "does not broadcast"),
        (((6, 4), (6, 1), (1,)), "alpha must have no dimensions"),
    ],
)
def test_gradient_node_with_a_wrong_operand(shapes: Any, match: str) -> None:
    gm, name = gradient(*shapes)
    refused(gm, f"{name}: .*{match}")


# A marked weight.


def test_marked_weight_that_is_masked_and_read_densely() -> None:
    gm = inserted(1)
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        dense = gm.graph.call_function(torch.sin, (node(gm, "w0"),))
    output.args = ((*output.args[0], dense),)
    refused(gm, f"w0 is to be masked, and is read densely by {dense.name}")


def test_unmarked_weight_may_be_read_both_ways() -> None:
    gm = inserted(1)
    del node(gm, "w0").meta[WEIGHT]
    output = gm.graph.output_node()
    output.args = ((*output.args[0], node(gm, "w0")),)
    verify_masked_graph(gm)


def test_marked_weight_that_no_mask_reads() -> None:
    built = Built(x=(3, 6), w=(6, 6))
    built["w"].meta[WEIGHT] = MaskSpec(0.1)
    use = built.call(F.linear, built["x"], built["w"])
    refused(built.module(use), f"w is to be masked, and is read densely by {use.name}")


@pytest.mark.parametrize("view", [False, True])
def test_marked_weight_that_is_written_to_may_be_read_densely(view: bool) -> None:
    built = Built(x=(3, 6), w=(6, 6))
    built["w"].meta[WEIGHT] = MaskSpec(0.1)
    built.call(operator.imul, built.graph.call_method("view", (built["w"], -1)) if view else built["w"], 2)
    verify_masked_graph(built.module(built.call(F.linear, built["x"], built["w"])))


# Deduplicated.


def twice(between: Callable[[Built], object], *second: str) -> tuple[GraphModule, Node]:
    built = Built(w=(6, 6), v=(6, 6), s=(1,), t=(1,), alpha=())
    first = built.mask("w", "s", "alpha")
    between(built)
    again = built.mask(*(second or ("w", "s", "alpha")))
    return built.module(first, again), again


def test_second_mask_of_one_weight() -> None:
    gm, again = twice(lambda built: None)
    verify_masked_graph(gm)
    refused(gm, f"{again.name} masks w once more", deduped=True)


@pytest.mark.parametrize("second", [("v", "s", "alpha"), ("w", "t", "alpha")])
def test_masks_of_different_weights_or_thresholds(second: tuple[str, ...]) -> None:
    verify_masked_graph(twice(lambda built: None, *second)[0], deduped=True)


def test_second_mask_under_another_grad_mode() -> None:
    verify_masked_graph(twice(lambda built: built.call(set_grad_enabled, False))[0], deduped=True)
    both_off, again = twice(lambda built: built.call(set_grad_enabled, torch.is_grad_enabled()))
    refused(both_off, again.name, deduped=True)


@pytest.mark.parametrize("name", ["w", "s", "alpha"])
def test_second_mask_behind_an_in_place_write(name: str) -> None:
    verify_masked_graph(twice(lambda built: built.call(operator.imul, built[name], 2))[0], deduped=True)


def test_second_mask_in_a_subgraph() -> None:
    inner, _ = twice(lambda built: None)
    outer = Built(x=(3, 6))
    gm = outer.module(outer["x"])
    gm.add_module("wrap_body_0", inner)
    refused(gm, "once more", deduped=True)


# Tagged.


def joint(*behind: tuple[Any, ...]) -> tuple[GraphModule, list[Node]]:
    """A mask with ``behind`` after it in a row, all but the output tagged by hand."""
    built = Built("val", w=(6, 6), s=(1,), alpha=())
    nodes = [built.mask("w", "s", "alpha")]
    for target, *args in behind:
        nodes.append(built.call(target, nodes[-1], *args))
    for n in nodes:
        n.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    return built.module(nodes[-1]), nodes


CAST = (torch.ops.prims.convert_element_type.default, torch.bfloat16)


@pytest.mark.parametrize("untagged", [0, 1, 2])
def test_mask_cast_or_view_without_tag(untagged: int) -> None:
    gm, nodes = joint(CAST, (aten.permute.default, [1, 0]))
    verify_masked_graph(gm, tagged=True)
    del nodes[untagged].meta["recompute"]
    verify_masked_graph(gm)
    refused(gm, f"{nodes[untagged].name} would be kept for the backward pass", tagged=True)


def test_what_is_computed_from_a_mask_needs_no_tag() -> None:
    gm, nodes = joint((aten.mm.default, 1), (aten.permute.default, [1, 0]))
    for n in nodes[1:]:
        del n.meta["recompute"]
    verify_masked_graph(gm, tagged=True)


def test_casts_and_views_of_other_tensors_need_no_tag() -> None:
    built = Built("val", x=(6, 6))
    verify_masked_graph(built.module(built.call(aten.t.default, built["x"])), tagged=True)


@pytest.mark.parametrize("behind", [(), (CAST,), (CAST, (aten.t.default,), (aten.mm.default, 1))])
def test_tag_recompute_makes_a_graph_good(behind: tuple[Any, ...]) -> None:
    gm, nodes = joint(*behind)
    for n in nodes:
        del n.meta["recompute"]
    refused(gm, nodes[0].name, tagged=True)
    tag_recompute(gm)
    verify_masked_graph(gm, tagged=True)
