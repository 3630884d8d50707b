"""diff_graphs on graphs made by hand, and on what a pass made of one."""

import operator

import torch
from torch import nn
from torch.fx import Graph, symbolic_trace

import autosparse_fx
from autosparse_fx import pipeline
from autosparse_fx.view import diff_graphs


def two_layers(*, masked: bool = False, shifted: bool = False) -> Graph:
    """relu(linear(x, w)), optionally with a mask on w, or with an addition before, which moves the names on."""
    graph = Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    if shifted:
        x = graph.call_function(operator.add, (x, 1))
    if masked:
        w = graph.call_function(torch.sign, (w,))
    y = graph.call_function(operator.add, (graph.call_function(torch.matmul, (x, w)), 2))
    graph.output(graph.call_function(torch.relu, (y,)))
    return graph


def test_equal_graphs_do_not_differ() -> None:
    found = diff_graphs(two_layers(), two_layers())
    assert not found
    assert str(found) == "no change"


def test_an_inserted_node_is_added_and_its_user_rewired() -> None:
    found = diff_graphs(two_layers(), two_layers(masked=True))
    assert list(found.added) == ["sign"]
    assert not found.removed and not found.renamed
    assert found.rewired == {"matmul": (("x", "w"), ("x", "sign"))}
    assert "+ sign = " in str(found) and "~ matmul: (x, w) -> (x, sign)" in str(found)


def test_the_way_back_removes_it() -> None:
    found = diff_graphs(two_layers(masked=True), two_layers())
    assert list(found.removed) == ["sign"] and not found.added
    assert found.rewired == {"matmul": (("x", "sign"), ("x", "w"))}


def test_a_node_that_was_renamed_is_the_same() -> None:
    before, after = two_layers(), two_layers(shifted=True)
    assert [n.name for n in after.nodes if n.target is operator.add] == ["add", "add_1"]
    found = diff_graphs(before, after)
    assert found.rewired == {"matmul": (("x", "w"), ("add", "w"))}
    assert list(found.added) == ["add"] and not found.removed
    assert found.renamed == {"add_1": "add"}


def test_other_constants_are_a_change() -> None:
    def times(factor: float) -> Graph:
        graph = Graph()
        graph.output(graph.call_function(operator.mul, (graph.placeholder("x"), factor)))
        return graph

    found = diff_graphs(times(2.0), times(3.0))
    assert found.altered == {"mul": ("(x, 2.0)", "(x, 3.0)")}
    assert found and not (found.added or found.removed or found.rewired)


def test_what_a_pass_changed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    step = torch.compile(model, backend="autosparse", options={"target_sparsity": 0.5, "total_steps": 4})
    step(torch.randn(2, 4)).sum().backward()
    captured, inserted = pipeline.compilations[-1].versions[:2]
    assert inserted.pass_name == "insert_masks"
    found = diff_graphs(captured.graph, inserted.graph)
    masks = [name for name, call in found.added.items() if "threshold_mask" in call]
    assert len(masks) == 2
    assert sorted(mask for _, after in found.rewired.values() for mask in after if mask in masks) == sorted(masks)
    assert not found.removed


def test_one_compilation_and_the_next() -> None:
    def compiled(model: nn.Module) -> Graph:
        torch._dynamo.reset()
        torch.compile(model, backend="autosparse")(torch.randn(2, 4))
        return pipeline.compilations[-1].versions[-1].graph

    model = autosparse_fx.sparsify(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    first = compiled(model)
    assert not diff_graphs(first, compiled(model))
    model.append(nn.Tanh())
    found = diff_graphs(first, compiled(model))
    assert any("tanh" in call for call in found.added.values())


def test_a_traced_model_is_compared_by_what_it_does() -> None:
    found = diff_graphs(symbolic_trace(lambda x: x.relu() + 1).graph, symbolic_trace(lambda x: x.tanh() + 1).graph)
    assert list(found.added) == ["tanh"] and list(found.removed) == ["relu"]
    assert found.rewired == {"add": (("relu",), ("tanh",))}
