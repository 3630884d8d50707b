"""What is sparse, how much, what that saves, and what was left dense for which reason."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autosparse_fx._compat import eager
from autosparse_fx.arguments import check_module
from autosparse_fx.attach import masked_modules
from autosparse_fx.consistency import refuse_broken_ties
from autosparse_fx.dtensors import full_tensor
from autosparse_fx.hidden.masks import all_masked_modules, hidden_masks
from autosparse_fx.history import History
from autosparse_fx.masked import MaskedModule, full_logit, masked_value
from autosparse_fx.masked_state import mask_state, stored_weight
from autosparse_fx.ownership import was_masked
from autosparse_fx.plan import Plan, Slot
from autosparse_fx.selection import Candidate, collect, pruned_value, reason, refuse_lazy_parameters
from autosparse_fx.sparsity_report import UNITS, Cost, LayerReport, SparsityReport

if TYPE_CHECKING:
    from autosparse_fx.flops import ModelFlops

NO_LAYER = "no layer that has a sparse kernel"

__all__ = ["LayerReport", "SparsityReport", "report", "sparsity", "thresholds"]


def report(
    model: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any] | Tensor | None = None,
    *,
    dynamic_shapes: Sequence[Any] | Mapping[str, Any] | None = None,
    unit: str = "flops",
    history: History | None = None,
) -> SparsityReport:
    """Count the zeros of every weight of ``model``, as its layers read them, and what they save.

    Works on a sparse model, on a finalized one and on a dense one; tied weights are counted once. On a model that is
    not prepared the weights of the known layer classes are listed, and what was masked before it was finalized; those
    that ``torch.nn.utils.prune`` masks as the layers read them, under the names of its parameters (``weight_orig``).

    Args:
        model: in the mode in which it is to be counted.
        example_inputs: the arguments of one call (a tensor, a tuple, or a dict of keyword arguments), to count what a
            forward pass multiplies. The model runs once; its buffers and the random state are restored. Of a model in
            eval mode that is not prepared the report then also says which kernels it would run on, and warns where that
            cannot be known (without a C++ compiler).
        dynamic_shapes: for each input ``{dimension: name}`` or None, as for ``torch.export``: ``flops`` of the report
            are then expressions in these names.
        unit: ``"flops"``, where a multiply-accumulate is 2 FLOPs, or ``"macs"``, counted as the sparse-training
            literature does: multiply-accumulates, and the additions of average pooling.
        history: of a training whose cost is to be counted, ``annealer.history``; that of the model itself while it is
            being trained.

    Raises:
        ValueError: if the model cannot be run on the inputs, a weight is on the meta device, not yet initialised, or
            was tied outside of ``dense_weights``, the unit is unknown, or there are dynamic shapes of no inputs.
    """
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(map(repr, UNITS))}, got {unit!r}")
    if dynamic_shapes is not None and example_inputs is None:
        raise ValueError("dynamic_shapes are those of example_inputs, which are missing: pass both")
    check_module(model, "report")
    model = eager.without_wrapper(model)
    found = _count_zeros(model)
    if history is not None:
        found = replace(found, history=history)
    if example_inputs is None:
        return found
    from autosparse_fx.flops import count_flops  # which needs the compiler

    found = _with_costs(found, count_flops(model, example_inputs, dynamic_shapes), unit)
    return found if model.training or _masked_by_weight(model) else _with_kernels(found, model, example_inputs)


def _with_kernels(
    found: SparsityReport, model: nn.Module, example_inputs: Sequence[Any] | Mapping[str, Any] | Tensor
) -> SparsityReport:
    from autosparse_fx.kernels.layers import layers  # which needs the compiler

    try:
        choices = {layer.name: layer.choice for layer in layers(model, example_inputs)}
    except ValueError as error:  # of making the kernels, which are C++: the model has just run on these inputs
        cause = error.__cause__ or error
        why: BaseException = getattr(cause, "inner_exception", cause)  # what a backend raised, behind Dynamo's own
        first = str(why).strip().partition("\n\n")[0]
        warnings.warn(
            f"which kernels the layers would run on is not known: {type(why).__name__}: {first}", stacklevel=3
        )
        return found
    listed = []
    for layer in found.layers:
        choice = choices.get(layer.name)
        kernel = "sparse" if choice is not None and choice.is_sparse else "dense"
        listed.append(replace(layer, kernel=kernel, kernel_reason=NO_LAYER if choice is None else choice.reason))
    return replace(found, layers=tuple(listed))


@torch.no_grad()
def _count_zeros(model: nn.Module) -> SparsityReport:
    layers: list[LayerReport] = []
    skipped: dict[str, tuple[int, str]] = {}
    parameters = dense_bytes = stored_bytes = 0
    by_weight = _masked_by_weight(model)
    prepared = bool(by_weight)
    plans = plans_of(model)
    embeddings: list[str] = []
    own = _thresholds_of(model)
    refuse_lazy_parameters(model)
    refuse_broken_ties(model)
    captured = next(hidden_masks(model), None) is not None
    for candidate in collect(model):
        if id(candidate.parameter) in own:
            continue
        parameters += candidate.parameter.numel()
        size = candidate.parameter.numel() * candidate.parameter.element_size()
        dense_bytes += size
        stored_bytes += size  # less what is saved below
        masked = by_weight.get(id(candidate.parameter))
        pruned = None if masked is not None or prepared else pruned_value(candidate)
        listed = candidate.axis is not None or was_masked(candidate.parameter) or pruned is not None
        if masked is None and (prepared or not listed):
            if prepared:
                skipped[candidate.name] = (candidate.parameter.numel(), _reason_for(candidate, plans, captured))
            continue
        weight: Tensor = candidate.parameter
        if weight.is_meta:
            raise ValueError(
                f"weight '{candidate.name}' {list(weight.shape)} is on the meta device, where nothing can be counted: "
                "call model.to_empty(device=...) and load a state_dict first"
            )
        cut = target = None
        if masked is not None:
            if any(isinstance(module, nn.Embedding) for module, _ in candidate.holders):
                embeddings.append(candidate.name)
            module, slot = masked
            weight = masked_value(module, slot)
            cut = float(torch.sigmoid(full_logit(module, slot)).mean())
            target = module._autosparse.weights[slot.name].config.target_sparsity
        else:
            weight = full_tensor(weight if pruned is None else pruned)
        zeros = weight.numel() - int(torch.count_nonzero(weight))
        layers.append(
            LayerReport(
                candidate.name,
                tuple(weight.shape),
                weight.numel(),
                zeros,
                cut,
                target,
                tuple(candidate.names[1:]),
                _stored_bytes(weight, zeros),
            )
        )
        stored_bytes += layers[-1].stored_bytes - size
    history = next((plan.history for plan, _, _ in plans if len(plan.history)), History())
    return SparsityReport(
        tuple(layers),
        parameters,
        skipped,
        tuple(embeddings),
        dense_bytes,
        stored_bytes,
        history,
        in_training_mode=model.training,
    )


def _stored_bytes(weight: Tensor, zeros: int) -> int:
    """Dense, as a bitmap and the other values, or as an index (of 16 bits within a row, or 32) with each of them."""
    size, left = weight.element_size(), weight.numel() - zeros
    row = weight.numel() // weight.shape[0] if weight.dim() and weight.shape[0] else 0
    index = 2 if row <= 2**16 else 4
    rows = weight.shape[0] if weight.dim() else 0
    return min(weight.numel() * size, -(-weight.numel() // 8) + left * size, left * (size + index) + 4 * (rows + 1))


def _with_costs(found: SparsityReport, flops: "ModelFlops", unit: str) -> SparsityReport:
    from autosparse_fx.flops.training import training_flops

    factor = UNITS[unit][1]
    here = flops.at(**flops.example_sizes)
    sparsities = {layer.name: layer.sparsity for layer in found.layers}
    costs: dict[str, Cost] = {}
    for product in here.products:
        if product.pooling and unit != "macs":
            continue
        names = {name for operand in product.operands for name, _ in operand.weights}
        if product.pooling:
            key = "average pooling"
        elif len(names) == 1 and names <= set(sparsities):
            (key,) = names
        elif names or any(operand.parameter for operand in product.operands):
            key = "weights left dense" if not names & set(sparsities) else "several weights at once"
        else:
            key = "products of activations"
        part = Cost(float(product.macs) * factor, product.forward_at(sparsities) * factor)
        costs[key] = costs.get(key, Cost(0, 0)) + part
    layers = tuple(replace(layer, cost=costs.pop(layer.name, Cost(0, 0))) for layer in found.layers)
    training = None
    if any(name in here.weights for name in found.history.numel):
        records = found.history.records
        training = training_flops(
            here, [r.step for r in records], [r.alpha for r in records], [r.sparsity for r in records]
        )
    return replace(found, layers=layers, flops=flops, training=training, other_costs=costs, unit=unit)


def sparsity(model: nn.Module) -> float:
    """Return the fraction of zeros in [0, 1] over the masked weights of ``model``, tied ones counted once.

    On a model that is not prepared: over the weights that ``report`` lists.
    """
    check_module(model, "sparsity")
    return report(model).sparsity


@torch.no_grad()
def thresholds(model: nn.Module) -> dict[str, Tensor]:
    """Return the logit ``s`` of every masked weight by its full name; the cut is ``torch.sigmoid(s)``.

    Each is a detached float32 tensor of shape ``[1]``, or ``[C]`` for per-channel thresholds.
    """
    check_module(model, "thresholds")
    model = eager.without_wrapper(model)
    found: dict[str, Tensor] = {}
    by_weight = _masked_by_weight(model)
    for candidate in collect(model):
        masked = by_weight.get(id(candidate.parameter))
        if masked is not None:
            module, slot = masked
            found[candidate.name] = full_logit(module, slot).reshape(-1).clone()
    return found


def group_sparsities(model: nn.Module) -> dict[float | None, tuple[float, list[str]]]:
    """Return, for each target, the sparsity reached over the weights that share it, and their names."""
    groups: dict[float | None, list[LayerReport]] = {}
    for layer in report(model).layers:
        groups.setdefault(layer.target, []).append(layer)
    return {
        target: (sum(x.zeros for x in layers) / max(1, sum(x.numel for x in layers)), [x.name for x in layers])
        for target, layers in groups.items()
    }


def plans_of(model: nn.Module) -> list[tuple[Plan, str, str]]:
    """The plans in ``model``, each with how names were prefixed when it was made, and how they are prefixed now.

    They differ where a part of the prepared model is looked at, or a module around it.
    """
    found: dict[int, tuple[Plan, str, str]] = {}
    for prefix, module in all_masked_modules(model):
        for slot in module._autosparse_slots:
            then = module._autosparse.weights[slot.name].name
            now = f"{prefix}.{slot.name}" if prefix else slot.name
            while then and now and then.rpartition(".")[2] == now.rpartition(".")[2]:
                then, now = then.rpartition(".")[0], now.rpartition(".")[0]
            plan = module._autosparse.plan
            found.setdefault(id(plan), (plan, then, now))
    return list(found.values())


def _reason_for(candidate: Candidate, plans: list[tuple[Plan, str, str]], captured: bool) -> str:
    for plan, then, now in plans:
        for name in candidate.names:
            if not now or name.startswith(f"{now}."):
                inner = name.removeprefix(f"{now}.") if now else name
                known = plan.skipped.get(f"{then}.{inner}" if then else inner)
                if known is not None:
                    return known
    if candidate.axis is not None and not captured:
        return "was no part of the model when sparsify prepared it: finalize the model and sparsify all of it"
    return reason(candidate, looked_for=captured)


def _masked_by_weight(model: nn.Module) -> dict[int, tuple[MaskedModule, Slot]]:
    """Each masked weight, by id, with a module that reads it masked."""
    return {
        id(stored_weight(module, slot)): (module, slot)
        for _, module in all_masked_modules(model)
        for slot in module._autosparse_slots
    }


def _thresholds_of(model: nn.Module) -> set[int]:
    return {id(mask_state(module, slot)[0]) for _, module in masked_modules(model) for slot in module._autosparse_slots}
