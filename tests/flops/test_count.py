"""count_flops: which products a captured graph makes, which gradients they need, and sizes that stay symbols."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flops.compare import Around, Count, count, numbers
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from autosparse_fx.flops import count_flops
from autosparse_fx.flops.formulas import PRODUCTS

# torch's own, about computed tensors that a graph begins with, and (2.11) about every autograd.Function.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    "ignore:.* should not be instantiated. Methods on autograd functions are all static:DeprecationWarning",
)

X = torch.randn(2, 3)  # Linear(3, 4) over it takes 24 MACs, Linear(4, 5) after that 40


def two(function: Callable[..., Any]) -> Around:
    return Around(function, a=nn.Linear(3, 4), b=nn.Linear(4, 5))


def test_the_first_layer_gives_no_gradient_to_its_input() -> None:
    model = two(lambda self, x: self.b(self.a(x)))
    assert count(model, X) == (64, 40, 64)
    assert count(model, X.clone().requires_grad_()) == (64, 64, 64)


CELLS = [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)]


@pytest.mark.skipif(torch.__version__ < (2, 14), reason="Dynamo of torch 2.11 fails on pad_packed_sequence")
@pytest.mark.parametrize(("kind", "gates"), CELLS)
@pytest.mark.parametrize("is_sorted", [True, False])
def test_packed_sequences_cost_what_is_in_them(kind: type[nn.RNNBase], gates: int, is_sorted: bool) -> None:
    def function(self: Any, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=is_sorted)
        return self.head(pad_packed_sequence(self.rnn(packed)[0])[0])

    model = Around(function, rnn=kind(4, 6, batch_first=True), head=nn.Linear(6, 2))
    lengths = torch.tensor([7, 4, 2] if is_sorted else [2, 7, 4])
    assert count(model, (torch.randn(3, 7, 4), lengths)).forward == 13 * gates * 6 * (4 + 6) + 21 * 6 * 2


@pytest.mark.parametrize(("kind", "gates"), CELLS)
def test_layers_take_packed_sequences(kind: type[nn.RNNBase], gates: int) -> None:
    (x, *_) = packed = pack_padded_sequence(torch.randn(7, 3, 4), torch.tensor([7, 4, 2]))
    assert len(x) == 13 and count(kind(4, 6), (packed,)).forward == 13 * gates * 6 * (4 + 6)


def test_dynamic_dimensions_that_a_training_has_marked_have_the_sizes_of_the_example() -> None:
    x = X.clone()
    torch._dynamo.mark_dynamic(x, 0)
    model = two(lambda self, x: self.b(self.a(x)))
    assert count(model, x) == count(model, X)


def test_sizes_that_depend_on_values_are_those_of_the_example() -> None:
    model = two(lambda self, x: self.b(self.a(x)[(x[:, 0] > 0).nonzero().flatten()]))
    x = torch.tensor([[1.0, 2, 3], [-1, 2, 3]])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        assert count(model, x).forward == 24 + 20


def test_frozen_layers_have_no_weight_gradient() -> None:
    """And below the first trained layer nothing has a gradient at all."""
    model = two(lambda self, x: self.b(self.a(x)))
    model.a.requires_grad_(False)
    assert count(model, X) == (64, 0, 40)
    model.a.requires_grad_(True)
    model.b.requires_grad_(False)
    assert count(model, X) == (64, 40, 24)
    model.requires_grad_(False)
    assert count(model, X) == (64, 0, 0)


def without_grad(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = self.a(x)
    return self.b(x)


def in_inference_mode(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        y = self.a(x)
    return y, self.b(F.pad(x, (0, 1)))


@pytest.mark.parametrize(
    "function",
    [
        without_grad,
        in_inference_mode,
    ],
)
def test_a_region_without_gradients_has_forward_products_only(function: Any) -> None:
    assert count(two(function), X) == (64, 0, 40)


def detached_in_place(self: Any, x: Tensor) -> Tensor:
    x = self.a(x).sin()
    x.detach_()
    return self.b(x)


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: self.b(self.a(x).detach()),
        lambda self, x: self.b(self.a(x).data),
        pytest.param(
            detached_in_place, marks=pytest.mark.xfail(strict=True, reason="no operator is dispatched for detach_")
        ),
    ],
    ids=["detach", "data", "detach_"],
)
def test_nothing_behind_a_detach_takes_an_input_gradient(function: Any) -> None:
    assert count(two(function), X).input_gradient == 0


@pytest.mark.xfail(strict=True, reason="a weight counts its gradient even if none reaches its output")
def test_a_layer_before_a_detach_has_no_weight_gradient() -> None:
    """As autograd does it: the layer's output leads to no output of the model that could be differentiated."""
    model = two(lambda self, x: self.b(self.a(x).detach()))
    model(X).sum().backward()
    assert model.a.weight.grad is None
    assert count(model, X).weight_gradient == 40


