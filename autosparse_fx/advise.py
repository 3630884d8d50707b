"""What sparsity would pay on this machine, layer by layer, before anything is trained."""

import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autosparse_fx._compat import cpu, eager
from autosparse_fx.arguments import check_module
from autosparse_fx.kernels.layers import Layer, layers
from autosparse_fx.kernels.library import library
from autosparse_fx.kernels.program import Buffer, Step, Window, assemble
from autosparse_fx.kernels.steps import as_kernel
from autosparse_fx.kernels.timing import median_seconds
from autosparse_fx.tables import Row, Tabular

SECONDS = 0.03  # for each kernel that is timed


@dataclass(frozen=True)
class LayerAdvice:
    """One weight: milliseconds of its dense kernel, and of the sparse one at each sparsity.

    ``sparse_ms`` is empty for a layer that sparse kernels do not run, and ``reason`` says why.
    """

    name: str
    shape: tuple[int, ...]
    dense_ms: float | None
    sparse_ms: dict[float, float]
    reason: str = ""

    def speedup(self, sparsity: float) -> float | None:
        """Dense over sparse time, or None where there is no sparse kernel."""
        if self.dense_ms is None or sparsity not in self.sparse_ms:
            return None
        return self.dense_ms / self.sparse_ms[sparsity]

    @property
    def pays_from(self) -> float | None:
        """The lowest of the sparsities from which on the sparse kernel is the faster one; None where it never is."""
        paying: float | None = None
        for sparsity in sorted(self.sparse_ms, reverse=True):
            if (self.speedup(sparsity) or 0) <= 1:
                break
            paying = sparsity
        return paying


