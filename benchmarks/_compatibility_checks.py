"""What is checked of a model: it trains, compiles, is finalized, saved and loaded as the README says."""

import math
import re
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

import autosparse_fx
from _compatibility_case import Case
from autosparse_fx import AutoSparse

STEPS, TARGET, RATE = 3, 0.9, 0.01
TOLERANCE = 1e-4
CONFIG = AutoSparse(target_sparsity=TARGET)

# In the order in which they run; each is a method of Checks.
CHECKS = {
    "sparsify": "`sparsify(model, example_inputs=...)`",
    "eager": f"{STEPS} steps in eager mode end at {TARGET:.0%} zeros",
    "state": "`state_dict()` of the sparse model into another one: the same outputs",
    "finalize": "`finalize`: outputs the same to the last bit, plain classes, the dense model's keys",
    "reload": "the finalized model saved and loaded: outputs the same to the last bit",
    "compiled": '`torch.compile(model, backend="autosparse")`: losses of eager mode, nothing compiled after step 1',
    "one line": '`options={"target_sparsity": ..., "total_steps": ...}`: the same weights masked, the same losses',
}


class Mismatch(Exception):
    """Something ran and is not what it should be."""


class Checks:
    """Runs the checks one by one, and keeps what each of them found."""

    def __init__(self, build: Callable[[], Case], save: Callable[[dict[str, Any]], None]) -> None:
        self.build, self.save = build, save
        self.found: dict[str, Any] = {"checks": {}}
        self.losses: list[float] = []
        self.masked: set[str] = set()
        self.trained: Case
        self.plain: tuple[list[Any], list[str]]  # of the dense model: its classes and its keys

    def run(self) -> dict[str, Any]:
        """All checks, as far as they do not build on one that failed, and the dense model where a compiled one did."""
        case = self.build()
        self.found |= {"kind": case.kind, "parameters": sum(p.numel() for p in case.model.parameters())}
        first, second, *others = CHECKS
        if self.attempt(first) and self.attempt(second):
            passed = {name: self.attempt(name) for name in others}
            if not (passed["compiled"] and passed["one line"]):
                self.attempt("dense")
        return self.found

    def attempt(self, name: str) -> bool:
        torch._dynamo.reset()
        start = time.perf_counter()
        try:
            self.found["checks"][name] = getattr(self, name.replace(" ", "_"))()
        except Exception as error:
            self.found["checks"][name] = {"error": told(error), "at": deepest_frames(error)}
        self.found["checks"][name]["seconds"] = round(time.perf_counter() - start, 1)
        self.save(self.found)
        return "error" not in self.found["checks"][name]

    def sparsify(self) -> dict[str, Any]:
        case = self.build()
        self.plain = described(case.model)
        self.trained = prepared(case)
        self.masked = set(autosparse_fx.thresholds(self.trained.model))
        layers = autosparse_fx.report(self.trained.model).layers
        self.found["masked"] = sum(layer.numel for layer in layers)
        return {"weights": len(layers)}

    def eager(self) -> dict[str, Any]:
        self.losses, _ = train(self.trained, self.trained.model)
        expect_target(self.trained.model)
        return {"losses": self.losses}

    def state(self) -> dict[str, Any]:
        other = prepared(self.build())
        other.model.load_state_dict(self.trained.model.state_dict())
        expect_equal(outputs(other), outputs(self.trained), "outputs of the loaded model")
        return {}

    def finalize(self) -> dict[str, Any]:
        model = self.trained.model
        before = outputs(self.trained)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            autosparse_fx.finalize(model)
        expect_equal(outputs(self.trained), before, "outputs of the finalized model")
        for what, found, expected in zip(("classes", "keys"), described(model), self.plain, strict=True):
            if found != expected:
                raise Mismatch(f"the finalized model has other {what} than the dense one")
        expect_target(model)
        return {}

    def reload(self) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            loaded = self.trained.reload(self.trained.model, Path(folder))
        expect_equal(outputs(self.trained._replace(model=loaded)), outputs(self.trained), "outputs of the loaded model")
        return {}

    def compiled(self) -> dict[str, Any]:
        case = prepared(self.build())
        losses, graphs = train(case, torch.compile(case.model, backend="autosparse"))
        return {**compared(losses, self.losses), **graphs}

    def one_line(self) -> dict[str, Any]:
        case = self.build()
        options = {"target_sparsity": TARGET, "total_steps": STEPS}
        losses, graphs = train(case, torch.compile(case.model, backend="autosparse", options=options), prepared=False)
        if (masked := set(autosparse_fx.thresholds(case.model))) != self.masked:
            raise Mismatch(
                f"not masked: {sorted(self.masked - masked)[:5]}, masked only here: {sorted(masked - self.masked)[:5]}"
            )
        expect_target(case.model)
        return {**compared(losses, self.losses), **graphs}

    def dense(self) -> dict[str, Any]:
        """The dense model under PyTorch's own compiler, beside itself in eager mode."""
        case = self.build()
        eager, _ = train(case, case.model, prepared=False)
        case = self.build()
        losses, graphs = train(case, torch.compile(case.model), prepared=False)
        return {**compared(losses, eager), **graphs}


