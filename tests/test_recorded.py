"""What Dynamo leaves to eager mode: its operators as a graph, and the weights that are found by them."""

import copy
import gc
import warnings
import weakref

import pytest
import reference
import torch
import torch.nn.functional as F
from masked_names import masked_names
from torch import Tensor, nn

from autosparse_fx import AutoSparse, report, sparsify
from autosparse_fx.capture import multiplied_parameters
from autosparse_fx.passes.find_weights import find_weights
from autosparse_fx.recorded import recorded


def found(model: nn.Module, x: Tensor) -> dict[str, int]:
    names = {p: name for name, p in model.named_parameters()}
    with recorded([*model.parameters(), *model.buffers()]) as (gm, state):
        model(x)
    weights = find_weights(gm, lambda node: isinstance(state.get(node), nn.Parameter))
    return {names[state[node]]: axis for node, axis in weights.items()}


MODELS = {
    "mlp": (reference.mlp, torch.randn(3, 16)),
    "convnet": (reference.ConvNet, torch.randn(3, 1, 8, 8)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3), torch.randn(2, 4, 9)),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0), torch.randn(2, 5, 8)),
    "tied": (reference.Tied, torch.arange(6)[None]),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_weights_and_axes_are_those_of_the_captured_graphs(name: str, grad: bool) -> None:
    make, x = MODELS[name]
    model = make()
    names = {id(p): name for name, p in model.named_parameters()}
    expected = {names[parameter]: axis for parameter, axis in multiplied_parameters(model, x).items()}
    with torch.set_grad_enabled(grad):
        assert found(model, x) == expected != {}


def test_what_is_not_multiplied_is_not_found() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4))
    assert found(model, torch.arange(3)) == {}


def test_views_are_views_and_nothing_is_kept_alive() -> None:
    w = torch.randn(2, 6, 4)
    with recorded([w]) as (gm, state):
        made = w[1].t().clone()
        split = made.chunk(2)
        alive = [weakref.ref(t) for t in (made, *split)]
        del made, split
        gc.collect()
        assert all(reference() is None for reference in alive)
    held = {str(node.target): node.meta["val"] for node in gm.graph.nodes if node.op == "call_function"}
    (node,) = state
    view, copy = held["aten.t.default"], held["aten.clone.default"]
    assert view.untyped_storage()._cdata == node.meta["val"].untyped_storage()._cdata
    assert view.stride() == (1, 4) and view.storage_offset() == 24
    assert copy.untyped_storage()._cdata != view.untyped_storage()._cdata and copy.is_meta


class Experts(nn.Module):
    """A loop over parts of the batch, in which Dynamo breaks its graph and so leaves all of it to eager mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(2, 6, 4)), nn.Parameter(torch.randn(2, 6, 4))
        self.shift, self.table = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.randn(3, 4))
        self.gate = nn.Linear(4, 2)
        self.register_buffer("mixing", torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        out = (x + self.shift + F.embedding(torch.zeros(1, dtype=torch.long), self.table)) @ self.mixing
        chosen = self.gate(x).argmax(1)
        for expert in range(2):
            rows = (chosen == expert).nonzero()[:, 0]
            if rows.numel() and x[rows].abs().max().item() > 0:
                hidden = F.gelu(F.linear(x[rows], self.first[expert]))
                out = out.index_add(0, rows, torch.einsum("no,oi->ni", hidden, self.second[expert]))
        return out


def test_products_in_code_that_dynamo_leaves_to_eager_mode_are_found() -> None:
    x = torch.randn(16, 4)
    model = Experts()
    before = copy.deepcopy(model.state_dict())
    sparsify(model, AutoSparse(granularity="channel"), example_inputs=x)
    assert masked_names(model) == {"first", "second", "gate.weight"}
    assert {slot.name: slot.axis for slot in model._autosparse_slots} == {"first": 1, "second": 2}
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all("seen" in report(model).skipped[name][1] for name in ("shift", "table"))


class Force(nn.Module):
    """Differentiates in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 3))

    def forward(self, position: Tensor) -> Tensor:
        position = position.detach().requires_grad_()
        energy = (position @ self.w.t()).tanh().sum()
        return -torch.autograd.grad(energy, position, create_graph=True)[0]


def test_a_model_that_differentiates_in_its_forward_can_be_run() -> None:
    model = Force()
    with torch.no_grad():  # where the model is prepared
        sparsify(model, example_inputs=torch.randn(5, 3))
    assert masked_names(model) == {"w"} and all(p.grad is None for p in model.parameters())


class Branching(nn.Module):
    """Breaks its graph, branches by an operator, and writes to what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        cache.append(x.clone())
        x.mul_(2)
        for _ in range(1):
            torch._dynamo.graph_break()
            x = x @ self.w
        return torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (x,)) @ self.v


def test_operators_of_higher_order_and_inputs_that_are_written_to() -> None:
    x, cache = torch.ones(3, 4), []
    model = sparsify(Branching(), example_inputs=(x, cache))
    assert masked_names(model) == {"w", "v"}
    assert cache == [] and bool((x == 2).all())  # lists are copied, and tensors written to as by one call


class Backward(nn.Module):
    """Runs a backward pass of its own where gradients are enabled."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (x @ self.w).sum().backward()
        return x.grad @ self.w


def test_no_gradients_are_left() -> None:
    model = sparsify(Backward(), example_inputs=torch.randn(3, 4))
    assert masked_names(model) == {"w"} and model._parameters["w"].grad is None


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.encoder, self.unused = nn.TransformerEncoder(layer, 1), nn.Parameter(torch.randn(2, 2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=mask)


def test_encoders_with_a_padding_mask_take_nested_tensors() -> None:
    model = Padded().eval().requires_grad_(False)
    mask = torch.tensor([[False, False, True], [False, True, True]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nested tensors are a prototype, as torch says
        sparsify(model, example_inputs=(torch.randn(2, 3, 8), mask))
    assert "unused" not in masked_names(model) and len(masked_names(model)) == 4
