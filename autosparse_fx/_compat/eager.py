"""Private parts of torch that are not of the compiler: autograd, modules, dispatch and distributed tensors."""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload as OpOverload  # an operator of a graph of ATen, and all of one name. 2.11-2.15.
from torch._ops import OpOverloadPacket as OpOverloadPacket
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # sees every operator. 2.11-2.15.
from torch.utils._python_dispatch import (
    is_traceable_wrapper_subclass as is_traceable_wrapper_subclass,  # whether a tensor holds others. 2.11-2.15.
)
from torch.utils._pytree import tree_leaves as tree_leaves  # the tensors in nested arguments. 2.11-2.15.
from torch.utils._pytree import tree_map as tree_map  # the same, each replaced. 2.11-2.15.

# The base classes of all convolutions, transposed ones included, and of the transposed ones. 2.11-2.15.
ConvNd, ConvTransposeNd = _ConvNd, _ConvTransposeNd


@torch.compiler.assume_constant_result
def forward_ad_is_active() -> bool:
    """Whether there are dual numbers of ``torch.autograd.forward_ad``. 2.11-2.15; no public equivalent."""
    return torch.autograd.forward_ad._current_level >= 0


@torch.compiler.assume_constant_result
def functorch_is_active() -> bool:
    """Whether a ``torch.func`` transform (grad, vmap, ...) is running. 2.11-2.15; no public equivalent.

    Dynamo runs the transforms of what it captures, and guards on those around it: so it may ask once, while it does.
    """
    return torch._C._are_functorch_transforms_active()


def register_decomposition(op: Any, function: Callable[..., Any]) -> None:
    """Enter ``op`` in the global decomposition table, from which DTensor derives sharding. 2.11-2.15.

    Inductor copies its own table, so the op stays a single node there.
    """
    from torch._decomp import register_decomposition as register

    register([op])(function)


def saved_tensor_hooks() -> tuple[Any, ...] | None:
    """The hooks that autograd calls at the moment for what it saves for the backward pass, if any. 2.11-2.15."""
    hooks: tuple[Any, ...] | None = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks


def weak_tensor_ref(tensor: Tensor) -> Callable[[], Tensor | None]:
    """A weak reference that follows a tensor whose Python object is revived from C++. 2.11-2.15."""
    from torch.utils.weak import TensorWeakRef

    return TensorWeakRef(tensor)


def python_dispatcher() -> Any:
    """Within it operators that are made of others take symbolic sizes as they are. 2.11-2.15."""
    from torch._dispatch.python import enable_python_dispatcher

    return enable_python_dispatcher()


def without_wrapper(model: nn.Module) -> nn.Module:
    """The model itself, where ``torch.compile(model)`` was given. 2.11-2.15."""
    return getattr(model, "_orig_mod", model) if type(model).__name__ == "OptimizedModule" else model


def is_managed_by_fsdp(module: nn.Module) -> bool:
    """Whether ``fully_shard`` has this module's parameters: the attribute is what it sets. 2.11-2.15."""
    return getattr(module, "_is_fsdp_managed_module", False)


def is_asked_by_distributed_tensors() -> bool:
    """Whether ``torch.distributed.tensor`` asks, to be used in a property: others look at all attributes. 2.11-2.15."""
    return str(sys._getframe(2).f_globals.get("__name__")).startswith("torch.distributed.tensor")


def reader() -> str | None:
    """Who reads a weight, to be asked in its property: one that must not get a masked copy, or None. 2.11-2.15.

    The old ``torch.nn.utils.weight_norm`` deletes the weight then: refusing later, when it registers parameters of its
    own, would be too late. ``get_parameter`` is for the parameter itself.
    """
    return _readers().get(id(sys._getframe(2).f_code))


@functools.cache
def _readers() -> dict[int, str]:
    from torch.nn.utils.weight_norm import WeightNorm

    codes = {
        "weight_norm": inspect.unwrap(WeightNorm.apply).__code__,
        "get_parameter": nn.Module.get_parameter.__code__,
    }
    return {id(code): name for name, code in codes.items()}


def is_symbolically_traced(module: nn.Module, name: str) -> bool:
    """Whether ``torch.fx.symbolic_trace`` runs, and a parameter of this name is a proxy in it. 2.11-2.15."""
    # The tracer has replaced what modules look parameters up by; other tracers have not.
    return is_fx_symbolic_tracing() and isinstance(nn.Module.__getattr__(module, name), torch.fx.Proxy)


def has_step_hooks(optimizer: object) -> bool:
    """Whether an optimizer can be given hooks: whether ``Optimizer.__init__`` was called for it. 2.11-2.15."""
    return hasattr(optimizer, "_optimizer_step_post_hooks")