def into_a_slice(self: Any, x: Tensor) -> Tensor:
    y = torch.zeros(2, 4)
    y[:, :2] = self.a(x)[:, :2]
    return self.b(y)


@pytest.mark.xfail(strict=True, reason="a write through a view marks the view, and not what it is a view of")
def test_a_write_into_a_slice_carries_the_gradient() -> None:
    assert count(two(into_a_slice), X) == (64, 40, 64)


def test_whole_writes_in_place_carry_the_gradient() -> None:
    model = two(lambda self, x: self.b(torch.zeros(2, 4).copy_(self.a(x)).add_(1)))
    assert count(model, X) == (64, 40, 64)


def test_gradients_off_around_the_call_change_nothing() -> None:
    """What is counted is the training step."""
    with torch.no_grad():
        assert count(two(lambda self, x: self.b(self.a(x))), X) == (64, 40, 64)


def test_inference_mode_around_the_call_changes_nothing() -> None:
    model = two(lambda self, x: self.b(self.a(x)))
    with torch.inference_mode():
        assert count(model, X) == (64, 40, 64)


def test_products_of_buffers_and_of_activations() -> None:
    """A buffer takes no gradient; two activations take one each."""
    model = Around(lambda self, x: (y := self.a(x) @ self.m) @ y.T, a=nn.Linear(3, 4), m=torch.ones(4, 4))
    assert count(model, X) == (24 + 32 + 16, 32 + 2 * 16, 24)


def test_weights_that_are_computed_from_parameters_are_weights() -> None:
    """Weight standardization: the gradient of the product is on its way to a weight."""
    model = Around(lambda self, x: F.linear(x, self.w / self.w.std()), w=nn.Parameter(torch.randn(4, 3)))
    assert count(model, X) == (24, 0, 24)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_block(reentrant: bool) -> None:
    """As the block without it: what is computed again is a choice of memory, and not counted."""
    model = two(lambda self, x: self.b(checkpoint(self.a, x, use_reentrant=reentrant)))
    flops = count_flops(model, X.clone().requires_grad_(reentrant))
    assert flops.weights == ("a.weight", "b.weight")
    assert numbers(flops) == (64, 64 if reentrant else 40, 64)


def test_checkpoint_in_a_checkpoint() -> None:
    inner = two(lambda self, x: checkpoint(self.a, x, use_reentrant=False))
    model = Around(lambda self, x: inner.b(checkpoint(self.inner, x, use_reentrant=False)), inner=inner)
    assert count(model, X) == (64, 40, 64)


def test_each_branch_of_cond_is_counted() -> None:
    model = two(lambda self, x: torch.cond(x.sum() > 0, self.a, lambda x: F.relu(self.a(x)) * 2, (x,)))
    flops = count_flops(model, X)
    assert (int(flops.dense.forward), flops.weights) == (48, ("a.weight",))


class Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w.T, x.T @ grad


def own_function() -> Around:
    return Around(
        lambda self, x: Multiply.apply(self.a(x), self.w), a=nn.Linear(3, 4), w=nn.Parameter(torch.ones(4, 5))
    )


