"""The Dynamo backend ``"autosparse"``: the package's graph passes, and then Inductor.

Found through the entry point group ``torch_dynamo_backends``, so that ``torch.compile(model, backend="autosparse")``
works without importing the package.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

import autosparse_fx.ops  # noqa: F401  (the operators must exist before a graph that holds them is loaded)
from autosparse_fx._compat import dynamo, dynamo_graphs, inductor
from autosparse_fx._compat.dynamo_graphs import placeholder_parameter
from autosparse_fx.hidden.graph import MaskedCall, mark_weights
from autosparse_fx.hidden.masks import Request, hidden_mask
from autosparse_fx.hidden.registration import undone_on_error
from autosparse_fx.hidden.training import hook_optimizers
from autosparse_fx.inference import LaterGraph, compile_for_inference
from autosparse_fx.options import ONE_LINE_OPTIONS, parse_options
from autosparse_fx.ownership import holds_zeros, unprepared
from autosparse_fx.passes import DYNAMO_PASSES
from autosparse_fx.passes.dedupe_masks import is_mask
from autosparse_fx.passes.find_weights import find_weights
from autosparse_fx.pipeline import run_passes

log = logging.getLogger(__name__)


def autosparse(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Compile one Dynamo graph, with its weights masked.

    A model that ``sparsify`` prepared brings its masks with it. One that was not is masked here if ``options`` ask for
    it, and only then.

    Args:
        gm, example_inputs: what Dynamo hands to every backend.
        mode: a mode of Inductor, ``"reduce-overhead"`` and so on.
        options: ``"total_steps"`` (the optimizer steps of the whole training) and the fields of
            :class:`~autosparse_fx.AutoSparse`, to make a model sparse that was never prepared; ``"recompute_masks"``
            (default True: masked weights are computed again in the backward pass instead of being kept for it);
            options of Inductor; and ``"mode"`` (``torch.compile`` takes only one of its two arguments).

    Raises:
        TypeError, ValueError: naming an option that is unknown, out of range, or missing; a rule that matches no
            parameter; options for a model that was prepared.
        RuntimeError: if the graph trains weights that nothing makes sparse. A finalized model trains on as it is, and
            so does any other in which at least half of the elements of the layers' weights are exactly zero, as in a
            copy of a finalized one.
    """
    parsed = parse_options(mode, options)
    if dynamo.compiles_a_backward_pass():  # of graphs that have their masks
        return inductor.compile_with_inductor(gm, example_inputs, parsed.inductor)
    _refuse_unprepared_training(gm, parsed.request)
    graph = dynamo_graphs.copy_dynamo_graph(gm)
    with undone_on_error():
        mark_weights(graph, parsed.request)
        run_passes(graph, DYNAMO_PASSES, "dynamo")
        call = MaskedCall(graph, parsed.request)

        def compile_as_it_is() -> Callable[..., Any]:
            inputs = [*example_inputs, *call.example_state(example_inputs)]
            return inductor.compile_with_inductor(
                graph, inputs, parsed.inductor, recompute_masks=parsed.recompute_masks
            )

        if parsed.request is None and not any(is_mask(n) for n in _all_nodes(graph)):
            if not torch.is_grad_enabled():
                return call.bind(compile_for_inference(graph, parsed.inductor, compile_as_it_is))
            log.info("no sparse kernels: they need torch.no_grad() or torch.inference_mode() around the call")
        elif not torch.is_grad_enabled() and (parsed.request is None or _has_masked_weights(gm)):
            log.info("no sparse kernels: the weights are masked, which ends with autosparse_fx.finalize(model)")
        compiled = compile_as_it_is()
        plain = LaterGraph(gm, parsed.inductor) if call.takes_masks and not torch.is_grad_enabled() else None
    return call.bind(compiled, plain)


def _refuse_unprepared_training(gm: GraphModule, request: Request | None) -> None:
    if any(is_mask(n) for n in _all_nodes(gm)):
        if request is not None:
            raise ValueError(
                "the model was prepared with sparsify, which fixed what becomes sparse and how: compile it without "
                f"the options {', '.join(ONE_LINE_OPTIONS)}"
            )
        return
    if request is not None or not torch.is_grad_enabled():
        return
    weights = {
        node: parameter
        for node in find_weights(gm, lambda n: placeholder_parameter(n) is not None)
        if (parameter := placeholder_parameter(node)) is not None
    }
    dense = unprepared(p for p in weights.values() if p.requires_grad and hidden_mask(p) is None)
    if dense and not holds_zeros(list(weights.values())):
        name = next(node.name for node, parameter in weights.items() if parameter is dense[0])
        raise RuntimeError(
            f"backend 'autosparse' was asked to train a model that is not sparse (weight '{name}' "
            f"{list(dense[0].shape)}; a model that was finalized has zeros in at least half of its layers' weights): "
            "call model = autosparse_fx.sparsify(model) before making the optimizer, compile with "
            "options={'target_sparsity': 0.9, 'total_steps': ...}, or use backend='inductor' to train it dense"
        )


def _has_masked_weights(gm: GraphModule) -> bool:
    parameters = map(placeholder_parameter, gm.graph.nodes)
    return any(parameter is not None and hidden_mask(parameter) is not None for parameter in parameters)


def _all_nodes(gm: GraphModule) -> list[torch.fx.Node]:
    return [n for m in gm.modules() if isinstance(m, GraphModule) for n in m.graph.nodes]


# Not a decorator: with an entry point of the same name it would register the name twice on first use.
dynamo.register_backend_once("autosparse", autosparse)
# Here, and not where a graph is compiled with options: Dynamo may capture no graph of a model at all.
hook_optimizers()
