"""capture: the graphs of one call, by the names of their tensors, and nothing left behind in model or inputs."""

import gc
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from flops.compare import Around
from torch import Tensor, nn

import autosparse_fx
from autosparse_fx.capture import capture, multiplied_parameters

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        torch._dynamo.graph_break()
        return x * 2


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a call of a model could change."""
    found: dict[str, Any] = {name: (id(t), t.detach().clone()) for name, t in model.state_dict(keep_vars=True).items()}
    found |= {f"{name} grad": parameter.grad for name, parameter in model.named_parameters()}
    found |= {f"{name} mode": module.training for name, module in model.named_modules()}
    found |= {f"{name} compiled": module._compiled_call_impl for name, module in model.named_modules()}
    found |= {f"{name} attributes": sorted(vars(module)) for name, module in model.named_modules()}
    return {**found, "random": torch.get_rng_state(), "grad mode": torch.is_grad_enabled()}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (value, other[name])), strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, name


def noisy(self: Any, x: Tensor) -> Tensor:
    self.calls.add_(1)
    return self.net(x + torch.randn_like(x))


def restless() -> nn.Module:
    """It draws random numbers, counts its calls, and takes statistics."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 5))
    return Around(noisy, net=net, calls=torch.zeros((), dtype=torch.long))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shapes", [None, [{0: "n"}]])
def test_the_model_is_as_before(training: bool, shapes: Any) -> None:
    model, x = restless().train(training), torch.randn(6, 3)
    model(x)
    before, inputs = state(model), (x.clone(), sorted(vars(x)))
    capture(model, x, shapes)
    assert_same(before, state(model))
    assert torch.equal(x, inputs[0]) and sorted(vars(x)) == inputs[1] == []
    assert not any(hasattr(x, name) for name in ("_dynamo_dynamic_indices", "_dynamo_weak_dynamic_indices"))


def test_submodules_keep_their_own_modes_and_gradients() -> None:
    model, x = restless(), torch.randn(6, 3)
    model.net[1].eval()
    model(x).sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    before = state(model)
    capture(model, x)
    assert_same(before, state(model))
    assert all(torch.equal(a, b.grad) for a, b in zip(grads, model.parameters(), strict=True))


def test_a_model_that_raises_is_as_before() -> None:
    def fails(self: Any, x: Tensor) -> Tensor:
        noisy(self, x)
        if x.shape[0] == 6:
            raise RuntimeError("not today")
        return x

    model, x = restless(), torch.randn(6, 3)
    model.function = fails
    model.net.compile(backend="eager")
    before = state(model)
    with pytest.raises(
        ValueError, match=r"(?s)Around could not be run on the example_inputs \(.*not today.*dict of keyword"
    ):
        capture(model, x)
    assert_same(before, state(model))
    with torch.no_grad(), pytest.raises(ValueError, match="not today"):
        capture(model, x)
    assert torch.is_grad_enabled()


def test_a_buffer_that_the_model_replaces_is_put_back() -> None:
    """``self.count = self.count + 1``, as moving averages are often written."""

    def counts(self: Any, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x * self.calls

    model = Around(counts, calls=torch.zeros(()))
    capture(model, torch.randn(3))
    assert model.calls == 0


def names(model: nn.Module, inputs: Any) -> list[set[str]]:
    """The tensors of each call of each graph."""
    return [set(call.values()) for graph in capture(model, inputs).graphs for call in graph.calls]


def test_tensors_have_their_full_names() -> None:
    model = restless()
    assert names(model, torch.randn(6, 3)) == [set(model.state_dict())]


def test_each_call_of_a_shared_graph_has_tensors_of_its_own() -> None:
    """Dynamo compiles one graph for the blocks that look alike."""
    model = nn.Sequential(Broken(), Broken(), Broken())
    found = capture(model, torch.randn(2, 4))
    calls = [set(call.values()) for graph in found.graphs for call in graph.calls]
    assert sorted(sorted(call) for call in calls if call) == [[f"{i}.fc.bias", f"{i}.fc.weight"] for i in range(3)]
    assert len(found.breaks) == 1 and "graph_break" in found.breaks[0]
    assert capture(nn.Linear(4, 4), torch.randn(2, 4)).breaks == []


def test_graphs_hold_no_tensors_of_the_model() -> None:
    """A capture may outlive the model."""
    model = autosparse_fx.sparsify(reference.mlp())
    found = capture(model, torch.randn(2, 16))
    watched = [weakref.ref(model), *map(weakref.ref, model.parameters())]
    del model
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)
    assert len(found.graphs) == 1


def test_buffers_that_stay_as_they_are_do_not_count_as_written_to() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    for train in (False, True):
        model.train(train)
        before = [(buffer._version, buffer.clone()) for buffer in model.buffers()]
        capture(model, torch.randn(2, 1, 5, 5))
        for buffer, (version, value) in zip(model.buffers(), before, strict=True):
            assert torch.equal(buffer, value) and (train or buffer._version == version)


def test_buffers_without_values() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        assert len(capture(model, torch.randn(2, 1, 5, 5)).graphs) == 1


def test_inputs_that_were_made_in_inference_mode() -> None:
    model = autosparse_fx.sparsify(reference.mlp())
    with torch.inference_mode():
        x = torch.randn(2, 16)
        assert len(capture(model, x).graphs) == 1
    assert len(capture(model, {"input": x}).graphs) == 1