def test_own_autograd_function_counts_its_forward_pass_once() -> None:
    flops = count_flops(own_function(), X)
    assert (int(flops.dense.forward), flops.weights) == (64, ("a.weight", "w"))


def test_own_autograd_function_has_gradients() -> None:
    assert count(own_function(), X) == (64, 40, 64)


def test_scan_counts_every_step() -> None:
    scan = pytest.importorskip("torch._higher_order_ops").scan
    model = Around(
        lambda self, x: scan(lambda c, y: (c @ self.w + y, c + 0), torch.zeros(2, 3), x)[0], w=torch.ones(3, 3)
    )
    assert count(model, torch.randn(7, 2, 3)).forward == 7 * 18


def test_a_module_that_is_called_twice_counts_twice() -> None:
    model = Around(lambda self, x: self.a(self.a(x)), a=nn.Linear(3, 3))
    flops = count_flops(model, X)
    assert numbers(flops) == (36, 18, 36)
    assert {name: int(macs.forward) for name, macs in flops.by_layer().items()} == {"a.weight": 36}


def test_tied_weights_are_one_weight() -> None:
    """The embedding costs nothing, the head is named as the parameter is."""
    model = Around(lambda self, ids: self.b(self.a(ids)), a=nn.Embedding(9, 4), b=nn.Linear(4, 9, bias=False))
    model.b.weight = model.a.weight
    flops = count_flops(model, torch.arange(6))
    assert (flops.weights, *numbers(flops)) == (("a.weight",), 216, 216, 216)


class Broken(nn.Module):
    """Breaks the graph between its two products."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        torch._dynamo.graph_break()
        return x @ x.mT


def test_a_graph_that_several_instances_share_counts_each_with_its_own_weight() -> None:
    """Dynamo compiles one graph for all blocks that look alike."""
    flops = count_flops(nn.Sequential(Broken(), Broken(), Broken()), torch.randn(4, 4))
    layers = {name: int(macs.forward) for name, macs in flops.by_layer().items() if name.endswith("weight")}
    assert layers == {"0.fc.weight": 64, "1.fc.weight": 64, "2.fc.weight": 64}
    assert numbers(flops) == (6 * 64, 2 * 64 + 6 * 64, 3 * 64)
    assert "graph_break" in flops.breaks[0]


class Loop(nn.Module):
    """Calls blocks that break the graph from a loop, which Dynamo cannot resume: it leaves forward to eager mode."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Broken() for _ in range(2))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_a_layer_that_is_called_outside_every_graph_is_counted() -> None:
    assert "head.weight" in count_flops(Loop(), torch.randn(4, 4)).weights


def test_nothing_is_left_in_the_model_by_counting() -> None:
    model = two(lambda self, x: self.b(self.a(x)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_flops(model, X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_computes_nothing() -> None:
    flops = count_flops(nn.Identity(), X)
    assert (flops.products, int(flops.dense.step), flops.weights) == ((), 0, ())


def test_grouped_products_count_one_matrix_for_each_row() -> None:
    a, b, offsets = torch.randn(16, 32).bfloat16(), torch.randn(4, 32, 64).bfloat16(), torch.tensor([2, 8, 8, 16])
    terms = PRODUCTS[torch.ops.aten._grouped_mm]((a, b, offsets), {}, torch.empty(16, 64))
    assert [term.macs for term in terms] == [16 * 32 * 64]
    of_weights = PRODUCTS[torch.ops.aten._grouped_mm]((a.t(), torch.randn(16, 64), offsets), {}, torch.empty(4, 32, 64))
    assert [term.macs for term in of_weights] == [16 * 32 * 64]
    x, w = torch.randn(7, 2, 3), torch.randn(5, 3, 6)
    (term,) = PRODUCTS[torch.ops.aten.conv_tbc]((x, w), {}, torch.conv_tbc(x, w, torch.zeros(6)))
    assert term.macs == 3 * 2 * 6 * 5 * 3


def test_empty_batch() -> None:
    assert count(nn.Linear(3, 4), torch.randn(0, 3)) == Count(0, 0, 0)
