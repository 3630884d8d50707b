"""What is counted: products of two operands, and how many multiplications each takes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import sympy

ONE = sympy.Integer(1)


@dataclass(frozen=True)
class Operand:
    """One side of a product: an activation, or something made of parameters."""

    weights: tuple[tuple[str, int], ...] = ()  # full names and elements of the weights whose zeros are zeros here
    parameter: bool = False  # made of parameters alone, so that its gradient is a weight gradient
    needs_grad: bool = False

    @property
    def density(self) -> sympy.Expr:
        """Fraction of non-zeros, in the symbols of the sparsities of the weights."""
        if not self.weights:
            return ONE
        total = sum(numel for _, numel in self.weights)
        return ONE - sympy.Add(*(numel * sparsity_symbol(name) for name, numel in self.weights)) / total

    def density_at(self, sparsities: Mapping[str, float]) -> float:
        """The density in numbers; a weight that is not named is dense."""
        zeros = sum(numel * sparsities.get(name, 0.0) for name, numel in self.weights)
        return 1 - zeros / sum(numel for _, numel in self.weights) if zeros else 1.0


@dataclass(frozen=True)
class Product:
    """One operation that multiplies, in one call of one captured graph.

    ``macs`` are the multiply-accumulates of the dense forward pass, in the symbols of dynamic sizes. Each gradient that
    is needed takes as many again.
    """

    graph: int  # index of the captured graph
    call: int  # index of the call of that graph
    node: str  # the Dynamo node, by name
    op: str
    layer: str  # the full names of its weights, or where it stands in the model
    macs: sympy.Expr
    operands: tuple[Operand, ...]
    pooling: bool = False  # an average, which adds and does not multiply

    @property
    def forward(self) -> sympy.Expr:
        """MACs of the forward pass that touch no zero of a weight."""
        return self.macs * sympy.Mul(*(operand.density for operand in self.operands))

    def forward_at(self, sparsities: Mapping[str, float]) -> float:
        """The same in numbers, where no size is dynamic."""
        return math.prod([float(self.macs), *(operand.density_at(sparsities) for operand in self.operands)])

    @property
    def input_gradient(self) -> sympy.Expr:
        """MACs of the gradients of activations."""
        return sympy.Add(*(self._gradient(i) for i, o in enumerate(self.operands) if o.needs_grad and not o.parameter))

    @property
    def weight_gradient(self) -> sympy.Expr:
        """MACs of the gradients of all weights, masked ones too (alpha > 0)."""
        return sympy.Add(*(self._gradient(i) for i, o in enumerate(self.operands) if o.needs_grad and o.parameter))

    @property
    def sparse_weight_gradient(self) -> sympy.Expr:
        """MACs of the gradients of the weights that are not masked (alpha = 0)."""
        return sympy.Add(
            *(self._gradient(i) * o.density for i, o in enumerate(self.operands) if o.needs_grad and o.parameter)
        )

    def without_zeros(self) -> "Product":
        """The same product with weights that are taken to be dense."""
        return replace(self, operands=tuple(replace(operand, weights=()) for operand in self.operands))

    def _gradient(self, index: int) -> sympy.Expr:
        return self.macs * sympy.Mul(*(o.density for i, o in enumerate(self.operands) if i != index))


def sparsity_symbol(weight: str) -> sympy.Symbol:
    """The symbol of the sparsity of a weight."""
    return sympy.Symbol(f"s[{weight}]", nonnegative=True)


def size_symbol(name: str) -> sympy.Symbol:
    """The symbol of a dynamic size."""
    return sympy.Symbol(name, integer=True, positive=True)
