"""How long a call takes on this machine."""

import statistics
import time
from collections.abc import Callable
from typing import Any


def median_seconds(function: Callable[[], Any], at_least: float) -> float:
    """The median of three calls or more that take so many seconds together, after one that warms the caches."""
    function()
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < at_least:
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
