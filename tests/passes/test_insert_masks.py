"""insert_masks: every use of a marked weight reads a mask, one per weight, right before the first use."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from autosparse_fx import AutoSparse
from autosparse_fx._compat import dynamo_graphs
from autosparse_fx._compat.dynamo_graphs import placeholder_parameter
from autosparse_fx.hidden.graph import mark_weights
from autosparse_fx.hidden.masks import Request
from autosparse_fx.passes import dedupe_masks, insert_masks
from autosparse_fx.passes.insert_masks import FIELDS, STATE, WEIGHT, MaskSpec
from autosparse_fx.passes.verify import verify_masked_graph

MASK = torch.ops.autosparse.threshold_mask.default
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
A = {"a.weight": MaskSpec(0.1)}


class Net(nn.Module):
    """Two linear layers, and a forward given by the test."""

    def __init__(self, forward: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def capture(model: nn.Module, specs: Mapping[str, MaskSpec] | Request, x: Tensor = X) -> GraphModule:
    """The Dynamo graph of a model, with the parameters in ``specs`` marked, or what a request marks."""
    names = {id(p): name for name, p in model.named_parameters()}
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(dynamo_graphs.copy_dynamo_graph(gm))
        if isinstance(specs, Request):
            mark_weights(graphs[-1], specs)
            return gm.forward
        for node in graphs[-1].graph.find_nodes(op="placeholder"):
            name = names.get(id(placeholder_parameter(node)))
            if name in specs:
                node.meta[WEIGHT] = specs[name]
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(x)
    (gm,) = graphs
    return gm


def masks(gm: GraphModule) -> list[Node]:
    return list(gm.graph.find_nodes(op="call_function", target=MASK))


def added(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if STATE in node.meta]


def marked(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if WEIGHT in node.meta]


# One mask per weight.


def many_uses(m: Net, x: Tensor) -> Tensor:
    return m.a(m.a(x)) + F.linear(x, m.a.weight) + torch.einsum("bi,oi->bo", x, m.a.weight)


def through_views_and_casts(m: Net, x: Tensor) -> Tensor:
    w = m.a.weight
    y = x @ w.T + x @ w.view(36).reshape(6, 6).transpose(0, 1) + (x.double() @ w.to(torch.float64)).float()
    return y + F.linear(x, w.permute(1, 0).contiguous().half().float()) + w.unsqueeze(0).chunk(2, 1)[0].sum()


def beside_another(m: Net, x: Tensor) -> Tensor:
    return m.a(F.relu(m.b(m.a(x))))


def as_plain_operand(m: Net, x: Tensor) -> Tensor:
    """A penalty on the weight reads what the layer computes with, as it does in a prepared model."""
    return m.a(x) + m.a.weight.abs().sum() + torch.cat([m.a.weight, m.a.weight]).mean()


@pytest.mark.parametrize("forward", [many_uses, through_views_and_casts, beside_another, as_plain_operand])
def test_one_mask_however_often_the_weight_is_used(forward: Callable[[Net, Tensor], Tensor]) -> None:
    gm = capture(Net(forward), A)
    assert insert_masks(gm) == 1
    (mask,), (weight,) = masks(gm), marked(gm)
    assert mask.args[0] is weight and list(weight.users) == [mask]
    verify_masked_graph(gm, deduped=True)


def test_two_names_of_one_tensor_have_one_mask() -> None:
    model = Net(lambda m, x: m.b(m.a(x)))
    model.b.weight = model.a.weight
    gm = capture(model, A)
    assert insert_masks(gm) == 1 and len(added(gm)) == 3


def test_mask_stands_right_before_the_first_use() -> None:
    """Hoisted to the top, every weight would be in use from the start, and DDP could not overlap its communication."""
    gm = capture(Net(lambda m, x: m.a(F.relu(m.b(x).sin()))), {**A, "b.weight": MaskSpec(0.1)})
    assert insert_masks(gm) == 2
    for mask in masks(gm):
        (use,) = mask.users
        assert mask.meta["stack_trace"] == use.meta["stack_trace"]
        assert mask.meta["nn_module_stack"] == use.meta["nn_module_stack"]
    names = [str(getattr(n.target, "__name__", n.target)) for n in gm.graph.nodes if n.op != "placeholder"]
    logit = ["mul", "add", "threshold_mask.default"]
    assert names == [*logit, "linear", "sin", "relu", *logit, "linear", "output"]


# What is added to the graph.


def test_placeholders_trail_in_threes() -> None:
    gm = capture(Net(beside_another), {**A, "b.weight": MaskSpec(0.1)})
    before = [n.name for n in gm.graph.find_nodes(op="placeholder")]
    insert_masks(gm)
    after = gm.graph.find_nodes(op="placeholder")
    assert [n.name for n in after[: len(before)]] == before
    assert after[len(before) :] == added(gm)
    assert [n.meta[STATE] for n in added(gm)] == [(weight.name, field) for weight in marked(gm) for field in FIELDS]
    for node in added(gm):
        assert node.meta["tensor_dict"] == {"_dynamo_static_input_type": "unguarded"}
        assert node._dynamo_source is None


SHAPES: dict[str, tuple[nn.Module, Tensor, MaskSpec, tuple[int, ...], tuple[int, ...] | None]] = {
    "layer": (nn.Linear(6, 5), X, MaskSpec(0.1), (1,), None),
    "linear": (nn.Linear(6, 5), X, MaskSpec(0.1, 0, 5), (5,), (-1, 1)),
    "one channel": (nn.Linear(6, 1), X, MaskSpec(0.1, 0, 1), (1,), (-1, 1)),
    "conv": (nn.Conv2d(2, 3, 3), torch.ones(1, 2, 5, 5), MaskSpec(0.1, 0, 3), (3,), (-1, 1, 1, 1)),
    "transposed": (nn.ConvTranspose2d(2, 3, 3), torch.ones(1, 2, 5, 5), MaskSpec(0.1, 1, 3), (3,), (1, -1, 1, 1)),
}


@pytest.mark.parametrize(("model", "x", "spec", "state", "view"), SHAPES.values(), ids=SHAPES)
def test_shapes_of_the_state(
    model: nn.Module, x: Tensor, spec: MaskSpec, state: tuple[int, ...], view: tuple[int, ...] | None
) -> None:
    gm = capture(model, {"weight": spec}, x)
    assert insert_masks(gm) == 1
    assert [tuple(n.meta["example_value"].shape) for n in added(gm)] == [state, state, ()]
    assert all(n.meta["example_value"].dtype == torch.float32 for n in added(gm))
    views = [n.args[1:] for n in gm.graph.find_nodes(op="call_method", target="view")]
    assert views == ([] if view is None else [view])
    verify_masked_graph(gm)


# Grad modes.


def no_grad_first(m: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = m.a(m.a(x))
    return m.a(m.a(x)) - 2 * target


def grad_inside_no_grad(m: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = m.a(x)
        with torch.enable_grad():
            y = m.a(x)
        target = m.a(target)
    return y - 2 * target


def inference_inside(m: Net, x: Tensor) -> Tensor:
    with torch.inference_mode():
        rows = m.a(x).shape[0]
    return m.a(x) * rows


@pytest.mark.parametrize("forward", [no_grad_first, grad_inside_no_grad, inference_inside])
def test_uses_without_gradients_have_a_mask_of_their_own(forward: Callable[[Net, Tensor], Tensor]) -> None:
    gm = capture(Net(forward), A)
    assert insert_masks(gm) == 2
    assert len(added(gm)) == 3  # of one threshold
    assert dedupe_masks(gm) == 0
    verify_masked_graph(gm, deduped=True)


# What is left alone.


@pytest.mark.parametrize("forward", [many_uses, no_grad_first, beside_another])
def test_running_it_again_changes_nothing(forward: Callable[[Net, Tensor], Tensor]) -> None:
    gm = capture(Net(forward), A)
    assert insert_masks(gm) > 0
    text = gm.code, str(gm.graph)
    assert insert_masks(gm) == 0
    assert (gm.code, str(gm.graph)) == text


def test_graph_without_marks_is_left_alone() -> None:
    gm = capture(Net(beside_another), {})
    code = gm.code
    assert insert_masks(gm) == 0 and gm.code == code


def test_unmarked_weights_and_biases_are_read_as_they_are() -> None:
    gm = capture(Net(beside_another), {"b.weight": MaskSpec(0.1)})
    assert insert_masks(gm) == 1
    first, second, third = (n for n in gm.graph.nodes if n.target is F.linear)
    assert second.args[1].target is MASK
    assert first.args[1] is third.args[1] and first.args[1].op == "placeholder"
    assert all(n.args[2].op == "placeholder" for n in (first, second, third))


def test_marked_weight_without_uses_gets_no_state() -> None:
    gm = capture(Net(lambda m, x: m.a(x)), A)
    (use,) = marked(gm)[0].users
    use.replace_all_uses_with(use.args[0])
    gm.graph.erase_node(use)
    assert insert_masks(gm) == 0 and not added(gm)


def write(statement: Callable[[nn.Parameter], object]) -> Callable[[Net, Tensor], Tensor]:
    def forward(m: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            statement(m.a.weight)
        return m.b(m.a(x))

    return forward


WRITES: dict[str, Callable[[nn.Parameter], object]] = {  # more of them in test_written_weights.py
    "mul_": lambda w: w.mul_(0.5),
    "setitem": lambda w: w.__setitem__(0, 0.0),
    "data": lambda w: w.data.mul_(0.5),
    "foreach": lambda w: torch._foreach_mul_([w], 0.5),
    "checkpoint": lambda w: torch.utils.checkpoint.checkpoint(lambda x: w.mul_(0.5) + x, X[:1], use_reentrant=False),
}


@pytest.mark.parametrize("statement", WRITES.values(), ids=WRITES)
def test_weight_that_is_written_to_is_left_alone(statement: Callable[[nn.Parameter], object]) -> None:
    gm = capture(Net(write(statement)), A)
    text = gm.code, str(gm.graph)
    assert insert_masks(gm) == 0 and (gm.code, str(gm.graph)) == text
    both = capture(Net(write(statement)), {**A, "b.weight": MaskSpec(0.1)})
    assert insert_masks(both) == 1
    assert [mask.args[0] for mask in masks(both)] == marked(both)[1:]
    verify_masked_graph(both, deduped=True)


def test_write_to_an_unmarked_weight_is_the_models_own_affair() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            m.b.weight.mul_(0.5)
        return m.b(m.a(x).relu_())

    assert insert_masks(capture(Net(forward), A)) == 1


# Higher-order ops, and weights that are attributes.


class Checkpointed(nn.Module):
    """A block that is checkpointed where it is compiled, so that eager mode can serve as the reference."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def block(self, x: Tensor) -> Tensor:
        return self.a(F.relu(self.a(x)))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            if torch.compiler.is_compiling():
                x = torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)
            else:
                x = self.block(x)
        return self.a(x)


