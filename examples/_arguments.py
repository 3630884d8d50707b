"""Types of command-line arguments: what argparse says of a wrong one names the option, the value and the cure."""

import math
from argparse import ArgumentTypeError
from collections.abc import Callable

import torch

MAX_SEED = 2**63 - 1


def whole(least: int = 1, most: int | None = None) -> Callable[[str], int]:
    """A whole number that is at least and at most this."""
    wanted = f"a whole number, at least {least}" + ("" if most is None else f" and at most {most}")

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is not {wanted}") from None
        if value < least or (most is not None and value > most):
            raise ArgumentTypeError(f"{value} is not {wanted}")
        return value

    return parse


def real(
    example: float,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    word: str | None = None,
    stands_for: str | None = None,
) -> Callable[[str], float | str | None]:
    """A finite number between bounds; or a word instead, and what it stands for."""
    bounds = ((above, "above"), (least, "at least"), (below, "below"), (most, "at most"))
    wanted = " and ".join(f"{what} {bound:g}" for bound, what in bounds if bound is not None)
    wanted = f"a finite number{wanted and ' '}{wanted}, such as {example:g}" + (f", nor {word!r}" if word else "")

    def accepts(value: float) -> bool:
        return (
            math.isfinite(value)
            and (above is None or value > above)
            and (least is None or value >= least)
            and (below is None or value < below)
            and (most is None or value <= most)
        )

    def parse(text: str) -> float | str | None:
        if word is not None and text.lower() == word:
            return stands_for
        try:
            value = float(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is not {wanted}") from None
        if not accepts(value):
            raise ArgumentTypeError(f"{text} is not {wanted}")
        return value

    return parse


def device(text: str) -> str:
    """A device that PyTorch can compute on, here and now."""
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        found += ["mps"] if torch.backends.mps.is_available() else []
        raise ArgumentTypeError(
            f"{text!r} cannot be used: choose one of {', '.join(found)} (PyTorch: {reason})"
        ) from None
    return text
