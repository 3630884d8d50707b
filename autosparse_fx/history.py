"""History: alpha, and the sparsity and the cut of every masked weight, over a training."""

import csv
import io
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from autosparse_fx.dtensors import full_tensor
from autosparse_fx.files import checked_path, written

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECORDS = 100  # of one training, however long it is
_SUFFIXES = (".png", ".svg", ".pdf")


class Record(NamedTuple):
    """The state after ``step`` optimizer steps; fractions and cuts by the full name of the weight."""

    step: int
    alpha: float
    sparsity: dict[str, float]  # fraction of zeros in [0, 1]
    threshold: dict[str, float]  # mean cut g(s) = sigmoid(s)


@dataclass
class _Columns:
    """What one annealer noted at one step; the numbers stay on the device until someone reads them."""

    step: int
    alpha: float
    names: tuple[str, ...]
    values: Tensor  # [2, names]: sparsity, cut


@dataclass
class History:
    """The recorded training of a model: ``annealer.history``, or ``report(model).history``.

    ``GradientAnnealing`` adds a record after the first step, about every hundredth of the training, and at its end.
    Memory is bounded: 8 bytes for each weight tensor and record.
    """

    numel: dict[str, int] = field(default_factory=dict)  # elements of each weight
    _columns: list[_Columns] = field(default_factory=list)

    def __repr__(self) -> str:
        steps = [columns.step for columns in self._columns]
        if not steps:
            return "History(no records)"
        return f"History({len(self)} records, steps {min(steps)} to {max(steps)}, {len(self.numel)} weights)"

    def __len__(self) -> int:
        return len({columns.step for columns in self._columns})

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    @property
    def records(self) -> list[Record]:
        """All records, by rising step."""
        return self._merged(self._columns)

    @staticmethod
    def _merged(every: Iterable[_Columns]) -> list[Record]:
        """By rising step. What one annealer noted stays where only others note; what it notes no more is gone."""
        found: dict[int, Record] = {}
        together: dict[int, list[tuple[str, ...]]] = {}
        for columns in every:
            together.setdefault(columns.step, []).append(columns.names)
            record = found.setdefault(columns.step, Record(columns.step, columns.alpha, {}, {}))
            sparsity, cut = columns.values.tolist()
            record.sparsity.update(zip(columns.names, sparsity, strict=True))
            record.threshold.update(zip(columns.names, cut, strict=True))
        records = [found[step] for step in sorted(found)]
        noted_with: dict[str, tuple[str, ...]] = {}
        for before, after in itertools.pairwise(records):
            noted_with |= {name: names for names in together[before.step] for name in names}
            noted = set(after.sparsity)
            for name in [name for name in before.sparsity if name not in noted]:
                if noted.isdisjoint(noted_with[name]):
                    after.sparsity[name], after.threshold[name] = before.sparsity[name], before.threshold[name]
        return records

    def total_sparsity(self, record: Record) -> float:
        """Zeros over all masked weights of a record, a fraction in [0, 1]."""
        total = sum(self.numel[name] for name in record.sparsity)
        return sum(self.numel[name] * value for name, value in record.sparsity.items()) / total if total else 0.0

    @torch.no_grad()
    def add(self, step: int, alpha: float, weights: Sequence[tuple[str, Tensor, Tensor]]) -> None:
        """Note names, weights and logits (that broadcast to them) after ``step`` optimizer steps."""
        sparsities, cuts = [], []
        for name, weight, logit in weights:
            weight, cut = full_tensor(weight), torch.sigmoid(logit)
            zeros = torch.count_nonzero(weight.abs() <= cut)
            self.numel[name] = weight.numel()
            sparsities.append(zeros / max(1, weight.numel()))
            cuts.append(cut.mean())
        device = cuts[0].device
        columns = [torch.stack([value.to(device).float() for value in column]) for column in (sparsities, cuts)]
        self._columns.append(_Columns(step, alpha, tuple(name for name, _, _ in weights), torch.stack(columns)))

    def latest(self) -> dict[str, float]:
        """The last record as one flat dict of numbers, for any logger."""
        if not self._columns:
            return {}
        needed: list[_Columns] = []
        for _, columns in sorted(enumerate(self._columns), key=lambda at: (at[1].step, at[0]), reverse=True):
            if {name for c in needed for name in c.names} == set(self.numel):
                break
            needed.append(columns)
        record = self._merged(reversed(needed))[-1]
        return {
            "step": record.step,
            "alpha": record.alpha,
            "sparsity": self.total_sparsity(record),
            **{f"sparsity/{name}": value for name, value in record.sparsity.items()},
            **{f"threshold/{name}": value for name, value in record.threshold.items()},
        }

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one line for each record and weight: step, alpha, weight, numel, sparsity, threshold.

        Raises:
            FileNotFoundError: if the directory is not there.
        """
        target = checked_path(path)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("step", "alpha", "weight", "numel", "sparsity", "threshold"))
        for record in self.records:
            for name, value in record.sparsity.items():
                writer.writerow((record.step, record.alpha, name, self.numel[name], value, record.threshold[name]))
        with written(target) as partial:
            partial.write_text(text.getvalue())

    def to_tensorboard(self, writer: Any) -> None:
        """Write every record to a ``torch.utils.tensorboard.SummaryWriter``, or to one that is made for a directory.

        Raises:
            ImportError: if the package ``tensorboard`` is not installed.
        """
        if isinstance(writer, (str, Path)):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("to_tensorboard needs the package tensorboard: pip install tensorboard") from error
            with SummaryWriter(str(writer)) as made:
                self.to_tensorboard(made)
            return
        for record in self.records:
            writer.add_scalar("autosparse/alpha", record.alpha, record.step)
            writer.add_scalar("autosparse/sparsity", self.total_sparsity(record), record.step)
            for name, value in record.sparsity.items():
                writer.add_scalar(f"autosparse_sparsity/{name}", value, record.step)
                writer.add_scalar(f"autosparse_threshold/{name}", record.threshold[name], record.step)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw sparsity and alpha, the sparsity of each weight, and its cut, over the steps: PNG, SVG or PDF.

        Raises:
            ValueError: if there is no record, or the suffix is another.
            FileNotFoundError: if the directory is not there.
            ImportError: if matplotlib is not installed.
        """
        target = checked_path(path, _SUFFIXES)
        if not self._columns:
            raise ValueError("the history holds no records: train with GradientAnnealing first")
        figure = self._figure()
        with written(target) as partial:
            figure.savefig(partial, dpi=120, format=target.suffix[1:].lower())

    def _figure(self) -> "Figure":
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot needs matplotlib: pip install 'autosparse-fx[plot]'") from error
        records = self.records
        steps = [record.step for record in records]
        names = list(self.numel)
        figure = Figure(figsize=(12, 3.6), layout="constrained")
        whole, layers, cuts = figure.subplots(1, 3)
        whole.plot(steps, [self.total_sparsity(record) for record in records], label="sparsity", color="tab:blue")
        whole.plot(steps, [record.alpha for record in records], label="alpha", color="tab:orange", linestyle="--")
        whole.set(title="all masked weights", ylim=(-0.02, 1.02))
        whole.legend(loc="center right", frameon=False)
        colors = figure_colors(len(names))
        for name, color in zip(names, colors, strict=True):
            known = [record for record in records if name in record.sparsity]
            at = [record.step for record in known]
            layers.plot(at, [record.sparsity[name] for record in known], label=name, color=color, linewidth=1)
            cuts.plot(at, [record.threshold[name] for record in known], label=name, color=color, linewidth=1)
        layers.set(title="sparsity of each weight, first to last", ylim=(-0.02, 1.02))
        positive = any(cut > 0 for record in records for cut in record.threshold.values())
        cuts.set(title="its cut, sigmoid(s)", yscale="log" if positive else "linear")
        if len(names) <= 8:
            layers.legend(fontsize="small", frameon=False)
        for axes in (whole, layers, cuts):
            axes.set_xlabel("optimizer step")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3)
        return figure

    def columns(self) -> dict[str, Tensor]:
        """What was recorded of each weight: float64 ``[records, 4]`` of step, alpha, sparsity and cut."""
        rows: dict[str, list[tuple[float, ...]]] = {name: [] for name in self.numel}
        for record in self.records:
            for name, sparsity in record.sparsity.items():
                rows[name].append((float(record.step), record.alpha, sparsity, record.threshold[name]))
        return {name: torch.tensor(row, dtype=torch.float64).reshape(-1, 4) for name, row in rows.items()}

    def put_columns(self, columns: Mapping[str, tuple[int, Tensor]]) -> None:
        """Enter what :meth:`columns` returned, with the number of elements of each weight."""
        at: dict[tuple[tuple[float, ...], int, float], dict[str, list[float]]] = {}
        for name, (numel, column) in columns.items():
            self.numel[name] = numel
            steps = tuple(column[:, 0].tolist())  # the same for those that were noted together
            for step, alpha, *values in column.tolist():
                at.setdefault((steps, int(step), alpha), {})[name] = values
        for (_, step, alpha), values in at.items():
            self._columns.append(_Columns(step, alpha, tuple(values), torch.tensor(list(values.values())).T))

    def become(self, other: "History") -> None:
        """Hold what another history holds."""
        self.numel, self._columns = dict(other.numel), list(other._columns)

    def state(self) -> dict[str, Any]:
        """Plain values, fit for JSON, for ``annealer.state_dict()``.

        No dict by names of weights: ``torch.distributed.checkpoint`` loads only keys that a dict has already.
        """
        return {
            "numel": [[name, numel] for name, numel in self.numel.items()],
            "records": [[c.step, c.alpha, list(c.names), c.values.tolist()] for c in self._columns],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "History":
        """The history that :meth:`state` was taken of."""
        columns = [
            _Columns(step, alpha, tuple(names), torch.tensor(values)) for step, alpha, names, values in state["records"]
        ]
        return cls(dict(state["numel"]), columns)


def figure_colors(count: int) -> list[Any]:
    """Colours from the first layer to the last."""
    from matplotlib import colormaps

    colormap = colormaps["viridis"]
    return [colormap(i / max(1, count - 1)) for i in range(count)]
