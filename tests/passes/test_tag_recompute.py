"""tag_recompute: no masked weight, mask or cast of one is kept for the backward pass, but what depthwise ones read."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from functorch.compile import aot_module_simplified, make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.utils.checkpoint import CheckpointPolicy

from autosparse_fx import AutoSparse, sparsify
from autosparse_fx.passes import tag_recompute

MASK = torch.ops.autosparse.threshold_mask.default
GRADIENT = torch.ops.autosparse.anneal_gradient.default
RECOMPUTED = (CheckpointPolicy.PREFER_RECOMPUTE, CheckpointPolicy.MUST_RECOMPUTE)


class Graphs:
    """A backend that partitions with a joint pass applied, and keeps the joint, forward and backward graphs."""

    def __init__(self, joint_pass: Callable[[GraphModule], Any] | None) -> None:
        self.joint_pass = joint_pass
        self.joint: list[Graph] = []
        self.forward: list[Graph] = []
        self.backward: list[Graph] = []

    def __call__(self, gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def partition(joint: GraphModule, *args: Any, **kwargs: Any) -> Any:
            if self.joint_pass is not None:
                self.joint_pass(joint)
            kept = Graph()
            kept.output(kept.graph_copy(joint.graph, {}))
            self.joint.append(kept)
            return min_cut_rematerialization_partition(joint, *args, **kwargs)

        def keep(graphs: list[Graph]) -> Callable[..., Any]:
            def compiler(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
                graphs.append(gm.graph)
                return make_boxed_func(gm.forward)

            return compiler

        return aot_module_simplified(  # type: ignore[no-any-return]
            gm, inputs, fw_compiler=keep(self.forward), bw_compiler=keep(self.backward), partition_fn=partition
        )


def saved_for_backward(model: nn.Module, x: Tensor, backend: Any, dtype: torch.dtype | None = None) -> list[Tensor]:
    """What one forward pass keeps besides parameters, buffers and the input; then runs the backward pass."""
    free = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in free:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    autocast = torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast:
        loss = compiled(x).float().square().sum()
    loss.backward()
    return list(kept.values())


def size(tensors: list[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


class Deep(nn.Module):
    """Weights far larger than activations, so that a kept weight shows; each read through other casts and views."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 48)
        self.second = nn.Linear(48, 96)
        self.conv = nn.Conv1d(2, 32, 5, padding=2)
        self.last = nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x))))
        x = F.relu(self.conv(x.unflatten(1, (2, 48))))
        return self.last(x).flatten(1) @ self.second.weight.T.reshape(-1)[:512].view(512, 1)


X = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))


def models(granularity: str = "layer") -> tuple[nn.Module, nn.Module]:
    dense = Deep()
    return dense, sparsify(copy.deepcopy(dense), AutoSparse(alpha=0.5, threshold_init=-2.5, granularity=granularity))


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_nothing_weight_sized_is_kept(granularity: str, dtype: torch.dtype | None) -> None:
    dense, sparse = models(granularity)
    expected = saved_for_backward(dense, X, Graphs(None), dtype)
    found = saved_for_backward(sparse, X, Graphs(tag_recompute), dtype)
    untagged = saved_for_backward(copy.deepcopy(sparse), X, Graphs(None), dtype)
    assert size(untagged) > size(found)  # the tags are what does it
    logits = sum(p.nbytes for name, p in sparse.named_parameters() if name.endswith("_threshold"))
    assert size(found) <= 1.02 * size(expected) + logits
    weights = {p.numel() for n, p in sparse.named_parameters() if n.endswith("weight") and p.dim() > 1}
    assert not [tuple(t.shape) for t in found if t.numel() in weights and t.numel() > 16 * X.shape[0]]


class Viewed(nn.Module):
    """A weight that is viewed before autocast copies it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(16, 96, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.conv.weight.view(96, 16)).relu() @ self.conv.weight.view(96, 16)


def test_low_precision_copy_of_a_view_is_not_kept() -> None:
    found = saved_for_backward(sparsify(Viewed()), X, Graphs(tag_recompute), torch.bfloat16)
    assert found and max(t.numel() for t in found) < 96 * 16


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_gradients_do_not_change(dtype: torch.dtype | None) -> None:
    _, sparse = models()
    grads = []
    for joint_pass in (None, tag_recompute):
        torch._dynamo.reset()
        sparse.zero_grad()
        saved_for_backward(sparse, X, Graphs(joint_pass), dtype)
        grads.append([p.grad.clone() for p in sparse.parameters() if p.grad is not None])
    assert len(grads[0]) == len(list(sparse.parameters()))
    torch.testing.assert_close(grads[0], grads[1])


def test_masks_stay_named_nodes_in_every_graph() -> None:
    _, sparse = models()
    graphs = Graphs(tag_recompute)
    saved_for_backward(sparse, X, graphs)
    (joint,), (forward,), (backward,) = graphs.joint, graphs.forward, graphs.backward
    for graph in (joint, forward):
        assert len({n.args[0] for n in graph.find_nodes(op="call_function", target=MASK)}) == 4
    for graph in (joint, backward):
        assert len({n.args[1] for n in graph.find_nodes(op="call_function", target=GRADIENT)}) == 4
    assert not forward.find_nodes(op="call_function", target=GRADIENT)
    assert backward.find_nodes(op="call_function", target=MASK)  # recomputed there


def test_forward_returns_no_masked_weight() -> None:
    """The outputs of a forward graph after the user's are what it keeps."""
    _, sparse = models()
    graphs = Graphs(tag_recompute)
    saved_for_backward(sparse, X, graphs)
    masks = set(graphs.forward[0].find_nodes(op="call_function", target=MASK))
    assert masks and not masks & set(graphs.forward[0].output_node().args[0])


