"""Every known layer class computes with its masked weights, however it is run, and gets the right gradients."""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

from autosparse_fx import AutoSparse, report, sparsify

# Both of torch itself, about dense models as well: the second where a compiled graph begins with a computed tensor.
pytestmark = pytest.mark.filterwarnings(
    "ignore:LSTM with projections is not supported with oneDNN",
    "ignore:The .grad attribute of a Tensor that is not a leaf",
)

ALPHA = 0.6
MASK = torch.ops.autosparse.threshold_mask.default


class Layer:
    """One layer to test: how to make it, what to call it with, and the weights of it that must be masked."""

    def __init__(
        self, name: str, make: Callable[[], nn.Module], inputs: list[tuple[int, ...]], weights: Iterable[str]
    ) -> None:
        self.name = name
        self.make = make
        self.shapes = inputs
        self.weights = set(weights)

    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(torch.randn(shape) for shape in self.shapes)


def rnn_weights(layers: int = 1, directions: int = 1, proj: bool = False) -> list[str]:
    kinds = ["weight_ih", "weight_hh", *(["weight_hr"] if proj else [])]
    return [f"{k}_l{i}{d}" for k in kinds for i in range(layers) for d in ("", "_reverse")[:directions]]


ATTENTION = ["in_proj_weight", "out_proj.weight"]
ENCODER_LAYER = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
DECODER_LAYER = [*ENCODER_LAYER, "multihead_attn.in_proj_weight", "multihead_attn.out_proj.weight"]
QKV = [(2, 5, 8), (2, 5, 8), (2, 5, 8)]

LAYERS = [
    Layer("linear", lambda: nn.Linear(6, 9), [(4, 6)], ["weight"]),
    Layer("bilinear", lambda: nn.Bilinear(4, 5, 6), [(3, 4), (3, 5)], ["weight"]),
    Layer("conv1d", lambda: nn.Conv1d(3, 6, 3), [(2, 3, 9)], ["weight"]),
    Layer("conv2d", lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"), [(2, 3, 7, 7)], ["weight"]),
    Layer("conv3d", lambda: nn.Conv3d(2, 4, 3), [(2, 2, 5, 5, 5)], ["weight"]),
    Layer("depthwise", lambda: nn.Conv2d(6, 6, 3, groups=6), [(2, 6, 7, 7)], ["weight"]),
    Layer("grouped", lambda: nn.Conv2d(6, 8, 3, groups=2), [(2, 6, 7, 7)], ["weight"]),
    Layer("transposed1d", lambda: nn.ConvTranspose1d(3, 6, 3), [(2, 3, 9)], ["weight"]),
    Layer("transposed2d", lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), [(2, 6, 5, 5)], ["weight"]),
    Layer("transposed3d", lambda: nn.ConvTranspose3d(2, 4, 3), [(2, 2, 4, 4, 4)], ["weight"]),
    Layer("attention", lambda: nn.MultiheadAttention(8, 2, batch_first=True), QKV, ATTENTION),
    Layer(
        "attention_separate",
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4, add_bias_kv=True, batch_first=True),
        [(2, 5, 8), (2, 5, 6), (2, 5, 4)],
        ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
    ),
    Layer(
        "encoder_layer", lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), [(2, 5, 8)], ENCODER_LAYER
    ),
    Layer(
        "decoder_layer",
        lambda: nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True),
        [(2, 5, 8)] * 2,
        DECODER_LAYER,
    ),
    Layer("lstm", lambda: nn.LSTM(4, 6, 2, bidirectional=True), [(5, 3, 4)], rnn_weights(2, 2)),
    Layer("lstm_projected", lambda: nn.LSTM(4, 6, proj_size=3), [(5, 3, 4)], rnn_weights(proj=True)),
    Layer("gru", lambda: nn.GRU(4, 6, 2, batch_first=True), [(3, 5, 4)], rnn_weights(2)),
    Layer("rnn", lambda: nn.RNN(4, 6, nonlinearity="relu"), [(5, 3, 4)], rnn_weights()),
    Layer("lstm_cell", lambda: nn.LSTMCell(4, 6), [(3, 4)], ["weight_ih", "weight_hh"]),
    Layer("gru_cell", lambda: nn.GRUCell(4, 6), [(3, 4)], ["weight_ih", "weight_hh"]),
    Layer("rnn_cell", lambda: nn.RNNCell(4, 6), [(3, 4)], ["weight_ih", "weight_hh"]),
]
every_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
GRANULARITIES = ("layer", "channel")


