"""dedupe_masks: one mask per weight, and none merged that could differ."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from autosparse_fx import AutoSparse, sparsify
from autosparse_fx.passes import dedupe_masks

MASK = torch.ops.autosparse.threshold_mask.default


def capture(model: nn.Module, *inputs: Any) -> GraphModule:
    """The one Dynamo graph of a model, as the backend gets it."""
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    (gm,) = graphs
    return gm


def masks(gm: GraphModule) -> int:
    graphs = [m for m in gm.modules() if isinstance(m, GraphModule)]
    return sum(len(m.graph.find_nodes(op="call_function", target=MASK)) for m in graphs)


def run(
    model: nn.Module, compiled_by: Callable[[GraphModule], object], *inputs: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """Output and gradients of the model, compiled with passes applied to its graphs."""

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        compiled_by(gm)
        return gm.forward

    torch._dynamo.reset()
    model.zero_grad()
    out = torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    out.square().sum().backward()
    return out.detach(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_same_results(model: nn.Module, *inputs: Tensor) -> None:
    out, grads = run(model, lambda gm: None, *inputs)
    merged_out, merged_grads = run(model, dedupe_masks, *inputs)
    torch.testing.assert_close(merged_out, out)
    torch.testing.assert_close(merged_grads, grads)


class Net(nn.Module):
    """Two linear layers, and a forward given by the test."""

    def __init__(self, forward: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def net(forward: Callable[[Net, Tensor], Tensor], granularity: str = "layer") -> Net:
    return sparsify(Net(forward), AutoSparse(alpha=0.5, threshold_init=-2.0, granularity=granularity))


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_repeated_reads_become_one_mask(granularity: str) -> None:
    model = net(lambda m, x: m.a(m.b(m.a(m.a(x)))) + F.linear(x, m.a.weight), granularity)
    gm = capture(model, X)
    assert masks(gm) == 5
    assert dedupe_masks(gm) == 3
    assert masks(gm) == 2
    gm.graph.lint()
    assert_same_results(model, X)


def test_the_logit_is_computed_once_too() -> None:
    gm = capture(net(lambda m, x: m.a(m.a(x)), "channel"), X)
    dedupe_masks(gm)
    names = [str(n.target) for n in gm.graph.nodes if n.op != "placeholder"]
    assert sum("mul" in n for n in names) == sum("add" in n for n in names) == sum("view" in n for n in names) == 1


def test_tied_weights_become_one_mask() -> None:
    model = sparsify(reference.Tied(), AutoSparse(threshold_init=-1.0))
    gm = capture(model, torch.randint(50, (2, 3)))
    assert masks(gm) == 3
    assert dedupe_masks(gm) == 1
    assert masks(gm) == 2


def test_nothing_is_merged_where_nothing_repeats() -> None:
    gm = capture(net(lambda m, x: m.a(m.b(x))), X)
    before = gm.code
    assert dedupe_masks(gm) == 0
    assert gm.code == before and masks(gm) == 2


def test_running_it_again_changes_nothing() -> None:
    gm = capture(net(lambda m, x: m.a(m.a(x))), X)
    assert dedupe_masks(gm) == 1
    before = gm.code
    assert dedupe_masks(gm) == 0
    assert gm.code == before


def test_dense_graph_is_left_alone() -> None:
    gm = capture(Net(lambda m, x: m.a(m.a(x))), X)
    before = gm.code
    assert dedupe_masks(gm) == 0 and gm.code == before


def no_grad_first(m: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = m.a(x)
    return m.a(x) - 2 * target


def grad_first(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    with torch.no_grad():
        target = m.a(x)
    return y - 2 * target


def enable_inside(m: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = m.a(x)
        with torch.enable_grad():
            y = m.a(x)
    return y - 2 * target


def inference_first(m: Net, x: Tensor) -> Tensor:
    with torch.inference_mode():
        shape = m.a(x).shape
    return m.a(x) * shape[0]


@pytest.mark.parametrize("forward", [no_grad_first, grad_first, enable_inside])
def test_masks_of_a_no_grad_region_are_not_merged_with_others(forward: Callable[[Net, Tensor], Tensor]) -> None:
    model = net(forward)
    gm = capture(model, X)
    assert dedupe_masks(gm) == 0
    assert masks(gm) == 2
    assert_same_results(model, X)
    _, grads = run(model, dedupe_masks, X)
    assert all(g is not None and g.abs().sum() > 0 for g in grads[:1])


def test_masks_within_one_region_are_merged() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = m.a(m.a(x))
        return m.a(m.a(x)) - target

    gm = capture(net(forward), X)
    assert masks(gm) == 4
    assert dedupe_masks(gm) == 2
    assert_same_results(net(forward), X)


def test_gradients_enabled_inside_a_call_without_gradients() -> None:
    """As for forces from an energy: the whole model is called under no_grad, and turns gradients on for a part."""

    def forward(m: Net, x: Tensor) -> Tensor:
        outside = m.a(x)
        with torch.enable_grad():
            return m.a(x) - 2 * outside

    model = net(forward)

    def weight_gradient(compiled_by: Callable[[GraphModule], object]) -> Tensor | None:
        def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            compiled_by(gm)
            return gm.forward

        torch._dynamo.reset()
        model.zero_grad()
        with torch.no_grad():
            out = torch.compile(model, backend=backend, fullgraph=True)(X)
        out.sum().backward()
        return model.a._parameters["weight"].grad

    expected = weight_gradient(lambda gm: None)
    assert expected is not None and expected.abs().sum() > 0
    found = weight_gradient(dedupe_masks)
    assert found is not None
    torch.testing.assert_close(found, expected)


def test_inference_mode_region_is_not_merged_with_the_rest() -> None:
    model = net(inference_first)
    assert_same_results(model, X)


def write_to_masked(m: Net, x: Tensor) -> Tensor:
    w = m.a.weight
    y = F.linear(x, w)
    w.mul_(2)
    return y + m.a(x)


def write_to_masked_by_index(m: Net, x: Tensor) -> Tensor:
    w = m.a.weight
    y = F.linear(x, w)
    w[0] = 0.0
    return y + m.a(x)


def write_to_masked_by_view(m: Net, x: Tensor) -> Tensor:
    w = m.a.weight
    w.view(-1)[:6].zero_()
    return F.linear(x, w) + m.a(x)


def write_to_masked_by_augmented_assignment(m: Net, x: Tensor) -> Tensor:
    w = m.a.weight
    w += 1
    return F.linear(x, w) + m.a(x)


def write_to_masked_by_out(m: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        w = m.a.weight
        torch.mul(w, 2.0, out=w)
        y = F.linear(x, w)
        return y + F.linear(x, m.a.weight) + x * x.sum()


def write_to_weight(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    with torch.no_grad():
        m.a._parameters["weight"].mul_(1.5)
    return (y + m.a(x)).detach() + m.b(x)


def write_to_view_of_weight(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    with torch.no_grad():
        m.a._parameters["weight"][0].mul_(3.0)
    return (y + m.a(x)).detach() + m.b(x)


def write_to_offset(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    m.a._buffers["weight_offset"].add_(1.0)
    return (y + m.a(x)).detach() + m.b(x)


def write_through_detached(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    m.a._parameters["weight"].detach().mul_(1.5)
    return (y + m.a(x)).detach() + m.b(x)


@pytest.mark.parametrize(
    "forward",
    [
        write_to_masked,
        write_to_masked_by_index,
        write_to_masked_by_view,
        write_to_masked_by_augmented_assignment,
        write_to_masked_by_out,
        write_to_weight,
        write_to_view_of_weight,
        write_to_offset,
        write_through_detached,
    ],
    ids=lambda f: f.__name__,
)
def test_nothing_is_merged_around_in_place_writes(forward: Callable[[Net, Tensor], Tensor]) -> None:
    model = net(forward)
    with torch.set_grad_enabled(forward is not write_to_masked_by_out):
        expected = copy.deepcopy(model)(X)  # eager, on a copy, since it writes to the model
        found: list[Tensor] = []
        graphs: list[GraphModule] = []

        def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            dedupe_masks(gm)
            graphs.append(gm)
            return gm.forward

        found.append(torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True)(X))
    torch.testing.assert_close(found[0], expected)
    assert sum(masks(gm) for gm in graphs) >= 2


def test_writes_to_other_tensors_do_not_matter() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(m.a(x))
        y.relu_()
        return y.add_(1)

    gm = capture(net(forward), X)
    assert dedupe_masks(gm) == 1


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def block(self, x: Tensor) -> Tensor:
        return self.a(F.relu(self.a(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)
        return self.a(self.a(x))


def test_masks_inside_a_checkpointed_block_are_merged_among_themselves() -> None:
    model = sparsify(Checkpointed(), AutoSparse(alpha=0.5, threshold_init=-2.0))
    gm = capture(model, X)
    (block,) = (m for m in gm.children() if isinstance(m, GraphModule))
    assert (masks(block), masks(gm)) == (2, 4)
    assert dedupe_masks(gm) == 2
    assert (masks(block), masks(gm)) == (1, 2)
    assert dedupe_masks(gm) == 0
    assert_same_results(model, X)


def test_different_thresholds_of_one_weight_are_not_merged() -> None:
    """By hand: nothing in the package makes such a graph."""

    class Two(nn.Module):
        def forward(self, w: Tensor, s: Tensor, t: Tensor, alpha: Tensor) -> Tensor:
            return MASK(w, s, alpha) + MASK(w, t, alpha) + MASK(w, s, alpha)

    gm = torch.fx.symbolic_trace(Two())
    assert dedupe_masks(gm) == 1
    assert masks(gm) == 2
