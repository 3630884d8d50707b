"""With ``example_inputs`` the parameters that a model's own code multiplies by are found in its captured graphs."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autosparse_fx import AutoSparse, finalize, report, sparsify

CONFIG = AutoSparse(alpha=0.5, threshold_init=-2.5)


def masked_names(model: nn.Module) -> set[str]:
    return {name for name, *_ in reference.masked_parameters(model)}


class Own(nn.Module):
    """A user's module that multiplies by parameters of its own in many ways, and has others besides."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Parameter(torch.randn(8, 8) / 3)
        self.einsum = nn.Parameter(torch.randn(2, 8, 4) / 3)
        self.right = nn.Parameter(torch.randn(8, 8) / 3)
        self.left = nn.Parameter(torch.randn(6, 6) / 3)
        self.conv = nn.Parameter(torch.randn(8, 8, 3) / 5)
        self.layer = nn.Linear(8, 8)
        self.class_token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 6, 8))
        self.layer_scale = nn.Parameter(torch.full((1, 1, 8), 0.5))
        self.table = nn.Parameter(torch.randn(5, 8))
        self.gain = nn.Parameter(torch.ones(8))
        self.unused = nn.Parameter(torch.randn(8, 8))
        self.register_buffer("projection", torch.randn(8, 8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, ids: Tensor, *, scale: float = 1.0) -> Tensor:
        self.calls += 1
        x = F.embedding(ids, self.table)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        x = F.linear(x, self.linear)
        x = torch.einsum("bti,hid->bthd", x, self.einsum).flatten(2)
        x = x @ self.right * self.layer_scale
        x = self.left @ x
        x = F.conv1d(x.transpose(1, 2), self.conv, padding=1).transpose(1, 2)
        x = F.rms_norm(x, (8,), self.gain)
        return self.layer(x @ self.projection) * scale


MULTIPLIED = {"linear", "einsum", "right", "left", "conv", "layer.weight"}
IDS = torch.arange(10).reshape(2, 5) % 5


def test_exactly_what_is_multiplied_is_masked() -> None:
    model = sparsify(Own(), CONFIG, example_inputs=IDS)
    assert masked_names(model) == MULTIPLIED
    skipped = {name: why for name, (_, why) in report(model).skipped.items()}
    assert set(skipped) == {"class_token", "positions", "layer_scale", "table", "gain", "unused", "layer.bias"}


def test_without_example_inputs_only_the_layer_is_masked() -> None:
    assert masked_names(sparsify(Own(), CONFIG)) == {"layer.weight"}


def test_output_and_gradients_equal_the_reference() -> None:
    dense = Own()
    model = sparsify(copy.deepcopy(dense), CONFIG, example_inputs=IDS)
    held = dict(dense.named_parameters())
    with torch.no_grad():
        for name, _, weight, s in reference.masked_parameters(model):
            held[name].copy_(reference.masked(weight, s, 0.5))
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    expected, found, third = dense(IDS), model(IDS), compiled(IDS)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(third, expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    for name, module, weight, s in reference.masked_parameters(model):
        incoming = held[name].grad
        assert incoming is not None
        _, dw, ds = reference.gradients(weight, s, 0.5, incoming)
        torch.testing.assert_close(weight.grad, dw.float(), rtol=1e-4, atol=1e-4)
        threshold = module._parameters[name.rpartition(".")[2] + "_threshold"]
        assert threshold is not None
        torch.testing.assert_close(threshold.grad, 0.1 * ds.reshape(-1).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "axis"), [("linear", 0), ("einsum", 2), ("right", 1), ("left", 0), ("conv", 0)])
def test_channel_thresholds_follow_the_axis_of_the_output(name: str, axis: int) -> None:
    model = sparsify(Own(), AutoSparse(granularity="channel", threshold_init=-2.5), example_inputs=IDS)
    weight = model._parameters[name]
    threshold = model._parameters[f"{name}_threshold"]
    assert weight is not None and threshold is not None
    if name == "einsum":
        assert threshold.shape[0] in (weight.shape[0], weight.shape[2])  # heads, or channels within a head
        return
    assert threshold.shape == (weight.shape[axis],)
    with torch.no_grad():
        model._buffers[f"{name}_offset"][1] = 30.0
    zero = (getattr(model, name) == 0).transpose(0, axis).flatten(1).all(1)
    assert zero.nonzero().flatten().tolist() == [1]


def test_finalize_gives_the_plain_module_back() -> None:
    model = sparsify(Own(), AutoSparse(target_sparsity=None, threshold_init=-2.5), example_inputs=IDS)
    expected = model(IDS)
    finalize(model)
    assert type(model) is Own
    assert list(model.state_dict()) == list(Own().state_dict())
    assert torch.equal(model(IDS), expected)


@pytest.mark.parametrize(
    "inputs",
    [IDS, (IDS,), [IDS], {"ids": IDS}, {"ids": IDS, "scale": 2.0}],
    ids=["tensor", "tuple", "list", "dict", "kwargs"],
)
def test_example_inputs_are_a_tensor_a_tuple_or_keyword_arguments(inputs: Any) -> None:
    assert masked_names(sparsify(Own(), CONFIG, example_inputs=inputs)) == MULTIPLIED


class Stateful(nn.Module):
    """Counts, draws random numbers, and has batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(x @ self.weight + torch.randn(8)))


@pytest.mark.parametrize("training", [True, False])
def test_buffers_random_state_gradients_and_mode_are_untouched(training: bool) -> None:
    model = Stateful().train(training)
    model.norm.running_mean.normal_()
    model(torch.randn(4, 8)).sum().backward()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    buffers = {name: id(b) for name, b in model.named_buffers()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    rng = torch.get_rng_state()
    x = torch.randn(4, 8, requires_grad=True)
    torch.set_rng_state(rng)
    sparsify(model, CONFIG, example_inputs=x)
    assert torch.equal(torch.get_rng_state(), rng)
    assert x.grad is None and torch.is_grad_enabled()
    assert all(m.training is training for m in model.modules())
    for name, t in state.items():
        assert torch.equal(model.state_dict()[name], t), name
    for name, b in model.named_buffers():
        assert name not in buffers or id(b) == buffers[name]
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(grads)
    for name, grad in grads.items():
        assert torch.equal(dict(model.named_parameters())[name].grad, grad), name
    assert masked_names(model) == {"weight"}


class Broken(nn.Module):
    """Dynamo cannot trace it in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Parameter(torch.randn(8, 8))
        self.after = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.before
        torch._dynamo.graph_break()
        return x @ self.after if x.sum().item() < math.inf else x


def test_weights_on_both_sides_of_a_graph_break_are_found() -> None:
    assert masked_names(sparsify(Broken(), CONFIG, example_inputs=torch.randn(2, 8))) == {"before", "after"}


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Parameter(torch.randn(8, 8))
        self.scale = nn.Parameter(torch.randn(1, 8))

    def block(self, x: Tensor) -> Tensor:
        return (x @ self.inside) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)


