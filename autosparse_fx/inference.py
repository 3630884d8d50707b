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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

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
# What is looked at of every weight at every call, without the interpreter's help: that shows where a model takes
# milliseconds.
_VERSION, _FIRST = operator.attrgetter("_version"), operator.itemgetter(0)
MOST_REWRITES = 8  # of weights between calls, after which a graph goes back to kernels that read them at every call


def compile_for_inference(gm: GraphModule, patches: dict[str, Any]) -> Callable[..., Any] | None:
    """Compile a Dynamo graph with its weights as constants.

    None where no layer would run sparse, nor half of the weights are zeros: then the graph is compiled like any other.
    """
    given = len(dynamo_graphs.graph_inputs(gm))
    gm, state = with_state_as_inputs(gm)
    if not any(_may_run_sparse(tensor) for tensor in state.values()):
        return None
    graph = aot_autograd.inference_graph(gm)
    if graph is None:
        log.info("no sparse kernels: the graph writes to its inputs")
        return None
    frozen = FrozenGraph(graph, list(state), dynamo_graphs.graph_inputs(gm), patches)
    if not frozen.compile_for(list(state.values())):
        return None
    attributes = [tensor for number, tensor in state.items() if number >= given]
    return (lambda *args: frozen(*args, *attributes)) if attributes else frozen


def repack(model: nn.Module) -> int:
    """Have the sparse kernels of ``model`` take its weights anew at the next call.

    Needed after a write that PyTorch does not count, as ``parameter.data[...] = ...`` is one. All others, in-place
    operations on the parameter itself, ``load_state_dict`` and optimizers among them, are noticed by themselves.

    Returns:
        How many compiled graphs will be compiled again.
    """
    state = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    return sum(frozen.forget(state) for frozen in list(_frozen))


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


def _may_run_sparse(tensor: Tensor) -> bool:
    return tensor.dim() >= 2 and not lacking(tensor)


def _holds_zeros(tensor: Tensor) -> bool:
    return _may_run_sparse(tensor) and 2 * int(tensor.count_nonzero()) <= tensor.numel()


def _is_weight(tensor: Tensor) -> bool:
    """Whether zeros in it may come of pruning: the masks and filters that models keep in buffers are full of them."""
    return isinstance(tensor, nn.Parameter) and _may_run_sparse(tensor)


class _Compiled:
    """What a graph became for certain tensors, which it does not hold.

    Args:
        tensors: weights and buffers.
        function: what to call.
        arguments: the numbers of the arguments that the function takes.
        versions: of the tensors, where they are constants of the function.
        rewrites: of the tensors, until now.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        function: Callable[..., Any],
        arguments: Sequence[int],
        *,
        versions: list[int] | None,
        rewrites: int,
    ) -> None:
        self.function, self.arguments, self.rewrites = function, list(arguments), rewrites
        self._versions = versions
        self._counted = _counted(tensors)
        self._probes = [] if versions is None else _probes(tensors)
        self._probed = list(map(_FIRST, self._probes))
        self._gone: list[object] = []
        # Their numbers are compared at every call, which takes less than looking at references; those only tell when a
        # number may have come to mean another tensor.
        self._ids = list(map(id, tensors))
        self._refs = [weakref.ref(tensor, self._gone.append) for tensor in tensors]

    def is_for(self, tensors: Sequence[Tensor]) -> bool:
        return not self._gone and self._ids == list(map(id, tensors))

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        if not self.is_for(tensors):
            return False
        if self._versions is None:
            return True
        is_same = self._versions == _versions(tensors, self._counted)
        return is_same and self._probed == list(map(_FIRST, self._probes))

    def is_for_any(self, ids: set[int]) -> bool:
        return not ids.isdisjoint(self._ids)

    @property
    def is_dead(self) -> bool:
        return bool(self._gone)


def _counted(tensors: Sequence[Tensor]) -> list[int]:
    """The numbers of those tensors whose writes autograd counts."""
    return [number for number, tensor in enumerate(tensors) if not tensor.is_inference()]


def _versions(tensors: Sequence[Tensor], counted: Sequence[int]) -> list[int]:
    """How often each of the tensors with these numbers was written to."""
    return list(map(_VERSION, map(tensors.__getitem__, counted)))


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
        self._dense: Callable[..., Any] | None = None  # the graph as it is, which reads its weights at every call
        self._lock = threading.RLock()
        _frozen.add(self)

    def forget(self, tensors: set[int]) -> int:
        """Drop what was compiled for any of these tensors, by id; return how many that were."""
        with self._lock:
            kept = [c for c in self._compiled if not c.is_for_any(tensors)]
            dropped = sum(not c.is_dead for c in self._compiled if c not in kept)
            self._compiled = kept
        return dropped

    def compile_for(self, tensors: Sequence[Tensor], rewrites: int = 0, inputs: Sequence[Any] | None = None) -> bool:
        """Compile for these weights as constants; return False where nothing about them is sparse.

        Which layers autotuning takes is measured with the ``inputs`` of a call, without the weights, for which it
        waits; not where sizes are dynamic, since Dynamo guards what is assumed of them only before the first call.
        """
        versions = _versions(tensors, _counted(tensors))
        graph = self._with_weights(tensors)
        is_tuned = bool(self._patches.get("max_autotune")) and any(map(_holds_zeros, tensors))
        waits = is_tuned and self._is_static and inputs is None
        is_worth_it = half_are_zeros(filter(_is_weight, tensors))
        if is_tuned and self._is_static and inputs is not None:
            with inductor.forgetting_what_is_compiled():
                scale = tuned_scale(graph, inputs, self._patches, lambda: self._choices(tensors))
            graph.meta[DENSE_SCALE] = scale
            is_worth_it = True
        graph.meta[AUTOTUNE] = is_tuned and not waits
        runs_sparse = _make_sparse(graph)
        if not runs_sparse and not is_worth_it:
            return False
        if not waits:
            function = self._compile(graph, runs_sparse=runs_sparse)
            self._keep(tensors, _Compiled(tensors, function, self._rest, versions=versions, rewrites=rewrites))
        return True

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
        rewrites = next((c.rewrites + 1 for c in self._compiled if c.is_for(tensors)), 0)
        with torch.no_grad(), aot_autograd.tracing_again(self._example_inputs):
            if rewrites > MOST_REWRITES:
                log.warning("weights were written to %d times between calls: dense kernels from now on", MOST_REWRITES)
            elif self.compile_for(tensors, rewrites, inputs):
                return
            if self._dense is None:
                graph = dynamo_graphs.copy_graph_module(self._graph)
                self._dense = inductor.compile_with_inductor(graph, self._example_inputs, self._patches)
        arguments = range(len(self._example_inputs))
        self._keep(tensors, _Compiled(tensors, self._dense, arguments, versions=None, rewrites=rewrites))


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
