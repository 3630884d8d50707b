"""One mask per weight and forward in eager mode, however often a module reads the weight.

Recurrent layers and attention read theirs several times. A compiled graph needs none of this: there ``dedupe_masks``,
or the compiler's own elimination of common subexpressions, merges the nodes.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autosparse_fx._compat import dynamo, eager


class _Memo:
    """What one forward has masked so far.

    It serves only reads whose results autograd saves in the same way: an activation checkpoint inside of the forward
    computes anew what it reads, at a time when this forward is over, and has to find it as it was.
    """

    def __init__(self) -> None:
        self._hooks = eager.saved_tensor_hooks()
        self.masked: dict[tuple[int, int, bool], tuple[Tensor, Tensor]] = {}

    @property
    def is_current(self) -> bool:
        return self._hooks == eager.saved_tensor_hooks()


class _Reads(threading.local):
    memo: _Memo | None = None


_reads = _Reads()


def masking_once(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``forward`` so that, in eager mode, each weight that it reads is masked once, however often it reads it."""

    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        outer = _reads.memo
        if outer is not None and outer.is_current:
            return forward(self, *args, **kwargs)
        _reads.memo = _Memo()
        try:
            return forward(self, *args, **kwargs)
        finally:
            _reads.memo = outer

    return wrapper


def masking_once_outside_graphs(forward: Callable[..., Any]) -> Callable[..., Any]:
    """As :func:`masking_once`, for layers that Dynamo leaves to eager mode: it must leave all of it, or it compiles the
    reads of their weights one by one."""
    outside = torch.compiler.disable(masking_once(forward))

    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (forward if torch.compiler.is_compiling() else outside)(self, *args, **kwargs)

    dynamo.skip_frame(wrapper)
    return wrapper


def masked_once(weight: Tensor, mask: Callable[[], Tensor]) -> Tensor:
    """Return ``mask()``, or what it returned before in the same forward for the weight as it is and the grad mode.

    Not where a backward pass has gone through that, as in a forward that differentiates.
    """
    memo = _reads.memo
    if memo is None or not memo.is_current:
        return mask()
    key = (id(weight), 0 if weight.is_inference() else weight._version, torch.is_grad_enabled())
    _, masked = memo.masked.get(key, (None, None))
    if masked is None or getattr(masked.grad_fn, "is_spent", False):
        masked = mask()
        memo.masked[key] = (weight, masked)  # holding the weight keeps its id from being used again
    return masked
