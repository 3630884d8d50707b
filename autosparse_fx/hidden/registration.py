"""Which weights get masks: those that a graph multiplies by, and those that were to be masked and were not."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from autosparse_fx.config import matches
from autosparse_fx.hidden.masks import (
    HiddenMask,
    Request,
    hidden_mask,
    insert,
    masked_parameters,
    registry,
    served,
    shared_alpha,
    take_off,
)
from autosparse_fx.initial import new_mask, warn_of_only_zeros
from autosparse_fx.masked import MaskedModule
from autosparse_fx.ownership import Place, is_finalized, places
from autosparse_fx.plan import MaskedWeight, Plan
from autosparse_fx.selection import check_tensor, collect, is_maskable, owner, reason, refuse_wrappers, role, unmatched


def register(weights: Mapping[nn.Parameter, int], around: list[nn.Parameter], request: Request) -> None:
    """Give a mask to every weight that has none yet, that the rules do not leave dense, and that nothing else owns.

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
        name = served(parameter, request)
        if hidden_mask(parameter) is None and name is not None:
            registry.missed[parameter] = (name, request)
            registry.members += 1
    unseen = [p for p in (*weights, *around) if registry.seen.get(p) != request]
    if not unseen and not any(_is_new(p, request) and registry.dense.get(p) != request for p in weights):
        return
    found = places([*weights, *around])
    expected = _expected([found[id(p)].scope for p in (*weights, *around) if id(p) in found], found, request)
    axes = {**{p: expected[p][1] for p in around if p in expected}, **weights}
    axes.update({p: expected[p][1] for p in weights if p in expected})  # of its layer, however the graph uses it
    new = [p for p in axes if _is_new(p, request) and registry.dense.get(p) != request]
    roots = {id(place.root): place.root for place in found.values()}
    plans = _plans(roots.values(), found, request)
    owned = _owned(list(roots.values())) if new else {}
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
        if id(parameter) in owned:
            dense.append((parameter, plan, names[0], owned[id(parameter)]))
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
        registry.missed[parameter] = (name, request)
    for parameter, plan, name, why in dense:
        plan.skipped[name] = why
        registry.dense[parameter] = request
    for parameter in unseen:
        registry.seen[parameter] = request
    for parameter, axis, weight, plan in made:
        with torch.inference_mode(False), torch.no_grad():
            threshold, offset = new_mask(parameter, axis, weight)
            alpha = shared_alpha(plan, parameter.device)
        insert(parameter, HiddenMask(weight, request, plan, axis, threshold, offset, alpha))
    warn_of_only_zeros([(weight, parameter) for parameter, _, weight, _ in made], stacklevel=2)


@contextmanager
def undone_on_error() -> Iterator[None]:
    """Take back what was registered within it if it raises.

    Dynamo raises not only where a compilation fails: it also does to begin one anew, and then what the graphs before
    have registered has to stay.
    """
    masked = {id(parameter) for parameter, _ in masked_parameters()}
    missed, dense, seen = registry.missed.copy(), registry.dense.copy(), registry.seen.copy()
    try:
        yield
    except BaseException:
        for parameter, _ in masked_parameters():
            if id(parameter) not in masked:
                take_off(parameter)
        registry.missed, registry.dense, registry.seen = missed, dense, seen
        raise


def adopt(parameters: Sequence[nn.Parameter], loaded: Sequence[tuple[Request, Plan]]) -> None:
    """Make these the plans of the models that hold the parameters, with the weights that rules have left dense."""
    found = places(parameters)
    for root in {id(place.root): place.root for place in found.values()}.values():
        plans: list[tuple[Request, Plan]] = registry.plans.setdefault(root, [])
        for request, plan in loaded:
            for known in [known for known in plans if known[0] == request]:
                plan.skipped.update(known[1].skipped)
                plans.remove(known)
            plans.append((request, plan))


def _plans(roots: Iterable[nn.Module], found: Mapping[int, Place], request: Request) -> dict[int, Plan]:
    """The plan of each model, by its id; new ones are made where there is none for the request."""
    plans: dict[int, Plan] = {}
    new = []
    for root in roots:
        known = next((plan for other, plan in registry.plans.get(root, []) if other == request), None)
        if known is None:
            new.append(root)
        else:
            plans[id(root)] = known
    for root in new:
        refuse_wrappers(root)
    candidates = [candidate for root in new for candidate in collect(root)]
    names = [name for c in candidates for name in found[id(c.parameter)].names]
    for pattern in request.config.rules if new and not plans else ():
        if not any(matches(pattern, name) for name in names):
            weights = ", ".join(c.name for c in candidates if c.axis is not None) or "none"
            raise ValueError(f"options: rules: {unmatched(pattern, candidates)}; its weights are {weights}")
    for root in new:
        plan = plans[id(root)] = Plan(request.config, total_steps=request.total_steps)
        registry.plans.setdefault(root, []).append((request, plan))
    return plans


def _is_new(parameter: nn.Parameter, request: Request) -> bool:
    """Whether a weight is to get a mask. One that was finalized gets another if it is trained again, by other options:
    what is called with the same ones may as well be the model that they were for, which is now evaluated.
    """
    if hidden_mask(parameter) is not None or served(parameter, request) is not None:
        return False
    return torch.is_grad_enabled() or not is_finalized(parameter)


def _owned(roots: list[nn.Module]) -> dict[int, str]:
    """By id, the parameters that something else computes the weights of these models from, and what that is."""
    candidates = [candidate for root in roots for candidate in collect(root)]
    return {id(c.parameter): reason(c) for c in candidates if owner(c) is not None}


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


def unmasked_in(scope: nn.Module, request: Request) -> dict[nn.Parameter, str]:
    """The weights of ``scope`` that layers of known classes multiply by, and that are to be masked and are not.

    Raises:
        ValueError: if a rule matches nothing in the model, or the model is one that cannot be made sparse.
    """
    layers = [candidate.parameter for candidate in collect(scope) if candidate.axis is not None]
    if all(hidden_mask(parameter) is not None for parameter in layers):
        return {}
    found = places(layers)
    _plans({id(place.root): place.root for place in found.values()}.values(), found, request)
    return {parameter: name for parameter, (name, _) in _expected([scope], found, request).items()}


def unseen_in(scope: nn.Module, request: Request) -> dict[nn.Parameter, str]:
    """The parameters of ``scope``, and of no layer of a known class, that no graph holds although they may well be
    weights: what they are used for runs where the compiler does not see it."""
    candidates = [
        candidate
        for candidate in collect(scope)
        if candidate.axis is None
        and candidate.parameter.requires_grad
        and candidate.parameter.dim() > 1
        and is_maskable(candidate.parameter.dtype)
        and registry.seen.get(candidate.parameter) != request
        and candidate.parameter not in registry.called_with
        and hidden_mask(candidate.parameter) is None
        and not any(isinstance(holder, MaskedModule) for holder, _ in candidate.holders)
        and role(candidate) is None
    ]
    if not candidates:
        return {}
    found = places([candidate.parameter for candidate in candidates])
    names = {candidate.parameter: found[id(candidate.parameter)].names for candidate in candidates}
    return {parameter: n[0] for parameter, n in names.items() if request.config.rule_for(n)[1] is not None}
