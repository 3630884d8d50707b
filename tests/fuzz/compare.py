"""One network in four forms: prepared and eager, prepared and compiled, in one line, and by the definition alone."""

import copy
from collections.abc import Callable
from typing import Any

import reference
import torch
from fuzz.networks import Network
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import autosparse_fx
from autosparse_fx import AutoSparse, GradientAnnealing, sparsify, thresholds

INIT, SCALE, STEPS, LR = -2.5, 0.1, 4, 0.1
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # weights are float64, thresholds float32


def backward(call: Callable[..., Any], x: Tensor) -> list[Tensor]:
    """The outputs of one call, whose sum of squares is then differentiated where it can be."""
    outputs = [t for t in tree_leaves(call(x)) if isinstance(t, Tensor)]
    loss = sum((t.square().sum() for t in outputs), torch.zeros(()))
    if loss.requires_grad:
        loss.backward()
    return [t.detach() for t in outputs]


class Reference:
    """A dense copy whose weights are replaced by masked ones that ordinary autograd computes."""

    def __init__(self, dense: nn.Module, axes: dict[str, int], granularity: str) -> None:
        self.model = dense
        self.alpha = 0.0
        self.weights: dict[str, nn.Parameter] = {}
        self.thresholds: dict[str, Tensor] = {}
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        modules = list(dense.named_modules(remove_duplicate=False))
        named = dict(dense.named_parameters())
        for name, axis in axes.items():
            w = named[name]
            shape = [w.shape[d] if d == axis and granularity == "channel" else 1 for d in range(w.dim())]
            self.weights[name] = w
            self.thresholds[name] = torch.zeros(shape, requires_grad=True)
            self._places[name] = [
                (module, key) for _, module in modules for key, p in module._parameters.items() if p is w
            ]
        self.others = {name: p for name, p in named.items() if name not in axes}
        for places in self._places.values():
            for module, key in places:
                module._parameters.pop(key, None)

    def __call__(self, x: Tensor) -> Any:
        for name, w in self.weights.items():
            masked = reference.masked(w, self.logit(name).double(), self.alpha)
            for module, key in self._places[name]:
                module.__dict__[key] = masked
        return self.model(x)

    def logit(self, name: str) -> Tensor:
        return INIT + SCALE * self.thresholds[name]

    def parameters(self) -> dict[str, Tensor]:
        return {**self.others, **self.weights, **{f"{n}_threshold": t for n, t in self.thresholds.items()}}


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(what: str, found: Tensor | None, expected: Tensor | None) -> None:
    """A gradient of zeros is none."""
    found = torch.zeros(()) if found is None else found.detach()
    expected = torch.zeros(()) if expected is None else expected.detach()
    shape = max(found.shape, expected.shape, key=len)
    torch.testing.assert_close(
        found.double().expand(shape) if found.numel() == 1 else found.double().reshape(shape),
        expected.double().expand(shape) if expected.numel() == 1 else expected.double().reshape(shape),
        msg=lambda text: f"{what}: {text}",
        **TOLERANCE,
    )


def check(network: Network) -> None:
    """Two training steps in every form; outputs, gradients and what the steps made of the model agree."""
    torch._dynamo.reset()
    xs = network.inputs()
    dense = network.build()
    config: dict[str, Any] = {
        "threshold_init": INIT, "threshold_scale": SCALE, "target_sparsity": None, "granularity": network.granularity,
    }  # fmt: skip
    prepared = copy.deepcopy(dense)
    try:
        sparsify(prepared, AutoSparse(**config), example_inputs=xs[0])
    except ValueError as error:
        assert "has no weights to mask" in str(error)
        return
    twin, one = copy.deepcopy(prepared), copy.deepcopy(dense)
    expected = Reference(copy.deepcopy(dense), {n: network.axis(n) for n in thresholds(prepared)}, network.granularity)
    steps = {
        "eager": prepared,
        "compiled": torch.compile(twin, backend="autosparse"),
        "one line": torch.compile(one, backend="autosparse", options={"total_steps": STEPS, **config}),
    }
    models = {"eager": prepared, "compiled": twin, "one line": one}
    optimizers = {form: torch.optim.SGD(m.parameters(), lr=LR) for form, m in models.items()}
    annealers = {f: GradientAnnealing(models[f], STEPS, optimizers[f]) for f in ("eager", "compiled")}
    for x in xs:
        expected.alpha = annealers["eager"].alpha
        outputs = backward(expected, x)
        parameters = expected.parameters()
        for form, call in steps.items():
            for i, (found, right) in enumerate(zip(backward(call, x), outputs, strict=True)):
                assert_same(f"{form}: output {i}", found, right)
            for name, gradient in gradients(models[form]).items():
                assert_same(f"{form}: gradient of {name}", gradient, parameters[name].grad)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for p in parameters.values():
                if p.grad is not None:
                    p -= LR * p.grad
                    p.grad = None
        for form, model in models.items():
            for name, p in model.named_parameters():
                assert_same(f"{form}: {name} after a step", p, parameters[name])
            for name, s in thresholds(model).items():
                assert_same(f"{form}: threshold of {name} after a step", s, expected.logit(name).flatten())
    never = set(thresholds(prepared)) - set(thresholds(one))
    used = {name for name, p in expected.weights.items() if not torch.equal(p, dict(dense.named_parameters())[name])}
    assert not never & used, f"one line: {never & used} not masked"
    sparse = [autosparse_fx.finalize(model) for model in models.values()]
    for model in sparse[:2]:
        with torch.no_grad():
            found, right = tree_leaves(model(xs[0])), tree_leaves(expected(xs[0]))
        for i, output in enumerate(right):
            assert_same(f"finalized: output {i}", found[i], output)
