"""Every private import from torch, each with its reason and the versions that it was seen to work on.

Versions: torch 2.11.0 (the oldest supported) and 2.15.0.
"""

import functools
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor as FakeTensor  # what Dynamo traces with. 2.11-2.15.
from torch.autograd.grad_mode import _enter_inference_mode, _exit_inference_mode
from torch.fx import Graph, GraphModule, Node
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # sees every operator. 2.11-2.15.
from torch.utils._pytree import tree_leaves as tree_leaves  # the tensors in nested arguments. 2.11-2.15.

# The base classes of all convolutions, transposed ones included, and of the transposed ones. 2.11-2.15.
ConvNd, ConvTransposeNd = _ConvNd, _ConvTransposeNd
# What checkpointed blocks and control flow are called by in a graph. 2.11-2.15.
HigherOrderOperator = torch._ops.HigherOrderOperator
# What Dynamo puts into a graph where the grad mode or the inference mode changes. 2.11-2.15.
set_grad_enabled = torch._C._set_grad_enabled
enter_inference_mode, exit_inference_mode = _enter_inference_mode, _exit_inference_mode


def functorch_is_active() -> bool:
    """Whether a ``torch.func`` transform (grad, vmap, ...) is running. 2.11-2.15; no public equivalent."""
    return torch._C._are_functorch_transforms_active()


def register_decomposition(op: Any, function: Callable[..., Any]) -> None:
    """Enter ``op`` in the global decomposition table, from which DTensor derives sharding. 2.11-2.15.

    Inductor copies its own table, so the op stays a single node there.
    """
    from torch._decomp import register_decomposition as register

    register([op])(function)


def register_lowerings_if_inductor_is_loaded() -> None:
    """Register the Inductor lowerings, once and only where Inductor has been imported already. 2.11-2.15."""
    if "torch._inductor.lowering" in sys.modules:
        import autosparse_fx.lowering  # noqa: F401  (registers on import)


def is_managed_by_fsdp(module: nn.Module) -> bool:
    """Whether ``fully_shard`` has this module's parameters: the attribute is what it sets. 2.11-2.15."""
    return getattr(module, "_is_fsdp_managed_module", False)


def inductor_lowerings() -> dict[Any, Callable[..., Any]]:
    """Inductor's table of lowerings, from which ours are composed. 2.11-2.15."""
    from torch._inductor.lowering import lowerings

    return lowerings


def register_inductor_lowering(op: Any, lowering: Callable[..., Any]) -> None:
    """Enter ``op`` in Inductor's table of lowerings. No type promotion: the ops fix their own dtypes. 2.11-2.15."""
    from torch._inductor.lowering import register_lowering

    register_lowering(op, type_promotion_kind=None)(lowering)


def tag_compile_caches(tag: str) -> None:
    """Make ``tag`` a part of the keys of AOTAutograd's and Inductor's caches, where no lowering is one: code of an
    earlier version of ours would be taken from them. 2.11-2.15; a public setting, made for this.
    """
    if tag not in torch.compiler.config.cache_key_tag:
        torch.compiler.config.cache_key_tag += tag


def weak_tensor_ref(tensor: Tensor) -> Callable[[], Tensor | None]:
    """A weak reference that follows a tensor whose Python object is revived from C++. 2.11-2.15."""
    from torch.utils.weak import TensorWeakRef

    return TensorWeakRef(tensor)


def register_backend_once(name: str, backend: Callable[..., Any]) -> None:
    """Register a Dynamo backend where its entry point is not about to do so by itself. 2.11-2.15."""
    if name not in torch._dynamo.list_backends(exclude_tags=None):
        torch._dynamo.register_backend(backend, name=name)


def inductor_mode_options(mode: str) -> dict[str, Any]:
    """The config patches that stand for a mode of ``torch.compile``. 2.11-2.15."""
    import torch._inductor

    return dict(torch._inductor.list_mode_options(mode))


def inductor_option_names() -> set[str]:
    """The names that Inductor takes as options. 2.11-2.15."""
    import torch._inductor

    return set(torch._inductor.list_options())


def copy_dynamo_graph(gm: GraphModule) -> GraphModule:
    """A copy of Dynamo's graph that may get more placeholders: Dynamo reads its own again afterwards. 2.11-2.15."""
    graph = Graph()
    nodes: dict[Node, Node] = {}
    output = graph.output(graph.graph_copy(gm.graph, nodes))
    output.meta = dict(gm.graph.output_node().meta)
    for node, copy in nodes.items():
        if hasattr(node, "_dynamo_source"):
            copy._dynamo_source = node._dynamo_source
    made = GraphModule(gm, graph)
    made.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        made._param_name_to_source = gm._param_name_to_source
    return made


def placeholder_parameter(node: Node) -> nn.Parameter | None:
    """The parameter behind a placeholder (or get_attr node) of a Dynamo graph, while its backend runs. 2.11-2.15."""
    tensor = placeholder_tensor(node)
    return tensor if isinstance(tensor, nn.Parameter) else None


