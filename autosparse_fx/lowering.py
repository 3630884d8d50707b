"""Inductor lowerings of the two operators: named nodes until the very end, then ordinary IR that fuses.

Registered for every backend that lowers through Inductor, the stock one included. A lowering is no part of Inductor's
cache key, so the hash of this file is added to it.
"""

import hashlib
import inspect
import sys
from typing import Any

import torch

from autosparse_fx import ops
from autosparse_fx._compat.inductor import inductor_lowerings, register_inductor_lowering, tag_compile_caches
from autosparse_fx.ops import broadcast_dims

aten = torch.ops.aten
prims = torch.ops.prims
ROWS = 64  # fewer would leave most of a GPU idle


def _call(op: Any, *args: Any, **kwargs: Any) -> Any:
    return inductor_lowerings()[op](*args, **kwargs)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x if x.get_dtype() == dtype else _call(prims.convert_element_type.default, x, dtype)


def _cut(threshold: Any, dtype: torch.dtype) -> Any:
    cut = _call(aten.sigmoid.default, _cast(threshold, dtype))
    if cut.get_device().type == "cpu":
        cut.realize()  # the C++ code would compute the same exponential once per weight; a GPU hides it behind the load
    return cut


def _threshold_mask(weight: Any, threshold: Any, alpha: Any) -> Any:
    dtype = torch.promote_types(weight.get_dtype(), torch.float32)
    w = _cast(weight, dtype)
    cut = _cut(threshold, dtype)
    clamped = _call(aten.minimum.default, _call(aten.maximum.default, w, _call(aten.neg.default, cut)), cut)
    return _cast(_call(aten.sub.Tensor, w, clamped), weight.get_dtype())


def _anneal_gradient(grad: Any, weight: Any, threshold: Any, alpha: Any) -> tuple[Any, Any]:
    dtype = torch.promote_types(weight.get_dtype(), torch.float32)
    w, grad = _cast(weight, dtype), _cast(grad, dtype)
    cut = _cut(threshold, dtype)
    kept = _call(aten.gt.Tensor, _call(aten.abs.default, w), cut)
    annealed = _call(aten.where.self, kept, grad, _call(aten.mul.Tensor, _cast(alpha, dtype), grad))
    d_weight = _cast(annealed, weight.get_dtype())
    on_cpu = weight.get_device().type == "cpu"
    if d_weight is annealed and on_cpu:
        annealed.realize()  # the sum then takes it in the loop that makes it, instead of making it in a loop of its own

    shape = threshold.get_size()
    dims, lacking = broadcast_dims(tuple(weight.get_size()), tuple(shape))
    total = _call(aten.mul.Tensor, annealed, _call(aten.sign.default, w))
    if not on_cpu and len(dims) > 1 and dims[0] == 0 and int(w.get_size()[0]) >= ROWS:
        # Row by row first. Inductor splits one long sum into chunks, and only chunks that are whole rows share a kernel
        # with the annealed gradient; otherwise gradient and weight are read twice.
        total = _call(aten.sum.dim_IntList, total, dims[1:], True)
        total.realize()
        dims = dims[:1]
    if dims:
        total = _call(aten.sum.dim_IntList, total, dims, True)
    if lacking:
        total = _call(aten.view.default, total, list(shape))
    slope = _call(aten.mul.Tensor, cut, _call(aten.sub.Tensor, cut, 1))  # -g'(s) = g * (g - 1)
    d_threshold = _call(aten.mul.Tensor, slope, total)
    return d_weight, _cast(d_threshold, threshold.get_dtype())


register_inductor_lowering(torch.ops.autosparse.threshold_mask.default, _threshold_mask)
register_inductor_lowering(torch.ops.autosparse.anneal_gradient.default, _anneal_gradient)
_sources = inspect.getsource(sys.modules[__name__]) + inspect.getsource(ops)
tag_compile_caches(f"autosparse-{hashlib.sha256(_sources.encode()).hexdigest()[:16]}")