def make_sparse(layer: Layer, granularity: str = "layer") -> tuple[nn.Module, nn.Module]:
    """The sparse layer with about half of each weight masked, and a dense one that holds the masked values."""
    dense = layer.make()
    sparse = sparsify(copy.deepcopy(dense), AutoSparse(alpha=ALPHA, granularity=granularity))
    with torch.no_grad():
        for name, module, weight, _ in reference.masked_parameters(sparse):
            key = name.rpartition(".")[2]
            cut = float(weight.abs().median())
            module._parameters[f"{key}_threshold"].uniform_(-2, 2)
            module._buffers[f"{key}_offset"].fill_(math.log(cut / (1 - cut)))
        held = dict(dense.named_parameters())
        for name, _, weight, s in reference.masked_parameters(sparse):
            held[name].copy_(reference.masked(weight, s, ALPHA))
    return sparse, dense


def tensors(output: Any) -> list[Tensor]:
    return [t for t in tree_flatten(output)[0] if isinstance(t, Tensor) and t.requires_grad]


def outputs_and_backward(run: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    output = tensors(run(*inputs))
    generator = torch.Generator().manual_seed(1)
    sum(((t * torch.randn(t.shape, generator=generator)).sum() for t in output), torch.zeros(())).backward()
    return output


class MaskCounter(TorchDispatchMode):
    """Counts how often each weight is masked, by the address of the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is MASK:
            self.calls[args[0].data_ptr()] += 1
        return func(*args, **(kwargs or {}))


@every_layer
def test_exactly_the_weights_of_the_layer_are_masked(layer: Layer) -> None:
    sparse, _ = make_sparse(layer)
    assert {name for name, *_ in reference.masked_parameters(sparse)} == layer.weights
    assert {entry.name for entry in report(sparse).layers} == layer.weights
    assert 0.2 < reference.total_sparsity(sparse) < 0.8  # otherwise the comparisons below say nothing


@every_layer
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_eager_outputs_and_gradients_equal_the_reference(layer: Layer, granularity: str, training: bool) -> None:
    sparse, dense = (m.train(training) for m in make_sparse(layer, granularity))
    inputs = layer.inputs()
    expected, found = outputs_and_backward(dense, inputs), outputs_and_backward(sparse, inputs)
    torch.testing.assert_close(found, expected)
    assert_gradients_equal_the_reference(sparse, dense)


def assert_gradients_equal_the_reference(sparse: nn.Module, dense: nn.Module) -> None:
    incoming = {name: p.grad for name, p in dense.named_parameters()}
    masked = set()
    for name, module, weight, s in reference.masked_parameters(sparse):
        grad = incoming[name]
        assert grad is not None
        _, dw, ds = reference.gradients(weight, s, ALPHA, grad)
        torch.testing.assert_close(weight.grad, dw.to(weight.dtype), rtol=1e-4, atol=1e-5)
        threshold = module._parameters[name.rpartition(".")[2] + "_threshold"]
        assert threshold is not None and threshold.grad is not None
        torch.testing.assert_close(threshold.grad, 0.1 * ds.reshape(-1).float(), rtol=1e-4, atol=1e-5)
        masked |= {name, name + "_threshold"}
    for name, parameter in sparse.named_parameters():
        if name not in masked:
            torch.testing.assert_close(parameter.grad, incoming[name], rtol=1e-4, atol=1e-5)


@every_layer
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_equals_eager(layer: Layer, backend: str) -> None:
    granularity = "channel" if backend == "eager" else "layer"
    sparse, dense = make_sparse(layer, granularity)
    inputs = layer.inputs()
    expected = outputs_and_backward(dense, inputs)
    found = outputs_and_backward(torch.compile(sparse, backend=backend), inputs)
    torch.testing.assert_close(found, expected)
    assert_gradients_equal_the_reference(sparse, dense)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "autosparse"])
def test_generated_code_equals_eager(backend: str) -> None:
    names = ("transposed2d", "attention")
    chosen = [layer for layer in LAYERS if layer.name in names]
    pairs = [make_sparse(layer, "channel" if i % 2 else "layer") for i, layer in enumerate(chosen)]
    sparse, dense = (nn.ModuleList(side) for side in zip(*pairs, strict=True))
    inputs = [layer.inputs() for layer in chosen]

    def run(modules: nn.ModuleList) -> list[Any]:
        return [module(*x) for module, x in zip(modules, inputs, strict=True)]

    expected = outputs_and_backward(lambda: run(dense), ())
    found = outputs_and_backward(torch.compile(lambda: run(sparse), backend=backend, fullgraph=True), ())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert_gradients_equal_the_reference(sparse, dense)


@every_layer
def test_submodule_on_its_own_is_masked(layer: Layer) -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer.make()

    parent = Parent()
    dense = copy.deepcopy(parent)
    sparsify(parent, AutoSparse(threshold_init=-2.5))
    with torch.no_grad():
        held = dict(dense.named_parameters())
        for name, _, weight, s in reference.masked_parameters(parent):
            held[name].copy_(reference.masked(weight, s, ALPHA))
    inputs = layer.inputs()
    torch.testing.assert_close(tensors(parent.inner(*inputs)), tensors(dense.inner(*inputs)))


@every_layer
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_one_forward_computes_each_mask_once(layer: Layer, training: bool, grad: bool) -> None:
    sparse, _ = make_sparse(layer)
    sparse.train(training)
    expected = {weight.data_ptr(): 1 for _, _, weight, _ in reference.masked_parameters(sparse)}
    with MaskCounter() as counter, torch.set_grad_enabled(grad):
        sparse(*layer.inputs())
    assert dict(counter.calls) == expected
    with counter, torch.set_grad_enabled(grad):  # the next forward computes them anew
        sparse(*layer.inputs())
    assert dict(counter.calls) == dict.fromkeys(expected, 2)


def test_encoder_stack_computes_each_mask_once_on_its_fast_path() -> None:
    """``nn.TransformerEncoder`` reads weights of its first layer before it calls it, to choose its path."""
    stack = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2, enable_nested_tensor=True
    )
    sparsify(stack.eval(), AutoSparse(threshold_init=-2.5))
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with MaskCounter() as counter, torch.no_grad(), pytest.warns(UserWarning, match="nested tensors"):
        stack(torch.randn(2, 5, 8), src_key_padding_mask=padding)
    assert len(counter.calls) == 8
    assert set(counter.calls.values()) == {1}


@pytest.mark.parametrize("name", ["attention", "encoder_layer"])
def test_fast_path_equals_the_slow_path_and_the_reference(name: str) -> None:
    (layer,) = (x for x in LAYERS if x.name == name)
    sparse, dense = (m.eval() for m in make_sparse(layer))
    x = torch.randn(2, 5, 8)
    inputs = (x, x, x) if name == "attention" else (x,)
    enabled = torch.backends.mha.get_fastpath_enabled()
    assert enabled
    with torch.no_grad():
        fast, expected = sparse(*inputs), dense(*inputs)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            slow = sparse(*inputs)
        finally:
            torch.backends.mha.set_fastpath_enabled(enabled)
    torch.testing.assert_close(fast, expected)
    torch.testing.assert_close(fast, slow)


def test_fast_path_is_still_taken() -> None:
    layer = sparsify(
        nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), AutoSparse(threshold_init=-2.5)
    ).eval()
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch(), torch.no_grad():
        layer(torch.randn(2, 5, 8))
    assert torch.ops.aten._transformer_encoder_layer_fwd.default in seen


def test_a_forward_that_raises_leaves_no_masks_behind() -> None:
    layer = sparsify(nn.Linear(4, 3), AutoSparse(threshold_init=-2.5))
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 5))
    before = layer.weight
    with torch.no_grad():
        layer._parameters["weight"].add_(1.0)
    assert not torch.equal(layer.weight, before)
    x = torch.randn(2, 4)
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)


def test_weights_of_one_forward_are_read_anew_in_the_next() -> None:
    layer = sparsify(nn.LSTM(4, 3), AutoSparse(threshold_init=-2.5))
    x = torch.randn(5, 2, 4)
    before = layer(x)[0]
    with torch.no_grad():
        layer._parameters["weight_ih_l0"].mul_(2)
    assert not torch.equal(layer(x)[0], before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_layers_compute_in_the_dtype_of_their_weights(dtype: torch.dtype) -> None:
    model = sparsify(nn.Sequential(nn.Linear(6, 5), nn.LSTM(5, 4)), AutoSparse(threshold_init=-2.5)).to(dtype)
    out, _ = model(torch.randn(3, 2, 6, dtype=dtype))
    assert out.dtype == dtype
    out.float().sum().backward()
    for name, _, weight, s in reference.masked_parameters(model):
        assert weight.dtype == dtype and weight.grad is not None and weight.grad.dtype == dtype, name
        assert s.dtype in (torch.float32, torch.float64)


def test_autocast_masks_in_float32_and_multiplies_in_bfloat16() -> None:
    sparse, dense = make_sparse(LAYERS[0])
    x = torch.randn(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = sparse(x), dense(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    assert sparse.weight.dtype == torch.float32


def test_subclasses_of_a_layer_are_masked_and_keep_their_own_forward() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer = sparsify(Scaled(4, 3), AutoSparse(threshold_init=-2.5))
    x = torch.randn(2, 4)
    _, _, weight, s = next(reference.masked_parameters(layer))
    torch.testing.assert_close(layer(x), 2 * (x @ reference.masked(weight, s, 0.0).T + layer.bias))
    assert isinstance(layer, Scaled)


class Checkpointed(nn.Module):
    """Reads a weight before a part that runs again in the backward pass, and twice inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(4, 4))  # its mask makes the forward below one that masks once
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x @ self.own)
        return checkpoint(lambda x: torch.tanh(self.layer(x)) * self.layer.weight[1], x, use_reentrant=False)


