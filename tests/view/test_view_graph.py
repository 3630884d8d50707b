"""The networkx graph of an FX graph: what is marked, where it stands, what is known of it."""

import networkx as nx
import pytest
import torch
from torch import nn

import autosparse_fx
from autosparse_fx.view import capture_graphs, to_networkx


class Net(nn.Module):
    """A layer, one that is called twice, a shared activation, and something outside every module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.act = nn.ReLU()
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.first(x))
        x = self.body(self.body(x))
        return self.head(self.act(x) + 1)


def of_kind(graph: nx.DiGraph, kind: str) -> list[str]:
    return [name for name, data in graph.nodes(data=True) if data["kind"] == kind]


@pytest.fixture
def sparse() -> nn.Module:
    return autosparse_fx.sparsify(Net())


@pytest.fixture
def forward(sparse: nn.Module) -> nx.DiGraph:
    (versions,) = capture_graphs(sparse, torch.randn(3, 4)).graphs
    return versions["after"]


def test_every_node_and_edge_of_the_graph_is_there() -> None:
    traced = torch.fx.symbolic_trace(Net())
    graph = to_networkx(traced.graph)
    assert list(graph) == [node.name for node in traced.graph.nodes]
    assert set(graph.edges) == {(i.name, n.name) for n in traced.graph.nodes for i in n.all_input_nodes}


def test_masks_are_marked_and_nothing_else(forward: nx.DiGraph) -> None:
    masks = of_kind(forward, "mask")
    assert [forward.nodes[m]["weight"] for m in masks] == ["first.weight", "body.0.weight", "head.weight"]
    assert all("threshold_mask" in forward.nodes[m]["target"] and forward.nodes[m]["is_mask"] for m in masks)
    assert not any(data["is_mask"] for name, data in forward.nodes(data=True) if name not in masks)
    assert not any(data["is_gradient"] for _, data in forward.nodes(data=True))


def test_values_are_plain_and_none_is_missing(forward: nx.DiGraph) -> None:
    for _, data in forward.nodes(data=True):
        assert all(type(value) in (str, int, float, bool) for value in data.values()), data


def test_a_mask_and_its_layer_know_sparsity_and_cut(sparse: nn.Module, forward: nx.DiGraph) -> None:
    layers = {layer.name: layer for layer in autosparse_fx.report(sparse).layers}
    readers = [
        d for _, d in forward.nodes(data=True) if d.get("weight") == "head.weight" and d["kind"] in ("op", "mask")
    ]
    assert [d["label"] for d in readers] == ["threshold_mask", "linear"]
    for data in readers:
        assert data["sparsity"] == pytest.approx(layers["head.weight"].sparsity)
        assert data["threshold"] == pytest.approx(layers["head.weight"].threshold)
        assert data["weight_shape"] == "2x8"
    assert readers[1]["shape"] == "3x2"
    assert readers[1]["flops"] == 2 * 3 * 8 * 2
    assert readers[1]["sparse_flops"] == pytest.approx(2 * 3 * 8 * 2 * (1 - layers["head.weight"].sparsity), abs=1)
    relu = next(d for _, d in forward.nodes(data=True) if d["label"] == "relu")
    assert not {"sparsity", "weight", "flops"} & set(relu)


def test_nodes_stand_in_the_module_that_called_them(forward: nx.DiGraph) -> None:
    modules = forward.graph["modules"]
    linear = [d for _, d in forward.nodes(data=True) if d["label"] == "linear"]
    assert [modules[d["module"]].path for d in linear] == ["first", "body.0", "body.0", "head"]
    assert modules[linear[1]["module"]].parent == "body"
    assert modules[linear[1]["module"]].type == "Linear"


def test_two_calls_of_a_module_are_two(forward: nx.DiGraph) -> None:
    labels = [module.label for module in forward.graph["modules"].values() if module.path in ("act", "body")]
    assert sorted(labels) == ["act", "act (call 2)", "body", "body (call 2)"]


def test_the_source_line_is_the_models_own(forward: nx.DiGraph) -> None:
    added = next(d for _, d in forward.nodes(data=True) if d["label"] == "add" and d["module"] == "")
    assert added["source"].endswith("return self.head(self.act(x) + 1)")
    assert "test_view_graph.py:" in added["source"]
    head = next(d for _, d in forward.nodes(data=True) if d.get("weight") == "head.weight" and d["kind"] == "op")
    assert "test_view_graph.py:" in head["source"]  # not a line of this package, through which weights are read


def test_parameters_stand_in_their_owner_and_inputs_in_none(forward: nx.DiGraph) -> None:
    bias = next(d for _, d in forward.nodes(data=True) if d.get("tensor") == "head.bias")
    assert (bias["kind"], bias["module"]) == ("parameter", "head")
    (entry,) = of_kind(forward, "input")
    assert (forward.nodes[entry]["label"], forward.nodes[entry]["module"]) == ("input 0", "")
    assert {forward.nodes[s].get("tensor", "") for s in of_kind(forward, "state")} >= {"head.weight_threshold"}


def test_keyword_inputs_have_their_own_names() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return self.layer(left) + right

    graph = capture_graphs(Two(), {"left": torch.ones(1, 2), "right": torch.ones(1, 2)}).graphs[0]["after"]
    assert [graph.nodes[n]["label"] for n in of_kind(graph, "input")] == ["left", "right"]


def test_tied_weights_have_one_mask_after_the_passes() -> None:
    model = Net()
    model.tied = nn.Linear(8, 8)
    model.tied.weight = model.body[0].weight
    model.head = nn.Sequential(model.tied, nn.Linear(8, 2))
    (versions,) = capture_graphs(autosparse_fx.sparsify(model), torch.randn(3, 4)).graphs
    tied = "body.0.weight = head.0.weight = tied.weight"
    for version, masks in (("before", 3), ("after", 1)):
        graph = versions[version]
        assert [graph.nodes[m]["weight"] for m in of_kind(graph, "mask")].count(tied) == masks
    layers = [d for _, d in versions["after"].nodes(data=True) if d["label"] == "linear"]
    assert [d["weight"] for d in layers].count(tied) == 3


def test_a_dense_model_has_no_marks() -> None:
    (versions,) = capture_graphs(Net(), torch.randn(3, 4)).graphs
    for graph in versions.values():
        assert not of_kind(graph, "mask") and not of_kind(graph, "state")
        assert len([d for _, d in graph.nodes(data=True) if "sparsity" in d and d["kind"] == "op"]) == 4


def test_the_one_line_form_has_masks_only_after_the_passes() -> None:
    model = Net()
    step = torch.compile(model, backend="autosparse", options={"target_sparsity": 0.5, "total_steps": 4})
    step(torch.randn(3, 4)).sum().backward()
    (versions,) = capture_graphs(model, torch.randn(3, 4)).graphs
    assert not of_kind(versions["before"], "mask")
    masks = of_kind(versions["after"], "mask")
    assert [versions["after"].nodes[m]["weight"] for m in masks] == ["first.weight", "body.0.weight", "head.weight"]
    assert all("threshold" in versions["after"].nodes[m] for m in masks)


@pytest.mark.parametrize("kind", ["joint", "backward"])
def test_graphs_with_a_backward_pass_have_the_gradient_nodes(sparse: nn.Module, kind: str) -> None:
    (versions,) = capture_graphs(sparse, torch.randn(3, 4), kind).graphs
    graph = versions["after"]
    gradients = of_kind(graph, "gradient")
    expected = ["body.0.weight", "first.weight", "head.weight"]
    assert sorted({graph.nodes[g]["weight"] for g in gradients}) == expected
    assert all(graph.nodes[g]["backward"] and graph.nodes[g]["is_gradient"] for g in gradients)
    paths = {graph.graph["modules"][graph.nodes[g]["module"]].path for g in gradients}
    assert paths == {"first", "body.0", "head"}
    products = [d for _, d in graph.nodes(data=True) if d["backward"] and d["label"] == "mm"]
    assert products and all(d["flops"] > 0 for d in products)


def test_a_backward_graph_computes_masks_again_only_after_the_passes(sparse: nn.Module) -> None:
    (versions,) = capture_graphs(sparse, torch.randn(3, 4), "backward").graphs
    assert not of_kind(versions["before"], "mask")
    assert (
        len(of_kind(versions["after"], "mask")) == 2
    )  # the gradient of the input, which the first would need, is not asked
    assert of_kind(versions["after"], "saved")


def test_only_the_masks_of_a_joint_graph_are_tagged(sparse: nn.Module) -> None:
    (versions,) = capture_graphs(sparse, torch.randn(3, 4), "joint").graphs
    for version, tagged in (("before", False), ("after", True)):
        graph = versions[version]
        assert all(graph.nodes[m]["recompute"] is tagged for m in of_kind(graph, "mask"))
        assert not any(graph.nodes[g]["recompute"] for g in of_kind(graph, "gradient"))


def test_a_sum_of_gradients_stands_where_the_layer_was_called() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.layer(self.norm(x))

    model = nn.Sequential(Block(), Block(), nn.LayerNorm(4))
    (versions,) = capture_graphs(model, torch.randn(3, 4, requires_grad=True), "joint").graphs
    graph = versions["after"]
    sums = [d for _, d in graph.nodes(data=True) if d["backward"] and d["label"] == "add"]
    assert [graph.graph["modules"][d["module"]].label for d in sums] == ["1 backward", "0 backward"]


def test_a_model_without_gradients_has_no_joint_graph(sparse: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"no joint graph.*draw graph='forward'"):
        capture_graphs(sparse.requires_grad_(False), torch.randn(3, 4), "joint")


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.inner = Inner()
        self.last = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.last(self.inner(x))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        torch._dynamo.graph_break()
        return x.relu()


# Dynamo's own, where it resumes behind a graph break. 2.15.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_each_graph_of_a_broken_model_has_full_names() -> None:
    captures = capture_graphs(autosparse_fx.sparsify(Broken()), torch.randn(2, 4))
    graphs = [versions["after"] for versions in captures.graphs]
    assert len(graphs) > 2
    masked = [graph.nodes[m]["weight"] for graph in graphs for m in of_kind(graph, "mask")]
    assert masked == ["first.weight", "inner.layer.weight", "last.weight"]
    modules = [
        graph.graph["modules"][graph.nodes[m]["module"]].path for graph in graphs for m in of_kind(graph, "mask")
    ]
    assert modules == ["first", "inner.layer", "last"]
    assert captures.title(0) == f"Broken: forward graph, graph 1 of {len(graphs)}"
    assert "graph_break" in captures.note
