"""The backend "autosparse": found by name, its options, and that it hands Inductor what it should."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from backend_models import MASK, X, sparse_mlp
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

from autosparse_fx import AutoSparse, GradientAnnealing, finalize, sparsify
from autosparse_fx.joint import JointPasses

# All of torch itself, about dense models as well: where a compiled graph begins with a computed tensor, and in export.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf",
    "ignore:.*isinstance.treespec, LeafSpec:FutureWarning",
)


class Handed:
    """What the backend hands to Inductor, which is left out: graphs run as they are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patches: list[dict[str, Any]] = []
        self.graphs: list[GraphModule] = []

        def compile_fx(gm: GraphModule, inputs: Any, *, config_patches: dict[str, Any], **_: Any) -> Callable[..., Any]:
            self.patches.append(dict(config_patches))
            self.graphs.append(gm)
            return gm.forward

        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> Handed:
    return Handed(monkeypatch)


# Finding it.


def test_found_by_name_without_importing_the_package() -> None:
    code = (
        "import sys, torch\n"
        "assert 'autosparse_fx' not in sys.modules\n"
        "assert 'autosparse' in torch._dynamo.list_backends()\n"
        "with torch.no_grad():\n"
        "    m = torch.nn.Linear(4, 3)\n"
        "    x = torch.randn(2, 4)\n"
        "    torch.testing.assert_close(torch.compile(m, backend='autosparse')(x), m(x))\n"
        "assert 'autosparse_fx.backend' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True, timeout=300)


def test_found_by_name_after_importing_the_package_and_twice() -> None:
    code = (
        "import torch, autosparse_fx, autosparse_fx.backend\n"
        "from torch._dynamo.backends.registry import lookup_backend\n"
        "assert lookup_backend('autosparse') is lookup_backend('autosparse') is autosparse_fx.backend.autosparse\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_importing_the_package_loads_neither_inductor_nor_what_is_optional() -> None:
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import autosparse_fx\n"
        "new = set(sys.modules) - before\n"
        "slow = ('torch._inductor.compile_fx', 'torch._inductor.lowering', 'transformers', 'networkx')\n"
        "assert not new & set(slow), new & set(slow)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


# Options.


def test_nothing_but_our_pass_is_patched_by_default(handed: Handed) -> None:
    torch.compile(sparse_mlp(), backend="autosparse")(X)
    (patches,) = handed.patches
    assert set(patches) == {"joint_custom_post_pass"}
    assert isinstance(patches["joint_custom_post_pass"], JointPasses)


@pytest.mark.parametrize("how", ["mode", "options"])
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_mode_passes_through(handed: Handed, mode: str, how: str) -> None:
    arguments: dict[str, Any] = {"mode": mode} if how == "mode" else {"options": {"mode": mode}}
    torch.compile(sparse_mlp(), backend="autosparse", **arguments)(X)
    (patches,) = handed.patches
    del patches["joint_custom_post_pass"]
    assert patches == torch._inductor.list_mode_options(mode) != {}


@pytest.mark.parametrize(
    "arguments", [{"mode": "default"}, {"options": {"mode": "default"}}, {"options": {"mode": None}}]
)
def test_default_mode_is_no_mode(handed: Handed, arguments: dict[str, Any]) -> None:
    torch.compile(sparse_mlp(), backend="autosparse", **arguments)(X)
    assert set(handed.patches[0]) == {"joint_custom_post_pass"}


def test_options_of_inductor_pass_through_beside_a_mode(handed: Handed) -> None:
    options = {"mode": "reduce-overhead", "epilogue_fusion": False, "triton.cudagraphs": False, "max-autotune": True}
    torch.compile(sparse_mlp(), backend="autosparse", options=options)(X)
    (patches,) = handed.patches
    assert patches["epilogue_fusion"] is False and patches["max_autotune"] is True
    assert patches["triton.cudagraphs"] is False  # what is said wins over what the mode means
    assert options == {
        "mode": "reduce-overhead",
        "epilogue_fusion": False,
        "triton.cudagraphs": False,
        "max-autotune": True,
    }


def compile_error(model: nn.Module, x: Tensor = X, **arguments: Any) -> str:
    with pytest.raises(Exception) as caught:  # Dynamo wraps what a backend raises in a class of its own
        torch.compile(model, backend="autosparse", **arguments)(x)
    return str(caught.value)


@pytest.mark.parametrize("name", ["no_such_option", "triton.no_such", "sparsity"])
def test_unknown_option_is_refused_by_name(name: str) -> None:
    text = compile_error(sparse_mlp(), options={name: 1})
    assert f"no option '{name}'" in text and "list_options" in text


@pytest.mark.parametrize("mode", ["fast", "reduce_overhead"])
def test_unknown_mode_is_refused_by_name(mode: str) -> None:
    text = compile_error(sparse_mlp(), options={"mode": mode})
    assert mode in text and "reduce-overhead" in text


def test_options_that_ask_for_sparsity_are_refused_for_a_prepared_model() -> None:
    text = compile_error(sparse_mlp(), options={"total_steps": 10})
    assert "was prepared with sparsify" in text and "without the options total_steps" in text


# Which models.


def test_unprepared_training_is_refused_naming_weight_and_cure() -> None:
    text = compile_error(reference.mlp())
    assert "not sparse" in text and "[64, 16]" in text and "autosparse_fx.sparsify" in text and "inductor" in text
    assert "weight" in text


@pytest.mark.parametrize("prepare", [lambda m: m, lambda m: m.requires_grad_(False)], ids=["no_grad", "frozen"])
def test_unprepared_model_that_does_not_train_compiles(
    handed: Handed, prepare: Callable[[nn.Module], nn.Module]
) -> None:
    model = prepare(reference.mlp())
    frozen = not next(model.parameters()).requires_grad
    with torch.set_grad_enabled(frozen):
        assert torch.equal(torch.compile(model, backend="autosparse")(X), model(X))
    (gm,) = handed.graphs
    assert not gm.graph.find_nodes(op="call_function", target=MASK)  # and never gets masks


def test_finalized_model_compiles_under_no_grad(handed: Handed) -> None:
    model = finalize(sparsify(reference.mlp(), AutoSparse(target_sparsity=None, threshold_init=-2.5)))
    with torch.no_grad():
        assert torch.equal(torch.compile(model.eval(), backend="autosparse")(X), model(X))
    assert not handed.graphs[0].graph.find_nodes(op="call_function", target=MASK)


def test_finalized_model_can_be_tuned_by_the_backend(handed: Handed) -> None:
    """Without options the backend never asks for sparsity, so that a finalized model can be compiled or tuned."""
    model = finalize(sparsify(reference.mlp(), AutoSparse(target_sparsity=None, threshold_init=-2.5)))
    torch.compile(model, backend="autosparse")(X).sum().backward()
    assert model[0].weight.grad is not None


def test_functions_without_weights_compile(handed: Handed) -> None:
    a = torch.randn(4, 4, requires_grad=True)
    assert torch.compile(lambda x: x @ a + x.sin(), backend="autosparse")(torch.ones(4, 4)).shape == (4, 4)


class WithBreak(nn.Module):
    """A graph break, and after it a part that a rule left dense, alone in its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.body(x))
        torch._dynamo.graph_break()
        return self.head(x)


def test_model_with_a_graph_break_and_a_dense_part_compiles(handed: Handed) -> None:
    model = sparsify(WithBreak(), AutoSparse(threshold_init=-2.5, rules={"head.weight": None}))
    out = torch.compile(model, backend="autosparse")(X)
    torch.testing.assert_close(out, model(X))
    assert [len(gm.graph.find_nodes(op="call_function", target=MASK)) for gm in handed.graphs] == [1, 0]
    out.sum().backward()


def test_copy_of_a_prepared_model_with_a_dense_part_compiles(handed: Handed) -> None:
    """A deep copy, a loaded pickle or a moved model is as prepared as its original."""
    model = copy.deepcopy(sparsify(WithBreak(), AutoSparse(threshold_init=-2.5, rules={"head.weight": None})))
    torch.compile(model, backend="autosparse")(X).sum().backward()
    assert len(handed.graphs) == 2


def test_prepared_model_that_was_moved_with_a_dense_part_compiles(handed: Handed) -> None:
    with torch.device("meta"):
        model = sparsify(WithBreak(), AutoSparse(threshold_init=-2.5, rules={"head.weight": None}))
    model.to_empty(device="cpu")
    torch.compile(model, backend="autosparse")(X)
    assert len(handed.graphs) == 2


# Graphs.


def test_passes_run_on_the_dynamo_graph(handed: Handed) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x))

    model = sparsify(Twice(), AutoSparse(threshold_init=-2.5))
    torch.testing.assert_close(torch.compile(model, backend="autosparse", fullgraph=True)(X), model(X))
    assert len(handed.graphs[0].graph.find_nodes(op="call_function", target=MASK)) == 1


def test_one_compile_for_a_whole_annealed_and_steered_training() -> None:
    model = sparsify(reference.ConvNet(), AutoSparse(0.8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    annealer = GradientAnnealing(model, 30, optimizer)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    batches = list(reference.classification_batches(30, shape=(1, 8, 8)))
    reference.train(compiled, optimizer, iter(batches[:1]))
    with torch.compiler.set_stance("fail_on_recompile"):
        reference.train(compiled, optimizer, iter(batches[1:]))
    assert annealer.alpha == 0
    assert abs(reference.total_sparsity(model) - 0.8) < 0.005


@pytest.mark.slow
def test_training_compiled_equals_training_eager() -> None:
    finals = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = sparsify(reference.mlp(), AutoSparse(0.8))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        GradientAnnealing(model, 10, optimizer)
        step = torch.compile(model, backend="autosparse", fullgraph=True) if compiled else model
        reference.train(step, optimizer, reference.classification_batches(10))
        finals.append(model.state_dict())
    for name, t in finals[0].items():
        torch.testing.assert_close(finals[1][name], t, rtol=1e-3, atol=1e-4, msg=name)


def test_evaluation_keeps_the_masks_and_follows_the_weights(handed: Handed) -> None:
    model = sparse_mlp().eval()
    compiled = torch.compile(model, backend="autosparse")
    with torch.no_grad():
        first = compiled(X)
        model[0]._parameters["weight"].mul_(2)
        second = compiled(X)
        torch.testing.assert_close(second, model(X))
    assert not torch.equal(first, second)
    assert len(handed.graphs) == 1


@pytest.mark.slow
def test_stock_backend_compiles_a_prepared_model_right() -> None:
    model = sparse_mlp()
    twin = copy.deepcopy(model)
    torch.compile(model, backend="inductor", fullgraph=True)(X).square().sum().backward()
    twin(X).square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)


# The joint passes among Inductor's.


class Counting(CustomGraphPass):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, graph: Graph) -> None:
        self.seen.append(len(graph.find_nodes(op="call_function", target=MASK)))

    def uuid(self) -> Any:
        return "counting-pass"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["option", "config"])
def test_the_users_own_joint_pass_still_runs(how: str) -> None:
    mine = Counting()
    model = sparse_mlp()
    if how == "option":
        torch.compile(model, backend="autosparse", options={"joint_custom_post_pass": mine})(X).sum().backward()
    else:
        with torch._inductor.config.patch(joint_custom_post_pass=mine):
            torch.compile(model, backend="autosparse")(X).sum().backward()
    assert mine.seen == [3]


def test_the_users_own_joint_pass_runs_before_ours() -> None:
    order: list[str] = []

    class Mine(Counting):
        def __call__(self, graph: Graph) -> None:
            order.append("tagged" if any("recompute" in n.meta for n in graph.nodes) else "fresh")

    graph = Graph()
    w = graph.placeholder("w")
    graph.output(graph.call_function(MASK, (w, w, w)))
    for passes in (Mine(), [Mine(), Mine()]):
        for node in graph.nodes:
            node.meta.clear()
        order.clear()
        JointPasses(passes)(graph)
        assert order == ["fresh"] * (len(passes) if isinstance(passes, list) else 1)
        assert any("recompute" in n.meta for n in graph.nodes)


def test_uuid_names_our_sources_and_the_users_passes() -> None:
    plain, mine = JointPasses().uuid(), JointPasses(Counting()).uuid()
    assert plain and plain == JointPasses().uuid() != mine
    assert "counting-pass" in mine
    assert JointPasses(lambda graph: None).uuid() is None  # a pass without identity turns caching off


@pytest.mark.slow
def test_cache_key_contains_our_uuid(tmp_path: Path) -> None:
    """The same graph: found in the cache again, and not found once our sources have changed."""
    code = """
import torch, autosparse_fx, autosparse_fx.joint
from torch._dynamo.utils import counters

def hits_and_misses():
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        torch.compile(model, backend="autosparse")(torch.ones(2, 8))
    found = counters["inductor"]
    assert found["fxgraph_cache_bypass"] == counters["aot_autograd"]["autograd_cache_bypass"] == 0
    return found["fxgraph_cache_hit"], found["fxgraph_cache_miss"]

model = autosparse_fx.sparsify(torch.nn.Linear(8, 8))
assert hits_and_misses() == (0, 1)
assert hits_and_misses() == (1, 0)
autosparse_fx.joint._source_hash = lambda passes: "other sources"
assert hits_and_misses() == (0, 1)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR_")}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, env=environment)
