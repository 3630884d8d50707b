"""The decay shapes of Gradient Annealing, against the published table."""

import itertools
import math

import pytest

from autosparse_fx.decay import DECAYS, annealed_alpha

# i/T from 0 to 1 in tenths, computed from the formulas of PQuant's documentation.
TABLE = {
    "cosine": [1, 0.9755, 0.9045, 0.7939, 0.6545, 0.5, 0.3455, 0.2061, 0.0955, 0.0245, 0],
    "sigmoid": [0.9975, 0.9918, 0.9734, 0.9168, 0.7685, 0.5, 0.2315, 0.0832, 0.0266, 0.0082, 0.0025],
    "sigmoid_cosine": [1, 0.9918, 0.9734, 0.9168, 0.7685, 0.5, 0.3455, 0.2061, 0.0955, 0.0245, 0.0025],
    "linear": [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0],
    "fixed": [1] * 11,
}


def test_the_shapes_are_those_of_the_documentation() -> None:
    assert set(DECAYS) == set(TABLE)


@pytest.mark.parametrize("decay", TABLE)
def test_the_shape_equals_the_table(decay: str) -> None:
    for tenth, expected in enumerate(TABLE[decay]):
        assert DECAYS[decay](tenth / 10) == pytest.approx(expected, abs=5e-5), tenth


@pytest.mark.parametrize("decay", TABLE)
def test_the_shape_never_rises_and_stays_in_the_unit_interval(decay: str) -> None:
    values = [DECAYS[decay](i / 1000) for i in range(1001)]
    assert all(0 <= value <= 1 for value in values)
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))


@pytest.mark.parametrize("decay", TABLE)
def test_alpha_is_the_initial_alpha_times_the_decay_before_its_end(decay: str) -> None:
    for tenth in range(9):
        assert annealed_alpha(0.75, decay, 0.9, tenth / 10) == pytest.approx(0.75 * TABLE[decay][tenth], abs=5e-5)


@pytest.mark.parametrize("decay", TABLE)
@pytest.mark.parametrize("alpha_end", [0.25, 0.9, 1.0])
def test_alpha_is_exactly_zero_from_its_end_on_and_not_before(decay: str, alpha_end: float) -> None:
    assert annealed_alpha(0.75, decay, alpha_end, alpha_end) == 0.0
    assert annealed_alpha(0.75, decay, alpha_end, 1.0) == 0.0
    assert annealed_alpha(0.75, decay, alpha_end, math.nextafter(alpha_end, 0) - 1e-3) > 0


@pytest.mark.parametrize("decay", TABLE)
@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_an_alpha_of_zero_stays_zero(decay: str, progress: float) -> None:
    assert annealed_alpha(0.0, decay, 1.0, progress) == 0.0
