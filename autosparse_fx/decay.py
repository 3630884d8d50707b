"""How alpha falls over a training: the decay shapes of Gradient Annealing."""

import math
from collections.abc import Callable


def _cosine(t: float) -> float:
    return (1 + math.cos(math.pi * t)) / 2


def _sigmoid(t: float) -> float:
    return 1 - 1 / (1 + math.exp(-(-6 + 12 * t)))


# Each maps progress t in [0, 1] to a factor in [0, 1]. sigmoid_cosine is the paper's: the slow start of the sigmoid and
# the gentle tail of the cosine. (Formulas as in PQuant, the one public implementation of arXiv:2304.06941.)
DECAYS: dict[str, Callable[[float], float]] = {
    "fixed": lambda t: 1.0,
    "linear": lambda t: 1 - t,
    "cosine": _cosine,
    "sigmoid": _sigmoid,
    "sigmoid_cosine": lambda t: max(_cosine(t), _sigmoid(t)),
}


def annealed_alpha(alpha: float, decay: str, alpha_end: float, progress: float) -> float:
    """Return alpha after the fraction ``progress`` of the training: ``alpha * decay(progress)``, exactly 0 from
    ``alpha_end`` on (and from the end on, where no step is left to take)."""
    return 0.0 if progress >= min(alpha_end, 1.0) else alpha * DECAYS[decay](progress)