@dataclass(frozen=True)
class Advice(Tabular):
    """The layers of a model, and what a forward pass of them takes; ``print`` it, take :meth:`to_dict`, or
    see it as HTML in a notebook."""

    layers: tuple[LayerAdvice, ...]
    sparsities: tuple[float, ...]
    threads: int

    def speedup(self, sparsity: float) -> float | None:
        """Of all layers together that have a sparse kernel, each on the faster of its two."""
        timed = [layer for layer in self.layers if layer.dense_ms is not None]
        if not timed:
            return None
        dense = sum(layer.dense_ms or 0 for layer in timed)
        return dense / sum(min(layer.dense_ms or 0, layer.sparse_ms[sparsity]) for layer in timed)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, fit for JSON."""
        return {
            "threads": self.threads,
            "speedup": {str(sparsity): self.speedup(sparsity) for sparsity in self.sparsities},
            "layers": [asdict(layer) | {"pays_from": layer.pays_from} for layer in self.layers],
        }

    def _table(self) -> tuple[Row, list[Row], list[Row]]:
        header = ["weight", "shape", "dense ms", *(f"{sparsity:.0%}" for sparsity in self.sparsities), "pays from"]
        rows: list[Row] = []
        for layer in self.layers:
            gains = [_times(layer.speedup(sparsity)) for sparsity in self.sparsities]
            time_taken = "" if layer.dense_ms is None else f"{layer.dense_ms:.3f}"
            pays = layer.reason or ("never" if layer.pays_from is None else f"{layer.pays_from:.0%}")
            rows.append([layer.name, "x".join(map(str, layer.shape)), time_taken, *gains, pays])
        total = sum(layer.dense_ms or 0 for layer in self.layers)
        gains = [_times(self.speedup(sparsity)) for sparsity in self.sparsities]
        return header, rows, [["these layers, each on the faster kernel", "", f"{total:.3f}", *gains, ""]]

    def _notes(self) -> list[str]:
        return [
            f"measured on this machine with {self.threads} threads, masks at random, each layer alone: a dense kernel "
            "in the dtype of the model, on channels-last images or tokens, over the sparse one, in float32"
        ]


def _times(speedup: float | None) -> str:
    return "" if speedup is None else f"{speedup:.2f}x"


@torch.no_grad()
def advise(
    model: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any] | Tensor,
    sparsities: Sequence[float] = (0.7, 0.8, 0.9, 0.95),
) -> Advice:
    """Time the layers of ``model`` on this machine's CPU, dense and at each sparsity, whatever the weights are now.

    Args:
        model: any module; it runs once in evaluation mode, without gradients, and is left as it was, with the random
            state.
        example_inputs: the arguments of one call (a tensor, a tuple, or a dict of keyword arguments), of the batch size
            and the image size to advise for.
        sparsities: fractions of zeros in [0, 1).

    Raises:
        TypeError: if ``model`` is no module, or a sparsity no number.
        ValueError: if a sparsity is out of range, or the model cannot be run on the inputs.
    """
    check_module(model, "advise")
    sparsities = _checked(sparsities)
    model = eager.without_wrapper(model)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        found = layers(model, example_inputs)
    finally:
        for module in training:
            module.training = True
    timed: dict[Any, tuple[float, dict[float, float]]] = {}
    rows = []
    for layer in found:
        if not layer.choice.is_supported:
            rows.append(LayerAdvice(layer.name, layer.shape, None, {}, layer.choice.reason))
            continue
        geometry = layer.shape, layer.units, layer.columns, layer.window, layer.groups, layer.dtype
        if geometry not in timed:
            timed[geometry] = _time_dense(layer), {s: _time_sparse(layer, s) for s in sparsities}
        rows.append(LayerAdvice(layer.name, layer.shape, *timed[geometry]))
    return Advice(tuple(rows), sparsities, torch.get_num_threads())


def _checked(sparsities: object) -> tuple[float, ...]:
    if not isinstance(sparsities, Iterable) or isinstance(sparsities, (str, Tensor)):
        raise TypeError(f"sparsities must be a sequence of fractions, as (0.8, 0.9), got {sparsities!r}")
    found = tuple(sparsities)
    for sparsity in found:
        if isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real):
            raise TypeError(f"sparsities must be fractions in [0, 1), got {sparsity!r}")
        if not 0 <= float(sparsity) < 1:
            raise ValueError(f"sparsities must be in [0, 1), got {sparsity!r}")
    return tuple(map(float, found))


def _time_dense(layer: Layer) -> float:
    weight, bias = _random(layer.shape, layer.dtype), torch.zeros(layer.shape[0], dtype=layer.dtype)
    if layer.window is None:
        x = _random((layer.columns, layer.shape[1]), layer.dtype)
        return _milliseconds(lambda: F.linear(x, weight, bias))
    window = layer.window
    x = _random((layer.units, layer.shape[1] * layer.groups, *window.in_size), layer.dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    return _milliseconds(
        cpu.constant_convolution(
            x, as_kernel(weight), bias, window.stride, window.padding, window.dilation, layer.groups
        )
    )


def _time_sparse(layer: Layer, sparsity: float) -> float:
    weight = _random(layer.shape)
    weight *= torch.rand(layer.shape, generator=torch.Generator()) >= sparsity
    rows, channels = layer.shape[0], layer.shape[1] * layer.groups
    is_tokens = layer.window is None
    window = layer.window or Window((1, 1), (1, 1))
    pixels = window.in_size[0] * window.in_size[1]
    step = Step(0, 1, as_kernel(weight), weight.new_zeros(rows), window, layer.groups)
    buffers = [Buffer("input", channels, pixels), Buffer("output", rows, layer.columns)]
    kernels = library()
    images = 1 if is_tokens else layer.units // torch.get_num_threads()
    tokens = layer.columns if is_tokens else 0
    program = assemble([step], buffers, kernels.machine, is_tokens=is_tokens, images=images, tokens=tokens).data
    shapes = (
        ((layer.columns, channels), (layer.columns, rows))
        if is_tokens
        else ((layer.units, channels, pixels), (layer.units, rows, layer.columns))
    )
    x, y = map(_random, shapes)
    return _milliseconds(lambda: kernels.run(program, [x], [y]))


def _random(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """The same at every call, and no change of the random state."""
    return torch.randn(shape, dtype=dtype, generator=torch.Generator())


def _milliseconds(function: Callable[[], Any]) -> float:
    return 1000 * median_seconds(function, SECONDS)
