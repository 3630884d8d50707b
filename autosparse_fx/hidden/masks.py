"""The masks of weights whose model was never prepared, found by the weight itself."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from autosparse_fx.attach import attach, masked_modules
from autosparse_fx.config import AutoSparse, matches
from autosparse_fx.decay import annealed_alpha
from autosparse_fx.initial import new_mask
from autosparse_fx.masked import MaskedModule
from autosparse_fx.ownership import Place, holds_only_for_us, is_finalized, places
from autosparse_fx.plan import MaskedWeight, Plan, Slot
from autosparse_fx.selection import check_tensor, collect, refuse_wrappers


@dataclass(frozen=True)
class Request:
    """What ``torch.compile(..., options={...})`` asked for."""

    config: AutoSparse
    total_steps: int


@dataclass(eq=False)
class HiddenMask:
    """The state of one masked weight. It does not hold the weight, which holds it alive."""

    weight: MaskedWeight
    request: Request
    plan: Plan
    axis: int
    threshold: nn.Parameter
    offset: Tensor
    alpha: Tensor
    steps: int = 0  # optimizer steps that the weight has seen
    used: int = 0  # when a graph last computed gradients with it, in ticks of ``tick``
    optimizer: str = ""  # the class of the optimizer that the threshold's state is of
    optimizer_state: dict[str, Any] = field(default_factory=dict)  # as torch.optim keeps it

    def state(self) -> tuple[nn.Parameter, Tensor]:
        """Threshold and offset."""
        return self.threshold, self.offset

    def holder(self, parameter: nn.Parameter, name: str = "weight") -> MaskedModule:
        """A masked module around the weight, under ``name`` in it, for all code that works on those."""
        slot = Slot(name, self.axis)
        module = nn.Module()
        holds_only_for_us(module)
        module._parameters[slot.name] = parameter
        attach(module, slot, self.weight, self.plan, self.threshold, self.offset, self.alpha)
        assert isinstance(module, MaskedModule)
        return module


@dataclass
class _Registry:
    """``members`` changes with the set of masks, ``version`` whenever a weight may have to be looked up again."""

    masks: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    # Weights that no graph has masked although a layer of a known class multiplies by them: their full names.
    missed: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    dense: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)  # by a rule: the requests
    # Masks that were taken off again: requests and the names under them.
    served: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    seen: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)  # looked at for this request
    alphas: Any = field(default_factory=WeakIdKeyDictionary)  # plan -> {device: alpha}
    plans: Any = field(default_factory=WeakIdKeyDictionary)  # root module -> [(request, plan)]
    called: set[HiddenMask] = field(default_factory=set)  # with gradients, since the last tick
    ticks: int = 0
    members: int = 0
    version: int = 0


_registry = _Registry()


def hidden_mask(parameter: Tensor) -> HiddenMask | None:
    """The mask of a weight, if it has one here."""
    found: HiddenMask | None = _registry.masks.get(parameter)
    return found


def version() -> int:
    """A number that changes whenever what is known of a weight may have changed."""
    return _registry.version


def membership() -> int:
    """A number that changes whenever a weight gets a mask or loses it."""
    return _registry.members


def touch() -> None:
    """Have every compiled graph look up its weights again."""
    _registry.version += 1


def note_use(used: tuple[HiddenMask, ...]) -> None:
    """Note that a graph is being called that computes gradients with these masks."""
    _registry.called.update(used)


def tick() -> int:
    """Begin a new count of uses, and return its number: masks that were used since the last one have it in ``used``."""
    _registry.ticks += 1
    for mask in _registry.called:
        mask.used = _registry.ticks
    _registry.called.clear()
    return _registry.ticks


def missed_weight(parameter: Tensor) -> tuple[str, bool] | None:
    """Of a weight that should be masked by now and is not: its name, and whether the same options masked it before."""
    found: tuple[str, Request] | None = _registry.missed.get(parameter)
    return None if found is None else (found[0], _served(parameter, found[1]) is not None)


def not_missed(parameters: Iterable[Tensor]) -> None:
    """Note that these weights are trained as they are, since their model was compiled again, without options."""
    for parameter in parameters:
        if _registry.missed.pop(parameter, None) is not None:
            _registry.members += 1


def register(weights: Mapping[nn.Parameter, int], around: list[nn.Parameter], request: Request) -> None:
    """Give a mask to every weight that has none yet and that the rules do not leave dense.

    Args:
        weights: weights that a graph multiplies by, and the axis of the output channels of each.
        around: all trainable parameters of the graph: they tell which model it belongs to, and those that layers of
            other graphs multiply by (an embedding that is tied to a head) get their masks here as well.
        request: what to make sparse and how.

    Raises:
        ValueError: if a rule matches nothing in the model, or a weight is being made sparse already with another
            configuration. Nothing is then registered.
    """
    for parameter in weights:
        mask = hidden_mask(parameter)
        if mask is not None and mask.request != request:
            raise ValueError(
                f"weight '{mask.weight.name}' is being made sparse already, with other options "
                f"({mask.request}): compile all parts of a model with the same ones"
            )
    for parameter in weights if torch.is_grad_enabled() else ():
        name = _served(parameter, request)
        if hidden_mask(parameter) is None and name is not None:
            _registry.missed[parameter] = (name, request)
            _registry.members += 1
    unseen = [p for p in (*weights, *around) if _registry.seen.get(p) != request]
    if not unseen and not any(_is_new(p, request) for p in weights):
        return
    found = places([*weights, *around])
    expected = _expected([found[id(p)].scope for p in (*weights, *around) if id(p) in found], found, request)
    axes = {**{p: expected[p][1] for p in around if p in expected}, **weights}
    new = [p for p in axes if _is_new(p, request) and _registry.dense.get(p) != request]
    plans = {id(place.root): _plan(place.root, found, request) for place in found.values()}
    made: list[tuple[nn.Parameter, int, MaskedWeight, Plan]] = []
    dense: list[tuple[nn.Parameter, Plan, str, str]] = []
    for parameter in new:
        place = found.get(id(parameter))
        names = place.names if place is not None else ("weight",)  # no module holds it
        plan = plans[id(place.root)] if place is not None else Plan(request.config, total_steps=request.total_steps)
        pattern, rule = request.config.rule_for(names)
        if rule is None:
            dense.append((parameter, plan, names[0], f"left dense by the rule {pattern!r}"))
            continue
        check_tensor(parameter, names[0])
        if type(parameter) is not nn.Parameter:
            raise TypeError(
                f"weight '{names[0]}' {list(parameter.shape)} is a {type(parameter).__name__}, which options= "
                "cannot make sparse: prepare the model with autosparse_fx.sparsify"
            )
        made.append((parameter, axes[parameter], MaskedWeight(names[0], rule), plan))
    # Everything that can fail comes before the first change.
    for parameter, (name, _) in expected.items():
        _registry.missed[parameter] = (name, request)
    for parameter, plan, name, why in dense:
        plan.skipped[name] = why
        _registry.dense[parameter] = request
    for parameter in unseen:
        _registry.seen[parameter] = request
    for parameter, axis, weight, plan in made:
        with torch.inference_mode(False), torch.no_grad():
            threshold, offset = new_mask(parameter, axis, weight)
            alpha = shared_alpha(plan, parameter.device)
        insert(parameter, HiddenMask(weight, request, plan, axis, threshold, offset, alpha))


def shared_alpha(plan: Plan, device: torch.device) -> Tensor:
    """The alpha of all weights of one model on one device, at the step that their training is at."""
    alphas: dict[torch.device, Tensor] = _registry.alphas.setdefault(plan, {})
    if device not in alphas:
        config = plan.config
        progress = min(1.0, plan.annealed_steps / plan.total_steps) if plan.total_steps else 0.0
        alpha = annealed_alpha(config.alpha, config.decay, config.alpha_end, progress)
        with torch.inference_mode(False):
            alphas[device] = torch.full((), alpha, dtype=torch.float32, device=device)
    return alphas[device]


@contextmanager
def undone_on_error() -> Iterator[None]:
    """Take back what was registered within it if it raises.

    Dynamo raises not only where a compilation fails: it also does to begin one anew, and then what the graphs before
    have registered has to stay.
    """
    masked = set(map(id, _registry.masks))
    missed, dense, seen = _registry.missed.copy(), _registry.dense.copy(), _registry.seen.copy()
    try:
        yield
    except BaseException:
        for parameter in [parameter for parameter in _registry.masks if id(parameter) not in masked]:
            _take_off(parameter)
        _registry.missed, _registry.dense, _registry.seen = missed, dense, seen
        raise


def insert(parameter: nn.Parameter, mask: HiddenMask) -> None:
    """Enter a mask for a weight."""
    _registry.masks[parameter] = mask
    _registry.missed.pop(parameter, None)
    _registry.members += 1
    touch()


def release(parameter: nn.Parameter) -> None:
    """Forget the mask of a weight: graphs that were compiled with it read the weight as it is from now on."""
    mask = _take_off(parameter)
    if mask is not None:
        _registry.served.setdefault(parameter, []).append((mask.weight.name, mask.request))
    _registry.missed.pop(parameter, None)


def _take_off(parameter: nn.Parameter) -> HiddenMask | None:
    mask: HiddenMask | None = _registry.masks.pop(parameter, None)
    if mask is not None:
        _registry.members += 1
        touch()
    return mask


def _plan(root: nn.Module, found: Mapping[int, Place], request: Request) -> Plan:
    plans: list[tuple[Request, Plan]] = _registry.plans.setdefault(root, [])
    for known, plan in plans:
        if known == request:
            return plan
    refuse_wrappers(root)
    candidates = collect(root)
    names = [name for c in candidates for name in found[id(c.parameter)].names]
    for pattern in request.config.rules:
        if not any(matches(pattern, name) for name in names):
            weights = ", ".join(c.name for c in candidates if c.axis is not None) or "none"
            raise ValueError(
                f"options: rules: {pattern!r} matches no parameter of the model; its weights are {weights}"
            )
    plan = Plan(request.config, total_steps=request.total_steps)
    plans.append((request, plan))
    return plan


def _is_new(parameter: nn.Parameter, request: Request) -> bool:
    """Whether a weight is to get a mask. One that was finalized gets another if it is trained again, by other options:
    what is called with the same ones may as well be the model that they were for, which is now evaluated.
    """
    if hidden_mask(parameter) is not None or _served(parameter, request) is not None:
        return False
    return torch.is_grad_enabled() or not is_finalized(parameter)


def _served(parameter: Tensor, request: Request) -> str | None:
    """The name of a weight that had a mask by this request, which was taken off again."""
    served: list[tuple[str, Request]] = _registry.served.get(parameter, [])
    return next((name for name, known in served if known == request), None)


def _expected(
    scopes: list[nn.Module], found: Mapping[int, Place], request: Request
) -> dict[nn.Parameter, tuple[str, int]]:
    """The weights of what was compiled that layers of known classes multiply by, without a mask yet: their names and
    channel axes. Graphs are to mask them all."""
    expected = {}
    for scope in {id(scope): scope for scope in scopes}.values():
        for candidate in collect(scope):
            parameter, names = candidate.parameter, found[id(candidate.parameter)].names
            prepared = any(isinstance(holder, MaskedModule) for holder, _ in candidate.holders)
            if prepared or candidate.axis is None:
                continue
            if _is_new(parameter, request) and request.config.rule_for(names)[1] is not None:
                expected[parameter] = (names[0], candidate.axis)
    return expected


def unmasked(scope: nn.Module, request: Request) -> dict[nn.Parameter, str]:
    """The weights of ``scope`` that layers of known classes multiply by, and that are to be masked and are not.

    Raises:
        ValueError: if a rule matches nothing in the model, or the model is one that cannot be made sparse.
    """
    layers = [candidate.parameter for candidate in collect(scope) if candidate.axis is not None]
    if all(hidden_mask(parameter) is not None for parameter in layers):
        return {}
    found = places(layers)
    for root in {id(place.root): place.root for place in found.values()}.values():
        _plan(root, found, request)
    return {parameter: name for parameter, (name, _) in _expected([scope], found, request).items()}


def state(parameter: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return threshold, offset and alpha of a weight for a graph that takes thresholds of ``shape``.

    A weight without a mask gets a cut of exactly 0, under which its value and its gradient are what they are.

    Raises:
        ValueError: if its threshold has another shape.
    """
    mask = hidden_mask(parameter)
    with torch.inference_mode(False):
        if mask is None:
            never = torch.full(shape, -torch.inf, dtype=torch.float32, device=parameter.device)
            return torch.zeros_like(never), never, torch.ones((), dtype=torch.float32, device=parameter.device)
        if tuple(mask.threshold.shape) != shape:
            raise ValueError(
                f"weight '{mask.weight.name}' has thresholds of shape {list(mask.threshold.shape)}, but shares a "
                f"compiled graph with weights whose thresholds have shape {list(shape)}: give them the same "
                "granularity, or prepare the model with autosparse_fx.sparsify"
            )
        _follow(mask, parameter.device)
        # Not detach(): an optimizer that steps in the middle of the backward pass may write to these.
        return mask.threshold.data, mask.offset.data, mask.alpha.data


def _follow(mask: HiddenMask, device: torch.device) -> None:
    """Move the state of a mask to where its weight has moved."""
    if mask.offset.device == device:
        return
    mask.threshold.data = mask.threshold.data.to(device)
    mask.offset = mask.offset.to(device)
    mask.alpha = shared_alpha(mask.plan, device)
    mask.optimizer_state = {
        key: value.to(device) if isinstance(value, Tensor) and value.dim() else value
        for key, value in mask.optimizer_state.items()
    }
    touch()


def hidden_masks(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, HiddenMask]]:
    """The weights of ``model`` that are masked here, with their full names in it."""
    if not len(_registry.masks):
        return
    for name, parameter in model.named_parameters():
        mask = hidden_mask(parameter)
        if mask is not None:
            yield name, parameter, mask


def all_masked_modules(model: nn.Module) -> list[tuple[str, MaskedModule]]:
    """The modules of ``model`` that read masked weights, and one around each weight that is masked here."""
    found = masked_modules(model)
    for full_name, parameter, mask in hidden_masks(model):
        prefix, _, name = full_name.rpartition(".")
        found.append((prefix, mask.holder(parameter, name)))
    return found
