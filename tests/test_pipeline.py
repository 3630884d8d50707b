"""The pipeline: passes in order and counted, and each version of a graph in memory, in the log and in the trace."""

import gc
import logging
import os
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from functorch.compile import aot_module_simplified, make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.fx import Graph, GraphModule

from autosparse_fx import AutoSparse, pipeline, sparsify
from autosparse_fx.passes import DYNAMO_PASSES, JOINT_PASSES
from autosparse_fx.passes.insert_masks import WEIGHT, MaskSpec
from autosparse_fx.pipeline import run_passes

MASK = torch.ops.autosparse.threshold_mask.default
X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
OPTIONS = {"target_sparsity": 0.8, "total_steps": 10}


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[deque[pipeline.Compilation]]:
    """No compilation of an earlier test is seen, and none of a test is kept for the next."""
    monkeypatch.setattr(pipeline, "compilations", deque(maxlen=pipeline.compilations.maxlen))
    yield pipeline.compilations


@pytest.fixture(autouse=True)
def without_code_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's part but for its code: the joint graph, our pass on it, the cut in two; graphs run as they are."""

    def compile_fx(gm: GraphModule, inputs: Any, *, config_patches: dict[str, Any], **_: Any) -> Callable[..., Any]:
        def partition(joint: GraphModule, *args: Any, **kwargs: Any) -> Any:
            config_patches["joint_custom_post_pass"](joint.graph)
            return min_cut_rematerialization_partition(joint, *args, **kwargs)

        def run(gm: GraphModule, inputs: Any) -> Callable[..., Any]:
            return make_boxed_func(gm.forward)

        return aot_module_simplified(gm, inputs, fw_compiler=run, bw_compiler=run, partition_fn=partition)  # type: ignore[no-any-return]

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)


class Twice(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.fc = nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.fc.weight), self.fc.weight.T)


def graph_of(*names: str) -> GraphModule:
    graph = Graph()
    nodes = [graph.placeholder(name) for name in names]
    graph.output(tuple(nodes))
    return GraphModule(nn.Module(), graph)


def pass_named(name: str, made: int, ran: list[str] | None = None) -> Callable[[GraphModule], Any]:
    def graph_pass(gm: GraphModule) -> int:
        if ran is not None:
            ran.append(name)
        return made

    graph_pass.__name__ = name
    return graph_pass


def versions() -> list[tuple[str, list[tuple[str, str, int]]]]:
    return [(c.id, [(v.stage, v.pass_name, v.changes) for v in c.versions]) for c in pipeline.compilations]


def masks(graph: Graph) -> int:
    return len(graph.find_nodes(op="call_function", target=MASK))


# Running.


def test_passes_run_in_order_and_are_counted() -> None:
    ran: list[str] = []
    passes = [pass_named("third", 3, ran), pass_named("first", 0, ran)]
    assert list(run_passes(graph_of("x"), passes, "dynamo").items()) == [("third", 3), ("first", 0)]
    assert ran == ["third", "first"]


def test_order_of_the_passes_of_the_package() -> None:
    assert [p.__name__ for p in DYNAMO_PASSES] == ["insert_masks", "dedupe_masks"]
    assert [p.__name__ for p in JOINT_PASSES] == ["tag_recompute"]


def test_checks_run_after_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[GraphModule, str, str]] = []
    monkeypatch.setattr(pipeline, "checks", [lambda *args: seen.append(args)])
    gm = graph_of("x")
    run_passes(gm, [pass_named("one", 1), pass_named("two", 0)], "joint")
    assert seen == [(gm, "joint", "one"), (gm, "joint", "two")]


def test_error_of_a_pass_or_a_check_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        run_passes(graph_of("x"), [refuse], "dynamo")
    monkeypatch.setattr(pipeline, "checks", [refuse])
    with pytest.raises(ValueError, match="refused"):
        run_passes(graph_of("x"), [pass_named("one", 1)], "dynamo")


