"""ModelFlops: the counts of a model by layer and in total, dense and sparse, forward and backward."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import sympy

from autosparse_fx.arguments import is_fraction, unknown_names
from autosparse_fx.flops.product import Product, size_symbol, sparsity_symbol


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one training step; the gradients are those of activations and of weights."""

    forward: sympy.Expr
    input_gradient: sympy.Expr
    weight_gradient: sympy.Expr

    @property
    def step(self) -> sympy.Expr:
        """Forward and backward together."""
        return self.forward + self.input_gradient + self.weight_gradient


@dataclass(frozen=True)
class ModelFlops:
    """The products of one call of a model.

    Counts are sympy expressions, in the names that ``dynamic_shapes`` gave to sizes; sparse ones also in the sparsities
    of the weights, ``sparsity_symbol(name)``. :meth:`evaluate` puts numbers in.
    """

    products: tuple[Product, ...]
    graphs: int = 1  # how many captured graphs there were
    breaks: tuple[str, ...] = ()  # why there is more than one
    example_sizes: Mapping[str, int] = field(default_factory=dict)  # what the dynamic sizes were in the example inputs

    @cached_property
    def dense(self) -> Macs:
        """Every weight counted, zero or not."""
        return self._total(self.products, sparse=False)

    @cached_property
    def sparse(self) -> Macs:
        """Zeros of weights skipped, but in the weight gradient: with alpha > 0 masked weights need theirs."""
        return self._total(self.products, sparse=True)

    @cached_property
    def settled(self) -> Macs:
        """Zeros of weights skipped in the weight gradient too, as they can be once alpha is 0."""
        return self._total(self.products, sparse=True, settled=True)

    @cached_property
    def pooling(self) -> sympy.Expr:
        """Additions of average pooling, which the sparse-training literature counts as MACs of the forward pass."""
        return sympy.Add(*(product.macs for product in self.products if product.pooling))

    @cached_property
    def weights(self) -> tuple[str, ...]:
        """The full names of the weights that the model multiplies by, in the order of their use."""
        return tuple(dict.fromkeys(name for p in self.products for o in p.operands for name, _ in o.weights))

    def by_layer(self, *, sparse: bool = False) -> dict[str, Macs]:
        """The counts by what multiplies: the name of a weight, or where two activations are multiplied."""
        layers: dict[str, list[Product]] = {}
        for product in self.products:
            if not product.pooling:
                layers.setdefault(product.layer, []).append(product)
        return {name: self._total(products, sparse=sparse) for name, products in layers.items()}

    def evaluate(
        self, count: sympy.Expr, sparsities: Mapping[str, float] | None = None, /, **sizes: int
    ) -> sympy.Expr | int | float:
        """Put sizes and sparsities into a count; a weight that is not named is dense.

        Returns:
            A number; an expression while sizes are missing.

        Raises:
            ValueError: naming a size or a weight that the counts do not depend on, or a sparsity that is no fraction.
        """
        known = sparsities or {}
        values = {sparsity_symbol(name): known.get(name, 0) for name in self.weights}
        unknown = [name for name in sizes if name not in self.sizes and name not in self.example_sizes]
        if unknown:
            raise ValueError(f"the counts depend on {', '.join(self.sizes) or 'no sizes'}, not on {', '.join(unknown)}")
        strangers = [name for name in known if name not in self.weights]
        if strangers:
            raise ValueError(
                f"the model does not multiply by {unknown_names(strangers[:3], self.weights)}; its weights are "
                f"{', '.join(self.weights[:5])}{', ...' if len(self.weights) > 5 else ''}"
            )
        for name, value in known.items():
            if not is_fraction(value):
                raise ValueError(f"the sparsity of {name!r} must be a fraction in [0, 1], got {value!r}")
        values |= {size_symbol(name): size for name, size in sizes.items()}
        result = count.subs(values)
        if not result.is_number:
            return result
        return int(result) if result.is_Integer else float(result)

    def at(self, **sizes: int) -> "ModelFlops":
        """The counts at these sizes."""
        values = {size_symbol(name): size for name, size in sizes.items()}
        return replace(self, products=tuple(replace(p, macs=p.macs.subs(values)) for p in self.products))

    @cached_property
    def sizes(self) -> tuple[str, ...]:
        """The names of the dynamic sizes that the counts depend on."""
        return tuple(sorted({str(symbol) for product in self.products for symbol in product.macs.free_symbols}))

    @staticmethod
    def _total(products: Iterable[Product], *, sparse: bool, settled: bool = False) -> Macs:
        counted = [product if sparse else product.without_zeros() for product in products if not product.pooling]
        return Macs(
            sympy.Add(*(p.forward for p in counted)),
            sympy.Add(*(p.input_gradient for p in counted)),
            sympy.Add(*(p.sparse_weight_gradient if settled else p.weight_gradient for p in counted)),
        )
