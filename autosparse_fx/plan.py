"""What ``sparsify`` decided, as the masked modules carry it along."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import uuid4

from autosparse_fx.config import AutoSparse
from autosparse_fx.history import History


class Slot(NamedTuple):
    """A masked name of a module class; ``axis`` is the dimension of the weight that a per-channel threshold follows."""

    name: str
    axis: int

    @property
    def threshold(self) -> str:
        return f"{self.name}_threshold"

    @property
    def offset(self) -> str:
        return f"{self.name}_offset"


class _DenseScope:
    """How many ``dense_weights`` contexts are open. A copy made inside one leaves it together with its original."""

    def __init__(self) -> None:
        self.depth = 0
        self._copies: list[_DenseScope] = []

    def enter(self) -> None:
        self.depth += 1

    def leave(self) -> None:
        self.depth -= 1
        if self.depth == 0:
            for scope in self._copies:
                scope.depth = 0
            self._copies.clear()

    def __deepcopy__(self, memo: dict[int, object]) -> "_DenseScope":
        made = _DenseScope()
        if self.depth:
            made.depth = self.depth
            self._copies.append(made)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return _DenseScope, ()


@dataclass(eq=False)
class Plan:
    """What one ``sparsify`` decided; shared by all modules that it masked, copied and pickled with them."""

    config: AutoSparse
    skipped: dict[str, str] = field(default_factory=dict)  # full name -> reason
    scope: _DenseScope = field(default_factory=_DenseScope)
    warned_of_dense_checkpoint: bool = False
    warned_of_untrained: bool = False
    warned_of_new: bool = False
    warned_of_zeros: bool = False
    annealed_steps: int = 0
    was_trained: bool = False  # by an annealer before the present one, or thresholds of a training were loaded
    floors: list[list[float]] | None = None  # of the annealer's controller
    total_steps: int = 0  # where it was given with the configuration, in the one-line form
    history: History = field(default_factory=History)
    lineage: str = ""  # of this plan and of its copies

    def __post_init__(self) -> None:
        self.lineage = self.lineage or uuid4().hex


@dataclass(eq=False)
class MaskedWeight:
    """The settings of one masked tensor; modules that share the tensor share this object."""

    name: str  # the full name that it had in ``sparsify``
    config: AutoSparse  # of the rule that applies
    provisional: bool = False  # threshold_init="auto" was computed without the weights' values
    found_by_use: bool = False  # no layer of a known class multiplied by it: example_inputs found it, or a graph
    was_embedding: bool = False  # and nothing but embeddings held it
    held_by: int = 1  # modules, or names of them, that it was tied to when it got its mask


@dataclass(eq=False)
class ModuleState:
    """What a masked module carries in ``_autosparse``."""

    plan: Plan
    weights: dict[str, MaskedWeight]