def test_a_checkpointed_part_masks_on_its_own() -> None:
    x = torch.randn(3, 4)
    model = sparsify(Checkpointed(), AutoSparse(threshold_init=-1.0), example_inputs=x)
    with torch.no_grad():
        expected = model(x)
    out = model(x)
    assert torch.equal(out, expected)
    out.sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = None
    hidden = model.layer(x @ model.own)
    (torch.tanh(model.layer(hidden)) * model.layer.weight[1]).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, msg=lambda text, name=name: f"{name}: {text}")


class Adapting(nn.Module):
    """Takes gradients through its own layers in its forward, and then uses them again."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.net = nn.Parameter(torch.randn(6, 6) / 2), nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            hidden = self.net(x @ self.w)
            gradients = torch.autograd.grad(hidden.square().sum(), [*self.net.parameters(), x], allow_unused=True)
            x = x - 0.1 * gradients[-1]
        return self.net(x @ self.w)


def test_a_forward_that_differentiates_reads_weights_that_can_be_differentiated_again() -> None:
    x = torch.randn(3, 6, requires_grad=True)
    model = sparsify(Adapting(), AutoSparse(alpha=0.5, threshold_init=-2.5), example_inputs=x)
    dense = Adapting()
    plain = {"w": model.w.detach(), "net.0.weight": model.net[0].weight.detach(), "net.0.bias": model.net[0].bias}
    dense.load_state_dict(plain)
    torch.testing.assert_close(model(x), dense(x))
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
