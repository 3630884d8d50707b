"""What is sparse, how much, and what was left dense for which reason."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autosparse_fx.attach import masked_modules
from autosparse_fx.hidden.masks import all_masked_modules
from autosparse_fx.masked import MaskedModule, logit, mask_state, masked_value, stored_weight
from autosparse_fx.plan import Plan, Slot
from autosparse_fx.selection import Candidate, collect, reason

__all__ = ["LayerReport", "SparsityReport", "report", "sparsity", "thresholds"]


@dataclass(frozen=True)
class LayerReport:
    """One weight tensor: ``zeros`` of its ``numel`` elements are zero where the layer reads it."""

    name: str
    shape: tuple[int, ...]
    numel: int
    zeros: int
    threshold: float | None  # mean cut g(s) = sigmoid(s); None for a weight that is not masked
    target: float | None
    tied: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in [0, 1]."""
        return self.zeros / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class SparsityReport:
    """Zeros and parameter counts per layer and in total; ``print`` it, or take :meth:`to_dict`."""

    layers: tuple[LayerReport, ...]
    parameters: int  # of the model, thresholds not counted
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)  # full name -> (numel, reason)
    masked_embeddings: tuple[str, ...] = ()  # masked because they are tied to a masked weight

    @property
    def numel(self) -> int:
        return sum(layer.numel for layer in self.layers)

    @property
    def zeros(self) -> int:
        return sum(layer.zeros for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Zeros over the weights listed in ``layers``, a fraction in [0, 1]."""
        return self.zeros / self.numel if self.numel else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, fit for JSON."""
        return {
            "sparsity": self.sparsity,
            "zeros": self.zeros,
            "numel": self.numel,
            "parameters": self.parameters,
            "layers": [
                {
                    "name": layer.name,
                    "shape": list(layer.shape),
                    "numel": layer.numel,
                    "zeros": layer.zeros,
                    "sparsity": layer.sparsity,
                    "threshold": layer.threshold,
                    "target": layer.target,
                    "tied": list(layer.tied),
                }
                for layer in self.layers
            ],
            "masked_embeddings": list(self.masked_embeddings),
            "skipped": {name: {"numel": numel, "reason": why} for name, (numel, why) in self.skipped.items()},
        }

    def __str__(self) -> str:
        rows = [("weight", "shape", "numel", "zeros", "sparsity", "cut")]
        for layer in self.layers:
            cut = "" if layer.threshold is None else f"{layer.threshold:.2e}"
            name = " = ".join((layer.name, *layer.tied))
            rows.append(
                (
                    name,
                    "x".join(map(str, layer.shape)),
                    f"{layer.numel:,}",
                    f"{layer.zeros:,}",
                    f"{layer.sparsity:.4f}",
                    cut,
                )
            )
        rows.append(("all masked weights", "", f"{self.numel:,}", f"{self.zeros:,}", f"{self.sparsity:.4f}", ""))
        share = self.zeros / self.parameters if self.parameters else 0.0
        rows.append(("all parameters", "", f"{self.parameters:,}", f"{self.zeros:,}", f"{share:.4f}", ""))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

        def line(row: tuple[str, ...]) -> str:
            return "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()

        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        lines = [line(rows[0]), rule, *map(line, rows[1:-2]), rule, *map(line, rows[-2:])]
        if self.masked_embeddings:
            lines.append(
                f"embeddings that are masked as the weights they are tied to: {', '.join(self.masked_embeddings)}"
            )
        if self.skipped:
            by_reason: dict[str, list[str]] = {}
            for name, (_, why) in self.skipped.items():
                by_reason.setdefault(why, []).append(name)
            lines.append("left dense:")
            for why, names in by_reason.items():
                shown = ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
                lines.append(f"  {why}: {shown}")
        return "\n".join(lines)


@torch.no_grad()
def report(model: nn.Module) -> SparsityReport:
    """Count the zeros of every weight of ``model``, as its layers read them.

    Works on a sparse model, on a finalized one and on a dense one; tied weights are counted once. On a model that is
    not prepared the weights of the known layer classes are listed.
    """
    layers: list[LayerReport] = []
    skipped: dict[str, tuple[int, str]] = {}
    parameters = 0
    by_weight = _masked_by_weight(model)
    prepared = bool(by_weight)
    plans = _plans_of(model)
    embeddings: list[str] = []
    own = _thresholds_of(model)
    for candidate in collect(model):
        if id(candidate.parameter) in own:
            continue
        parameters += candidate.parameter.numel()
        masked = by_weight.get(id(candidate.parameter))
        if masked is None and (prepared or candidate.axis is None):
            if prepared:
                skipped[candidate.name] = (candidate.parameter.numel(), _reason_for(candidate, plans))
            continue
        weight: Tensor = candidate.parameter
        cut = target = None
        if masked is not None:
            if any(isinstance(module, nn.Embedding) for module, _ in candidate.holders):
                embeddings.append(candidate.name)
            module, slot = masked
            weight = masked_value(module, slot)
            cut = float(torch.sigmoid(logit(module, slot)).mean())
            target = module._autosparse.weights[slot.name].config.target_sparsity
        layers.append(
            LayerReport(
                candidate.name,
                tuple(weight.shape),
                weight.numel(),
                weight.numel() - int(torch.count_nonzero(weight)),
                cut,
                target,
                tuple(candidate.names[1:]),
            )
        )
    return SparsityReport(tuple(layers), parameters, skipped, tuple(embeddings))


def sparsity(model: nn.Module) -> float:
    """Return the fraction of zeros in [0, 1] over the masked weights of ``model``, tied ones counted once.

    On a model that is not prepared: over the weights of the known layer classes.
    """
    return report(model).sparsity


@torch.no_grad()
def thresholds(model: nn.Module) -> dict[str, Tensor]:
    """Return the logit ``s`` of every masked weight by its full name; the cut is ``torch.sigmoid(s)``.

    Each is a detached float32 tensor of shape ``[1]``, or ``[C]`` for per-channel thresholds.
    """
    found: dict[str, Tensor] = {}
    by_weight = _masked_by_weight(model)
    for candidate in collect(model):
        masked = by_weight.get(id(candidate.parameter))
        if masked is not None:
            module, slot = masked
            found[candidate.name] = logit(module, slot).detach().reshape(-1).clone()
    return found


def group_sparsities(model: nn.Module) -> dict[float | None, tuple[float, list[str]]]:
    """Return, for each target, the sparsity reached over the weights that share it, and their names."""
    groups: dict[float | None, list[LayerReport]] = {}
    for layer in report(model).layers:
        groups.setdefault(layer.target, []).append(layer)
    return {
        target: (sum(x.zeros for x in layers) / max(1, sum(x.numel for x in layers)), [x.name for x in layers])
        for target, layers in groups.items()
    }


def _plans_of(model: nn.Module) -> list[tuple[Plan, str, str]]:
    """The plans in ``model``, each with how names were prefixed when it was made, and how they are prefixed now.

    They differ where a part of the prepared model is looked at, or a module around it.
    """
    found: dict[int, tuple[Plan, str, str]] = {}
    for prefix, module in all_masked_modules(model):
        for slot in module._autosparse_slots:
            then = module._autosparse.weights[slot.name].name
            now = f"{prefix}.{slot.name}" if prefix else slot.name
            while then and now and then.rpartition(".")[2] == now.rpartition(".")[2]:
                then, now = then.rpartition(".")[0], now.rpartition(".")[0]
            plan = module._autosparse.plan
            found.setdefault(id(plan), (plan, then, now))
    return list(found.values())


def _reason_for(candidate: Candidate, plans: list[tuple[Plan, str, str]]) -> str:
    for plan, then, now in plans:
        for name in candidate.names:
            if not now or name.startswith(f"{now}."):
                inner = name.removeprefix(f"{now}.") if now else name
                known = plan.skipped.get(f"{then}.{inner}" if then else inner)
                if known is not None:
                    return known
    return reason(candidate)


def _masked_by_weight(model: nn.Module) -> dict[int, tuple[MaskedModule, Slot]]:
    """Each masked weight, by id, with a module that reads it masked."""
    return {
        id(stored_weight(module, slot)): (module, slot)
        for _, module in all_masked_modules(model)
        for slot in module._autosparse_slots
    }


def _thresholds_of(model: nn.Module) -> set[int]:
    return {id(mask_state(module, slot)[0]) for _, module in masked_modules(model) for slot in module._autosparse_slots}
