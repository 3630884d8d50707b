"""All models of torchvision: prepared and eager, prepared and compiled, and compiled in one line, they compute the same
outputs and gradients as plain autograd over the definition."""

import gc
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import reference
import torch
from hidden.compare import error, without_inductor
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autosparse_fx import AutoSparse, sparsify, thresholds

pytest.importorskip("torchvision")
import torchvision_zoo as zoo
from torchvision.models import list_models
from torchvision_zoo import Case

# All of torch itself, about dense models as well: where a compiled graph begins with a computed tensor, and of
# torchvision's own operators.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf",
    "ignore:.create_unbacked_symint. is deprecated:FutureWarning",
)

ALPHA = 0.75
SAMPLE = ["resnet18", "lraspp_mobilenet_v3_large"]
INDUCTOR = ["resnet18", "mobilenet_v3_small", "swin_t"]
MODELS = [name for name in list_models() if name not in zoo.EXCLUDED]

Results = dict[str, Tensor | None]


@pytest.fixture(autouse=True)
def collected() -> Iterable[None]:
    """A model and its graphs are cycles of some GB, which must not be there at the same time as the next ones."""
    yield
    gc.collect()


def settings(cuts: dict[str, float]) -> dict[str, Any]:
    rules = {name: {"threshold_init": math.log(cut / (1 - cut))} for name, cut in cuts.items()}
    return {"target_sparsity": None, "alpha": ALPHA, "rules": rules}


def results(call: Callable[..., Any], args: tuple[Any, ...], wanted: dict[str, Tensor]) -> Results:
    """Floating-point outputs, and gradients of the sum of their squares (None where unused)."""
    leaves = [t for t in tree_leaves(call(*args)) if isinstance(t, Tensor) and t.is_floating_point()]
    loss = torch.stack([t.square().sum() for t in leaves]).sum()
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    outputs = {f"output {i}": t.detach() for i, t in enumerate(leaves)}
    return {**outputs, **dict(zip(wanted, gradients, strict=True))}


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def by_definition(case: Case, cuts: dict[str, float], alpha: float = ALPHA) -> Results:
    """The dense model called with masked weights, and their gradients taken on to weights and thresholds one by one."""
    held = trainable(case.model)
    logits = {name: torch.tensor([math.log(cut / (1 - cut))], dtype=torch.float32) for name, cut in cuts.items()}
    logits = {name: s.to(held[name].dtype).requires_grad_() for name, s in logits.items()}
    read = {name: reference.masked(held[name], s, alpha).detach().requires_grad_() for name, s in logits.items()}

    def call(*args: Any) -> Any:
        return torch.func.functional_call(case.model, read, args)

    found = results(call, case.args, {**held, **read})
    for name, s in logits.items():
        grad = found[name]
        is_read = not name.startswith(case.unread)
        assert grad is not None and grad.any() == is_read, f"{name} is not used: choose other inputs"
        masked = reference.masked(held[name], s, alpha)
        found[name], ds = torch.autograd.grad(masked, (held[name], s), grad)
        found[f"{name}_threshold"] = (0.1 * ds).float()
    return found


def assert_same(found: Results, expected: Results) -> None:
    """Every tensor within 1e-4 of its own largest value in float32, and much closer in float64.

    Some gradients are rounding errors of 0, as those of a bias before batch norm: they may differ by as much as the
    arithmetic of the larger ones does.
    """
    assert set(found) == set(expected)
    largest = max(float(t.abs().max()) for t in expected.values() if t is not None)
    single = all(t is None or t.dtype == torch.float32 for t in expected.values())
    rtol, floor = (1e-4, 1e-6) if single else (1e-6, 1e-14)
    for name, t in expected.items():
        other = found[name]
        if t is None or other is None:
            assert t is None and other is None, name
            continue
        bound = rtol * float(t.abs().max()) + floor * largest
        off = float((other - t).abs().max())
        assert off <= bound, f"{name}: off by {off:.1e}, which may be {bound:.1e}"


def check(make: Callable[[], Case], unseen: tuple[str, ...] = ()) -> None:
    case = make()
    names = set(case.cuts)
    seen = {name: cut for name, cut in case.cuts.items() if not name.startswith(unseen)}
    held = trainable(case.model)
    for name, cut in case.cuts.items():
        assert 0.2 < float((held[name].detach().abs() <= cut).double().mean()) < 0.4  # the comparison says something
    expected = by_definition(case, case.cuts)
    expected_of_seen = expected if len(seen) == len(names) else by_definition(case, seen)

    example_inputs = case.args if names - set(zoo.layer_weights(case.model)) else None
    model = sparsify(case.model, AutoSparse(**settings(case.cuts)), example_inputs=example_inputs)
    assert set(thresholds(model)) == names
    assert_same(results(model, case.args, trainable(model)), expected)
    assert_same(results(torch.compile(model, backend="autosparse"), case.args, trainable(model)), expected)
    del case, model, held

    torch._dynamo.reset()
    case = make()
    options = {"total_steps": 10, **settings(case.cuts)}
    compiled = torch.compile(case.model, backend="autosparse", options=options)
    found = results(compiled, case.args, trainable(case.model))
    assert set(thresholds(case.model)) == set(seen)
    assert_same(found, {name: t for name, t in expected_of_seen.items() if not name.endswith("_threshold")})


def test_every_model_is_tested_or_excluded_for_a_reason() -> None:
    assert sorted([*MODELS, *zoo.EXCLUDED]) == sorted(list_models())
    assert all(zoo.EXCLUDED.values())
    assert {*SAMPLE, *INDUCTOR, *zoo.THIN, *zoo.UNSEEN} <= set(MODELS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_sample_computes_what_the_definition_says(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    without_inductor(monkeypatch)
    check(lambda: zoo.build(name))


def test_small_vision_transformer_computes_what_the_definition_says(monkeypatch: pytest.MonkeyPatch) -> None:
    without_inductor(monkeypatch)
    check(zoo.small_vision_transformer)


def test_comparison_sees_one_dense_weight_and_another_alpha() -> None:
    case = zoo.build("shufflenet_v2_x0_5")
    expected = by_definition(case, case.cuts)
    assert_same(by_definition(case, case.cuts), expected)
    for name in [*case.cuts][::10]:
        dense = by_definition(case, {n: cut for n, cut in case.cuts.items() if n != name})
        with pytest.raises(AssertionError, match="off by"):
            assert_same({**dense, f"{name}_threshold": expected[f"{name}_threshold"]}, expected)
    with pytest.raises(AssertionError, match="off by"):
        assert_same(by_definition(case, case.cuts, alpha=0.749), expected)


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_model_computes_what_the_definition_says(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """With eager kernels under AOTAutograd: Inductor would take hours."""
    without_inductor(monkeypatch)
    check(lambda: zoo.build(name), zoo.UNSEEN.get(name, ()))


@pytest.mark.long
@pytest.mark.parametrize("name", INDUCTOR)
def test_model_computes_what_the_definition_says_under_inductor(name: str) -> None:
    check(lambda: zoo.build(name))


@pytest.mark.long
@pytest.mark.parametrize("name", zoo.UNSEEN)
def test_weights_that_dynamo_never_shows_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    without_inductor(monkeypatch)
    model, args, cuts, _ = zoo.build(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    compiled = torch.compile(model, backend="autosparse", options={"total_steps": 10, **settings(cuts)})
    sum(compiled(*args).values()).backward()
    assert zoo.UNSEEN[name][0] in error(optimizer.step)
