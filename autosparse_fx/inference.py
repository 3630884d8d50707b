"""Graphs under no_grad: weights become constants, and layers that hold enough zeros run on sparse kernels.

A compiled graph is called with its weights like any other. It remembers which tensors it was compiled for, and at which
version; others, or the same written to since, are compiled for anew.
"""

import logging
import operator
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from autosparse_fx._compat import aot_autograd, dynamo_graphs, inductor
from autosparse_fx.kernels.choice import CHOICE, DENSE_SCALE, lacking
from autosparse_fx.kernels.choice_tuning import SCALES, tuned_scale
from autosparse_fx.ownership import half_are_zeros
from autosparse_fx.passes import INFERENCE_PASSES
from autosparse_fx.passes.constants import with_constants
from autosparse_fx.passes.fuse_sparse_programs import AUTOTUNE, RUN_PROGRAM
from autosparse_fx.pipeline import run_passes

log = logging.getLogger(__name__)

_frozen: "weakref.WeakSet[FrozenGraph]" = weakref.WeakSet()
_sees_fused_steps = False
# What is looked at of every weight at every call, without the interpreter's help: that shows where a model takes
# milliseconds.
_VERSION, _FIRST = operator.attrgetter("_version"), operator.itemgetter(0)
MOST_REWRITES = 8  # of weights between calls, after which a graph goes back to kernels that read them at every call


def compile_for_inference(
    gm: GraphModule, patches: dict[str, Any], compile_dense: Callable[[], Callable[..., Any]]
) -> Callable[..., Any]:
    """Compile a Dynamo graph with its weights as constants.

    Where no layer would run sparse, nor half of the weights are zeros, it is what ``compile_dense`` makes of the graph,
    until its weights become sparse.
    """
    given = len(dynamo_graphs.graph_inputs(gm))
    gm, state = with_state_as_inputs(gm)
    inputs, weights = dynamo_graphs.graph_inputs(gm), list(state.values())
    if not any(_may_run_sparse(tensor) for tensor in weights):
        return compile_dense()
    graph = inference_graph(gm, weights)
    if isinstance(graph, str):
        log.info("no sparse kernels: %s", graph)
        return compile_dense()
    frozen = FrozenGraph(graph, list(state), inputs, patches)
    if not frozen.compile_for(weights):
        frozen.run_dense(weights, compile_dense(), range(given))
    attributes = [tensor for number, tensor in state.items() if number >= given]
    return (lambda *args: frozen(*args, *attributes)) if attributes else frozen


def repack(model: nn.Module) -> int:
    """Have the sparse kernels of ``model`` take its weights anew at the next call.

    Needed after a write that PyTorch does not count, as ``parameter.data[...] = ...`` is one. All others, in-place
    operations on the parameter itself, ``load_state_dict`` and PyTorch's optimizers among them, are noticed by
    themselves.

    Returns:
        How many compiled graphs will be compiled again.
    """
    state = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    return sum(frozen.forget(state) for frozen in list(_frozen))


@torch.compiler.disable
def _count_fused_writes(optimizer: Optimizer, args: object, kwargs: object) -> None:
    """Fused optimizers write to weights without counting it: count the writes to those of compiled graphs for them."""
    fused = [p for group in optimizer.param_groups if group.get("fused") for p in group["params"]]
    if fused:
        known = set().union(*(frozen.tensors() for frozen in list(_frozen)))
        torch.autograd.graph.increment_version([p for p in fused if id(p) in known])


def _see_fused_steps() -> None:
    global _sees_fused_steps
    if not _sees_fused_steps:
        _sees_fused_steps = True
        register_optimizer_step_post_hook(_count_fused_writes)


