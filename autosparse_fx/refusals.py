"""What modules with masked weights refuse, by the name of the weight and with the cure."""

from collections.abc import Callable
from typing import Any

from autosparse_fx.masked_state import reset_mask
from autosparse_fx.plan import Slot


def describe(module: Any, name: str) -> str:
    """The weight under ``name``: its full name, its shape, and the class of its module."""
    state = module.__dict__.get("_autosparse")
    weight = state.weights.get(name) if state is not None else None
    parameter = module._parameters.get(name)
    shape = "" if parameter is None else f" {list(parameter.shape)}"
    return f"weight '{weight.name if weight is not None else name}'{shape} of {type(module).__name__}"


def refuse_late_dtensor(module: Any, slot: Slot, what: str) -> None:
    raise RuntimeError(
        f"{describe(module, slot.name)} {what}: parallelize the model first (parallelize_module, distribute_module), "
        "then sparsify it, then fully_shard it"
    )


def refuse_second_owner(module: Any, slot: Slot) -> None:
    raise RuntimeError(
        f"{describe(module, slot.name)} is masked by autosparse_fx and cannot be pruned or normalised by "
        "torch.nn.utils as well: do that before sparsify, or finalize the model first"
    )


def refuse_symbolic_trace(module: Any, slot: Slot) -> None:
    raise RuntimeError(
        f"{describe(module, slot.name)} is masked by autosparse_fx, and torch.fx.symbolic_trace would make a constant "
        "of what it reads as now: trace the dense model and sparsify(..., example_inputs=...) what comes out, finalize "
        "the model first, or use torch.export"
    )


def refuse_copy(module: Any) -> None:
    raise RuntimeError(
        f"{describe(module, module._autosparse_slots[0].name)} is masked by autosparse_fx, and a GraphModule that "
        "holds it copies and pickles only what its graph names, which its threshold is not: copy it before sparsify or "
        "after finalize, or save its state_dict()"
    )


def refuse_stateless_copy(module: Any) -> None:
    raise RuntimeError(
        f"{describe(module, module._autosparse_slots[0].name)} is masked by autosparse_fx, and the __reduce__ of its "
        "class keeps nothing of its threshold: copy it before sparsify or after finalize, or save its state_dict()"
    )


def refuse_assignment(module: Any, name: str, value: object) -> None:
    raise TypeError(
        f"{describe(module, name)} is masked by autosparse_fx and cannot become a {type(value).__name__}: assign a "
        "torch.nn.Parameter, which becomes the stored weight, or tie and write weights inside "
        "`with autosparse_fx.dense_weights(model):`"
    )


def refuse_lookup(module: Any, slot: Slot) -> None:
    """Not an AttributeError, which ``tie_weights`` of Hugging Face takes for a weight that is not there."""
    raise RuntimeError(
        f"{describe(module, slot.name)} is masked by autosparse_fx, and get_parameter (which tie_weights and "
        "resize_token_embeddings call too) would find the masked copy: call it inside "
        "`with autosparse_fx.dense_weights(model):`, or take the weight from model.named_parameters()"
    )


def guarded_reset(method: str) -> Callable[..., None]:
    """What ``reset_parameters`` and its like become: refused where they would write to masked copies."""

    def reset(self: Any, *args: object, **kwargs: object) -> None:
        if self._autosparse.plan.scope.depth == 0:
            raise RuntimeError(
                f"{type(self).__name__}.{method}() would write to masked copies of its weights: call it inside "
                "`with autosparse_fx.dense_weights(model):`"
            )
        # Recurrent layers initialise whatever is in parameters().
        own = {slot.threshold: self._parameters.pop(slot.threshold) for slot in self._autosparse_slots}
        try:
            getattr(self._autosparse_base, method)(self, *args, **kwargs)
        finally:
            self._parameters.update(own)
        for slot in self._autosparse_slots:  # which followed weights that are gone
            reset_mask(self, slot)

    return reset
