"""The one-line form where models, their parts and compiled code do not match one to one."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from hidden.compare import (
    INIT,
    OLD,
    Mlp,
    assert_same,
    check,
    eager,
    error,
    one_line,
    options,
    outputs_and_gradients,
    without_inductor,
)
from torch import Tensor, nn

from autosparse_fx import AutoSparse, finalize, report, sparsify, sparsity, thresholds

# All of torch itself: where a compiled graph begins with a computed tensor.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_inductor(monkeypatch)


def train(model: nn.Module, call: Callable[..., Any], steps: int = 10, prepared: bool = False) -> None:
    from autosparse_fx import GradientAnnealing

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if prepared:
        GradientAnnealing(model, 10, optimizer)
    for x, y in reference.classification_batches(steps):
        optimizer.zero_grad()
        F.cross_entropy(call(x), y).backward()
        optimizer.step()


def assert_same_training(model: nn.Module, twin: nn.Module) -> None:
    for (name, p), q in zip(
        model.named_parameters(), (p for n, p in twin.named_parameters() if not n.endswith("_threshold")), strict=True
    ):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=name)
    ours, theirs = thresholds(model), thresholds(twin)
    for name, s in theirs.items():
        torch.testing.assert_close(ours[name], s, rtol=1e-3, atol=1e-3, msg=name)


# Ways to compile.


NEVER_CALLED = pytest.mark.xfail(
    OLD,
    reason="Dynamo of torch 2.11 leaves an nn.Sequential that is compiled in place to eager mode: the backend is never "
    "called, and to train the model is an error",
    strict=True,
)


@pytest.mark.parametrize("make", [Mlp, pytest.param(reference.mlp, marks=NEVER_CALLED)])
def test_module_compiled_in_place(make: Callable[[], nn.Module]) -> None:
    model = make()
    twin = sparsify(copy.deepcopy(model), AutoSparse(threshold_init=INIT))
    dense = copy.deepcopy(model)
    model.compile(backend="autosparse", options=options())
    names = [name for name, _ in dense.named_parameters()]
    assert_same(outputs_and_gradients(model, model, names, X), outputs_and_gradients(twin, twin, names, X))
    assert set(thresholds(model)) == {"0.weight", "2.weight", "4.weight"}


@pytest.mark.parametrize("whole_step", [False, True], ids=["forward", "whole step"])
def test_compiled_function_that_closes_over_the_model(whole_step: bool) -> None:
    model = reference.mlp()
    twin = sparsify(copy.deepcopy(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(model(x), y)
        if whole_step:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss

    compiled = torch.compile(step, backend="autosparse", options={"total_steps": 10})
    for x, y in reference.classification_batches(10):
        loss = compiled(x, y)
        if not whole_step:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert set(thresholds(model)) == {"0.weight", "2.weight", "4.weight"}
    train(twin, twin, prepared=True)
    assert_same_training(model, twin)
    assert abs(sparsity(model) - 0.8) < 0.005


def test_rules_of_a_compiled_function_take_the_names_of_the_model() -> None:
    model = reference.mlp()
    step = torch.compile(lambda x: model(x).sum(), backend="autosparse", options=options(rules={"2.weight": None}))
    step(X).backward()
    assert set(thresholds(model)) == {"0.weight", "4.weight"}


def test_weight_that_no_module_holds() -> None:
    weight = nn.Parameter(torch.randn(8, 16) / 4)
    found = torch.compile(lambda x: F.linear(x, weight), backend="autosparse", options=options())(X)
    torch.testing.assert_close(found, F.linear(X, reference.masked(weight, torch.tensor(INIT), 0.75)))


# Regional compilation.


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mlp(16, 32, 16) for _ in range(4))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


FIRST = [f"blocks.{i}.0.weight" for i in range(4)]
ALL = {f"blocks.{i}.{j}.weight" for i in range(4) for j in (0, 2, 4)}


def by_block(model: Blocks, **extra: Any) -> Blocks:
    for block in model.blocks:
        block.compile(backend="autosparse", options=options(**extra))
    return model


def test_equal_blocks_have_thresholds_of_their_own_and_one_target() -> None:
    model = by_block(Blocks(), threshold_init="auto")
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            block[0].weight.mul_(1 + i)
    # The head runs outside all that is compiled: it is dense, and nobody misses it.
    twin = sparsify(copy.deepcopy(model), AutoSparse(rules={"head.weight": None}))
    train(model, model)
    assert set(thresholds(model)) == ALL
    assert len({round(thresholds(model)[name].item(), 3) for name in FIRST}) == 4
    train(twin, twin, prepared=True)
    assert_same_training(model, twin)
    assert abs(sparsity(model) - 0.8) < 0.005
    assert "head.weight" in report(model).skipped


@pytest.mark.parametrize("pattern", ["blocks.2.0.weight", "blocks.2.*", "re:blocks\\.2\\..*"])
def test_rule_means_only_one_of_several_equal_blocks(pattern: str) -> None:
    model = by_block(Blocks(), rules={pattern: None})
    names = [name for name, _ in model.named_parameters()]
    dense = {"blocks.2.0.weight"} if pattern.endswith("0.weight") else {f"blocks.2.{j}.weight" for j in (0, 2, 4)}
    found = outputs_and_gradients(model, model, names, X)
    assert set(thresholds(model)) == ALL - dense
    for block in model.blocks:
        block._compiled_call_impl = None
    assert_same(found, outputs_and_gradients(eager(model), model, names, X))


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_rule_for_the_first_block_only(granularity: str) -> None:
    """The graph that all four share is compiled for a weight that stays dense."""
    model = by_block(Blocks(), rules={"blocks.0.*": None}, granularity=granularity)
    model(X)
    assert set(thresholds(model)) == {name for name in ALL if not name.startswith("blocks.0.")}


def test_rule_by_the_name_inside_the_block_means_all_of_them() -> None:
    model = by_block(Blocks(), rules={"0.weight": None})
    model(X)
    assert set(thresholds(model)) == ALL - set(FIRST)


def test_rule_by_the_name_inside_a_later_part_is_no_mistake() -> None:
    model = nn.Sequential(Mlp(16, 32, 16), reference.Residual(16, 32, 16))
    for part in model:
        part.compile(backend="autosparse", options=options(rules={"stem.weight": None}))
    model(X)
    assert set(thresholds(model)) == {
        "0.0.weight",
        "0.2.weight",
        "0.4.weight",
        "1.branch.0.weight",
        "1.branch.2.weight",
        "1.head.weight",
    }


def test_granularities_that_differ_in_shared_code_are_refused_with_the_cure() -> None:
    text = error(by_block(Blocks(), rules={"blocks.2.*": {"granularity": "channel"}}), X)
    assert "blocks.2.0.weight" in text and "same granularity" in text and "sparsify" in text


def test_target_of_one_of_several_equal_blocks() -> None:
    model = by_block(Blocks(), threshold_init="auto", rules={"blocks.2.*": {"target_sparsity": 0.5}})
    train(model, model)
    layers = {layer.name: layer for layer in report(model).layers}
    for part, target in ((layers.keys() & {f"blocks.2.{j}.weight" for j in (0, 2, 4)}, 0.5), (layers.keys(), None)):
        chosen = [layers[n] for n in part if target or not n.startswith("blocks.2.")]
        reached = sum(x.zeros for x in chosen) / sum(x.numel for x in chosen)
        assert abs(reached - (target or 0.8)) < 0.01


# Several models.


@pytest.mark.parametrize("other", [{}, {"granularity": "channel", "target_sparsity": 0.5}], ids=["equal", "different"])
def test_two_models_interleaved(other: dict[str, Any]) -> None:
    a, b = reference.mlp(), reference.mlp()
    twins = [sparsify(copy.deepcopy(a)), sparsify(copy.deepcopy(b), AutoSparse(**other))]
    steps = [
        torch.compile(m, backend="autosparse", options={"total_steps": 10, **extra})
        for m, extra in ((a, {}), (b, other))
    ]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (a, b)]
    for x, y in reference.classification_batches(10):
        losses = [F.cross_entropy(step(x), y) for step in steps]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for model, twin in zip((a, b), twins, strict=True):
        train(twin, twin, prepared=True)
        assert_same_training(model, twin)


def test_several_instances_share_compiled_code() -> None:
    models = [nn.Linear(16, 16) for _ in range(5)]
    step = torch.compile(lambda m, x: m(x), backend="autosparse", options=options(), fullgraph=True)
    for _ in range(2):
        for model in models:
            torch.testing.assert_close(step(model, X), eager(model)(X) if thresholds(model) else step(model, X))
    with torch.compiler.set_stance("fail_on_recompile"):
        for model in models:
            torch.testing.assert_close(step(model, X), eager(model)(X))


def test_compiling_a_masked_model_again_with_other_options_is_refused() -> None:
    model = reference.mlp()
    one_line(model)(X)
    text = error(one_line(model, target_sparsity=0.5), X)
    assert "'0.weight' is being made sparse already, with other options" in text


SHARED_WITH_DENSE = pytest.mark.xfail(
    reason="a graph compiled for an instance without masks takes no thresholds; Dynamo runs it for an instance with "
    "masks too, which is then dense in silence",
    strict=True,
)


def test_code_shared_with_a_finalized_instance_masks_the_others() -> None:
    done, new = reference.mlp(), reference.mlp()
    finalize(sparsify(done, AutoSparse(target_sparsity=None, threshold_init=INIT)))
    step = torch.compile(lambda m, x: m(x), backend="autosparse", options=options())
    step(done, X)
    step(new, X)
    assert set(thresholds(new)) == {"0.weight", "2.weight", "4.weight"}


@SHARED_WITH_DENSE
def test_code_compiled_without_options_for_a_dense_instance_masks_the_others() -> None:
    dense, masked = reference.mlp(), reference.mlp()
    expected = one_line(masked)(X)
    step = torch.compile(lambda m, x: m(x), backend="autosparse")
    with torch.no_grad():
        step(dense, X)
        torch.testing.assert_close(step(masked, X), expected)


# Parts.


class WithHead(nn.Module):
    def __init__(self, recurrent: bool = False) -> None:
        super().__init__()
        self.backbone: nn.Module = Recurrent() if recurrent else Mlp(16, 32, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.lstm = nn.Linear(16, 16), nn.LSTM(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.stem(x).unsqueeze(1))[0].squeeze(1)


@pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "in place"])
def test_head_outside_the_compiled_backbone_is_dense_and_not_missed(in_place: bool) -> None:
    model = WithHead()
    if in_place:
        model.backbone.compile(backend="autosparse", options=options())
    else:
        model.backbone = one_line(model.backbone)
    train(model, model, 2)
    assert len(thresholds(model)) == 3 and not any("head" in name for name in thresholds(model))


@pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "in place"])
def test_lstm_inside_the_compiled_backbone_is_missed(in_place: bool) -> None:
    model = WithHead(recurrent=True)
    if in_place:
        model.backbone.compile(backend="autosparse", options=options())
    else:
        model.backbone = one_line(model.backbone)
    # Where Dynamo leaves the whole backbone to eager mode, its first weight is the one that is named.
    missed = r"weight 'backbone\.(lstm\.weight_ih_l0|stem\.weight)'"
    with pytest.raises(RuntimeError, match=rf"(?s){missed}.*nn\.LSTM.*sparsify"):
        train(model, model, 1)


def test_cure_for_the_lstm_by_a_rule_works_or_says_what_else_to_do() -> None:
    model = Recurrent()
    try:
        train(model, one_line(model, rules={"lstm.*": None}), 2)
    except RuntimeError as refusal:  # where Dynamo leaves the whole of it to eager mode
        assert "weight 'stem.weight'" in str(refusal) and "sparsify" in str(refusal) and not thresholds(model)
        model = Recurrent()
        train(model, one_line(model, rules={"*": None}), 2)
    else:
        assert set(thresholds(model)) == {"stem.weight"}


# Owners.


def test_parameters_frozen_out_of_the_garbage_collector_keep_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """``gc.freeze()``, as training scripts call it after building the model."""
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 1)  # which the tests' own freezing hides
    model = reference.mlp()
    gc.collect()
    gc.freeze()
    try:
        text = error(one_line(model, rules={"nope": None}), X)
        assert "'nope' matches no parameter" in text
        assert check(model, X, config={"rules": {"2.*": None}}) == {"0.weight", "4.weight"}
    finally:
        gc.unfreeze()
