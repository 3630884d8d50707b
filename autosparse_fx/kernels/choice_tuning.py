"""Autotuning which layers run sparse: whole compiled graphs are timed, and the fastest is taken.

What a layer gains by itself says little of what it gains among others, whose caches it meets and whose layout it
shares. So the estimate of ``choice.py`` stays, but for one number: how slow dense kernels are, relative to what it
takes them for. With 0 no layer runs sparse, with more than 1 more layers do.

What was found is remembered (see ``store.py``).
"""

import hashlib
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from autosparse_fx.kernels.choice import lacking
from autosparse_fx.kernels.store import remembered
from autosparse_fx.kernels.timing import median_seconds

log = logging.getLogger(__name__)

SCALES = (1.0, 0.0, 0.6, 1.6)  # of the estimate for dense kernels; the first is taken unless another is clearly faster
ROUNDS, SECONDS = 5, 0.05  # of each graph, and what a round takes of it at least
CLEARLY = 0.97  # of the time of the first


def tuned_scale(
    graph: GraphModule,
    inputs: Sequence[Any],
    options: Mapping[str, Any],
    compiled: Callable[[], Mapping[float, Callable[..., Any]]],
) -> float:
    """Return the scale whose graph is fastest on this machine.

    Args:
        graph: with its weights as constants, before any pass.
        inputs: of a call, without the weights.
        options: of Inductor.
        compiled: compiles the graph for each scale that makes a difference.
    """
    return float(remembered("choices", _key(graph, inputs, options), lambda: _fastest(compiled(), inputs)))


@torch.no_grad()
def _fastest(functions: Mapping[float, Callable[..., Any]], inputs: Sequence[Any]) -> float:
    times: dict[float, list[float]] = {scale: [] for scale in functions}
    with torch.random.fork_rng(devices=()):
        for _ in range(ROUNDS if len(functions) > 1 else 1):
            for scale, function in functions.items():
                times[scale].append(median_seconds(partial(function, *inputs), SECONDS))
    medians = {scale: statistics.median(found) for scale, found in times.items()}
    log.info("a graph takes %s", ", ".join(f"{1000 * t:.3f} ms with {scale:g}" for scale, t in medians.items()))
    first, best = next(iter(medians)), min(medians, key=medians.__getitem__)
    return best if medians[best] < CLEARLY * medians[first] else first


def _key(graph: GraphModule, inputs: Sequence[Any], options: Mapping[str, Any]) -> bytes:
    """What the fastest choice depends on, besides the machine: how many weights are zero, and not which."""
    kinds = [(v.dtype, v.shape, v.stride()) if isinstance(v, Tensor) else v for v in inputs]
    found = hashlib.sha256()
    found.update(repr((torch.__version__, SCALES, kinds, sorted(map(repr, options.items())))).encode())
    found.update(str(graph.graph).encode())
    for value in graph.buffers():
        zeros = "" if lacking(value) else f"{1 - value.count_nonzero() / max(1, value.numel()):.2f}"
        found.update(repr((value.dtype, tuple(value.shape), zeros)).encode())
    return found.digest()