def placeholder_tensor(node: Node) -> Tensor | None:
    """The tensor behind a placeholder (or get_attr node) of a Dynamo graph, while its backend runs. 2.11-2.15."""
    if node.op == "get_attr":
        owner: Any = node.graph.owning_module
        for atom in str(node.target).split("."):
            owner = getattr(owner, atom, None)
        return owner if isinstance(owner, Tensor) else None
    argument = node.meta.get("grapharg")
    example = getattr(argument, "example", None) if argument is not None else None
    return example if isinstance(example, Tensor) else None


def share_storage(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors, fake ones too, are views of the same memory; not known of those within vmap. 2.11-2.15."""
    try:
        return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return False


def is_fixed(size: torch.SymInt, example: int) -> bool:
    """Whether a graph demands of one of its sizes that it stay as it was in the example. 2.11-2.15.

    ``size`` is a symbol, and a guard that is an equation does not hold for twice its value.
    """
    import sympy

    symbol, shape_env = size.node.expr, size.node.shape_env
    assert shape_env is not None
    if symbol in shape_env.replacements:
        return True
    equations = [guard.expr for guard in shape_env.guards if isinstance(guard.expr, sympy.Eq)]
    return any(e.free_symbols == {symbol} and not e.subs(symbol, 2 * example) for e in equations)


def module_name(path: str) -> str:
    """The full name of a module, without what Dynamo's ``nn_module_stack`` calls the model itself. 2.11-2.15."""
    return re.sub(r"^L\['[^']*'\](\[\d+\])*\.?", "", path)


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


def compile_with_inductor(
    gm: GraphModule, example_inputs: Sequence[Any], patches: dict[str, Any], *, recompute_masks: bool = True
) -> Callable[..., Any]:
    """Hand a Dynamo graph to Inductor, with our joint passes after the user's own. 2.11-2.15."""
    from torch._inductor.compile_fx import compile_fx

    from autosparse_fx.joint import JointPasses

    key = "joint_custom_post_pass"
    user_pass = patches.get(key, getattr(torch._inductor.config, key))
    patches = {**patches, key: JointPasses(user_pass, recompute_masks=recompute_masks)}
    with warnings.catch_warnings():
        # What Inductor's own freezing does to a graph with a dynamic batch size. 2.15.
        warnings.filterwarnings("ignore", "Raw SymInt value", UserWarning)
        compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches)
    return compiled  # type: ignore[no-any-return]


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


def backend_arguments(wrapper: object, backend: str) -> dict[str, Any] | None:
    """The mode and the options that one ``torch.compile`` passes to its backend, where it is this one. 2.11-2.15."""
    return getattr(wrapper, "kwargs", {}) if getattr(wrapper, "compiler_name", None) == backend else None


def compiling_backends() -> dict[int, Any]:
    """The backends that ``torch.compile`` was given since Dynamo was last reset, one for each call. 2.11-2.15."""
    return torch._dynamo.eval_frame.cached_backends


def skip_frame(function: Callable[..., Any]) -> None:
    """Have Dynamo run this function as it is when it meets it on its own; it still inlines it. 2.11-2.15."""
    from torch._dynamo.eval_frame import skip_code

    skip_code(function.__code__)


def capturing_everything() -> Any:
    """Within it Dynamo captures a function however often it was compiled before, recurrent layers too, and every new
    shape anew. 2.11-2.15.
    """
    import torch._dynamo

    return torch._dynamo.config.patch(
        recompile_limit=2**31, accumulated_recompile_limit=2**31, allow_rnn=True, automatic_dynamic_shapes=False
    )


