"""sparsify, finalize and dense_weights: the life of a sparse model, from dense to dense."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from autosparse_fx._compat import eager
from autosparse_fx.arguments import check_bool, check_module
from autosparse_fx.attach import attach, detach, detach_weight, masked_modules, remask
from autosparse_fx.config import AutoSparse, check_config
from autosparse_fx.consistency import is_masked, refuse_broken_ties
from autosparse_fx.dtensors import placed_like
from autosparse_fx.hidden.masks import all_masked_modules, hidden_mask, hidden_masks, release
from autosparse_fx.initial import new_mask, warn_of_only_zeros
from autosparse_fx.masked import MaskedModule, masked_class, masked_value
from autosparse_fx.masked_state import ALPHA, stored_weight
from autosparse_fx.optimizers import warn_of_late_weights
from autosparse_fx.ownership import holders, remember_finalized
from autosparse_fx.plan import MaskedWeight, Plan, Slot
from autosparse_fx.report import group_sparsities
from autosparse_fx.selection import collect, is_embedding, refuse_lazy_parameters, refuse_wrappers, select
from autosparse_fx.steering import TOLERANCE, explain_divergence, explain_out_of_reach, steer, steered_groups

__all__ = ["finalize", "sparsify"]

log = logging.getLogger(__name__)
ModuleT = TypeVar("ModuleT", bound=nn.Module)

# Modules that read the weights of their children more than once in a forward.
_READS_CHILDREN = (nn.TransformerEncoder, nn.TransformerEncoderLayer)


def sparsify(
    model: ModuleT,
    config: AutoSparse | None = None,
    *,
    example_inputs: Sequence[Any] | Mapping[str, Any] | Tensor | None = None,
) -> ModuleT:
    """Prepare ``model`` for sparse training, in place, and return it.

    Every weight that a known layer multiplies by (convolutions, linear, bilinear, attention and recurrent layers) gets
    a learned threshold and is masked wherever it is read. The model keeps its classes, its parameter names and its
    methods; ``state_dict()`` gains ``<name>_threshold`` and ``<name>_offset`` for each masked weight.

    Args:
        model: any module, on any device, the meta device included.
        config: what to make sparse and how; 80 % sparsity by default. A model that ``torch.compile(...,
            options=...)`` is making sparse goes on with its thresholds and its configuration.
        example_inputs: arguments of one call of the model (a tensor, a tuple, or a dict of keyword arguments). With
            them, parameters that the model's own code multiplies by (``F.linear``, ``torch.einsum``, ``@``, ...) are
            found and masked as well. The model runs once, without gradients where it can, and once more where the
            compiler leaves some of it to eager mode; its buffers, gradients and the random state are restored.

    Returns:
        ``model`` itself.

    Warns:
        UserWarning: if a weight begins with only zeros, because its ``threshold_init`` has a cut above all of it.

    Raises:
        TypeError, ValueError: if a rule matches nothing, a weight cannot be masked, nothing is left to mask, or the
            model was prepared with another configuration. The model is then unchanged.
    """
    check_module(model, "sparsify")
    hidden = list(hidden_masks(model))
    if config is None:
        config = hidden[0][2].request.config if hidden else AutoSparse()
    check_config(config, "sparsify")
    refuse_wrappers(model)
    _refuse_ddp(model)
    prepared = [(name, module) for name, module in masked_modules(model) if module._autosparse_slots]
    if prepared:
        name, first = prepared[0]
        if first._autosparse.plan.config == config:
            _refuse_unmasked_parts(model, config)
            return model
        raise ValueError(
            f"the model is sparse already ('{name}' was prepared with {first._autosparse.plan.config}): finalize it "
            "before preparing it with another configuration"
        )
    for name, _, mask in hidden:
        if mask.request.config != config:
            raise ValueError(
                f"weight '{name}' is being made sparse already by torch.compile(..., options=...), as "
                f"{mask.request.config}: sparsify without a configuration takes that over"
            )
    by_use = {id(candidate.parameter) for candidate in collect(model) if candidate.axis is None}
    used = {id(parameter): mask.axis for _, parameter, mask in hidden} or None
    if example_inputs is not None:
        refuse_lazy_parameters(model)  # which the capture would run into
        from autosparse_fx.capture import multiplied_parameters

        used = {**(used or {}), **multiplied_parameters(model, example_inputs)}
    selection = select(model, config, used)
    for candidate, _ in selection.chosen:
        for module, name in candidate.holders:
            for new in (f"{name}_threshold", f"{name}_offset", ALPHA):
                if hasattr(module, new):
                    raise ValueError(
                        f"{type(module).__name__} that holds '{candidate.name}' has an attribute '{new}' already"
                    )
    plan = Plan(config, selection.skipped, annealed_steps=max((mask.steps for _, _, mask in hidden), default=0))

    # Everything that can fail comes before the first change.
    alphas: dict[torch.device, Tensor] = {}
    prepared_masks = []
    for candidate, rule in selection.chosen:
        assert candidate.axis is not None
        for module, name in candidate.holders:
            masked_class(type(module), (Slot(name, candidate.axis),), config.threshold_scale)
        known = hidden_mask(candidate.parameter)
        weight = MaskedWeight(candidate.name, rule) if known is None else replace(known.weight, name=candidate.name)
        weight.found_by_use = id(candidate.parameter) in by_use
        weight.held_by = len(candidate.holders)
        weight.was_embedding = is_embedding(candidate)
        made = new_mask(candidate.parameter, candidate.axis, weight) if known is None else known.state()
        alpha = _shared_alpha(alphas, candidate.parameter.device, config.alpha if known is None else float(known.alpha))
        prepared_masks.append((candidate, weight, *made, alpha))
    begun = [(weight, c.parameter) for c, weight, *_ in prepared_masks if hidden_mask(c.parameter) is None]
    warn_of_only_zeros(begun, stacklevel=2)
    attached: list[tuple[nn.Module, str]] = []
    try:
        for candidate, weight, threshold, offset, alpha in prepared_masks:
            for module, name in candidate.holders:
                attach(module, Slot(name, candidate.axis or 0), weight, plan, threshold, offset, alpha)
                attached.append((module, name))
    except BaseException:  # a class that lets no other take its place, say
        for module, name in attached:
            detach_weight(module, name)
        raise
    for candidate, *_ in prepared_masks:
        release(candidate.parameter)
    for module in model.modules():
        if isinstance(module, _READS_CHILDREN) and not isinstance(module, MaskedModule):
            remask(module, (), plan)
    log.info("sparsify: %d weights masked, %d left dense", len(selection.chosen), len(selection.skipped))
    return model


def finalize(model: ModuleT, *, reach_target: bool = False) -> ModuleT:
    """Turn a sparse model back into a plain one, in place, with real zeros in its weights, and return it.

    The modules get their original classes, the state_dict the dense model's exact keys; thresholds, offsets and alpha
    are gone. The parameters stay the same objects, and the output of the model stays the same to the last bit. Nothing
    enforces the zeros from then on.

    Args:
        model: what was trained.
        reach_target: shift all thresholds once more before that, to the target sparsity exactly, as the last step of an
            annealer does. For what no annealer has steered to where it is: an average of weights
            (``torch.optim.swa_utils.AveragedModel``), or a training that ends early. The output then changes.

    Warns:
        UserWarning: if a target sparsity was missed by more than half a point, no annealer ever stepped, or a layer
            that joined the model after ``sparsify`` was never masked.

    Raises:
        TypeError: if ``model`` is no module, or ``reach_target`` no bool.
        ValueError: if nothing in ``model`` is sparse, weights are on the meta device, were tied outside of
            ``dense_weights``, or are tied to masked ones outside of ``model``, or it is to reach a target and has none.
        RuntimeError: if a masked module was wrapped by FSDP2 or parametrized meanwhile, or if the target is out of
            reach; the model is then unchanged.
    """
    check_module(model, "finalize")
    check_bool(reach_target, "reach_target")
    modules = all_masked_modules(model)
    if not modules:
        raise ValueError(
            f"{type(model).__name__} is not sparse: there is nothing to finalize (was it finalized before?)"
        )
    for name, module in modules:
        if "_autosparse_slots" not in type(module).__dict__ or eager.is_managed_by_fsdp(module):
            raise RuntimeError(
                f"'{name}' is sharded by fully_shard, or its class was changed to {type(module).__mro__[0]} after "
                "sparsify (by parametrize?): finalize a plain copy of the model that has loaded the full state_dict"
            )
        for slot in module._autosparse_slots:
            if module._parameters.get(slot.name) is None:
                raise RuntimeError(
                    f"'{name}' has lost its weight '{slot.name}', which is masked: remove weights inside "
                    "`with autosparse_fx.dense_weights(model):`"
                )
    refuse_broken_ties(model)
    _refuse_ties_to_the_outside(modules)
    if not any(hidden_masks(model)):  # in the one-line form a layer that came late is an error
        warn_of_late_weights(model)
    if reach_target:
        _steer_to_targets(modules)
    _warn_of_missed_targets(model, modules)
    held: dict[nn.Parameter, list[tuple[MaskedModule, Slot]]] = {}
    for _, module in modules:
        for slot in module._autosparse_slots:
            held.setdefault(stored_weight(module, slot), []).append((module, slot))
    # Weight by weight, so that an interrupted call leaves none that is written and still masked.
    for parameter, places in held.items():
        with torch.no_grad():
            parameter.copy_(placed_like(masked_value(*places[0]), parameter))
        for module, slot in places:
            detach_weight(module, slot.name)
        release(parameter)
        remember_finalized([parameter], {id(parameter)})
    for _, module in masked_modules(model):  # those that read the weights of others
        detach(module)
    remember_finalized(model.parameters(), ())
    return model


def _shared_alpha(alphas: dict[torch.device, Tensor], device: torch.device, value: float) -> Tensor:
    if device not in alphas:
        alphas[device] = torch.full((), value, dtype=torch.float32, device=device)
    return alphas[device]


def _refuse_ddp(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel) and not masked_modules(module):
            raise ValueError(
                f"module '{name}' is DistributedDataParallel already, which would not average the gradients of new "
                "thresholds over the ranks: sparsify the plain model, then wrap it"
            )


def _refuse_unmasked_parts(model: nn.Module, config: AutoSparse) -> None:
    for candidate in collect(model):
        dense = candidate.axis is not None and not is_masked(candidate)
        if dense and config.rule_for(candidate.names)[1] is not None:
            raise ValueError(
                f"the model is sparse already, but its weight '{candidate.name}' is not masked: finalize it before "
                "preparing the larger model"
            )


def _refuse_ties_to_the_outside(modules: list[tuple[str, Any]]) -> None:
    held: dict[int, list[tuple[MaskedWeight, nn.Parameter]]] = {}
    for _, module in modules:
        for slot in module._autosparse_slots:
            stored = stored_weight(module, slot)
            held.setdefault(id(stored), []).append((module._autosparse.weights[slot.name], stored))
    short = [places for places in held.values() if len(places) < places[0][0].held_by]
    if not short:
        return
    inside = {id(module) for _, module in modules}
    outside = [m for m in holders([p[0][1] for p in short]) if isinstance(m, MaskedModule) and id(m) not in inside]
    for places in short:
        weight, stored = places[0]
        for module in outside:
            if any(stored_weight(module, slot) is stored for slot in module._autosparse_slots):
                raise ValueError(
                    f"weight '{weight.name}' {list(stored.shape)} is tied to one of a {type(module).__name__} outside "
                    "of what is to be finalized, which would mask it once more: finalize the whole model, or untie "
                    "it inside `with autosparse_fx.dense_weights(model):`"
                )


def _steer_to_targets(modules: list[tuple[str, Any]]) -> None:
    groups = steered_groups(module for _, module in modules)
    if not groups:
        raise ValueError("finalize: reach_target needs a target, and the model was prepared with target_sparsity=None")
    before = [(offset, offset.clone()) for weights in groups.values() for w in weights for offset in w.offsets]
    for (target, _), weights in groups.items():
        limit = weights[0].module._autosparse.plan.config.max_layer_sparsity
        shift = steer(weights, target, limit, exact=True)
        if not shift.reached:
            for offset, value in before:
                offset.copy_(value)
            why = explain_out_of_reach(weights, target) if shift.finite else explain_divergence(weights)
            raise RuntimeError(f"finalize: {why}")


def _warn_of_missed_targets(model: nn.Module, modules: list[tuple[str, Any]]) -> None:
    plans = {id(m._autosparse.plan): m._autosparse.plan for _, m in modules}
    for target, (reached, names) in group_sparsities(model).items():
        if target is None or abs(reached - target) <= TOLERANCE:
            continue
        never = not any(plan.annealed_steps for plan in plans.values())
        cure = (
            "no GradientAnnealing ever stepped this model: make one before the training (in the one-line form, train "
            "it by an optimizer of torch that holds its parameters)"
            if never
            else "train to the end of total_steps, lower the target, or finalize with reach_target=True"
        )
        warnings.warn(
            f"finalize: sparsity {reached:.4f} instead of the target {target:.4f} over {len(names)} weights "
            f"({names[0]}, ...): {cure}",
            stacklevel=3,
        )