def prepared(case: Case) -> Case:
    autosparse_fx.sparsify(case.model, CONFIG, example_inputs=case.inputs)
    return case


def train(case: Case, call: Callable[..., Any], prepared: bool = True) -> tuple[list[float], dict[str, int]]:
    """The losses of STEPS steps, and how many graphs the first of them compiled."""
    optimizer = torch.optim.SGD(case.model.parameters(), lr=RATE, momentum=0.9)
    annealer = autosparse_fx.GradientAnnealing(case.model, STEPS, optimizer=optimizer) if prepared else None
    losses, graphs = [], []
    counters.clear()
    for _ in range(STEPS):
        loss = case.loss(call(**case.inputs))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        graphs.append(counters["stats"]["unique_graphs"])
    assert annealer is None or annealer.steps == STEPS
    if not all(map(math.isfinite, losses)):
        raise Mismatch(f"the losses are {losses}")
    if call is not case.model and graphs[0] == 0:
        raise Mismatch("nothing was compiled")
    if graphs[-1] != graphs[0]:
        raise Mismatch(f"after the first step with {graphs[0]} graphs {graphs[-1] - graphs[0]} more were compiled")
    return losses, {"graphs": graphs[0]}


@torch.no_grad()
def outputs(case: Case) -> list[Tensor]:
    """What the model returns in eval mode."""
    case.model.eval()
    found = [t for t in tree_leaves(case.model(**case.inputs)) if isinstance(t, Tensor)]
    case.model.train()
    return found


def described(model: nn.Module) -> tuple[list[Any], list[str]]:
    return [(name, type(module)) for name, module in model.named_modules()], list(model.state_dict())


def expect_equal(found: list[Tensor], expected: list[Tensor], what: str) -> None:
    if len(found) != len(expected) or not expected:
        raise Mismatch(f"{what}: {len(found)} tensors instead of {len(expected)}")
    for a, b in zip(found, expected, strict=True):
        if not torch.equal(a, b):
            raise Mismatch(f"{what} differ by {float((a - b).abs().max()):.1e}, of {float(b.abs().max()):.1e}")


def expect_target(model: nn.Module) -> None:
    if abs((reached := autosparse_fx.sparsity(model)) - TARGET) > 0.005:
        raise Mismatch(f"{reached:.1%} zeros instead of {TARGET:.0%}")


def compared(losses: list[float], expected: list[float]) -> dict[str, Any]:
    off = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
    if off > TOLERANCE:
        raise Mismatch(f"losses {losses} instead of {expected}, {off:.1e} off")
    return {"off": off}


def told(error: Exception) -> str:
    """The type and the first lines of an error, without the places of installed packages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {without_folders(' '.join(lines[:3]))}"[:600]


def deepest_frames(error: Exception) -> list[str]:
    """Where it was raised, the last calls, innermost first."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return [f"{without_folders(frame.filename)}:{frame.lineno} {frame.name}" for frame in reversed(frames)]


def without_folders(text: str) -> str:
    text = re.sub(r"[^\s\"']*/site-packages/", "", text)
    return re.sub(r"[^\s\"']*/(?=(autosparse_fx|passes|benchmarks)/)", "", text)