def joint_graph(granularity: str = "layer", autocast: bool = False) -> Graph:
    _, sparse = models(granularity)
    graphs = Graphs(None)
    saved_for_backward(sparse, X, graphs, torch.bfloat16 if autocast else None)
    (graph,) = graphs.joint
    for node in graph.nodes:
        node.meta.pop("recompute", None)
    return graph


def ancestors(node: Any) -> set[Any]:
    if node.op != "call_function":
        return set()
    return {node, *(n for source in node.all_input_nodes for n in ancestors(source))}


@pytest.mark.parametrize("autocast", [False, True])
def test_tags_the_masks_and_the_casts_and_views_behind_them_and_nothing_else(autocast: bool) -> None:
    graph = joint_graph(autocast=autocast)
    count = tag_recompute(GraphModule(nn.Module(), graph))
    tagged = [n for n in graph.nodes if n.meta.get("recompute") in RECOMPUTED]
    assert count == len(tagged) > 0
    assert set(graph.find_nodes(op="call_function", target=MASK)) <= set(tagged)
    before = {n for mask in graph.find_nodes(op="call_function", target=MASK) for n in ancestors(mask.args[1])}
    behind = [n for n in tagged if n.target is not MASK and n not in before]
    assert before <= set(tagged)  # the logit
    for node in behind:
        assert node.all_input_nodes[0] in tagged  # behind a mask, without a gap
    names = {str(n.target) for n in behind}
    for heavy in ("mm", "convolution", "relu", "anneal_gradient", "add", "sum"):
        assert not any(heavy in name for name in names), names
    if autocast:
        assert any("convert_element_type" in name or "_to_copy" in name for name in names)


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_the_copy_for_a_depthwise_convolution_keeps_its_memory_format(groups: int) -> None:
    model = sparsify(nn.Sequential(nn.Conv2d(8, 8, 3, groups=groups)), AutoSparse(threshold_init=-2.5))
    graphs = Graphs(tag_recompute)
    saved_for_backward(model, torch.randn(1, 8, 6, 6), graphs, torch.bfloat16)
    (convolution,) = graphs.joint[0].find_nodes(op="call_function", target=torch.ops.aten.convolution.default)
    assert ("recompute" in convolution.args[1].meta) == (groups < 8)


def test_running_it_again_changes_nothing() -> None:
    graph = joint_graph()
    assert tag_recompute(GraphModule(nn.Module(), graph)) > 0
    before = {n: n.meta.get("recompute") for n in graph.nodes}
    assert tag_recompute(GraphModule(nn.Module(), graph)) == 0
    assert {n: n.meta.get("recompute") for n in graph.nodes} == before


def test_a_policy_that_is_there_already_is_kept() -> None:
    graph = joint_graph()
    mask, *others = graph.find_nodes(op="call_function", target=MASK)
    mask.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    tag_recompute(GraphModule(nn.Module(), graph))
    assert mask.meta["recompute"] is CheckpointPolicy.MUST_SAVE
    assert all(node.meta["recompute"] in RECOMPUTED for node in others)


def test_graph_without_masks_is_left_alone() -> None:
    graphs = Graphs(tag_recompute)
    saved_for_backward(reference.mlp(), X, graphs)
    assert not any("recompute" in n.meta for n in graphs.joint[0].nodes)


def test_checkpointed_block_keeps_nothing_weight_sized() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)

    dense = Checkpointed()
    sparse = sparsify(copy.deepcopy(dense), AutoSparse(threshold_init=-2.5))
    expected = saved_for_backward(dense, X, Graphs(None))
    assert size(saved_for_backward(sparse, X, Graphs(tag_recompute))) <= 1.02 * size(expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_backend_keeps_no_more_than_inductor_does_for_the_dense_model(dtype: torch.dtype | None) -> None:
    dense, sparse = models()
    expected = saved_for_backward(dense, X, "inductor", dtype)
    found = saved_for_backward(sparse, X, "autosparse", dtype)
    assert size(found) <= 1.02 * size(expected)