@pytest.mark.parametrize("disabled", ["two", "TWO", "two,other"])
def test_pass_that_inductor_was_told_to_leave_out_is_skipped(
    disabled: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not counted, not checked, and not left out in silence; the passes behind it run."""
    ran: list[str] = []
    checked: list[str] = []
    monkeypatch.setattr(pipeline, "checks", [lambda gm, stage, name: checked.append(name)])
    passes = [pass_named(name, made, ran) for name, made in (("one", 1), ("two", 2), ("three", 0))]
    with torch._inductor.config.patch(disabled_passes=disabled):
        counts = run_passes(graph_of("x"), passes, "dynamo")
    assert (counts, ran, checked) == ({"one": 1, "three": 0}, ["one", "three"], ["one", "three"])
    assert versions()[0][1][-1] == ("dynamo", "one", 1)
    (warning,) = (r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)
    assert warning.startswith("two is disabled by") and "disabled_passes" in warning


def test_disabled_pass_of_the_package_leaves_the_graph_as_it_is() -> None:
    model = sparsify(Twice(), AutoSparse(threshold_init=-2.5))
    with torch._inductor.config.patch(disabled_passes="dedupe_masks"):
        torch.compile(model, backend="autosparse")(X)
    (compilation,) = pipeline.compilations
    assert [(v.pass_name, masks(v.graph)) for v in compilation.versions if v.stage == "dynamo"] == [("captured", 2)]


# Versions.


def test_versions_of_a_model_that_was_never_prepared() -> None:
    model = reference.mlp()
    torch.compile(model, backend="autosparse", options=OPTIONS)(X).sum().backward()
    ((_, found),) = versions()
    names = [("dynamo", "captured", 0), ("dynamo", "insert_masks", 3), ("joint", "captured", 0)]
    assert found[:3] == names
    assert [v[:2] for v in found[3:]] == [("joint", "tag_recompute")] and found[3][2] >= 3
    graphs = [v.graph for v in pipeline.compilations[0].versions]
    assert [masks(graph) for graph in graphs] == [0, 3, 3, 3]
    assert ["recompute" in graph.find_nodes(op="call_function", target=MASK)[0].meta for graph in graphs[2:]] == [
        False,
        True,
    ]
    for graph in graphs:
        graph.lint()


def test_versions_of_a_prepared_model() -> None:
    """Its masks are there when it is captured, and merged; there is nothing to insert."""
    model = sparsify(Twice(), AutoSparse(threshold_init=-2.5))
    torch.compile(model, backend="autosparse")(X).sum().backward()
    ((_, found),) = versions()
    assert [v[:2] for v in found] == [
        ("dynamo", "captured"),
        ("dynamo", "dedupe_masks"),
        ("joint", "captured"),
        ("joint", "tag_recompute"),
    ]
    assert [masks(v.graph) for v in pipeline.compilations[0].versions] == [2, 1, 1, 1]


def test_version_of_the_captured_graph_keeps_its_names_and_is_not_rewritten() -> None:
    gm = graph_of("x", "y")

    def rename(gm: GraphModule) -> int:
        next(iter(gm.graph.nodes)).target = "other"
        return 1

    run_passes(gm, [rename], "dynamo")
    first, second = pipeline.compilations[0].versions
    assert [n.target for n in first.graph.nodes] == ["x", "y", "output"]
    assert [n.target for n in second.graph.nodes] == ["other", "y", "output"]
    assert first.graph is not gm.graph and second.graph is not gm.graph


def test_every_compilation_is_an_entry_of_its_own() -> None:
    """Recompiled for other sizes, the same frame is 0/0 and then 0/1; the next frame is 1/0."""
    compiled = torch.compile(lambda m, x: m(x), backend="autosparse", options=OPTIONS, dynamic=False)
    for x in (X, X[:2]):
        compiled(reference.mlp(), x).sum().backward()
    torch.compile(Twice(), backend="autosparse", options=OPTIONS)(X).sum().backward()
    ids, stages = zip(*versions(), strict=True)
    assert ids == ("0/0", "0/1", "1/0")
    for found in stages:
        assert [v[:2] for v in found] == [
            ("dynamo", "captured"),
            ("dynamo", "insert_masks"),
            ("joint", "captured"),
            ("joint", "tag_recompute"),
        ]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_graphs_on_both_sides_of_a_break_are_entries_of_their_own() -> None:
    class Broken(Twice):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            torch._dynamo.graph_break()
            return F.linear(x, self.fc.weight)

    torch.compile(Broken(), backend="autosparse", options=OPTIONS)(X).sum().backward()
    assert len({c.id for c in pipeline.compilations}) == len(pipeline.compilations) == 2
    assert [c.versions[1].changes for c in pipeline.compilations] == [1, 1]


def test_memory_is_bounded() -> None:
    limit = pipeline.compilations.maxlen
    assert limit is not None
    for i in range(limit + 3):
        run_passes(graph_of(f"x{i}"), [], "dynamo")
    assert len(pipeline.compilations) == limit
    assert next(iter(pipeline.compilations[0].versions[0].graph.nodes)).name == "x3"
    assert next(iter(pipeline.compilations[-1].versions[0].graph.nodes)).name == f"x{limit + 2}"


def test_compilations_that_dynamo_does_not_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of a served model that change, and whatever else is compiled outside of Dynamo."""
    stages = ("inference", "joint", "inference", "joint", "joint")
    for stage in stages:
        run_passes(graph_of("x"), [], stage)
    found = [(id_, [stage for stage, _, _ in made]) for id_, made in versions()]
    assert found == [("", ["inference", "joint"]), ("", ["inference", "joint"]), ("", ["joint"])]
    monkeypatch.setattr("autosparse_fx._compat.dynamo.current_compile_id", lambda: "0/0")
    for stage in ("dynamo", "inference", "joint", "joint"):  # the last of a subgraph and of the graph
        run_passes(graph_of("x"), [], stage)
    assert [stage for stage, _, _ in versions()[-1][1]] == ["dynamo", "inference", "joint", "joint"]


def real_tensors(value: Any, seen: set[int]) -> list[Tensor]:
    """The tensors with data that a value leads to, through containers."""
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, Tensor):
        return [] if isinstance(value, FakeTensor) else [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
    return [t for v in inner for t in real_tensors(v, seen)]


@pytest.mark.parametrize("prepared", [False, True])
def test_versions_lead_to_no_real_tensor(prepared: bool) -> None:
    model = sparsify(Twice()) if prepared else Twice()
    torch.compile(model, backend="autosparse", options=None if prepared else OPTIONS)(X).sum().backward()
    for version in pipeline.compilations[0].versions:
        for node in version.graph.nodes:
            assert "grapharg" not in node.meta
            assert not real_tensors(node.meta, set()), node


@pytest.mark.parametrize("prepared", [False, True])
def test_weights_are_freed_with_the_model(prepared: bool) -> None:
    model = sparsify(Twice()) if prepared else Twice()
    compiled = torch.compile(model, backend="autosparse", options=None if prepared else OPTIONS)
    compiled(X).sum().backward()
    weight = weakref.ref(model.fc._parameters["weight"])
    del model, compiled
    torch._dynamo.reset()
    gc.collect()
    assert weight() is None
    assert len(pipeline.compilations[0].versions) == 4


def test_weight_that_is_an_attribute_of_the_graph_is_freed_with_it() -> None:
    """The state of its mask knows the weight by name only, so that no version leads to the graph that was compiled."""
    graph = Graph()
    weight = graph.get_attr("weight")
    with torch._subclasses.FakeTensorMode():
        weight.meta.update(example_value=torch.empty(3, 6), **{WEIGHT: MaskSpec(0.1)})
    graph.output((graph.call_function(torch.sin, (weight,)),))
    gm = GraphModule(nn.Linear(6, 3, bias=False), graph)
    assert run_passes(gm, DYNAMO_PASSES, "dynamo")["insert_masks"] == 1
    parameter = weakref.ref(gm.weight)
    del gm, graph, weight
    gc.collect()
    assert parameter() is None
    assert len(pipeline.compilations[0].versions) == 2


# Log and trace.


def test_counts_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "autosparse_fx"):
        torch.compile(Twice(), backend="autosparse", options=OPTIONS)(X)
    text = [r.getMessage() for r in caplog.records if r.name == "autosparse_fx.pipeline"]
    assert text[:2] == [
        "compilation 0/0, dynamo graph: insert_masks made 1 changes",
        "compilation 0/0, dynamo graph: dedupe_masks made 0 changes",
    ]
    assert len(text) == 3 and "joint graph: tag_recompute made" in text[2]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """What a process prints and traces that was started with TORCH_LOGS and TORCH_TRACE."""
    code = (
        "import torch, torch._inductor.compile_fx\n"
        "torch._inductor.compile_fx.compile_fx = lambda gm, inputs, **_: gm.forward\n"
        "torch.compile(torch.nn.Linear(4, 3), backend='autosparse', options={'total_steps': 9})(torch.ones(2, 4))\n"
    )
    folder: Path = tmp_path_factory.mktemp("trace")
    environment = {**os.environ, "TORCH_LOGS": "+autosparse_fx", "TORCH_TRACE": str(folder)}
    found = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=300, env=environment, text=True, capture_output=True
    )
    return found.stderr, "".join(path.read_text() for path in folder.iterdir())


def test_torch_logs_prints_the_counts(traced: tuple[str, str]) -> None:
    printed, _ = traced
    assert "insert_masks made 1 changes" in printed and "dedupe_masks made 0 changes" in printed


def test_torch_trace_has_the_graph_after_each_pass_that_changed_it(traced: tuple[str, str]) -> None:
    _, trace = traced
    assert trace.count("autosparse_after_insert_masks") == 1
    assert "autosparse_after_dedupe_masks" not in trace
    artifact = trace[trace.index("autosparse_after_insert_masks") :]
    assert "torch.ops.autosparse.threshold_mask.default(" in artifact
