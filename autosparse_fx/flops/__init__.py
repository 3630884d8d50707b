"""FLOPs of a model, counted on its captured graphs as sympy expressions."""

from autosparse_fx.flops.count import count_flops
from autosparse_fx.flops.model import ModelFlops

__all__ = ["ModelFlops", "count_flops"]
