"""What ``torch.compile(model, backend="autosparse", mode=..., options={...})`` may say."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autosparse_fx._compat import inductor
from autosparse_fx.arguments import check_bool, unknown_names, whole_steps
from autosparse_fx.config import AutoSparse
from autosparse_fx.hidden.masks import Request

# The options that ask for a model that was never prepared to be made sparse.
ONE_LINE_OPTIONS = ("total_steps", *(f.name for f in dataclasses.fields(AutoSparse)))
_OPTIONS = ("mode", "recompute_masks", *ONE_LINE_OPTIONS)


@dataclass(frozen=True)
class Options:
    """The options of one ``torch.compile``, checked."""

    request: Request | None
    recompute_masks: bool
    inductor: dict[str, Any]


def parse_options(mode: str | None, options: Mapping[str, Any] | None) -> Options:
    """Check and sort the arguments ``mode`` and ``options`` of ``torch.compile``.

    Raises:
        TypeError, ValueError: naming the option, its value and what it accepts.
    """
    for name in options or {}:
        if not isinstance(name, str):
            raise TypeError(f"the names of options must be strings, got {name!r}")
    given = {name.replace("-", "_"): value for name, value in (options or {}).items()}
    mode = given.pop("mode", None) or mode
    request = _request({name: given.pop(name) for name in ONE_LINE_OPTIONS if name in given})
    recompute_masks = given.pop("recompute_masks", True)
    check_bool(recompute_masks, "option 'recompute_masks'")
    known = inductor.inductor_option_names()
    for name in given:
        if name not in known:
            raise ValueError(
                f"backend 'autosparse' has no option {unknown_names([name], [*_OPTIONS, *known])}: it takes "
                f"{', '.join(map(repr, _OPTIONS))}, and the options of Inductor, as listed by "
                "torch._inductor.list_options()"
            )
    patches = inductor.inductor_mode_options(mode) if mode and mode != "default" else {}
    return Options(request, recompute_masks, {**patches, **given})


def _request(given: dict[str, Any]) -> Request | None:
    if not given:
        return None
    if "total_steps" not in given:
        raise ValueError(
            f"option {next(iter(given))!r} makes a model sparse while it trains, which also needs 'total_steps': the "
            "number of optimizer steps of the whole training"
        )
    steps = whole_steps(given.pop("total_steps"), "option 'total_steps'")
    return Request(AutoSparse(**given), steps)
