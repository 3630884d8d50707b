"""What the arguments of the public functions must be, said in the same words by all of them."""

from torch import nn


def check_module(model: object, function: str) -> None:
    """Raise a TypeError that names the function, where its model is none."""
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"{function} takes a torch.nn.Module, got {given}")
