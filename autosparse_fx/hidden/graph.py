"""From a Dynamo graph of an unprepared model to a compiled one that is called with the thresholds of its weights."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from autosparse_fx._compat.dynamo_graphs import FakeTensor, placeholder_parameter
from autosparse_fx.config import AutoSparse
from autosparse_fx.hidden import masks, registration
from autosparse_fx.hidden.masks import HiddenMask, Request
from autosparse_fx.passes.find_weights import find_weights
from autosparse_fx.passes.insert_masks import STATE, WEIGHT, MaskSpec
from autosparse_fx.passes.modes import function_name, is_written_to
from autosparse_fx.selection import is_maskable

UNMASKED = "autosparse_unmasked"  # key in the meta of the node of a weight that the graph reads as it is
_DIFFERENTIATING = frozenset({"_wrap_for_grad", "_make_dual"})  # what torch.func puts before a function of its inputs


def mark_weights(gm: GraphModule, request: Request | None) -> None:
    """Mark the nodes of the weights that ``insert_masks`` is to mask.

    With a request those are all trainable weights that the graph multiplies by; also the ones that stay dense, by a
    rule or because they were finalized, since Dynamo may run one graph for several instances of a class. Without a
    request they are the weights that other graphs mask. A weight that is masked there reads as masked in all graphs of
    its model, whatever they use it for, as it does when the model is prepared.

    Raises:
        RuntimeError: if the graph writes to a weight that is to be masked, or differentiates with respect to it by
            ``torch.func``.
    """
    given = {
        node: parameter
        for node in gm.graph.nodes
        if node.op in ("placeholder", "get_attr") and (parameter := placeholder_parameter(node)) is not None
    }
    parameters = {node: parameter for node, parameter in given.items() if _may_be_masked(parameter)}
    found = find_weights(gm, given.__contains__)
    for node in found:
        if node not in parameters and given[node].is_floating_point():
            node.meta[UNMASKED] = True
    found = {node: axis for node, axis in found.items() if node in parameters}
    if request is not None:
        weights = {parameters[node]: axis for node, axis in found.items()}
        registration.register(weights, list(parameters.values()), request)
    elif torch.is_grad_enabled():
        masks.not_missed(parameters.values())
    for node, parameter in parameters.items():
        mask = masks.hidden_mask(parameter)
        needed = node in found or _is_looked_up_in(node)
        if mask is not None and (needed or (request is not None and not is_written_to([node]))):
            if is_written_to([node]):
                raise RuntimeError(
                    f"the model writes to its weight '{mask.weight.name}' inside forward, which a masked copy would "
                    f"lose: leave it dense with options={{'rules': {{{mask.weight.name!r}: None}}, ...}}, or write to "
                    "it outside the compiled region"
                )
            if any(function_name(user) in _DIFFERENTIATING for user in node.users):
                raise RuntimeError(
                    f"torch.func differentiates with respect to the weight '{mask.weight.name}' inside the compiled "
                    "region, out of reach of its threshold: call model = autosparse_fx.sparsify(model) before making "
                    "the optimizer, and compile without the options"
                )
            node.meta[WEIGHT] = _mask_spec(mask.weight.config, parameter, mask.axis)
        elif request is not None and node in found and _could_be_masked(parameter):
            node.meta[WEIGHT] = _mask_spec(request.config, parameter, found[node])  # for other instances of its class
        elif mask is None and (needed or (request is not None and parameter.dim() > 1)) and not is_written_to([node]):
            node.meta[UNMASKED] = True


def _could_be_masked(parameter: nn.Parameter) -> bool:
    return type(parameter) is nn.Parameter and is_maskable(parameter.dtype)


def _mask_spec(config: AutoSparse, parameter: nn.Parameter, axis: int) -> MaskSpec:
    channels = parameter.shape[axis] if config.granularity == "channel" else None
    return MaskSpec(config.threshold_scale, axis, channels)


def _is_looked_up_in(node: Node) -> bool:
    """Whether the graph uses a weight as an embedding; it may be tied to one that other graphs multiply by."""
    return any(user.target in (F.embedding, F.embedding_bag) for user in node.users)


def _may_be_masked(parameter: nn.Parameter) -> bool:
    """A frozen weight is left as it is, unless it was frozen after it had got its mask."""
    return parameter.requires_grad or masks.hidden_mask(parameter) is not None


@dataclass(frozen=True)
class _Known:
    """What was looked up for the weights of a call, and serves the next ones with the same weights."""

    version: int
    weights: list[Callable[[], Any]]
    state: list[Tensor]
    masks: tuple[HiddenMask, ...]

    def holds_for(self, weights: Sequence[nn.Parameter]) -> bool:
        return self.version == masks.version() and all(r() is w for r, w in zip(self.weights, weights))  # noqa: B905


class PlainGraph(Protocol):
    """The graph of a :class:`MaskedCall` without masks."""

    def function(self, *args: Any) -> Callable[..., Any] | None:
        """What to call with these arguments, if there is anything that the masked graph does not do as well."""


class MaskedCall:
    """Calls a compiled graph with the thresholds, offsets and alphas of the weights that it is called with.

    They are looked up at every call, from the weights themselves, because Dynamo runs one graph for all instances of a
    class that look alike.
    """

    def __init__(self, gm: GraphModule, request: Request | None) -> None:
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        self._plain: PlainGraph | None = None
        self._request = request
        self._sources: list[int | nn.Parameter] = []
        self._shapes: list[tuple[int, ...]] = []
        self._axes: list[int] = []
        self._compiled: Callable[..., Any] | None = None
        self._known: _Known | None = None
        self._examples: list[Tensor] = []
        self._unmasked = [self._source(node, placeholders) for node in gm.graph.nodes if UNMASKED in node.meta]
        self._seen_unmasked: tuple[int, list[int]] | None = None  # the version of the masks at which these had none
        by_name = {node.name: node for node in gm.graph.nodes}
        for node in placeholders:
            name, field = node.meta.get(STATE, (None, None))
            if field == "threshold":
                weight = by_name[name]
                self._sources.append(self._source(weight, placeholders))
                self._shapes.append(tuple(node.meta["example_value"].shape))
                self._axes.append(weight.meta[WEIGHT].axis)
            if field is not None:
                self._examples.append(node.meta["example_value"])

    @property
    def takes_masks(self) -> bool:
        """Whether the graph has hidden thresholds."""
        return bool(self._sources)

    @staticmethod
    def _source(weight: Node, placeholders: list[Node]) -> int | nn.Parameter:
        if weight.op == "placeholder":
            return placeholders.index(weight)
        parameter = placeholder_parameter(weight)
        assert parameter is not None
        return parameter

    def example_state(self, example_inputs: Sequence[Any]) -> list[Tensor]:
        """The inputs that the graph takes behind ``example_inputs``, fake ones where those are fake (under DDP)."""
        if any(isinstance(value, FakeTensor) for value in example_inputs):
            return self._examples
        return [torch.empty(fake.shape, dtype=fake.dtype, device=fake.device) for fake in self._examples]

    def bind(self, compiled: Callable[..., Any], plain: PlainGraph | None = None) -> Callable[..., Any]:
        """Return what Dynamo is to call: ``compiled`` itself where the graph has no hidden thresholds.

        Args:
            compiled: what the masked graph became.
            plain: tells what to call without gradients where no weight has a mask any more; None for the masked graph,
                which then computes the same.
        """
        self._compiled, self._plain = compiled, plain
        return self if self._sources or self._unmasked else compiled

    def __call__(self, *args: Any) -> Any:
        assert self._compiled is not None
        if self._unmasked and masks.exist():
            unmasked = self._weights(self._unmasked, args)
            seen = masks.version(), list(map(id, unmasked))
            if self._seen_unmasked != seen:
                _refuse_masks_of(unmasked)
                masks.note_call(unmasked)
                self._seen_unmasked = seen
        if not self._sources:
            return self._compiled(*args)
        weights = self._weights(self._sources, args)
        known = self._known  # once, since threads call a graph for weights of their own
        if known is None or not known.holds_for(weights):
            if any(isinstance(weight, FakeTensor) for weight in weights):  # DDPOptimizer, which asks for output strides
                return self._compiled(*args, *self._examples)
            state = self._look_up(weights)
            found = tuple(mask for mask in map(masks.hidden_mask, weights) if mask is not None)
            known = self._known = _Known(masks.version(), [weakref.ref(weight) for weight in weights], state, found)
        if torch.is_grad_enabled():
            masks.note_use(known.masks)
        elif not known.masks and self._plain is not None:
            function = self._plain.function(*args)
            if function is not None:
                return function(*args)
        return self._compiled(*args, *known.state)

    @staticmethod
    def _weights(sources: Sequence[int | nn.Parameter], args: Sequence[Any]) -> list[nn.Parameter]:
        return [args[source] if isinstance(source, int) else source for source in sources]

    def _look_up(self, weights: list[nn.Parameter]) -> list[Tensor]:
        if self._request is not None:
            registration.register(dict(zip(weights, self._axes, strict=True)), [], self._request)
        found: list[Tensor] = []
        for weight, shape in zip(weights, self._shapes, strict=True):
            found.extend(masks.state(weight, shape))
        return found


def _refuse_masks_of(weights: Sequence[nn.Parameter]) -> None:
    for weight in weights:
        mask = None if isinstance(weight, FakeTensor) else masks.hidden_mask(weight)
        if mask is not None:
            raise RuntimeError(
                f"weight '{mask.weight.name}' {list(weight.shape)} had no mask when this graph was compiled (it was "
                "frozen, or not yet used by what is compiled with options, or so was another one like it), which so "
                "reads it as it is, and has got one since: call torch._dynamo.reset() once after the first step of "
                "every part of the model (and then the masked one first), or prepare it with "
                "model = autosparse_fx.sparsify(model) before making the optimizer"
            )
