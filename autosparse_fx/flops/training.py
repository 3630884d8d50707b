"""What a whole training costs, as the sparse-training literature counts it, and what other methods would.

Per step the forward pass and the gradients of activations skip the zeros of weights. The gradients of weights are dense
while alpha > 0, because masked weights get theirs too, and as sparse as the weights once alpha is 0. The other methods
are counted at the same final sparsity of every layer:

* STR (arXiv:2002.03231): the recorded sparsities with alpha 0 throughout, so all three are sparse;
* RigL (arXiv:1911.11134): the final sparsity throughout, and one dense weight gradient every 100 steps:
  ``(3 f_S * 100 + 2 f_S + f_D) / 101``;
* GMP (arXiv:1710.01878): the cubic schedule from 20 to 80 % of the training, with dense weight gradients;
* MEST (arXiv:2110.14032): the final sparsity throughout, all three sparse. Its short phases with a few more weights are
  not counted.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from autosparse_fx.flops.model import ModelFlops
from autosparse_fx.flops.product import Product

RIGL_INTERVAL = 100
GMP_START, GMP_END = 0.2, 0.8
GMP_POINTS = 100


@dataclass(frozen=True)
class TrainingFlops:
    """MACs of an average training step, of this training and of others; of one call of the model in each step."""

    dense: float
    sparse: float
    others: dict[str, float]

    @property
    def fraction(self) -> float:
        """Of a dense training."""
        return self._of_dense(self.sparse)

    @property
    def other_fractions(self) -> dict[str, float]:
        """Of a dense training, by method."""
        return {name: self._of_dense(macs) for name, macs in self.others.items()}

    def _of_dense(self, macs: float) -> float:
        return macs / self.dense if self.dense else 1.0


def training_flops(
    flops: ModelFlops, steps: Sequence[int], alphas: Sequence[float], sparsities: Sequence[Mapping[str, float]]
) -> TrainingFlops:
    """Integrate the cost of a training over its recorded history.

    Args:
        flops: the counts of the model, without free sizes.
        steps: how many optimizer steps had been made at each record, rising from 1 or later.
        alphas: alpha at each record.
        sparsities: of each weight by its full name, at each record.

    Raises:
        ValueError: if there is no record, steps do not rise, the history has none of the model's weights, or the counts
            depend on dynamic sizes.
    """
    if not steps:
        raise ValueError("the history holds no records: train with GradientAnnealing first")
    if flops.sizes:
        raise ValueError(f"the counts depend on {', '.join(flops.sizes)}: count without dynamic_shapes")
    if not len(steps) == len(alphas) == len(sparsities):
        raise ValueError(f"{len(steps)} steps, {len(alphas)} alphas and {len(sparsities)} sparsities make no records")
    recorded = {name for known in sparsities for name in known}
    if recorded and not recorded & set(flops.weights):
        raise ValueError(
            f"the history is of {', '.join(sorted(recorded)[:3])}, ..., and the model multiplies by "
            f"{', '.join(flops.weights[:3]) or 'nothing'}, ...: is it of another model, or recorded in a wrapper?"
        )
    if any(later <= earlier for earlier, later in zip((0, *steps), steps, strict=False)):
        raise ValueError(f"the records of the history must be at rising steps from 1 on, got {list(steps)[:5]}")
    parts = _Parts(flops)

    def mean(cost: Callable[[Mapping[str, float], float], float]) -> float:
        """Over all steps: those between two records cost what lies between the costs at both."""
        costs = [cost(known, alpha) for known, alpha in zip(sparsities, alphas, strict=True)]
        at, before, total = 0, costs[0], 0.0
        for step, now in zip(steps, costs, strict=True):
            total += (step - at) * (before + now) / 2
            at, before = step, now
        return total / steps[-1]

    final = sparsities[-1]
    dense = parts.settled({})
    static = parts.settled(final)
    others = {
        "STR": mean(lambda known, _: parts.settled(known)),
        "RigL": (RIGL_INTERVAL * static + parts.annealing(final)) / (RIGL_INTERVAL + 1),
        "GMP": sum(
            parts.annealing({name: s * _gmp_progress((i + 0.5) / GMP_POINTS) for name, s in final.items()})
            for i in range(GMP_POINTS)
        )
        / GMP_POINTS,
        "MEST": static,
    }
    return TrainingFlops(
        dense, mean(lambda known, alpha: parts.annealing(known) if alpha > 0 else parts.settled(known)), others
    )


def _gmp_progress(time: float) -> float:
    done = min(1.0, max(0.0, (time - GMP_START) / (GMP_END - GMP_START)))
    return 1 - (1 - done) ** 3


class _Parts:
    """The cost of one step at given sparsities, in plain numbers."""

    def __init__(self, flops: ModelFlops) -> None:
        self._products = [(p, float(p.macs)) for p in flops.products if not p.pooling]

    def annealing(self, sparsities: Mapping[str, float]) -> float:
        """With dense weight gradients."""
        return sum(self._step(product, macs, sparsities, settled=False) for product, macs in self._products)

    def settled(self, sparsities: Mapping[str, float]) -> float:
        """With weight gradients as sparse as the weights."""
        return sum(self._step(product, macs, sparsities, settled=True) for product, macs in self._products)

    @staticmethod
    def _step(product: Product, macs: float, sparsities: Mapping[str, float], *, settled: bool) -> float:
        densities = [operand.density_at(sparsities) for operand in product.operands]
        forward = total = macs * math.prod(densities)
        for i, operand in enumerate(product.operands):
            if operand.needs_grad:
                of_others = macs * math.prod(densities[:i] + densities[i + 1 :])
                total += forward if operand.parameter and settled else of_others
        return total
