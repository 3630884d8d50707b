"""SparsityReport: zeros, parameters and costs of a model, and how they are shown."""

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autosparse_fx.history import History
from autosparse_fx.tables import Row, Tabular, short

if TYPE_CHECKING:
    import pandas as pd

    from autosparse_fx.flops import ModelFlops
    from autosparse_fx.flops.training import TrainingFlops

UNITS = {"flops": ("FLOPs", 2), "macs": ("MACs", 1)}
SPEED_PREPARED = (
    "speed: while a model is prepared its zeros are multiplied like all other weights; the report of model = "
    "autosparse_fx.finalize(model).eval() says which layers then run on sparse kernels"
)
SPEED_IN_TRAINING = (
    "speed: in training mode zeros are multiplied like all other weights; the report of model.eval() says which layers "
    "run on sparse kernels"
)
SPEED = 'speed: compiled with backend="autosparse" under torch.no_grad() on this CPU'


@dataclass(frozen=True)
class Cost:
    """What one forward pass multiplies, with zeros of weights counted, and without."""

    dense: float
    sparse: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.dense + other.dense, self.sparse + other.sparse)


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
    stored_bytes: int = 0  # the smallest of dense, bitmap and values, and indices and values
    cost: Cost | None = None  # None where the report was made without example inputs
    kernel: str | None = None  # "sparse" or "dense", in inference; None where that is not known
    kernel_reason: str = ""

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in [0, 1]."""
        return self.zeros / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class SparsityReport(Tabular):
    """Zeros and parameter counts per layer and in total, and what they save; ``print`` it, or take one of its forms:
    :meth:`to_dict`, :meth:`to_json`, :meth:`to_frame`, or HTML where a notebook shows it.

    With example inputs, ``flops`` holds the counts as sympy expressions, and with a recorded history ``training`` the
    cost of the whole training beside that of other methods (see ``autosparse_fx.flops.training``).
    """

    layers: tuple[LayerReport, ...]
    parameters: int  # of the model, thresholds not counted
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)  # full name -> (numel, reason)
    masked_embeddings: tuple[str, ...] = ()  # masked because they are tied to a masked weight
    dense_bytes: int = 0  # of all parameters
    stored_bytes: int = 0  # with the weights in ``layers`` stored sparse where that is smaller
    history: History = field(default_factory=History)
    flops: "ModelFlops | None" = None
    training: "TrainingFlops | None" = None
    other_costs: dict[str, Cost] = field(default_factory=dict)  # of what is in no layer of ``layers``
    unit: str = "flops"
    in_training_mode: bool = False  # as the model was when the report was made

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

    @property
    def cost(self) -> Cost | None:
        """Of one forward pass, in ``unit``; None where the report was made without example inputs."""
        if self.flops is None:
            return None
        costs = [layer.cost for layer in self.layers if layer.cost is not None]
        return sum([*costs, *self.other_costs.values()], Cost(0, 0))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, fit for JSON."""
        found: dict[str, Any] = {
            "sparsity": self.sparsity,
            "zeros": self.zeros,
            "numel": self.numel,
            "parameters": self.parameters,
            "dense_bytes": self.dense_bytes,
            "stored_bytes": self.stored_bytes,
            "layers": [self._layer(layer) for layer in self.layers],
            "masked_embeddings": list(self.masked_embeddings),
            "skipped": {name: {"numel": numel, "reason": why} for name, (numel, why) in self.skipped.items()},
        }
        if self.flops is not None and self.cost is not None:
            found["forward"] = {
                "unit": self.unit,
                "dense": self.cost.dense,
                "sparse": self.cost.sparse,
                "sizes": dict(self.flops.example_sizes),
                "graphs": self.flops.graphs,
                "graph_breaks": list(self.flops.breaks),
                "other": {
                    name: {"dense": cost.dense, "sparse": cost.sparse} for name, cost in self.other_costs.items()
                },
            }
        if self.training is not None:
            found["training"] = {
                "fraction_of_dense": self.training.fraction,
                "other_methods": self.training.other_fractions,
            }
        return found

    @staticmethod
    def _layer(layer: LayerReport) -> dict[str, Any]:
        return {
            "name": layer.name,
            "shape": list(layer.shape),
            "numel": layer.numel,
            "zeros": layer.zeros,
            "sparsity": layer.sparsity,
            "threshold": layer.threshold,
            "target": layer.target,
            "tied": list(layer.tied),
            "stored_bytes": layer.stored_bytes,
            **({} if layer.cost is None else {"dense": layer.cost.dense, "sparse": layer.cost.sparse}),
            **({} if layer.kernel is None else {"kernel": layer.kernel, "kernel_reason": layer.kernel_reason}),
        }

    def to_json(self, **options: Any) -> str:
        """Return :meth:`to_dict` as JSON; ``options`` are those of ``json.dumps``."""
        return json.dumps(self.to_dict(), **options)

    def to_frame(self) -> "pd.DataFrame":
        """Return the layers as a pandas data frame, by name.

        Raises:
            ImportError: if pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_frame needs the package pandas: pip install pandas") from error
        return pd.DataFrame([self._layer(layer) for layer in self.layers]).set_index("name")

    def _table(self) -> tuple[Row, list[Row], list[Row]]:
        cost, unit = self.cost, UNITS[self.unit][0]
        header = ["weight", "shape", "numel", "zeros", "sparsity", "cut"]
        header += [] if cost is None else [f"dense {unit}", f"sparse {unit}", "share"]
        kernels = any(layer.kernel is not None for layer in self.layers)
        header += ["kernel"] if kernels else []

        def costs(part: Cost | None) -> list[str]:
            if cost is None:
                return []
            if part is None:
                return ["", "", ""]
            return [short(part.dense), short(part.sparse), f"{part.sparse / cost.sparse:.1%}" if cost.sparse else ""]

        rows: list[Row] = []
        for layer in self.layers:
            rows.append(
                [
                    " = ".join((layer.name, *layer.tied)),
                    "x".join(map(str, layer.shape)),
                    f"{layer.numel:,}",
                    f"{layer.zeros:,}",
                    f"{layer.sparsity:.4f}",
                    "" if layer.threshold is None else f"{layer.threshold:.2e}",
                    *costs(layer.cost),
                    *([f"{layer.kernel}: {layer.kernel_reason}" if layer.kernel else ""] if kernels else []),
                ]
            )
        share = self.zeros / self.parameters if self.parameters else 0.0
        listed = sum([layer.cost for layer in self.layers if layer.cost is not None], Cost(0, 0))
        numbers = [f"{self.numel:,}", f"{self.zeros:,}", f"{self.sparsity:.4f}"]
        which = "masked" if self._is_prepared else "these"
        totals: list[Row] = [[f"all {which} weights", "", *numbers, "", *costs(listed)]]
        totals += [[name, "", "", "", "", "", *costs(part)] for name, part in self.other_costs.items()]
        numbers = [f"{self.parameters:,}", f"{self.zeros:,}", f"{share:.4f}"]
        totals.append(["all parameters" if cost is None else "all", "", *numbers, "", *costs(cost)])
        return header, rows, [[*row, ""] for row in totals] if kernels else totals

    def _notes(self) -> list[str]:
        notes = []
        if self.masked_embeddings:
            notes.append(
                f"embeddings that are masked as the weights they are tied to: {', '.join(self.masked_embeddings)}"
            )
        if self.skipped:
            by_reason: dict[str, list[str]] = {}
            for name, (_, why) in self.skipped.items():
                by_reason.setdefault(why, []).append(name)
            notes.append("left dense:")
            for why, names in by_reason.items():
                notes.append(f"  {why}: {_some(names)}")
        notes.append(
            f"size of the parameters: {short(self.dense_bytes, 'B')}; {short(self.stored_bytes, 'B')} where zeros are "
            "left out"
        )
        cost = self.cost
        if cost is None or self.flops is None:
            return notes
        sizes = ", ".join(f"{name} = {size}" for name, size in self.flops.example_sizes.items())
        notes.append(
            f"forward pass: {short(cost.sparse, UNITS[self.unit][0])} of {short(cost.dense, UNITS[self.unit][0])}"
            + (f", {cost.sparse / cost.dense:.4f} of dense" if cost.dense else "")
            + (f", at {sizes}" if sizes else "")
        )
        if self.flops.graphs > 1:
            why = f": {'; '.join(self.flops.breaks)}" if self.flops.breaks else ""
            notes.append(f"the model breaks into {self.flops.graphs} graphs, and all are counted{why}")
        if self.training is not None:
            others = ", ".join(f"{name} {part:.3f}" for name, part in self.training.other_fractions.items())
            notes.append(
                f"training so far: {self.training.fraction:.3f} of the {UNITS[self.unit][0]} of a dense one; at the "
                f"same final sparsities {others}"
            )
        return [*notes, *self._kernel_notes()]

    def _kernel_notes(self) -> list[str]:
        known = [layer for layer in self.layers if layer.kernel is not None]
        if known:
            sparse = sum(layer.kernel == "sparse" for layer in known)
            return [f"{SPEED}, {sparse} of {len(known)} weights run on sparse kernels"]
        if self._is_prepared:
            return [SPEED_PREPARED]
        return [SPEED_IN_TRAINING] if self.in_training_mode else []

    @property
    def _is_prepared(self) -> bool:
        return any(layer.threshold is not None for layer in self.layers)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
