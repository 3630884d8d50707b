"""Folding modules into boxes, on graphs made by hand."""

import networkx as nx
import pytest

from autosparse_fx.view.collapse import Collapsed, collapse, light_edges, visible
from autosparse_fx.view.graph import Module

MODULES = {
    "block": Module("block", "Block", None),
    "block.conv": Module("block.conv", "Conv2d", "block"),
    "block.bn": Module("block.bn", "BatchNorm2d", "block"),
    "head": Module("head", "Linear", None),
}


def node(kind: str = "op", module: str = "", **more: object) -> dict[str, object]:
    flags = {"is_mask": kind == "mask", "is_gradient": kind == "gradient", "backward": False}
    return {"kind": kind, "module": module, "label": kind, **flags, **more}


@pytest.fixture
def graph() -> nx.DiGraph:
    """x -> [block: conv(mask(w)) -> bn] -> add with x -> head."""
    made = nx.DiGraph(modules=MODULES)
    weight = {"weight": "block.conv.weight", "numel": 8, "sparsity": 0.75, "weight_shape": "2x4"}
    made.add_node("x", **node("input"))
    made.add_node("w", **node("parameter", "block.conv"))
    made.add_node("m", **node("mask", "block.conv", **weight))
    made.add_node("conv", **node("op", "block.conv", flops=10, **weight))
    made.add_node("norm", **node("op", "block.bn"))
    made.add_node("add", **node("op", ""))
    made.add_node("fc", **node("op", "head", weight="head.weight", numel=8, sparsity=0.25, weight_shape="2x4"))
    made.add_edges_from([("x", "conv"), ("w", "m"), ("m", "conv"), ("conv", "norm"), ("norm", "add"), ("x", "add")])
    made.add_edge("add", "fc")
    return made


def boxes(graph: nx.DiGraph) -> dict[str, Collapsed]:
    return {key: data["box"] for key, data in graph.nodes(data=True)}


def test_layers_become_boxes_with_what_only_follows_them(graph: nx.DiGraph) -> None:
    made = collapse(graph)
    assert set(made) == {"node x", "module block.conv", "node add", "module head"}
    conv = boxes(made)["module block.conv"]
    assert conv.followers == ["block.bn"]
    assert (conv.sparsity, conv.masks, conv.flops, conv.parent) == (0.75, 1, 10, "block")
    assert list(made.graph["modules"]) == ["block"]
    assert set(made.edges) == {
        ("node x", "module block.conv"),
        ("node x", "node add"),
        ("module block.conv", "node add"),
        ("node add", "module head"),
    }


def test_at_depth_0_every_module_is_shut(graph: nx.DiGraph) -> None:
    made = collapse(graph, depth=0)
    assert set(made) == {"node x", "module block", "node add", "module head"}
    assert boxes(made)["module block"].masks == 1
    assert made.graph["modules"] == {}


def test_sparsity_of_a_box_is_that_of_all_its_weights(graph: nx.DiGraph) -> None:
    graph.nodes["fc"]["module"] = "block"
    graph.nodes["fc"]["numel"] = 24
    box = boxes(collapse(graph, depth=0))["module block"]
    assert box.sparsity == pytest.approx((8 * 0.75 + 24 * 0.25) / 32)


def test_what_branches_is_not_merged(graph: nx.DiGraph) -> None:
    graph.add_node("other", **node("op", "block"))
    graph.add_edge("conv", "other")
    assert boxes(collapse(graph))["module block.conv"].followers == []


def test_the_graph_itself_is_left_alone(graph: nx.DiGraph) -> None:
    before = nx.to_dict_of_dicts(graph)
    collapse(graph)
    assert nx.to_dict_of_dicts(graph) == before


def test_parameters_and_an_output_of_everything_are_not_drawn(graph: nx.DiGraph) -> None:
    graph.add_node("out", **node("output"))
    graph.add_edge("fc", "out")
    assert set(visible(graph)) == set(graph) - {"w"}
    for i in range(9):
        graph.add_node(f"g{i}", **node())
        graph.add_edge(f"g{i}", "out")
    assert "out" not in visible(graph)


def test_a_large_graph_is_shut_until_it_is_legible() -> None:
    modules = {f"b{i}": Module(f"b{i}", "Block", None) for i in range(50)}
    modules |= {f"b{i}.{j}": Module(f"b{i}.{j}", "Linear", f"b{i}") for i in range(50) for j in range(4)}
    made = nx.DiGraph(modules=modules)
    for i in range(50):
        for j in range(4):
            made.add_node(
                f"n{i}_{j}", **node("op", f"b{i}.{j}", weight=f"w{i}_{j}", numel=1, sparsity=0.0, weight_shape="1")
            )
    nx.add_path(made, list(made))
    assert len(collapse(made)) == 50
    assert len(collapse(made, depth=1)) == 200


def test_reads_across_the_passes_are_light_but_for_the_turning_point() -> None:
    made = nx.DiGraph(modules={})
    for name, kind, backward in (
        ("x", "input", False), ("a", "op", False), ("b", "op", False), ("t", "input", False),
        ("db", "op", True), ("da", "op", True),
    ):  # fmt: skip
        made.add_node(f"node {name}", box=Collapsed(name, kind=kind, backward=backward))
    for edge in ("x a", "a b", "b db", "t db", "db da", "a da", "x da"):
        made.add_edge(*(f"node {end}" for end in edge.split()))
    assert light_edges(made) == {("node a", "node da"), ("node x", "node da")}
