"""Attach masks to modules and detach them; the modules keep their identity."""

from torch import Tensor, nn

from autosparse_fx.masked import MaskedModule, masked_class
from autosparse_fx.masked_state import ALPHA
from autosparse_fx.plan import MaskedWeight, ModuleState, Plan, Slot


def attach(
    module: nn.Module,
    slot: Slot,
    weight: MaskedWeight,
    plan: Plan,
    threshold: nn.Parameter,
    offset: Tensor,
    alpha: Tensor,
) -> None:
    """Make ``module`` read ``slot.name`` masked by ``threshold`` and ``offset``."""
    if isinstance(module, MaskedModule):
        module._autosparse.weights[slot.name] = weight
        module._autosparse.plan = plan
        if slot not in module._autosparse_slots or module._autosparse_scale != plan.config.threshold_scale:
            others = tuple(s for s in module._autosparse_slots if s.name != slot.name)
            remask(module, (*others, slot), plan)
    else:
        module.__dict__["_autosparse"] = ModuleState(plan, {slot.name: weight})
        try:
            remask(module, (slot,), plan)
        except BaseException:
            del module.__dict__["_autosparse"]
            raise
    module._parameters[slot.threshold] = threshold
    module._buffers[slot.offset] = offset
    module._buffers[ALPHA] = alpha
    module._non_persistent_buffers_set.add(ALPHA)


def remask(module: nn.Module, slots: tuple[Slot, ...], plan: Plan) -> None:
    """Set the class of ``module`` to the masked class of its original class for ``slots``.

    Raises:
        RuntimeError: if the class was changed after ``sparsify``, which would be lost.
    """
    if isinstance(module, MaskedModule) and "_autosparse_slots" not in type(module).__dict__:
        raise RuntimeError(
            f"the class of a masked {module._autosparse_base.__name__} was changed to {type(module)} after sparsify "
            "(by fully_shard or parametrize?), and which of its weights are masked cannot change any more: tie, untie "
            "and replace weights before that"
        )
    base = module._autosparse_base if isinstance(module, MaskedModule) else type(module)
    module.__dict__.setdefault("_autosparse", ModuleState(plan, {}))
    module.__class__ = masked_class(base, slots, plan.config.threshold_scale)
    module.__dict__.pop("_flat_weights", None)


def detach_weight(module: nn.Module, name: str) -> None:
    """Undo :func:`attach` for one weight."""
    assert isinstance(module, MaskedModule)
    others = tuple(slot for slot in module._autosparse_slots if slot.name != name)
    if not others:
        detach(module)
        return
    for slot in module._autosparse_slots:
        if slot.name == name:
            _drop_state(module, slot)
    del module._autosparse.weights[name]
    remask(module, others, module._autosparse.plan)


def _drop_state(module: MaskedModule, slot: Slot) -> None:
    module._parameters.pop(slot.threshold, None)
    module._buffers.pop(slot.offset, None)


def detach(module: nn.Module) -> None:
    """Undo :func:`attach` for all weights: the original class, no thresholds, no offsets."""
    assert isinstance(module, MaskedModule)
    for slot in module._autosparse_slots:
        _drop_state(module, slot)
    module._buffers.pop(ALPHA, None)
    module._non_persistent_buffers_set.discard(ALPHA)
    del module.__dict__["_autosparse"]
    original: nn.Module = module
    original.__class__ = module._autosparse_base
    if isinstance(original, nn.RNNBase):
        original._init_flat_weights()
        original.flatten_parameters()


def masked_modules(model: nn.Module) -> list[tuple[str, MaskedModule]]:
    """The modules of ``model`` that read masked weights, each once, with their names."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, MaskedModule)]