def test_weight_of_checkpointed_blocks_is_masked_once_and_outside() -> None:
    gm = capture(Checkpointed(), A)
    blocks = [m for m in gm.children() if isinstance(m, GraphModule)]
    code = [block.code for block in blocks]
    assert blocks and insert_masks(gm) == 1
    (mask,) = masks(gm)
    assert [block.code for block in blocks] == code
    assert len(mask.users) == 3
    assert mask.next in mask.users and isinstance(mask.next.target, dynamo_graphs.HigherOrderOperator)
    verify_masked_graph(gm, deduped=True)


@pytest.mark.parametrize("inputs", [0, 1])
def test_weight_that_is_an_attribute_of_the_graph(inputs: int) -> None:
    """By hand: also where the graph has no placeholder at all."""
    root = nn.Linear(6, 4, bias=False)
    root.x = nn.Buffer(X)
    graph = Graph()
    x = graph.placeholder("x") if inputs else graph.get_attr("x")
    weight = graph.get_attr("weight")
    with FakeTensorMode() as mode:
        weight.meta.update(example_value=mode.from_tensor(root.weight), **{WEIGHT: MaskSpec(0.1, 0, 4)})
    graph.output((graph.call_function(F.linear, (x, weight)), graph.call_function(F.linear, (x, weight))))
    gm = GraphModule(root, graph)
    assert insert_masks(gm) == 1 and insert_masks(gm) == 0
    assert [n.op for n in gm.graph.nodes][: inputs + 3] == ["placeholder"] * (inputs + 3)
    verify_masked_graph(gm, deduped=True)
    offset, alpha = torch.linspace(-3, -1, 4), torch.tensor(0.5)
    first, second = gm(*[X] * inputs, torch.zeros(4), offset, alpha)
    g = torch.sigmoid(offset).view(4, 1)
    torch.testing.assert_close(first, F.linear(X, root.weight - root.weight.clamp(-g, g)))
    assert torch.equal(first, second)


