"""The two operators that every pass, graph and kernel of this package speaks about.

``autosparse::threshold_mask(weight, threshold, alpha)`` is the threshold-mask node: the soft threshold
``sign(w) * relu(|w| - g(s))`` with ``g = sigmoid`` (STR, arXiv:2002.03231, section 3; AutoSparse, arXiv:2304.06941).
``autosparse::anneal_gradient(grad, weight, threshold, alpha)`` is the GA-gradient node: its backward, in which the
derivative of the relu is 1 for a weight that is kept and ``alpha`` for one that is masked (Gradient Annealing).

Both stay single nodes in the Dynamo, joint, forward and backward graphs. Inductor lowers them to pointwise and
reduction IR (see ``lowering.py``), so that they fuse with their neighbours.
"""

from typing import Any

import torch
from torch import Tensor

from autosparse_fx._compat import eager, inductor

__all__ = ["anneal_gradient", "threshold_mask"]

BLOCK = 2**18  # elements of a weight that are summed at a time in eager mode: their temporaries fit into a core's cache
MOST = 2**30  # elsewhere: CUDA's libraries count elements in 32 bits, of which one is the sign

_library = torch.library.Library("autosparse", "DEF")
_library.define(
    "threshold_mask(Tensor weight, Tensor threshold, Tensor alpha) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "anneal_gradient(Tensor grad, Tensor weight, Tensor threshold, Tensor alpha) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def threshold_mask(weight: Tensor, threshold: Tensor, alpha: Tensor) -> Tensor:
    """Return the masked weight ``w - clamp(w, -g(s), g(s))``, whose gradient is annealed by ``alpha``.

    Zeros are +0 and NaN is passed on. The value does not depend on ``alpha``; the gradients do::

        dw = G * h              h = 1 where |w| > g(s), else alpha
        ds = -g'(s) * sum(G * sign(w) * h)      summed over what s is broadcast over

    Args:
        weight: floating-point tensor of any shape, strides and device.
        threshold: float32 or float64 logits ``s`` that broadcast to ``weight``: ``[1]``, or ``[C, 1, ...]``.
        alpha: 0-d float32 tensor in [0, 1] on the device of ``weight``; gets no gradient.

    Returns:
        A new tensor with the shape, dtype and (dense) strides of ``weight``.

    Raises:
        TypeError: if ``weight`` is not real floating-point, or ``threshold`` is neither float32 nor float64.
    """
    if eager.functorch_is_active() or eager.forward_ad_is_active():
        _check(weight, threshold)
        # torch.func and vmap do not run a library op's autograd formula; the same values and gradients, op by op.
        return _threshold_mask_by_autograd(weight, threshold, alpha)
    return torch.ops.autosparse.threshold_mask.default(weight, threshold, alpha)  # type: ignore[no-any-return]


def anneal_gradient(grad: Tensor, weight: Tensor, threshold: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(dw, ds)``, the gradients of :func:`threshold_mask` for the incoming gradient ``grad``.

    Args:
        grad: gradient of the masked weight, of the shape of ``weight``.
        weight, threshold, alpha: as given to :func:`threshold_mask`.

    Returns:
        ``dw`` with the shape and dtype of ``weight``, and ``ds`` with those of ``threshold``.
    """
    return torch.ops.autosparse.anneal_gradient.default(grad, weight, threshold, alpha)  # type: ignore[no-any-return]


def _check(weight: Tensor, threshold: Tensor) -> None:
    if not weight.is_floating_point():
        raise TypeError(f"autosparse: a weight must be real floating-point to be masked, got {weight.dtype}")
    if threshold.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"autosparse: thresholds must be float32 or float64, got {threshold.dtype}")


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that masks are computed in: that of the weight, but float32 at least."""
    return torch.promote_types(weight.dtype, torch.float32)


def threshold_mask_decomposition(weight: Tensor, threshold: Tensor, alpha: Tensor) -> Tensor:
    """``threshold_mask`` in ATen: the fake kernel, and the decomposition for export and DTensor."""
    _check(weight, threshold)
    dtype = _compute_dtype(weight)
    w = weight.to(dtype)
    cut = torch.sigmoid(threshold.to(dtype))
    return (w - torch.clamp(w, -cut, cut)).to(weight.dtype)


def anneal_gradient_decomposition(
    grad: Tensor, weight: Tensor, threshold: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor]:
    """``anneal_gradient`` in ATen."""
    _check(weight, threshold)
    dtype = _compute_dtype(weight)
    w = weight.to(dtype)
    grad = grad.to(dtype)
    cut = torch.sigmoid(threshold.to(dtype))
    annealed = torch.where(w.abs() > cut, grad, alpha.to(dtype) * grad)
    total = _sum_to(annealed * torch.sign(w), threshold)
    return annealed.to(weight.dtype), (-cut * (1 - cut) * total).to(threshold.dtype)


def broadcast_dims(shape: tuple[int, ...], threshold_shape: tuple[int, ...]) -> tuple[list[int], int]:
    """Return the dimensions of ``shape`` that a threshold is broadcast over, and how many of them it lacks."""
    lacking = len(shape) - len(threshold_shape)
    dims = [d for d in range(len(shape)) if d < lacking or threshold_shape[d - lacking] == 1]
    return dims, lacking


def _sum_to(x: Tensor, threshold: Tensor) -> Tensor:
    dims, lacking = broadcast_dims(tuple(x.shape), tuple(threshold.shape))
    total = x.sum(dim=dims, keepdim=True) if dims else x
    return total.squeeze(tuple(range(lacking))) if lacking else total


def _threshold_mask_by_autograd(weight: Tensor, threshold: Tensor, alpha: Tensor) -> Tensor:
    """``threshold_mask`` as a composition whose ordinary autograd gives the annealed gradients."""
    dtype = _compute_dtype(weight)
    w = weight.to(dtype)
    cut = torch.sigmoid(threshold.to(dtype))
    x = w - torch.sign(w).detach() * cut
    masked = torch.where(w.abs() > cut, x, alpha.detach().to(dtype) * (x - x.detach()))
    return masked.to(weight.dtype)


def _threshold_mask_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    weight, threshold, ctx.alpha = inputs  # not saved: DDP writes to buffers at every forward, and annealers between
    ctx.save_for_backward(weight, threshold)


def _threshold_mask_backward(ctx, grad):  # type: ignore[no-untyped-def]
    weight, threshold = ctx.saved_tensors
    ctx.is_spent = True  # after this call what it saved may be gone, and its result is not to be used anew
    return *anneal_gradient(grad, weight, threshold, ctx.alpha), None


def _anneal_gradient_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _anneal_gradient_backward(ctx, grad_dw, grad_ds):  # type: ignore[no-untyped-def]
    """Double backward: linear in ``grad``; the weight is piecewise constant in both outputs and gets none."""
    grad, weight, threshold, alpha = ctx.saved_tensors
    dtype = _compute_dtype(weight)
    w, s = weight.to(dtype), threshold.to(dtype)
    cut = torch.sigmoid(s)
    slope = torch.where(w.abs() > cut, torch.ones_like(w), alpha.to(dtype))
    d_cut = cut * (1 - cut)
    sign = torch.sign(w)
    grad_grad = slope * (grad_dw.to(dtype) - sign * d_cut * grad_ds.to(dtype))
    total = _sum_to(grad.to(dtype) * sign * slope, threshold)
    grad_threshold = -d_cut * (1 - 2 * cut) * total * grad_ds.to(dtype)
    return grad_grad.to(grad.dtype), None, grad_threshold.to(threshold.dtype), None


def signed_sum(grad: Tensor, weight: Tensor) -> Tensor:
    """Return the sum over ``grad * sign(weight)``, of shape ``[1]``; both have the same dense strides.

    On the CPU block by block, so that the signs stay in the cache: a temporary tensor as large as a weight would cost
    several times as much as the sum.
    """
    grad, weight = _flat(grad, weight), _flat(weight, weight)
    size = BLOCK if weight.device.type == "cpu" else MOST
    blocks = zip(grad.split(size), weight.split(size), strict=True)
    return torch.stack([torch.dot(g, torch.sign(w).to(g.dtype)) for g, w in blocks]).sum().reshape(1)


def _flat(t: Tensor, like: Tensor) -> Tensor:
    """``t`` in the memory order of ``like``: a view where it is dense."""
    return t.permute(sorted(range(like.dim()), key=lambda d: like.stride()[d], reverse=True)).reshape(-1)


def _threshold_mask_kernel(weight: Tensor, threshold: Tensor, alpha: Tensor) -> Tensor:
    """The decomposition with one temporary tensor less: in eager mode memory is what it costs."""
    _check(weight, threshold)
    w = weight.to(_compute_dtype(weight))
    cut = _eager_cut(w, threshold)
    clamped = torch.clamp(w, -cut, cut)
    return torch.sub(w, clamped, out=clamped).to(weight.dtype)


def _anneal_gradient_kernel(grad: Tensor, weight: Tensor, threshold: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """The decomposition with half its temporary tensors."""
    if grad.stride() != weight.stride():
        return anneal_gradient_decomposition(grad, weight, threshold, alpha)
    _check(weight, threshold)
    w = weight.to(_compute_dtype(weight))
    grad = grad.to(w.dtype)
    cut = torch.sigmoid(threshold.to(w.dtype))
    annealed = _anneal(grad, w, threshold, alpha)
    total = signed_sum(annealed, w) if threshold.shape == (1,) else _sum_to(torch.sign(w).mul_(annealed), threshold)
    return annealed.to(weight.dtype), (-cut * (1 - cut) * total).to(threshold.dtype)


def _anneal(grad: Tensor, w: Tensor, threshold: Tensor, alpha: Tensor) -> Tensor:
    """``grad`` where ``|w|`` is above the cut, ``alpha * grad`` elsewhere."""
    scratch = w.abs()
    cut = _eager_cut(w, threshold)
    if w.device.type == "cpu":
        # Comparing and selecting run on one number at a time there; this does the same in vector registers.
        scratch.sub_(cut)
        torch.ops.aten.leaky_relu_backward.grad_input(grad, scratch, alpha.item(), False, grad_input=scratch)
        return scratch
    annealed = torch.mul(grad, alpha.to(w.dtype))
    return torch.where(scratch > cut, grad, annealed, out=annealed)


def _eager_cut(w: Tensor, threshold: Tensor) -> Any:  # Tensor | float, which torch's annotations do not take
    """The cut in the dtype of ``w``; as a number on the CPU, where reading it is free and arithmetic with it faster."""
    cut = torch.sigmoid(threshold.to(w.dtype))
    return cut.item() if w.device.type == "cpu" and cut.numel() == 1 else cut


_library.impl("threshold_mask", _threshold_mask_kernel, "CompositeExplicitAutograd")
_library.impl("anneal_gradient", _anneal_gradient_kernel, "CompositeExplicitAutograd")


def _fake(decomposition):  # type: ignore[no-untyped-def]
    """The fake kernel of an op: its decomposition, run on fake tensors, which makes shapes and strides exact.

    It is also where the Inductor lowerings are registered: a fake kernel runs in every trace, after Inductor (if it
    is Inductor that traces) was imported and before it lowers, and importing this package stays cheap.
    """

    def fake(*args: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        inductor.register_lowerings_if_inductor_is_loaded()
        return decomposition(*args)  # type: ignore[no-any-return]

    return fake


torch.library.register_fake(
    "autosparse::threshold_mask", _fake(threshold_mask_decomposition), lib=_library, allow_override=False
)
torch.library.register_fake(
    "autosparse::anneal_gradient", _fake(anneal_gradient_decomposition), lib=_library, allow_override=False
)
torch.library.register_autograd(
    "autosparse::threshold_mask", _threshold_mask_backward, setup_context=_threshold_mask_setup, lib=_library
)
torch.library.register_autograd(
    "autosparse::anneal_gradient", _anneal_gradient_backward, setup_context=_anneal_gradient_setup, lib=_library
)
eager.register_decomposition(torch.ops.autosparse.threshold_mask.default, threshold_mask_decomposition)
eager.register_decomposition(torch.ops.autosparse.anneal_gradient.default, anneal_gradient_decomposition)
