"""The Dynamo backend ``"autosparse"``: the package's graph passes, and then Inductor.

Found through the entry point group ``torch_dynamo_backends``, so that ``torch.compile(model, backend="autosparse")``
works without importing the package.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

import autosparse_fx.ops  # noqa: F401  (the operators must exist before a graph that holds them is loaded)
from autosparse_fx import _compat
from autosparse_fx.capture import placeholder_parameter
from autosparse_fx.config import AutoSparse
from autosparse_fx.ownership import is_prepared
from autosparse_fx.passes import DYNAMO_PASSES
from autosparse_fx.passes.dedupe_masks import is_mask
from autosparse_fx.passes.find_weights import find_weights

log = logging.getLogger(__name__)


def autosparse(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Compile one Dynamo graph of a model that ``sparsify`` prepared.

    Args:
        gm, example_inputs: what Dynamo hands to every backend.
        mode: a mode of Inductor, ``"reduce-overhead"`` and so on.
        options: options of Inductor, and ``"mode"`` (``torch.compile`` takes only one of its two arguments).

    Raises:
        ValueError: naming an option that neither this backend nor Inductor knows.
        RuntimeError: if the graph trains weights of a model that was never prepared.
    """
    patches = _config_patches(mode, dict(options or {}))
    _refuse_unprepared_training(gm)
    for graph_pass in DYNAMO_PASSES:
        changes = graph_pass(gm)
        log.debug("%s: %d changes", graph_pass.__name__, changes)
    return _compat.compile_with_inductor(gm, example_inputs, patches)


def _config_patches(mode: str | None, options: dict[str, Any]) -> dict[str, Any]:
    mode = options.pop("mode", mode)
    patches = _compat.inductor_mode_options(mode) if mode and mode != "default" else {}
    known = _compat.inductor_option_names()
    ours = {f.name for f in dataclasses.fields(AutoSparse)} | {"total_steps"}
    for name, value in options.items():
        key = name.replace("-", "_")
        if key in ours:
            raise ValueError(
                f"the option {name!r} asks for a model that was never prepared to be made sparse, which this version "
                "cannot do: prepare it with autosparse_fx.sparsify(model, AutoSparse(...)) and compile it without "
                "that option"
            )
        if key not in known:
            raise ValueError(
                f"backend 'autosparse' has no option {name!r}: it takes 'mode' and the options of Inductor, as listed "
                "by torch._inductor.list_options()"
            )
        patches[key] = value
    return patches


def _refuse_unprepared_training(gm: GraphModule) -> None:
    if not torch.is_grad_enabled() or any(is_mask(n) for n in _all_nodes(gm)):
        return
    for node in find_weights(gm, lambda n: placeholder_parameter(n) is not None):
        parameter = placeholder_parameter(node)
        if parameter is not None and parameter.requires_grad and not is_prepared(parameter):
            raise RuntimeError(
                f"backend 'autosparse' was asked to train a model that is not sparse (weight '{node.name}' "
                f"{list(parameter.shape)}): call model = autosparse_fx.sparsify(model) before making the optimizer, or "
                "use backend='inductor' to train it dense"
            )


def _all_nodes(gm: GraphModule) -> list[torch.fx.Node]:
    return [n for m in gm.modules() if isinstance(m, GraphModule) for n in m.graph.nodes]


# Not a decorator: with an entry point of the same name it would register the name twice on first use.
_compat.register_backend_once("autosparse", autosparse)