# The marks of the backend.


def test_marks_that_a_request_makes() -> None:
    """Trainable weights that the graph multiplies by, along the axis of their own layer."""
    model = nn.Sequential(nn.ConvTranspose1d(6, 4, 1), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 3))
    gm = capture(model, Request(AutoSparse(granularity="channel"), 10), X.unsqueeze(2))
    found = [(tuple(n.meta["example_value"].shape), n.meta[WEIGHT]) for n in marked(gm)]
    assert found == [((6, 4, 1), MaskSpec(0.1, 1, 4)), ((3, 4), MaskSpec(0.1, 0, 3))]
    assert insert_masks(gm) == 2


# Values and gradients.


class ConvTranspose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ConvTranspose1d(2, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.unflatten(1, (2, 3)))


@pytest.mark.parametrize(
    ("make", "spec"),
    [
        (lambda: Net(many_uses), MaskSpec(0.1)),
        (lambda: Net(many_uses), MaskSpec(0.3, 0, 6)),
        (lambda: Net(through_views_and_casts), MaskSpec(0.1, 1, 6)),
        (lambda: Net(as_plain_operand), MaskSpec(0.1)),
        (lambda: Net(no_grad_first), MaskSpec(0.1)),
        (lambda: Net(grad_inside_no_grad), MaskSpec(0.1)),
        (Checkpointed, MaskSpec(0.1, 0, 6)),
        (ConvTranspose, MaskSpec(0.1, 1, 6)),
    ],
    ids=["layer", "channel", "views", "operand", "no_grad", "grad inside no_grad", "checkpoint", "transposed"],
)
def test_values_and_gradients(make: Callable[[], nn.Module], spec: MaskSpec) -> None:
    model = make()
    w = model.a.weight
    gm = capture(model, {"a.weight": spec})
    insert_masks(gm)
    threshold, offset = torch.randn(2, spec.channels or 1)
    offset, alpha = offset - 2.5, torch.tensor(0.5)
    torch._dynamo.reset()
    found = torch.compile(model, backend=lambda _, inputs: lambda *args: gm(*args, threshold, offset, alpha))(X)
    (grad,) = torch.autograd.grad(found.square().sum(), w)

    s = offset + spec.scale * threshold
    s = s if spec.channels is None else s.view([-1 if d == spec.axis else 1 for d in range(w.dim())])
    g = torch.sigmoid(s)
    value = w - torch.clamp(w, -g, g)
    assert 0 < (value == 0).sum() < w.numel()
    torch.testing.assert_close(found, torch.func.functional_call(model, {"a.weight": value}, X))
    expected = torch.func.functional_call(model, {"a.weight": reference.masked(w, s, alpha)}, X)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), w)
    torch.testing.assert_close(grad, expected_grad)
