"""Which parameters of a model are masked, and why the others are not."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor, nn

from autosparse_fx._compat.eager import ConvNd, ConvTransposeNd, is_managed_by_fsdp
from autosparse_fx.arguments import unknown_names
from autosparse_fx.config import AutoSparse, matches
from autosparse_fx.dtensors import is_dtensor
from autosparse_fx.plan import Slot

# Suffixes under which torch.nn.utils keeps a weight that it owns.
_OWNED = {"_orig": "torch.nn.utils.prune", "_g": "torch.nn.utils.weight_norm", "_v": "torch.nn.utils.weight_norm"}


@dataclass(eq=False)
class Candidate:
    """One parameter tensor with every place that holds it."""

    parameter: nn.Parameter
    names: list[str] = field(default_factory=list)
    holders: list[tuple[nn.Module, str]] = field(default_factory=list)  # (module, name on it), each module once
    holder_names: list[str] = field(default_factory=list)  # the first of the names through each of them
    axis: int | None = None  # the channel axis of the layer that multiplies by it; None where none is known to

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass
class Selection:
    """The outcome: what to mask with which configuration, and what is left dense for which reason."""

    chosen: list[tuple[Candidate, AutoSparse]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def is_embedding(candidate: Candidate) -> bool:
    """Whether nothing but embeddings holds a weight."""
    return all(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) for module, _ in candidate.holders)


def layer_weights(module: nn.Module) -> list[Slot]:
    """The parameters that a module of a known class multiplies by, with the axis of their output channels."""
    if isinstance(module, ConvNd):
        return [Slot("weight", 1 if isinstance(module, ConvTransposeNd) else 0)]
    if isinstance(module, (nn.Linear, nn.Bilinear)):
        return [Slot("weight", 0)]
    if isinstance(module, nn.MultiheadAttention):
        return [Slot(name, 0) for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")]
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        names = [name for name in module._parameters if name.startswith("weight_")]
        return [Slot(name, 0) for name in names if not name.endswith("_threshold")]  # of one that is masked
    transformers = sys.modules.get("transformers.pytorch_utils")
    if transformers is not None and isinstance(module, transformers.Conv1D):
        return [Slot("weight", 1)]  # stored [in, out]
    return []


def collect(model: nn.Module) -> list[Candidate]:
    """Every parameter of ``model`` once, in order, with its aliases, its holders and what is known of its use."""
    candidates: dict[int, Candidate] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        axes = {slot.name: slot.axis for slot in layer_weights(module)}
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            candidate = candidates.setdefault(id(parameter), Candidate(parameter))
            full_name = f"{prefix}.{name}" if prefix else name
            candidate.names.append(full_name)
            if not any(holder is module and held == name for holder, held in candidate.holders):
                candidate.holders.append((module, name))
                candidate.holder_names.append(full_name)
            if name in axes:
                candidate.axis = axes[name]
    return list(candidates.values())


def select(model: nn.Module, config: AutoSparse, used: dict[int, int] | None = None) -> Selection:
    """Decide what to mask. ``used`` maps ids of parameters that a captured graph multiplies by to their channel axes.

    Raises:
        ValueError: if a rule matches no parameter, or configures only parameters that are not masked, if a lazy
            module is not yet initialised, or if nothing is left to mask.
        TypeError: if a weight is not real floating-point, or of a tensor subclass (quantized, ...).
    """
    selection = Selection()
    candidates = collect(model)
    matched: dict[str, list[Candidate]] = {
        pattern: [c for c in candidates if any(matches(pattern, name) for name in c.names)] for pattern in config.rules
    }
    for given, found in matched.items():
        if not found:
            names = ", ".join(c.name for c in candidates if c.axis is not None) or "none"
            raise ValueError(f"AutoSparse.rules: {unmatched(given, candidates)}; its weights are {names}")
    for candidate in candidates:
        axis = candidate.axis
        if axis is None and used is not None and owner(candidate) is None:
            axis = used.get(id(candidate.parameter))
        if axis is None:
            selection.skipped[candidate.name] = reason(candidate, looked_for=used is not None)
            continue
        pattern, rule = config.rule_for(candidate.names)
        if rule is None:
            selection.skipped[candidate.name] = f"left dense by the rule {pattern!r}"
            continue
        check_tensor(candidate.parameter, candidate.name)
        candidate.axis = axis
        selection.chosen.append((candidate, rule))
    chosen = {id(candidate) for candidate, _ in selection.chosen}
    for rule_pattern, found in matched.items():
        if config.rules[rule_pattern] is not None and not any(id(c) in chosen for c in found):
            why = [selection.skipped.get(c.name, "another rule came first") for c in found]
            reasons = ", ".join(f"{c.name} ({skip})" for c, skip in zip(found, why, strict=True))
            raise ValueError(
                f"AutoSparse.rules: {rule_pattern!r} matches only parameters that are not masked: {reasons}"
            )
    if not selection.chosen:
        raise ValueError(
            f"{type(model).__name__} has no weights to mask: "
            + (", ".join(f"{name} ({why})" for name, why in selection.skipped.items()) or "it has no parameters")
            + ". If its own code multiplies by them, pass example_inputs to sparsify"
        )
    return selection


def unmatched(pattern: str, candidates: Iterable[Candidate]) -> str:
    """That a pattern matches no parameter, and what may have been meant."""
    names = [name for candidate in candidates for name in candidate.names]
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"{pattern!r} matches no parameter of the model: {pattern!r} is a module: write '{pattern}.*'"
    modules = {f"{prefix}.*": None for name in names for prefix in accumulate(name.split(".")[:-1], "{}.{}".format)}
    return f"{unknown_names([pattern], [*names, *modules])} matches no parameter of the model"


def is_maskable(dtype: torch.dtype) -> bool:
    """Whether torch computes with weights of a dtype: it stores those of 8 bits and fewer only."""
    return dtype.is_floating_point and dtype.itemsize > 1


def check_tensor(p: Tensor, name: str) -> None:
    """Raise where a weight is of a kind that cannot be masked."""
    if isinstance(p, nn.UninitializedParameter):
        raise ValueError(
            f"weight '{name}' belongs to a lazy module that has not seen an input yet: run one forward "
            "pass of the model first"
        )
    if not is_maskable(p.dtype):
        raise TypeError(
            f"weight '{name}' {list(p.shape)} is {p.dtype}, and only real floating-point weights of 16 bits or "
            f"more can be masked: sparsify before quantizing, or leave it dense with rules={{{name!r}: None}}"
        )
    if type(p) is not nn.Parameter and not is_dtensor(p):
        raise TypeError(
            f"weight '{name}' {list(p.shape)} is a {type(p).__name__}: sparsify before converting it, or "
            f"leave it dense with rules={{{name!r}: None}}"
        )


def refuse_lazy_parameters(model: nn.Module) -> None:
    """Raise where a lazy module has not seen an input yet."""
    for candidate in collect(model):
        if isinstance(candidate.parameter, nn.UninitializedParameter):
            check_tensor(candidate.parameter, candidate.name)


def refuse_wrappers(model: nn.Module) -> None:
    """Raise where a wrapper holds the parameters in a form that cannot be masked."""
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__module__.startswith("torch.") and kind.__name__ in ("DataParallel", "FullyShardedDataParallel"):
            cure = "DistributedDataParallel" if kind.__name__ == "DataParallel" else "FSDP2 (fully_shard)"
            raise ValueError(
                f"autosparse_fx does not support {kind.__name__} (module '{name}'): sparsify the plain model, then "
                f"wrap it with {cure}"
            )
        if is_managed_by_fsdp(module) and not hasattr(module, "_autosparse"):
            raise ValueError(
                f"module '{name}' is managed by FSDP2 already, which would not reduce the gradients of new thresholds: "
                "call sparsify first, and fully_shard after it"
            )


def owner(candidate: Candidate) -> str | None:
    """What computes a weight from this parameter at every forward, and writes to one or the other: not to be masked."""
    if any("parametrizations" in name.split(".") for name in candidate.names):
        return "torch.nn.utils.parametrize"
    for module, name in candidate.holders:
        hooks = module._forward_pre_hooks.values()
        hooked = [getattr(hook, "name", getattr(hook, "_tensor_name", None)) for hook in hooks]
        for suffix, found in _OWNED.items():
            base = name.removesuffix(suffix)
            if suffix == "_orig" and f"{base}_u" in module._buffers:
                found = "torch.nn.utils.spectral_norm"
            if name.endswith(suffix) and (base in hooked or base in {slot.name for slot in layer_weights(module)}):
                return found
    return None


def pruned_value(candidate: Candidate) -> Tensor | None:
    """What a known layer multiplies by, where ``torch.nn.utils.prune`` masks this parameter of it at every forward."""
    for module, name in candidate.holders:
        base = name.removesuffix("_orig")
        mask = module._buffers.get(f"{base}_mask")
        if base != name and mask is not None and {name, base} & {slot.name for slot in layer_weights(module)}:
            return candidate.parameter * mask
    return None


def reason(candidate: Candidate, *, looked_for: bool = False) -> str:
    """Why a parameter that no known layer multiplies by is left dense, also ``looked_for`` in the captured graphs."""
    known = role(candidate)
    if known is not None:
        return known
    if looked_for:
        return "no known layer multiplies by it, nor does any product that was seen"
    return "no known layer multiplies by it (pass example_inputs to look for its use)"


def role(candidate: Candidate) -> str | None:
    """What a parameter is that has a use of its own, which is no product."""
    owned_by = owner(candidate)
    if owned_by is not None:
        return f"owned by {owned_by}"
    for module, name in candidate.holders:
        kind = type(module).__name__
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            return "an embedding"
        if "Norm" in kind:
            return "a normalization"
        if "bias" in name:
            return "a bias"
    return None
