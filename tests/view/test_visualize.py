"""What visualize writes, and what it refuses before anything is written."""

import shutil
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from torch import nn

import autosparse_fx
from autosparse_fx.view import files
from autosparse_fx.view import visualize as module
from autosparse_fx.view.html import page

SUFFIXES = (".html", ".svg", ".png", ".dot", ".graphml")
INPUT = torch.zeros(2, 4)


@pytest.fixture
def model() -> nn.Module:
    return autosparse_fx.sparsify(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 2))))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_is_written_whole(model: nn.Module, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    (graph,) = autosparse_fx.visualize(model, INPUT, path)
    assert path.stat().st_size > 500
    assert list(tmp_path.iterdir()) == [path]
    assert sum(data["is_mask"] for _, data in graph.nodes(data=True)) == 2


def test_a_capital_suffix_and_a_plain_string_will_do(model: nn.Module, tmp_path: Path) -> None:
    autosparse_fx.visualize(model, INPUT, str(tmp_path / "model.DOT"))
    assert (tmp_path / "model.DOT").read_text().startswith("digraph")


def test_a_png_has_the_shape_of_its_graph(model: nn.Module, tmp_path: Path) -> None:
    def size(path: Path) -> tuple[int, int]:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        return width, height

    autosparse_fx.visualize(model, INPUT, tmp_path / "small.png")
    deep = nn.Sequential(*(nn.Linear(4, 4) for _ in range(60)))
    autosparse_fx.visualize(deep, INPUT, tmp_path / "large.png")
    (width, height), (wide, high) = size(tmp_path / "small.png"), size(tmp_path / "large.png")
    assert 500 < width < 1200 and 300 < height < 1200
    assert wide > 1.5 * width and high < 3000  # wrapped, not a strip


def test_an_svg_is_xml_with_its_text_as_text(model: nn.Module, tmp_path: Path) -> None:
    autosparse_fx.visualize(model, INPUT, tmp_path / "model.svg")
    root = ET.parse(tmp_path / "model.svg").getroot()
    text = "".join(root.itertext())
    assert "Sequential: forward graph" in text
    assert "Linear 8\u00d74" in text and "zeros" in text
    autosparse_fx.visualize(model, INPUT, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "model.svg").read_bytes()


def test_graphml_gives_the_graph_back(model: nn.Module, tmp_path: Path) -> None:
    (graph,) = autosparse_fx.visualize(model, INPUT, tmp_path / "model.graphml")
    read = nx.read_graphml(tmp_path / "model.graphml")
    assert dict(read.nodes(data=True)) == dict(graph.nodes(data=True))
    assert set(read.edges) == set(graph.edges)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pydot 4 calls pyparsing by its old names
def test_dot_gives_the_graph_back(model: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("pydot")
    (graph,) = autosparse_fx.visualize(model, INPUT, tmp_path / "model.dot")
    edges = {(e.get_source().strip('"'), e.get_destination().strip('"')) for e in _dot_edges(tmp_path / "model.dot")}
    assert edges == set(graph.edges)


def _dot_edges(path: Path) -> list[Any]:
    import pydot

    (parsed,) = pydot.graph_from_dot_file(str(path))
    return list(parsed.get_edges())


def test_dot_has_modules_as_clusters_and_quotes_everything(tmp_path: Path) -> None:
    graph = nx.DiGraph(modules={})
    graph.add_node('a"b\\', kind="op", module="", label='say "hi"\nthere', sparsity=1.0)
    with (tmp_path / "x.dot").open("wb") as file:
        files.write_dot([graph], ["t"], file)
    text = (tmp_path / "x.dot").read_text()
    assert '"a\\"b\\\\" [' in text and 'label="say \\"hi\\"\\nthere"' in text


def test_sizes_of_tensors_are_no_shapes_of_nodes_in_dot(model: nn.Module, tmp_path: Path) -> None:
    """Graphviz has its own `shape`."""
    (graph,) = autosparse_fx.visualize(model, INPUT, tmp_path / "model.dot")
    assert {"2x4", "8x4"} <= {data.get("shape") for _, data in graph.nodes(data=True)}
    text = (tmp_path / "model.dot").read_text()
    assert 'tensor_shape="2x4"' in text and ' shape="' not in text


@pytest.mark.skipif(shutil.which("dot") is None, reason="no Graphviz on this machine")
def test_graphviz_knows_all_that_a_dot_file_says(model: nn.Module, tmp_path: Path) -> None:
    autosparse_fx.visualize(model, INPUT, tmp_path / "model.dot")
    done = subprocess.run(["dot", "-Tdot", tmp_path / "model.dot"], capture_output=True, text=True, check=True)
    assert "Warning" not in done.stderr


def test_modules_are_clusters_of_dot(model: nn.Module, tmp_path: Path) -> None:
    autosparse_fx.visualize(model, INPUT, tmp_path / "model.dot")
    text = (tmp_path / "model.dot").read_text()
    assert text.index('subgraph "cluster_2"') < text.index('subgraph "cluster_2.0"')
    assert text.count("{") == text.count("}")


def test_a_page_needs_nothing_else_and_names_are_data(tmp_path: Path) -> None:
    graph = nx.DiGraph(modules={})
    graph.add_node("n", kind="op", module="", label="</script><script>alert(1)</script>", source="<!--")
    text = page([("<b>&", {"after": graph})], version="after")
    assert (
        "</script><script>alert" not in text and "<!--" not in text.partition('id="data"')[2].partition("</script>")[0]
    )
    assert "<title>&lt;b&gt;&amp;</title>" in text
    assert text.count("<script") == text.count("</script>") == 5
    assert 'src="' not in text and '<link rel="stylesheet' not in text and "sourceMappingURL" not in text
    assert "default-src 'none'" in text


@pytest.mark.parametrize("kind", ["joint", "backward"])
@pytest.mark.parametrize("suffix", [".html", ".png", ".dot"])
def test_other_graphs_are_drawn_on_request(model: nn.Module, tmp_path: Path, kind: str, suffix: str) -> None:
    (graph,) = autosparse_fx.visualize(model, INPUT, tmp_path / f"model{suffix}", graph=kind)
    assert sum(data["is_gradient"] for _, data in graph.nodes(data=True)) == 2


def test_before_the_passes_is_another_version(tmp_path: Path) -> None:
    layer = nn.Linear(4, 4)
    model = autosparse_fx.sparsify(nn.Sequential(layer, nn.ReLU(), layer))
    counts = [
        sum(
            d["is_mask"]
            for g in autosparse_fx.visualize(model, INPUT, tmp_path / "m.dot", version=v)
            for _, d in g.nodes.items()
        )
        for v in ("before", "after")
    ]
    assert counts == [2, 1]


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        torch._dynamo.graph_break()
        return self.b(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_graph_of_a_broken_model_is_drawn_and_said_so(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    with pytest.warns(UserWarning, match=r"Broken breaks into 2 graphs.*graph_break"):
        graphs = autosparse_fx.visualize(autosparse_fx.sparsify(Broken()), INPUT, path)
    assert len(graphs) == 2
    if suffix != ".png":
        text = path.read_text()
        assert "graph 1 of 2" in text and "graph 2 of 2" in text
    if suffix == ".graphml":
        assert sorted(n.split("/")[0] for n, d in nx.read_graphml(path).nodes(data=True) if d["is_mask"]) == [
            "graph1",
            "graph2",
        ]


def test_the_model_is_left_as_it_was(model: nn.Module, tmp_path: Path) -> None:
    model.append(nn.BatchNorm1d(2)).append(nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    autosparse_fx.visualize(model, INPUT, tmp_path / "m.dot")
    autosparse_fx.visualize(model, INPUT, tmp_path / "m.dot", graph="joint")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_compiled_model_is_drawn_as_the_model(model: nn.Module, tmp_path: Path) -> None:
    (graph,) = autosparse_fx.visualize(torch.compile(model), INPUT, tmp_path / "m.dot")
    assert {d["weight"] for _, d in graph.nodes(data=True) if d["is_mask"]} == {"0.weight", "2.0.weight"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path": "model.jpeg"}, ValueError, r"'model.jpeg'.*\.html, \.svg, \.png, \.dot, \.graphml"),
        ({"path": "model"}, ValueError, "must end in one of"),
        ({"path": "nowhere/model.html"}, FileNotFoundError, "nowhere.* is not there: make it first"),
        ({"path": "taken.html"}, IsADirectoryError, "is a directory: give the name of a file"),
        ({"graph": "sideways"}, ValueError, "graph must be one of 'forward', 'joint', 'backward', got 'sideways'"),
        ({"version": "later"}, ValueError, "version must be one of 'before', 'after', got 'later'"),
        ({"depth": -1}, ValueError, "depth must be a number of levels"),
        ({"model": lambda x: x}, TypeError, r"visualize takes a torch\.nn\.Module, got function"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_the_model_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    class NeverRun(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("the model ran")

    (tmp_path / "taken.html").mkdir()
    monkeypatch.chdir(tmp_path)
    given = {"model": NeverRun(), "example_inputs": INPUT, "path": "model.html", **arguments}
    with pytest.raises(error, match=message):
        autosparse_fx.visualize(**given)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.html"]


def test_inputs_that_do_not_fit_leave_no_file(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "model.html").write_text("what was there")
    with pytest.raises(ValueError, match="could not be run on the example_inputs"):
        autosparse_fx.visualize(model, torch.zeros(2, 5), tmp_path / "model.html")
    assert (tmp_path / "model.html").read_text() == "what was there"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failure_while_writing_leaves_nothing_behind(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(files, "write_dot", fail)
    with pytest.raises(OSError, match="no space"):
        autosparse_fx.visualize(model, INPUT, tmp_path / "model.dot")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_operations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Identity has no forward graph"):
        autosparse_fx.visualize(nn.Identity(), INPUT, tmp_path / "model.html")


@pytest.mark.parametrize("package", ["matplotlib", "py_mini_racer"])
def test_a_picture_without_the_extra_names_it(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*pip install 'autosparse-fx\[plot\]'"):
        autosparse_fx.visualize(model, INPUT, tmp_path / "model.png")
    autosparse_fx.visualize(model, INPUT, tmp_path / "model.html")


def test_importing_the_package_imports_nothing_that_draws() -> None:
    import subprocess

    code = (
        "import autosparse_fx, sys; print([m for m in ('matplotlib', 'py_mini_racer', 'networkx') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
    assert module.visualize is autosparse_fx.visualize