def with_state_as_inputs(gm: GraphModule) -> tuple[GraphModule, dict[int, Tensor]]:
    """A Dynamo graph whose parameters and buffers are all inputs, and these by their number, while its backend runs."""
    made, attributes = dynamo_graphs.with_tensors_as_inputs(gm)
    placeholders = [node for node in made.graph.nodes if node.op == "placeholder"]
    state = {
        number: tensor
        for number, node in enumerate(placeholders)
        if dynamo_graphs.is_module_state(node) and (tensor := dynamo_graphs.placeholder_tensor(node)) is not None
    }
    return made, state | dict(enumerate(attributes, len(placeholders) - len(attributes)))


def inference_graph(gm: GraphModule, state: Iterable[Tensor]) -> GraphModule | str:
    """The graph of ATen operators of what :func:`with_state_as_inputs` gave, or why there is none."""
    if any(is_traceable_wrapper_subclass(value) for value in [*state, *dynamo_graphs.graph_inputs(gm)]):
        return "its graph computes with tensors of a subclass"
    graph = aot_autograd.inference_graph(gm)
    return "its graph writes to an input or a buffer" if graph is None else graph


def _may_run_sparse(tensor: Tensor) -> bool:
    return tensor.dim() >= 2 and not lacking(tensor)


def _holds_zeros(tensor: Tensor) -> bool:
    return _may_run_sparse(tensor) and 2 * int(tensor.count_nonzero()) <= tensor.numel()


def _is_weight(tensor: Tensor) -> bool:
    """Whether zeros in it may come of pruning: the masks and filters that models keep in buffers are full of them."""
    return isinstance(tensor, nn.Parameter) and _may_run_sparse(tensor)


