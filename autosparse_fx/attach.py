"""Attach masks to modules and detach them; the modules keep their identity."""

from torch import Tensor, nn

from autosparse_fx.masked import ALPHA, MaskedModule, masked_class
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
        slots = tuple(s for s in module._autosparse_slots if s.name != slot.name)
        module._autosparse.weights[slot.name] = weight
    else:
        slots = ()
        module.__dict__["_autosparse"] = ModuleState(plan, {slot.name: weight})
    remask(module, (*slots, slot), plan)
    module._parameters[slot.threshold] = threshold
    module._buffers[slot.offset] = offset
    module._buffers[ALPHA] = alpha
    module._non_persistent_buffers_set.add(ALPHA)


def remask(module: nn.Module, slots: tuple[Slot, ...], plan: Plan) -> None:
    """Set the class of ``module`` to the masked class of its original class for ``slots``."""
    base = module._autosparse_base if isinstance(module, MaskedModule) else type(module)
    module.__dict__.setdefault("_autosparse", ModuleState(plan, {}))
    module.__dict__.pop("_flat_weights", None)
    module.__class__ = masked_class(base, slots, plan.config.threshold_scale)


def detach(module: nn.Module) -> None:
    """Undo :func:`attach`: the original class, no thresholds, no offsets."""
    assert isinstance(module, MaskedModule)
    for slot in module._autosparse_slots:
        module._parameters.pop(slot.threshold, None)
        module._buffers.pop(slot.offset, None)
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
