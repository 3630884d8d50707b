"""Private parts of Dynamo: which backends compile what, and how a capture goes."""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch.fx import GraphModule


def register_backend_once(name: str, backend: Callable[..., Any]) -> None:
    """Register a Dynamo backend where its entry point is not about to do so by itself. 2.11-2.15."""
    if name not in torch._dynamo.list_backends(exclude_tags=None):
        torch._dynamo.register_backend(backend, name=name)


def compiling_backends() -> dict[int, Any]:
    """The backends that ``torch.compile`` was given since Dynamo was last reset, one for each call. 2.11-2.15."""
    return torch._dynamo.eval_frame.cached_backends


def backend_arguments(wrapper: object, backend: str) -> dict[str, Any] | None:
    """The mode and the options that one ``torch.compile`` passes to its backend, where it is this one. 2.11-2.15."""
    return getattr(wrapper, "kwargs", {}) if getattr(wrapper, "compiler_name", None) == backend else None


def compiled_by(function: FunctionType, backend: str) -> tuple[Callable[..., Any], dict[str, Any]] | None:
    """What ``function`` compiles, with the mode and the options, where it is what ``torch.compile`` with this backend
    returned (or holds, for a module). 2.11-2.15; Dynamo tells a backend of graphs, and not of what was compiled.
    """
    compiled = getattr(function, "_torchdynamo_orig_callable", None)
    if compiled is None:
        return None
    for cell in function.__closure__ or ():
        try:
            callback = cell.cell_contents
        except ValueError:  # a variable that has no value
            continue
        if hasattr(callback, "_torchdynamo_orig_backend"):
            wrapper = torch._dynamo.eval_frame.innermost_backend(callback)
            arguments = backend_arguments(wrapper, backend)
            if arguments is not None:
                return compiled, arguments
    return None


def compiles_a_backward_pass() -> bool:
    """Whether what Dynamo compiles is a backward pass that ``compiled_autograd`` captured. 2.11-2.15.

    What such a pass runs with gradients is not: a block that a checkpoint computes again.
    """
    from torch._dynamo import compiled_autograd

    return compiled_autograd.in_compiled_autograd_region and not torch.is_grad_enabled()


def compile_apart(function: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` whose compilations do not count for the recompile limit of others. 2.15; on 2.11 they do."""
    apart = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    options: dict[str, Any] = {"isolate_recompiles": True} if apart else {}
    compiled: Callable[..., Any] = torch.compile(function, backend=backend, **options)
    return compiled


def capturing_everything() -> Any:
    """Within it Dynamo captures a function however often it was compiled before, recurrent layers too, every new
    shape anew, and no size that depends on the values. 2.11-2.15.
    """
    import torch._dynamo

    return torch._dynamo.config.patch(
        recompile_limit=2**31,
        accumulated_recompile_limit=2**31,
        allow_rnn=True,
        automatic_dynamic_shapes=False,
        capture_dynamic_output_shape_ops=False,
        capture_scalar_outputs=False,
    )


def compile_lock() -> Any:
    """What Dynamo holds while it compiles, because tracing and the options of Inductor are those of the whole process,
    and not of a thread. 2.11-2.15.
    """
    from torch._dynamo import convert_frame

    return convert_frame.compile_lock


@contextmanager
def compiling() -> Iterator[None]:
    """Compile outside of Dynamo as it does: under its lock, and under no mode of the caller (a default device is one).
    2.11-2.15.
    """
    from torch._dynamo.variables.torch_function import torch_function_mode_stack_state_mgr
    from torch.utils._python_dispatch import _disable_current_modes

    with compile_lock(), _disable_current_modes(), torch_function_mode_stack_state_mgr:
        yield


def skip_frame(function: Callable[..., Any]) -> None:
    """Have Dynamo run this function as it is when it meets it on its own; it still inlines it. 2.11-2.15."""
    from torch._dynamo.eval_frame import skip_code

    skip_code(function.__code__)


@contextmanager
def graph_break_reasons() -> Iterator[list[str]]:
    """Collect why Dynamo broke a graph while this was open, and keep it from logging that. 2.11-2.15."""
    from torch._dynamo.utils import counters

    reasons: list[str] = []
    before = dict(counters["graph_break"])
    logs = [logging.getLogger(name) for name in ("torch._dynamo", "torch._subclasses")]
    levels = [log.level for log in logs]
    for log in logs:
        if log.getEffectiveLevel() >= logging.WARNING:  # nobody asked for more
            log.setLevel(logging.CRITICAL)
    try:
        yield reasons
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
        new = (reason for reason, count in counters["graph_break"].items() if count > before.get(reason, 0))
        reasons.extend(reason.strip().splitlines()[0] for reason in new if reason.strip())


def current_compile_id() -> str:
    """Dynamo's name for the compilation that is under way, such as "0/0". 2.11-2.15."""
    return str(torch._guards.CompileContext.current_compile_id() or "")


def trace_graph(name: str, gm: GraphModule) -> None:
    """Add a readable graph to PyTorch's structured trace (TORCH_TRACE), where tlparse finds it. 2.11-2.15."""
    from torch._logging import trace_structured

    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=lambda: gm.print_readable(print_output=False),
    )
