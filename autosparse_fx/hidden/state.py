"""Saving and loading what a half-trained one-line model holds besides its own weights."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autosparse_fx.arguments import check_module
from autosparse_fx.attach import masked_modules
from autosparse_fx.config import AutoSparse
from autosparse_fx.hidden import masks
from autosparse_fx.hidden.masks import HiddenMask, Request
from autosparse_fx.hidden.registration import adopt
from autosparse_fx.plan import MaskedWeight, Plan

__all__ = ["load_state_dict", "state_dict"]

# What every entry holds, of whatever version of this package.
_KEYS = (
    *("name", "axis", "threshold", "offset", "steps"),
    *("optimizer", "optimizer_state", "config", "rule", "total_steps"),
)


def state_dict(model: nn.Module) -> dict[str, Any]:
    """Return thresholds, offsets, their optimizer state, history and the step count of a model that
    ``torch.compile(..., options={...})`` is making sparse.

    Save it beside ``model.state_dict()`` and ``optimizer.state_dict()``, which know nothing of it. A model that
    ``sparsify`` prepared needs none of this: everything is in its own ``state_dict()`` and in the annealer's.

    Returns:
        Tensors and plain values, by the full names of the weights in ``model``; ``torch.load(..., weights_only=True)``
        reads it.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if no compiled graph masks any weight of the model.
    """
    check_module(model, "state_dict")
    columns: dict[Plan, dict[str, torch.Tensor]] = {}
    for _, _, mask in masks.hidden_masks(model):
        if mask.plan not in columns:
            columns[mask.plan] = mask.plan.history.columns()
    found = {
        _plain(name): {
            "name": mask.weight.name,
            "axis": mask.axis,
            "threshold": mask.threshold.detach(),
            "offset": mask.offset,
            "steps": mask.steps,
            "optimizer": mask.optimizer,
            "optimizer_state": dict(mask.optimizer_state),
            "config": mask.request.config.to_dict(),
            "rule": mask.weight.config.to_dict(),
            "total_steps": mask.request.total_steps,
            "floors": mask.plan.floors,
            "history": columns[mask.plan].get(mask.weight.name, torch.empty(0, 4, dtype=torch.float64)),
        }
        for name, _, mask in masks.hidden_masks(model)
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no hidden thresholds: they exist from the first call of a model compiled with "
            "options={'total_steps': ..., ...} on; a model that sparsify prepared keeps its thresholds in "
            "model.state_dict()"
        )
    return found


def load_state_dict(model: nn.Module, state: dict[str, Any]) -> None:
    """Give ``model`` the thresholds that :func:`state_dict` returned, before its first call or after.

    Load ``model.state_dict()`` and ``optimizer.state_dict()`` as usual, compile with the same options, and train on.

    Raises:
        TypeError: if ``model`` is no module, or ``state`` no dict.
        ValueError: if the model has no such weight, a threshold has another shape, the state is empty or another one
            (``model.state_dict()``), or ``sparsify`` prepared the model. Nothing is then changed.
    """
    check_module(model, "load_state_dict")
    if masked_modules(model):
        raise ValueError(
            f"{type(model).__name__} was prepared with sparsify and keeps its thresholds in its own state_dict(): use "
            "model.load_state_dict"
        )
    _refuse_other_states(state)
    parameters = {_plain(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    plans: list[tuple[Request, Plan]] = []
    histories: dict[Plan, dict[str, tuple[int, torch.Tensor]]] = {}
    made = []
    for name, entry in state.items():
        parameter = parameters.get(name)
        if parameter is None:
            raise ValueError(f"{type(model).__name__} has no parameter '{name}', for which thresholds were saved")
        rule, request = AutoSparse.from_dict(entry["rule"]), _request(entry)
        shape = [parameter.shape[entry["axis"]]] if rule.granularity == "channel" else [1]
        for field in ("threshold", "offset"):
            if list(entry[field].shape) != shape:
                raise ValueError(
                    f"the saved {field} of '{name}' has shape {list(entry[field].shape)}, its weight "
                    f"{list(parameter.shape)} asks for {shape}"
                )
        plan = next((plan for known, plan in plans if known == request), None)
        if plan is None:
            plan = Plan(
                request.config,
                annealed_steps=entry["steps"],
                floors=entry.get("floors", []),
                total_steps=request.total_steps,
            )
            plans.append((request, plan))
        if "history" in entry:
            histories.setdefault(plan, {})[entry["name"]] = parameter.numel(), entry["history"]
        made.append((parameter, _mask(parameter, entry, rule, request, plan)))
    missing = [name for name, _, _ in masks.hidden_masks(model) if _plain(name) not in state]
    if missing:
        raise ValueError(f"the state lacks the thresholds of '{missing[0]}' ({len(missing)} weights in all)")
    for plan, columns in histories.items():
        plan.history.put_columns(columns)
    adopt([parameter for parameter, _ in made], plans)
    for parameter, mask in made:
        masks.insert(parameter, mask)


def _refuse_other_states(state: object) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(
            f"load_state_dict takes what autosparse_fx.state_dict(model) returned, got {type(state).__name__}"
        )
    if not state:
        raise ValueError("the state is empty: save what autosparse_fx.state_dict(model) returns")
    for name, entry in state.items():
        if isinstance(entry, torch.Tensor):
            raise ValueError(
                f"entry {name!r} is a tensor: this is model.state_dict(): load that with model.load_state_dict, and "
                "here what autosparse_fx.state_dict(model) returned"
            )
        lost = [key for key in _KEYS if key not in entry] if isinstance(entry, Mapping) else list(_KEYS)
        if lost:
            raise ValueError(
                f"entry {name!r} lacks {', '.join(map(repr, lost[:3]))}: load what autosparse_fx.state_dict(model) "
                "returned, not a whole checkpoint or the state of an optimizer"
            )


def _request(entry: dict[str, Any]) -> Request:
    return Request(AutoSparse.from_dict(entry["config"]), entry["total_steps"])


def _mask(parameter: nn.Parameter, entry: dict[str, Any], rule: AutoSparse, request: Request, plan: Plan) -> HiddenMask:
    device = parameter.device
    return HiddenMask(
        MaskedWeight(entry["name"], rule),
        request,
        plan,
        entry["axis"],
        nn.Parameter(entry["threshold"].detach().to(device, copy=True)),
        entry["offset"].to(device, copy=True),
        masks.shared_alpha(plan, device),
        entry["steps"],
        entry["optimizer"],
        {
            key: value.to(device if value.dim() else value.device, copy=True)
            if isinstance(value, torch.Tensor)
            else copy.deepcopy(value)
            for key, value in entry["optimizer_state"].items()
        },
    )


def _plain(name: str) -> str:
    """The name without what torch.compile puts around a module."""
    return name.replace("_orig_mod.", "")