def test_weights_inside_a_checkpointed_block_are_found() -> None:
    model = sparsify(Checkpointed(), CONFIG, example_inputs=torch.randn(2, 8))
    assert masked_names(model) == {"inside"}
    model(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert model._parameters["inside_threshold"].grad is not None


class InLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.ParameterList([torch.randn(8, 8) for _ in range(3)])
        self.named = nn.ParameterDict({"up": torch.randn(8, 8), "bias": torch.randn(8)})

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.stack:
            x = x @ weight
        return x @ self.named["up"] + self.named["bias"]


def test_parameters_in_lists_and_dicts_are_masked() -> None:
    dense = InLists()
    model = sparsify(copy.deepcopy(dense), CONFIG, example_inputs=torch.randn(2, 8))
    assert masked_names(model) == {"stack.0", "stack.1", "stack.2", "named.up"}
    assert len(model.stack) == 3 and set(model.named.keys()) == {"up", "bias"}
    held = dict(dense.named_parameters())
    with torch.no_grad():
        for name, _, weight, s in reference.masked_parameters(model):
            held[name].copy_(reference.masked(weight, s, 0.5))
    x = torch.randn(2, 8)
    torch.testing.assert_close(model(x), dense(x))
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), dense(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    finalize_quietly(model)
    assert list(model.state_dict()) == list(dense.state_dict())


def finalize_quietly(model: nn.Module) -> None:
    with pytest.warns(UserWarning, match="instead of the target"):
        finalize(model)


def test_many_models_of_one_class_are_all_captured() -> None:
    """Dynamo gives up compiling a function after some recompiles, and would then find nothing, silently."""
    for i in range(12):
        model = sparsify(Own(), AutoSparse(threshold_init=-2.5 - i / 10), example_inputs=IDS)
        assert masked_names(model) == MULTIPLIED, i


def test_a_model_that_is_compiled_already_can_be_captured() -> None:
    model = Own()
    model.compile(backend="eager")
    before = model(IDS)
    sparsify(model, CONFIG, example_inputs=IDS)
    assert masked_names(model) == MULTIPLIED
    assert not torch.equal(model(IDS), before)


def test_rules_apply_to_what_was_found() -> None:
    model = sparsify(Own(), AutoSparse(threshold_init=-2.5, rules={"linear": None}), example_inputs=IDS)
    assert masked_names(model) == MULTIPLIED - {"linear"}


def test_layer_that_the_example_does_not_reach_is_masked_all_the_same() -> None:
    class Optional(Own):
        def __init__(self) -> None:
            super().__init__()
            self.never = nn.Linear(8, 8)

    assert masked_names(sparsify(Optional(), CONFIG, example_inputs=IDS)) == MULTIPLIED | {"never.weight"}


@pytest.mark.parametrize(
    "inputs",
    [torch.randn(2, 5), (), (IDS, IDS), {"wrong": IDS}, {}],
    ids=["dtype", "none", "too many", "wrong name", "empty"],
)
def test_bad_example_inputs_are_refused_and_leave_the_model_alone(inputs: Any) -> None:
    model = Own()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"(?s)Own could not be run on the example_inputs.*arguments of one call"):
        sparsify(model, CONFIG, example_inputs=inputs)
    assert type(model) is Own and list(model.state_dict()) == list(state)
    for name, t in state.items():
        assert torch.equal(model.state_dict()[name], t), name


