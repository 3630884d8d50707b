"""What a graph became for certain weights, and whether they are still what they were."""

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from autosparse_fx.kernels.choice import lacking

# What is looked at of every weight at every call, without the interpreter's help: that shows where a model takes
# milliseconds.
_VERSION, _ADDRESS, _FIRST = operator.attrgetter("_version"), operator.methodcaller("data_ptr"), operator.itemgetter(0)
ROWS = 16  # of a weight, at least, by which its zeros are judged


class Compiled:
    """What a graph became for certain tensors, which it does not hold.

    Args:
        tensors: weights and buffers.
        function: what to call.
        arguments: the numbers of the arguments that the function takes.
        versions: of the tensors whose writes matter, by their numbers (see :func:`versions_of`).
        is_frozen: whether the tensors are constants of the function. It is for these alone then, and for all tensors
            that come with the same parameters otherwise.
        rewrites: how often constants had to be given up for these parameters.
        zeros: where the tensors are no constants, what :func:`zeros_of` found in them.
        moving: the numbers of those that are no constants where the others are.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        function: Callable[..., Any],
        arguments: Sequence[int],
        versions: dict[int, tuple[int, int]],
        *,
        is_frozen: bool,
        rewrites: int,
        zeros: dict[int, int] | None = None,
        moving: frozenset[int] = frozenset(),
    ) -> None:
        self.arguments, self.rewrites = list(arguments), rewrites
        self.is_frozen, self.zeros, self.moving = is_frozen, zeros or {}, moving
        self._parameters = [number for number, tensor in enumerate(tensors) if isinstance(tensor, nn.Parameter)]
        constants = [number for number in range(len(tensors)) if number not in moving]
        self._own = constants if is_frozen else self._parameters
        self._watched = [number for number in versions if number not in moving]
        self._versions = [versions[number][0] for number in self._watched]
        self._addresses = [versions[number][1] for number in self._watched]
        self._probes = _probes([tensors[number] for number in constants]) if is_frozen else []
        self._probed = list(map(_FIRST, self._probes))
        self._functions = [function]
        held = self._functions, self._probes

        def let_go(_: object) -> None:
            """Drop the constants, which are as large as the model, with the first tensor that is gone."""
            for kept in held:  # and not self, which references to a method would make a cycle
                kept.clear()

        # Their numbers are compared at every call, which takes less than looking at references; those only tell when a
        # number may have come to mean another tensor.
        self.ids = [id(tensors[number]) for number in self._own]
        self._refs = {number: weakref.ref(tensors[number], let_go) for number in self._own}

    @property
    def function(self) -> Callable[..., Any]:
        """For tensors that it fits, which are alive."""
        return self._functions[0]

    def is_for(self, tensors: Sequence[Tensor]) -> bool:
        return not self.is_dead and self.ids == list(map(id, map(tensors.__getitem__, self._own)))

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it is for these tensors, as they are now."""
        if not self.is_for(tensors):
            return False
        watched = list(map(tensors.__getitem__, self._watched))
        is_same = self._versions == list(map(_VERSION, watched)) and self._addresses == list(map(_ADDRESS, watched))
        return is_same and self._probed == list(map(_FIRST, self._probes))

    def has_parameters_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it is for these parameters, if with other buffers."""
        return all(self._refs[number]() is tensors[number] for number in self._parameters)

    def changed_buffers(self, tensors: Sequence[Tensor]) -> frozenset[int]:
        """Which constants are others now, or were written to, where all of these are buffers."""
        versions = zip(self._versions, self._addresses, strict=True)
        then, now = dict(zip(self._watched, versions, strict=True)), versions_of(tensors)
        changed = {
            number
            for number in self._own
            if self._refs[number]() is not tensors[number] or then.get(number) != now.get(number)
        }
        return frozenset() if changed & set(self._parameters) else frozenset(changed)

    def has_fewer_zeros(self, zeros: dict[int, int]) -> bool:
        """Whether one of the tensors holds more zeros now, by a tenth of it."""
        return any(tenths > self.zeros.get(number, tenths) for number, tenths in zeros.items())

    @property
    def is_dead(self) -> bool:
        """Whether one of the tensors is gone, and the function with it."""
        return not self._functions


def may_run_sparse(tensor: Tensor) -> bool:
    """Whether there is a sparse kernel for a weight like this."""
    return tensor.dim() >= 2 and not lacking(tensor)


def versions_of(tensors: Sequence[Tensor]) -> dict[int, tuple[int, int]]:
    """How often each tensor was written to and where it lies, which ``tensor.data = ...`` changes, by its number; of
    those whose writes autograd counts."""
    watched = [(number, tensor) for number, tensor in enumerate(tensors) if not tensor.is_inference()]
    return {number: (tensor._version, tensor.data_ptr()) for number, tensor in watched}


def zeros_of(tensors: Sequence[Tensor]) -> dict[int, int]:
    """How many tenths of each weight are zeros, by its number; judged by some of its rows."""
    return {number: _tenths(tensor) for number, tensor in enumerate(tensors) if may_run_sparse(tensor)}


def _tenths(tensor: Tensor) -> int:
    rows = tensor.detach()[:: max(1, tensor.shape[0] // ROWS)]
    return 10 * (rows.numel() - int(rows.count_nonzero())) // max(1, rows.numel())


def _probes(tensors: Sequence[Tensor]) -> list[memoryview]:
    """What to look at besides versions: batch norm writes to its statistics without counting it.

    Each begins with the largest element of a buffer, because the statistics of a channel that is pruned stay zero.
    """
    buffers = [t for t in tensors if not isinstance(t, nn.Parameter) and t.dim() == 1 and t.numel() and not lacking(t)]
    # Their bits, because NumPy knows no bfloat16; and as memory, of which Python reads an element fastest.
    bits = {2: torch.int16, 4: torch.int32}
    return [t.detach().view(bits[t.dtype.itemsize]).numpy().data[_largest(t) :] for t in buffers]


def _largest(tensor: Tensor) -> int:
    """The number of the element that is farthest from zero, of those that are finite."""
    return int(tensor.nan_to_num(0, 0, 0).abs().argmax())


def count_fused_writes(known: Callable[[], set[int]]) -> None:
    """From now on count the writes of fused optimizers, which they do not themselves, to tensors with the ids that
    ``known`` returns."""

    @torch.compiler.disable
    def count(optimizer: Optimizer, args: object, kwargs: object) -> None:
        fused = [p for group in optimizer.param_groups if group.get("fused") for p in group["params"]]
        if fused:
            ids = known()
            torch.autograd.graph.increment_version([p for p in fused if id(p) in ids])

    register_optimizer_step_post_hook(count)