def test_graphs_before_and_after_the_passes() -> None:
    """A tied weight is masked by each module that reads it, and once after the passes."""
    model = autosparse_fx.sparsify(reference.Tied())
    graph = capture(model, torch.arange(6).view(2, 3)).graphs[0]

    def masks(gm: torch.fx.GraphModule) -> int:
        return sum("threshold_mask" in str(node.target) for node in gm.graph.nodes)

    assert (masks(graph.gm), masks(graph.rewritten)) == (3, 2)


def test_the_mode_of_the_model_is_the_mode_of_the_graph() -> None:
    def has_dropout(model: nn.Module) -> bool:
        graph = capture(model, torch.randn(6, 3)).graphs[0].gm.graph
        return any(node.target is nn.functional.dropout and node.args[2] for node in graph.nodes)

    assert has_dropout(restless())
    assert not has_dropout(restless().eval())


FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "compiled in place": lambda model: model.compile(backend="eager") or model,
    "a part compiled in place": lambda model: model.net.compile(backend="eager") or model,
    "wrapped": lambda model: torch.compile(model, backend="eager"),
    "wrapped and called": lambda model: torch.compile(model, backend="eager"),
}


@pytest.mark.parametrize("form", FORMS)
def test_compiled_models(form: str) -> None:
    """They are captured whole, and their own compiled code is used again afterwards."""
    model, x = restless(), torch.randn(6, 3)
    compiled = FORMS[form](model)
    if form == "wrapped and called":
        compiled(x)
    before = state(model)
    found = capture(compiled, x)
    assert_same(before, state(model))
    assert [len(graph.calls) for graph in found.graphs] == [1]
    assert {name.removeprefix("_orig_mod.") for name in found.graphs[0].calls[0].values()} == set(model.state_dict())
    assert compiled(x).shape == (6, 5)


@pytest.mark.xfail(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters,
    strict=True,
    reason="before torch 2.15 the frames of a broken graph keep an entry of each capture, which count for the limit",
)
def test_captures_do_not_use_up_the_recompiles_of_the_user() -> None:
    """A report at the end of each epoch would turn the user's own torch.compile off."""
    model, x = nn.Sequential(Broken(), Broken()), torch.randn(2, 4)
    for _ in range(12):
        capture(model, x)
    compiled: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiled.append(gm)
        return gm.forward

    torch.compile(model, backend=backend)(x)
    assert compiled


def test_a_compiled_model_is_not_compiled_again() -> None:
    compiled: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiled.append(gm)
        return gm.forward

    model, x = reference.mlp(), torch.randn(2, 16)
    step = torch.compile(model, backend=backend)
    for _ in range(3):
        step(x)
        capture(model, x, [{0: "n"}])
    assert len(compiled) == 1


@pytest.mark.parametrize(
    "inputs", [(torch.randn(2, 3),), [torch.randn(2, 3)], {"x": torch.randn(2, 3)}, torch.randn(2, 3)]
)
def test_inputs_of_one_call(inputs: Any) -> None:
    assert len(capture(Around(lambda self, x: x + 1), inputs).graphs) == 1


@pytest.mark.parametrize("inputs", [torch.randn(2, 4), (), (1, 2), {"y": torch.randn(2, 3)}, None])
def test_inputs_that_do_not_fit(inputs: Any) -> None:
    with pytest.raises(ValueError, match=r"(?s)Linear could not be run on the example_inputs.*arguments of one call"):
        capture(nn.Linear(3, 4), inputs)


def test_inputs_of_any_kind_pass_through() -> None:
    def run(self: Any, pair: tuple[Tensor, dict[str, Tensor]], *, scale: float, flag: bool) -> Tensor:
        return self.fc(pair[0] + pair[1]["y"]) * scale if flag else pair[0]

    inputs = {"pair": (torch.randn(2, 3), {"y": torch.randn(2, 3)}), "scale": 2.0, "flag": True}
    assert names(Around(run, fc=nn.Linear(3, 4)), inputs) == [{"fc.weight", "fc.bias"}]


def test_a_dynamic_input_keeps_its_gradient() -> None:
    """The marked view stands for it, and a leaf of its own takes no gradient from it."""
    x = torch.randn(2, 3, requires_grad=True)
    found = capture(nn.Linear(3, 4), x, [{0: "n"}])
    values = [node.meta["example_value"] for node in found.graphs[0].gm.graph.nodes if node.op == "placeholder"]
    assert [value.requires_grad for value in values if isinstance(value, Tensor)] == [True] * 3
    assert x.grad is None and x.is_leaf and list(found.names.values()) == ["n"]


def test_recurrent_layers_are_captured_and_the_setting_is_put_back() -> None:
    before = torch._dynamo.config.allow_rnn
    assert names(nn.LSTM(3, 4), torch.randn(5, 2, 3)) == [set(nn.LSTM(3, 4).state_dict())]
    assert torch._dynamo.config.allow_rnn == before


def test_multiplied_parameters_and_the_axis_of_their_channels() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.ConvTranspose1d(4, 2, 1))
    x = torch.randn(2, 3, 5)
    before = state(model)
    found = multiplied_parameters(model, x)
    assert_same(before, state(model))
    assert found == {id(model[0].weight): 0, id(model[2].weight): 1}