def test_nothing_multiplied_is_refused() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    with pytest.raises(ValueError, match="no weights to mask"):
        sparsify(Scale(), CONFIG, example_inputs=torch.randn(4, 4))


@pytest.mark.parametrize(
    "use",
    [
        lambda w, x: w * x,
        lambda w, x: x + w,
        lambda w, x: F.embedding(x[:, 0].long().abs() % 8, w),
        lambda w, x: w[x[:, 0].long().abs() % 8],
        lambda w, x: F.layer_norm(x, (8,), w[0]),
        lambda w, x: torch.cat([x, w]),
        lambda w, x: torch.where(x > 0, w[:1], x),
        lambda w, x: x / w.norm(),
    ],
)
def test_other_uses_of_a_parameter_are_no_multiplication(use: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.other = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return use(self.other, self.fc(x))

    assert masked_names(sparsify(Uses(), CONFIG, example_inputs=torch.randn(8, 8))) == {"fc.weight"}


class ReadsTwice(nn.Module):
    """Reads one weight before a checkpointed block, and twice inside of it, where a layer is called as well."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6) * 0.3)
        self.layer = nn.Linear(6, 6)
        self.checkpoints = True

    def block(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu(x @ self.weight)) + x @ self.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x @ self.weight)
        if not self.checkpoints:
            return self.block(x)
        return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)


def test_a_weight_that_is_read_outside_and_inside_of_a_checkpoint() -> None:
    x = torch.randn(3, 6)
    model = sparsify(ReadsTwice(), AutoSparse(threshold_init=-2.0), example_inputs=x)
    gradients = []
    for model.checkpoints in (False, True):
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