def compile_apart(function: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` whose compilations do not count for the recompile limit of others. 2.15; on 2.11 they do."""
    apart = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    options: dict[str, Any] = {"isolate_recompiles": True} if apart else {}
    compiled: Callable[..., Any] = torch.compile(function, backend=backend, **options)
    return compiled


def python_dispatcher() -> Any:
    """Within it operators that are made of others take symbolic sizes as they are. 2.11-2.15."""
    from torch._dispatch.python import enable_python_dispatcher

    return enable_python_dispatcher()


def without_wrapper(model: nn.Module) -> nn.Module:
    """The model itself, where ``torch.compile(model)`` was given. 2.11-2.15."""
    return getattr(model, "_orig_mod", model) if type(model).__name__ == "OptimizedModule" else model


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


def reader() -> str | None:
    """Who reads a weight, to be asked in its property: one that must not get a masked copy, or None. 2.11-2.15.

    The old ``torch.nn.utils.weight_norm`` deletes the weight then: refusing later, when it registers parameters of its
    own, would be too late. ``get_parameter`` is for the parameter itself.
    """
    return _readers().get(id(sys._getframe(2).f_code))


def is_asked_by_distributed_tensors() -> bool:
    """Whether ``torch.distributed.tensor`` asks, to be used in a property: others look at all attributes. 2.11-2.15."""
    return str(sys._getframe(2).f_globals.get("__name__")).startswith("torch.distributed.tensor")


@functools.cache
def _readers() -> dict[int, str]:
    from torch.nn.utils.weight_norm import WeightNorm

    codes = {
        "weight_norm": inspect.unwrap(WeightNorm.apply).__code__,
        "get_parameter": nn.Module.get_parameter.__code__,
    }
    return {id(code): name for name, code in codes.items()}


def saved_tensor_hooks() -> tuple[Any, ...] | None:
    """The hooks that autograd calls at the moment for what it saves for the backward pass, if any. 2.11-2.15."""
    hooks: tuple[Any, ...] | None = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks


def joint_graph(gm: GraphModule) -> GraphModule | None:
    """The graph of forward and backward together that AOTAutograd makes of a Dynamo graph, with its metadata, or None
    where nothing needs a gradient. 2.11-2.15.

    Without decompositions: one node for an operation that autograd knows, where Inductor would break it up.
    """
    from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_compiler
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    found: list[GraphModule] = []

    def partition(joint: GraphModule, inputs: Any, **kwargs: Any) -> Any:
        found.append(copy_graph_module(joint))
        found[0].meta["partition"] = (inputs, kwargs)
        return min_cut_rematerialization_partition(joint, inputs, **kwargs)

    compiler = make_boxed_compiler(lambda graph, _: graph.forward)
    values = graph_inputs(gm)
    with torch.enable_grad(), tracing_again(values):
        aot_module_simplified(
            copy_dynamo_graph(gm), values, fw_compiler=compiler, bw_compiler=compiler, partition_fn=partition
        )
    return found[0] if found else None


def cut_joint_graph(joint: GraphModule) -> tuple[GraphModule, GraphModule]:
    """Cut what :func:`joint_graph` gave in two: the forward and the backward graph. 2.11-2.15."""
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    inputs, kwargs = joint.meta["partition"]
    return min_cut_rematerialization_partition(copy_graph_module(joint), inputs, **kwargs)


def copy_graph_module(gm: GraphModule) -> GraphModule:
    graph = Graph()
    nodes: dict[Node, Node] = {}
    output = graph.output(graph.graph_copy(gm.graph, nodes))
    output.meta = dict(gm.graph.output_node().meta)
    made = GraphModule(gm, graph)
    made.meta = dict(gm.meta)
    return made


def compile_cpp(source: str) -> Any:
    """Compile C++ for this machine's vector instructions, and load it; Inductor's cache keeps it. 2.11-2.15."""
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache.load(source)


def inductor_cache_dir() -> Path:
    """Where Inductor keeps what it compiled, and what it measured. 2.11-2.15."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def graph_inputs(gm: GraphModule) -> list[Any]:
    """What the placeholders of a Dynamo graph were traced with: fake tensors, and symbols for sizes. 2.11-2.15."""
    return [node.meta["example_value"] for node in gm.graph.nodes if node.op == "placeholder"]


def inference_graph(gm: GraphModule) -> GraphModule | None:
    """The functional graph of ATen operators that AOTAutograd makes of a Dynamo graph under no_grad, not decomposed.

    Its placeholders are those of the Dynamo graph, in order, and so are its outputs. None where that cannot be: where
    the graph writes to an input. 2.11-2.15.
    """
    from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_compiler
    from torch._guards import TracingContext

    found: list[GraphModule] = []

    def keep(graph: GraphModule, _: Any) -> Callable[..., Any]:
        found.append(copy_graph_module(graph))
        return graph.forward

    compiler = make_boxed_compiler(keep)
    inputs = graph_inputs(gm)
    with tracing_again(inputs):
        aot_module_simplified(
            copy_dynamo_graph(gm), inputs, fw_compiler=compiler, bw_compiler=compiler, inference_compiler=compiler
        )
        metadata = TracingContext.get().fw_metadata
    if len(found) != 1 or metadata is None or metadata.mutated_inp_runtime_indices or metadata.num_intermediate_bases:
        return None
    return found[0]


def is_module_state(node: Node) -> bool:
    """Whether a placeholder of a Dynamo graph is a parameter or buffer of a module. 2.11-2.15."""
    return "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})


def tracing_again(inputs: Sequence[Any]) -> Any:
    """Within it a graph is traced and compiled apart from any compilation, for fake inputs of one. 2.11-2.15."""
    from torch._guards import TracingContext, tracing

    modes = [value.fake_mode for value in inputs if isinstance(value, FakeTensor)]
    return tracing(TracingContext(modes[0] if modes else None))


def size_hint(size: int | torch.SymInt) -> int:
    """A size, or what a symbolic one was when its graph was captured; nothing is guarded. 2.11-2.15."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if hint is not None else 8
