"""Graphs under no_grad: weights become constants, and layers that hold enough zeros run on sparse kernels.

A compiled graph is called with its weights like any other. It remembers which tensors it was compiled for, and at which
version; others, or the same written to since, are compiled for anew.
"""

import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from autosparse_fx._compat import aot_autograd, dynamo, dynamo_graphs, inductor
from autosparse_fx._compat.eager import is_traceable_wrapper_subclass
from autosparse_fx.arguments import check_module
from autosparse_fx.compiled_weights import Compiled, count_fused_writes, may_run_sparse, versions_of, zeros_of
from autosparse_fx.kernels.choice import CHOICE, DENSE_SCALE
from autosparse_fx.kernels.choice_tuning import SCALES, tuned_scale
from autosparse_fx.ownership import half_are_zeros
from autosparse_fx.passes import INFERENCE_PASSES
from autosparse_fx.passes.constants import with_constants
from autosparse_fx.passes.fuse_sparse_programs import AUTOTUNE, RUN_PROGRAM
from autosparse_fx.pipeline import run_passes

log = logging.getLogger(__name__)

_frozen: "weakref.WeakSet[FrozenGraph]" = weakref.WeakSet()
_frozen_lock = threading.RLock()  # of that set
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
    if not any(map(may_run_sparse, weights)):
        return compile_dense()
    graph = inference_graph(gm, weights)
    if isinstance(graph, str):
        log.info("no sparse kernels: %s", graph)
        return compile_dense()
    frozen = FrozenGraph(graph, list(state), inputs, patches)
    attributes = [tensor for number, tensor in state.items() if number >= given]
    if not frozen.compile_for(weights):
        frozen.call(compile_dense(), range(given), weights, reads_weights=not attributes)
    return (lambda *args: frozen(*args, *attributes)) if attributes else frozen


class LaterGraph:
    """A Dynamo graph that is compiled for inference at the first call, for the weights of that."""

    def __init__(self, gm: GraphModule, patches: dict[str, Any]) -> None:
        given = len(dynamo_graphs.graph_inputs(gm))
        gm, state = with_state_as_inputs(gm)
        self._graph: GraphModule | None = gm
        self._state, self._patches = list(state), patches
        self._attributes = [tensor for number, tensor in state.items() if number >= given]
        self._function: Callable[..., Any] | None = None
        self._lock = threading.Lock()

    def function(self, *args: Any) -> Callable[..., Any] | None:
        """What to call with these arguments; None where no kernel is sparse, whatever the weights hold."""
        if self._graph is not None:
            with self._lock:
                if self._graph is not None:  # and no other thread has compiled it meanwhile
                    self._function = self._compiled(self._graph, (*args, *self._attributes))
                    self._graph = None
        return self._function

    def _compiled(self, gm: GraphModule, values: Sequence[Any]) -> Callable[..., Any] | None:
        weights = [values[number] for number in self._state]
        if not any(map(may_run_sparse, weights)):
            return None
        inputs, attributes = dynamo_graphs.graph_inputs(gm), self._attributes
        with dynamo.compiling(), torch.no_grad(), aot_autograd.tracing_again(inputs):
            graph = inference_graph(gm, weights)
        if isinstance(graph, str):
            log.info("no sparse kernels: %s", graph)
            return None
        frozen = FrozenGraph(graph, self._state, inputs, self._patches)
        return (lambda *args: frozen(*args, *attributes)) if attributes else frozen


def repack(model: nn.Module) -> int:
    """Have the sparse kernels of ``model`` take its weights anew at the next call.

    Needed after a write that PyTorch does not count, as ``parameter.data[...] = ...`` is one. All others, in-place
    operations on the parameter itself, ``load_state_dict`` and PyTorch's optimizers among them, are noticed by
    themselves.

    Returns:
        How many compiled graphs will be compiled again.
    """
    check_module(model, "repack")
    state = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    return sum(frozen.forget(state) for frozen in _all_frozen())


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
    if isinstance(graph, str):
        return graph
    strided = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.as_strided.default)
    if any(node.args[0].op != "placeholder" for node in strided):
        return "its graph takes a computed tensor by its strides (as_strided), which sparse layers may change"
    return graph