def _looks_sparse(tensor: Tensor) -> bool:
    """Whether a quarter of a weight may be zeros, judged by some of its rows."""
    if not _is_weight(tensor) or not tensor.numel():
        return False
    rows = tensor.detach()[:: max(1, tensor.shape[0] // 16)]
    return 4 * int(rows.count_nonzero()) <= 3 * rows.numel()


class _Compiled:
    """What a graph became for certain tensors, which it does not hold.

    Args:
        tensors: weights and buffers.
        function: what to call.
        arguments: the numbers of the arguments that the function takes.
        versions: of the tensors whose writes matter, by their numbers.
        is_frozen: whether the tensors are constants of the function.
        rewrites: of the tensors, until now.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        function: Callable[..., Any],
        arguments: Sequence[int],
        *,
        versions: dict[int, int],
        is_frozen: bool,
        rewrites: int,
    ) -> None:
        self.function, self.arguments, self.rewrites = function, list(arguments), rewrites
        self.is_frozen = is_frozen
        self._watched, self._versions = list(versions), list(versions.values())
        self._probes = _probes(tensors) if is_frozen else []
        self._probed = list(map(_FIRST, self._probes))
        self._gone: list[object] = []
        # Their numbers are compared at every call, which takes less than looking at references; those only tell when a
        # number may have come to mean another tensor.
        self.ids = list(map(id, tensors))
        self._refs = [weakref.ref(tensor, self._gone.append) for tensor in tensors]

    def is_for(self, tensors: Sequence[Tensor]) -> bool:
        return not self._gone and self.ids == list(map(id, tensors))

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        if not self.is_for(tensors):
            return False
        is_same = self._versions == list(map(_VERSION, map(tensors.__getitem__, self._watched)))
        return is_same and self._probed == list(map(_FIRST, self._probes))

    @property
    def is_dead(self) -> bool:
        return bool(self._gone)


def _versions(tensors: Sequence[Tensor]) -> dict[int, int]:
    """How often each tensor was written to, by its number; of those whose writes autograd counts."""
    return {number: tensor._version for number, tensor in enumerate(tensors) if not tensor.is_inference()}


class FrozenGraph:
    """Calls a graph compiled for the weights that it is called with, and compiles it when they are new or changed."""

    def __init__(
        self, graph: GraphModule, state: Sequence[int], example_inputs: Sequence[Any], patches: dict[str, Any]
    ) -> None:
        self._graph, self._patches = graph, patches
        self._example_inputs = list(example_inputs)
        self._state = list(state)
        self._rest = [number for number in range(len(example_inputs)) if number not in set(state)]
        self._is_static = all(map(dynamo_graphs.is_static, example_inputs))
        self._compiled: list[_Compiled] = []
        # The graph as it is, which reads its weights at every call, and the arguments that it takes.
        self._dense: tuple[Callable[..., Any], Sequence[int]] | None = None
        self._lock = threading.RLock()
        _frozen.add(self)
        _see_fused_steps()

    def tensors(self) -> set[int]:
        """The ids of those that it was compiled for."""
        return {number for compiled in self._compiled for number in compiled.ids}

    def forget(self, tensors: set[int]) -> int:
        """Drop what was compiled for any of these tensors, by id; return how many that were."""
        with self._lock:
            kept = [c for c in self._compiled if tensors.isdisjoint(c.ids)]
            dropped = sum(not c.is_dead for c in self._compiled if c not in kept)
            self._compiled = kept
        return dropped

    def compile_for(self, tensors: Sequence[Tensor], rewrites: int = 0, inputs: Sequence[Any] | None = None) -> bool:
        """Compile for these weights as constants; return False where nothing about them is sparse.

        Which layers autotuning takes is measured with the ``inputs`` of a call, without the weights, for which it
        waits; not where sizes are dynamic, since Dynamo guards what is assumed of them only before the first call.
        """
        versions = _versions(tensors)
        graph = self._with_weights(tensors)
        is_tuned = bool(self._patches.get("max_autotune")) and any(map(_holds_zeros, tensors))
        waits = is_tuned and self._is_static and inputs is None
        is_worth_it = half_are_zeros(filter(_is_weight, tensors))
        if is_tuned and self._is_static and inputs is not None:
            scale = tuned_scale(graph, inputs, self._patches, lambda: self._choices(tensors))
            graph.meta[DENSE_SCALE] = scale
            is_worth_it = True
        graph.meta[AUTOTUNE] = is_tuned and not waits
        runs_sparse = _make_sparse(graph)
        if not runs_sparse and not is_worth_it:
            return False
        if not waits:
            function = self._compile(graph, runs_sparse=runs_sparse)
            made = _Compiled(tensors, function, self._rest, versions=versions, is_frozen=True, rewrites=rewrites)
            self._keep(tensors, made)
        return True

    def run_dense(self, tensors: Sequence[Tensor], dense: Callable[..., Any], arguments: Sequence[int]) -> None:
        """Call ``dense`` with these of the arguments while nothing about these weights is sparse."""
        self._dense = dense, arguments
        self._keep_dense(tensors, rewrites=0, versions=_versions(tensors))

    def _keep_dense(self, tensors: Sequence[Tensor], *, rewrites: int, versions: dict[int, int]) -> None:
        """What the weights are written to is of interest where ``versions`` are given."""
        assert self._dense is not None
        watched = {number: version for number, version in versions.items() if _is_weight(tensors[number])}
        made = _Compiled(tensors, *self._dense, versions=watched, is_frozen=False, rewrites=rewrites)
        self._keep(tensors, made)

    def _with_weights(self, tensors: Sequence[Tensor]) -> GraphModule:
        return with_constants(self._graph, dict(zip(self._state, tensors, strict=True)))

    def _choices(self, tensors: Sequence[Tensor]) -> dict[float, Callable[..., Any]]:
        """The graph compiled with all choices of sparse layers that autotuning compares, by what makes them."""
        functions: dict[tuple[str, ...], tuple[float, Callable[..., Any]]] = {}
        for scale in SCALES:
            graph = self._with_weights(tensors)
            graph.meta[DENSE_SCALE] = scale
            runs_sparse = _make_sparse(graph)
            dense = tuple(node.name for node in graph.graph.nodes if CHOICE in node.meta)
            if dense not in functions:
                with aot_autograd.tracing_again(self._example_inputs):
                    functions[dense] = scale, self._compile(graph, runs_sparse=runs_sparse)
        return dict(functions.values())

    def _compile(self, graph: GraphModule, *, runs_sparse: bool) -> Callable[..., Any]:
        patches = {"freezing": True, **self._patches}
        if runs_sparse:
            patches.setdefault("layout_optimization", False)
        inputs = [self._example_inputs[number] for number in self._rest]
        with inductor.forgetting_what_is_compiled():
            return inductor.compile_with_inductor(graph, inputs, patches)

    def _keep(self, tensors: Sequence[Tensor], compiled: _Compiled) -> None:
        others = [c for c in self._compiled if not c.is_dead and not c.is_for(tensors)]
        self._compiled = [compiled, *others]

    def __call__(self, *args: Any) -> Any:
        tensors = list(map(args.__getitem__, self._state))
        for compiled in self._compiled:
            if compiled.fits(tensors):
                return compiled.function(*map(args.__getitem__, compiled.arguments))
        with self._lock:
            if not any(compiled.fits(tensors) for compiled in self._compiled):  # by another thread
                self._adapt_to(tensors, [args[number] for number in self._rest])
        return self(*args)

    def _adapt_to(self, tensors: Sequence[Tensor], inputs: Sequence[Any]) -> None:
        """Compile for weights that are new, or were written to; in the end, for weights that keep changing."""
        last = next((c for c in self._compiled if c.is_for(tensors)), None)
        rewrites, versions = 0 if last is None else last.rewrites, _versions(tensors)
        if last is not None and not last.is_frozen and not any(map(_looks_sparse, tensors)):
            self._keep_dense(tensors, rewrites=rewrites, versions=versions)  # they still are
            return
        with torch.no_grad(), aot_autograd.tracing_again(self._example_inputs):
            rewrites += last is not None
            if rewrites > MOST_REWRITES:
                log.warning("weights were written to %d times between calls: dense kernels from now on", MOST_REWRITES)
                versions = {}
            elif self.compile_for(tensors, rewrites, inputs):
                return
            if self._dense is None:
                graph = dynamo_graphs.copy_graph_module(self._graph)
                function = inductor.compile_with_inductor(graph, self._example_inputs, self._patches)
                self._dense = function, range(len(self._example_inputs))
        self._keep_dense(tensors, rewrites=rewrites, versions=versions)


def _probes(tensors: Sequence[Tensor]) -> list[memoryview]:
    """What to look at besides versions: batch norm writes to its statistics without counting it."""
    buffers = [t for t in tensors if not isinstance(t, nn.Parameter) and t.dim() == 1 and t.numel() and not lacking(t)]
    # Their bits, because NumPy knows no bfloat16; and as memory, of which Python reads an element fastest.
    bits = {2: torch.int16, 4: torch.int32}
    return [t.detach().view(bits[t.dtype.itemsize]).numpy().data for t in buffers]


def _make_sparse(graph: GraphModule) -> bool:
    """Run the passes of inference; return whether what they made of the graph is worth it."""
    dense_bytes, start = _bytes_of(graph), time.perf_counter()
    run_passes(graph, INFERENCE_PASSES, "inference")
    programs = graph.graph.find_nodes(op="call_function", target=RUN_PROGRAM)
    if not programs:
        reasons = Counter(node.meta[CHOICE].reason for node in graph.graph.nodes if CHOICE in node.meta)
        log.info("no sparse kernels: %s", ", ".join(f"{why} ({n})" for why, n in reasons.most_common(5)))
        return False
    log.info(
        "packed the weights of a graph for %d sparse programs in %.2f s: %.1f MB of constants, %.1f MB before",
        *(len(programs), time.perf_counter() - start, _bytes_of(graph) / 1e6, dense_bytes / 1e6),
    )
    return True


def _bytes_of(graph: GraphModule) -> int:
    return sum(buffer.nbytes for buffer in graph.buffers())
