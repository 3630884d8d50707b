"""The masks of weights whose model was never prepared, found by the weight itself."""

import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from autosparse_fx.attach import attach, masked_modules
from autosparse_fx.config import AutoSparse
from autosparse_fx.decay import annealed_alpha
from autosparse_fx.masked import MaskedModule
from autosparse_fx.ownership import holds_only_for_us
from autosparse_fx.plan import MaskedWeight, Plan, Slot

UNHEARD_CALLS = 1000  # of graphs with gradients, after which an optimizer should have stepped


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
    optimizer: str = ""  # the class of the optimizer that the threshold's state is of
    optimizer_state: dict[str, Any] = field(default_factory=dict)  # as torch.optim keeps it
    trained: bool = False  # whether an optimizer that took a step holds the weight
    used: int = 0  # when a graph last computed gradients with it, in ticks of ``tick``
    unheard: int = 0  # calls of graphs that use it first, since that tick began

    def state(self) -> tuple[nn.Parameter, Tensor]:
        """Threshold and offset."""
        return self.threshold, self.offset

    def holder(self, parameter: nn.Parameter, name: str = "weight") -> MaskedModule:
        """A masked module around the weight, under ``name`` in it, for all code that works on those."""
        with torch.inference_mode(False):
            _follow(self, parameter.device)
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
    called_with: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)  # by graphs that mask others
    alphas: Any = field(default_factory=WeakIdKeyDictionary)  # plan -> {device: alpha}
    plans: Any = field(default_factory=WeakIdKeyDictionary)  # root module -> [(request, plan)]
    ticks: int = 0
    members: int = 0
    version: int = 0


registry = _Registry()
_ticking = threading.Lock()  # since threads step optimizers of their own


def hidden_mask(parameter: Tensor) -> HiddenMask | None:
    """The mask of a weight, if it has one here."""
    found: HiddenMask | None = registry.masks.get(parameter)
    return found


def masked_parameters() -> list[tuple[Tensor, HiddenMask]]:
    """All weights that have a mask here, of which other threads may register more meanwhile."""
    live = [parameter for reference in registry.masks.keyrefs() if (parameter := reference()) is not None]
    return [(parameter, mask) for parameter in live if (mask := hidden_mask(parameter)) is not None]


def exist() -> bool:
    """Whether any weight has a mask here."""
    return len(registry.masks) > 0


def version() -> int:
    """A number that changes whenever what is known of a weight may have changed."""
    return registry.version


def membership() -> int:
    """A number that changes whenever a weight gets a mask or loses it."""
    return registry.members


def touch() -> None:
    """Have every compiled graph look up its weights again."""
    registry.version += 1


def note_use(used: tuple[HiddenMask, ...]) -> None:
    """Note that a graph is being called that computes gradients with these masks."""
    if not used:
        return
    now = registry.ticks + 1
    for mask in used:
        if mask.used != now:
            mask.used, mask.unheard = now, 0
    used[0].unheard += 1
    if used[0].unheard == UNHEARD_CALLS:
        warnings.warn(
            f"the compiled graph of weight '{used[0].weight.name}' has been called {UNHEARD_CALLS} times with "
            "gradients, and no optimizer of torch.optim has stepped that holds its weights: its thresholds are "
            "neither trained nor steered. Evaluate under torch.no_grad(); for training by anything else than "
            "torch.optim prepare the model with autosparse_fx.sparsify, and call the step() of a GradientAnnealing",
            stacklevel=3,
        )


def tick() -> int:
    """End a count of uses, and return its number: masks that were used since the last one have it in ``used``."""
    with _ticking:
        registry.ticks += 1
        return registry.ticks


def note_call(unmasked: Iterable[Tensor]) -> None:
    """Note that a graph has been called with these parameters, which it reads as they are."""
    for parameter in unmasked:
        registry.called_with[parameter] = True


def untrained(plan: Plan) -> list[str]:
    """The names of the masked weights of one model that need a gradient and that no optimizer has trained."""
    return [
        mask.weight.name
        for parameter, mask in masked_parameters()
        if mask.plan is plan and parameter.requires_grad and not mask.trained
    ]


def missed_weight(parameter: Tensor) -> tuple[str, bool] | None:
    """Of a weight that should be masked by now and is not: its name, and whether the same options masked it before."""
    found: tuple[str, Request] | None = registry.missed.get(parameter)
    return None if found is None else (found[0], served(parameter, found[1]) is not None)


def not_missed(parameters: Iterable[Tensor]) -> None:
    """Note that these weights are trained as they are, since their model was compiled again, without options."""
    for parameter in parameters:
        if registry.missed.pop(parameter, None) is not None:
            registry.members += 1


def shared_alpha(plan: Plan, device: torch.device) -> Tensor:
    """The alpha of all weights of one model on one device, at the step that their training is at."""
    alphas: dict[torch.device, Tensor] = registry.alphas.setdefault(plan, {})
    if device not in alphas:
        config = plan.config
        progress = min(1.0, plan.annealed_steps / plan.total_steps) if plan.total_steps else 0.0
        alpha = annealed_alpha(config.alpha, config.decay, config.alpha_end, progress)
        with torch.inference_mode(False):
            alphas[device] = torch.full((), alpha, dtype=torch.float32, device=device)
    return alphas[device]


def insert(parameter: nn.Parameter, mask: HiddenMask) -> None:
    """Enter a mask for a weight."""
    registry.masks[parameter] = mask
    registry.missed.pop(parameter, None)
    registry.members += 1
    touch()


def release(parameter: nn.Parameter) -> None:
    """Forget the mask of a weight: graphs that were compiled with it read the weight as it is from now on."""
    mask = take_off(parameter)
    if mask is not None:
        registry.served.setdefault(parameter, []).append((mask.weight.name, mask.request))
    registry.missed.pop(parameter, None)


def take_off(parameter: Tensor) -> HiddenMask | None:
    mask: HiddenMask | None = registry.masks.pop(parameter, None)
    if mask is not None:
        registry.members += 1
        touch()
    return mask


def served(parameter: Tensor, request: Request) -> str | None:
    """The name of a weight that had a mask by this request, which was taken off again."""
    served: list[tuple[str, Request]] = registry.served.get(parameter, [])
    return next((name for name, known in served if known == request), None)


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
    registry.members += 1  # what trains it holds the state as it was
    touch()


def hidden_masks(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, HiddenMask]]:
    """The weights of ``model`` that are masked here, with their full names in it."""
    if not len(registry.masks):
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