def _holds_zeros(tensor: Tensor) -> bool:
    return may_run_sparse(tensor) and 2 * int(tensor.count_nonzero()) <= tensor.numel()


def _is_weight(tensor: Tensor) -> bool:
    """Whether zeros in it may come of pruning: the masks and filters that models keep in buffers are full of them."""
    return isinstance(tensor, nn.Parameter) and may_run_sparse(tensor)


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
        self._compiled: list[Compiled] = []
        # The graph as it is, which reads its weights at every call, and the arguments that it takes.
        self._dense: tuple[Callable[..., Any], Sequence[int]] | None = None
        self._lock = threading.RLock()
        with _frozen_lock:
            _frozen.add(self)

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

    def compile_for(
        self,
        tensors: Sequence[Tensor],
        rewrites: int = 0,
        call: Sequence[Any] | None = None,
        moving: frozenset[int] = frozenset(),
    ) -> bool:
        """Compile for these weights as constants, all but the ``moving``; return False where nothing about them is
        sparse.

        Which layers autotuning takes is measured with the arguments of a ``call``, for which it waits; not where sizes
        are dynamic, since Dynamo guards what is assumed of them only before the first call.
        """
        versions = versions_of(tensors)
        graph = self._with_weights(tensors, moving)
        arguments = self._arguments(moving)
        is_tuned = bool(self._patches.get("max_autotune")) and any(map(_holds_zeros, tensors))
        waits = is_tuned and self._is_static and call is None
        is_worth_it = half_are_zeros(filter(_is_weight, tensors))
        if is_tuned and self._is_static and call is not None:
            inputs = list(map(call.__getitem__, arguments))
            scale = tuned_scale(graph, inputs, self._patches, lambda: self._choices(tensors, moving))
            graph.meta[DENSE_SCALE] = scale
            is_worth_it = True
        graph.meta[AUTOTUNE] = is_tuned and not waits
        runs_sparse = _make_sparse(graph)
        if not runs_sparse and not is_worth_it:
            return False
        if not waits:
            function = self._compile(graph, arguments, runs_sparse=runs_sparse)
            made = Compiled(tensors, function, arguments, versions, is_frozen=True, rewrites=rewrites, moving=moving)
            self._keep(tensors, made)
        return True

    def call(
        self, dense: Callable[..., Any], arguments: Sequence[int], tensors: Sequence[Tensor], *, reads_weights: bool
    ) -> None:
        """Call ``dense`` with these of the arguments while nothing about the weights is sparse.

        Or, unless it reads them at every call, as long as they stay as they are.
        """
        if reads_weights:
            self._dense = dense, arguments
            self._keep_dense(tensors, versions_of(tensors), zeros_of(tensors), rewrites=0)
        else:
            versions = versions_of(tensors)
            self._keep(tensors, Compiled(tensors, dense, arguments, versions, is_frozen=True, rewrites=0))

    def _keep_dense(
        self, tensors: Sequence[Tensor], versions: dict[int, tuple[int, int]], zeros: dict[int, int], *, rewrites: int
    ) -> None:
        assert self._dense is not None
        watched = {number: version for number, version in versions.items() if number in zeros}
        made = Compiled(tensors, *self._dense, watched, is_frozen=False, rewrites=rewrites, zeros=zeros)
        self._keep(tensors, made)

    def _with_weights(self, tensors: Sequence[Tensor], moving: frozenset[int]) -> GraphModule:
        numbered = enumerate(zip(self._state, tensors, strict=True))
        return with_constants(self._graph, dict(item for number, item in numbered if number not in moving))

    def _arguments(self, moving: frozenset[int]) -> list[int]:
        """Those that a graph takes whose other weights are constants."""
        return sorted([*self._rest, *(self._state[number] for number in moving)])

    def _choices(self, tensors: Sequence[Tensor], moving: frozenset[int]) -> dict[float, Callable[..., Any]]:
        """The graph compiled with all choices of sparse layers that autotuning compares, by what makes them."""
        functions: dict[tuple[str, ...], tuple[float, Callable[..., Any]]] = {}
        for scale in SCALES:
            graph = self._with_weights(tensors, moving)
            graph.meta[DENSE_SCALE] = scale
            runs_sparse = _make_sparse(graph)
            dense = tuple(node.name for node in graph.graph.nodes if CHOICE in node.meta)
            if dense not in functions:
                with aot_autograd.tracing_again(self._example_inputs):
                    functions[dense] = scale, self._compile(graph, self._arguments(moving), runs_sparse=runs_sparse)
        return dict(functions.values())

    def _compile(self, graph: GraphModule, arguments: Sequence[int], *, runs_sparse: bool) -> Callable[..., Any]:
        patches = {"freezing": True, **self._patches}
        if runs_sparse:
            patches.setdefault("layout_optimization", False)
        inputs = [self._example_inputs[number] for number in arguments]
        with inductor.forgetting_what_is_compiled():
            return aot_autograd.called_without_autocast(lambda: inductor.compile_with_inductor(graph, inputs, patches))

    def _keep(self, tensors: Sequence[Tensor], compiled: Compiled) -> None:
        others = [c for c in self._compiled if not c.is_dead and not c.is_for(tensors)]
        self._compiled = [compiled, *others]

    def __call__(self, *args: Any) -> Any:
        tensors = list(map(args.__getitem__, self._state))
        for compiled in self._compiled:
            if compiled.fits(tensors):
                return compiled.function(*map(args.__getitem__, compiled.arguments))
        with self._lock:
            if not any(compiled.fits(tensors) for compiled in self._compiled):  # by another thread
                self._adapt_to(tensors, args)
        return self(*args)

    def _adapt_to(self, tensors: Sequence[Tensor], call: Sequence[Any]) -> None:
        """Compile for weights that are new, or were written to; in the end, for weights that keep changing.

        Buffers that change twice while the parameters stay are no constants from then on.
        """
        last = next((c for c in self._compiled if c.has_parameters_of(tensors)), None)
        versions, zeros, rewrites, moving = versions_of(tensors), zeros_of(tensors), 0, frozenset[int]()
        if last is not None:
            rewrites = last.rewrites + last.is_frozen
            moving = last.moving | (last.changed_buffers(tensors) if rewrites > 1 else frozenset())
            if not last.is_frozen and not last.has_fewer_zeros(zeros):
                self._keep_dense(tensors, versions, last.zeros, rewrites=rewrites)
                return
        with dynamo.compiling(), torch.no_grad(), aot_autograd.tracing_again(self._example_inputs):
            if rewrites > MOST_REWRITES:
                log.warning("weights were written to %d times between calls: dense kernels from now on", MOST_REWRITES)
                zeros = {}
            elif self.compile_for(tensors, rewrites, call, moving):
                return
            if self._dense is None:
                graph = dynamo_graphs.copy_graph_module(self._graph)
                function = aot_autograd.called_without_autocast(
                    lambda: inductor.compile_with_inductor(graph, self._example_inputs, self._patches)
                )
                self._dense = function, range(len(self._example_inputs))
        self._keep_dense(tensors, versions, zeros, rewrites=rewrites)


def _make_sparse(graph: GraphModule) -> bool:
    """Run the passes of inference; return whether what they made of the graph is worth it."""
    dense_bytes, start = _bytes_of(graph), time.perf_counter()
    run_passes(graph, INFERENCE_PASSES, "inference")
    programs = graph.graph.find_nodes(op="call_function", target=RUN_PROGRAM)
    if not programs:
        reasons = Counter(node.meta[CHOICE].reason for node in graph.graph.nodes if CHOICE in node.meta)
        listed = ", ".join(f"{why} ({n})" for why, n in reasons.most_common(5))
        log.info("no sparse kernels: %s", listed or "its graph has no layer that has one")
        return False
    log.info(
        "packed the weights of a graph for %d sparse programs in %.2f s: %.1f MB of constants, %.1f MB before",
        *(len(programs), time.perf_counter() - start, _bytes_of(graph) / 1e6, dense_bytes / 1e6),
    )
    return True


def _bytes_of(graph: GraphModule) -> int:
    return sum(buffer.nbytes for buffer in graph.buffers())


def _all_frozen() -> "list[FrozenGraph]":
    with _frozen_lock:
        return list(_frozen)


count_fused_writes(lambda: set().union(*(frozen.tensors() for frozen in _all_frozen())))
