"""The Triton code that Inductor makes of the two operators for a GPU, generated (not run) on a machine without one.

Dynamo and AOTAutograd see the CPU, because autograd does not run on fake CUDA tensors where there is no driver. Each of
the graphs that they hand to Inductor is then moved to a CUDA device that claims to be an sm_90, and its code is read.
"""

import copy
import functools
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch._inductor.compile_fx as inductor
import torch._inductor.scheduler
import torch.nn.functional as F
import torch.utils._triton
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo import device_interface
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering
from torch._inductor.lowering import lowerings
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.utils import run_and_get_code
from torch.utils._pytree import tree_map_only

import autosparse_fx
from autosparse_fx import AutoSparse
from autosparse_fx.ops import threshold_mask

needs_triton = pytest.mark.skipif(
    torch.version.cuda is None or not torch.utils._triton.has_triton_package(),
    reason="no CUDA build of torch, or no triton",
)
CUDA = torch.device("cuda", 0)
SM90 = types.SimpleNamespace(
    name="fake sm_90",
    major=9,
    minor=0,
    gcnArchName="",
    warp_size=32,
    multi_processor_count=132,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=2**16,
    shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10,
    total_memory=2**37,
    L2_cache_size=50 * 2**20,
)


@dataclass(frozen=True)
class Buffer:
    """A tensor of the generated code. Two of one graph differ by ``name``."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_input: bool


@dataclass(frozen=True)
class Kernel:
    """One launch: the buffers of each of its loads and stores, in their order in the source."""

    name: str
    loads: tuple[Buffer, ...]
    stores: tuple[Buffer, ...]

    @property
    def reduces(self) -> bool:
        return not self.name.startswith(("triton_poi", "triton_for"))


@dataclass(frozen=True)
class Code:
    """What one graph became."""

    source: str
    buffers: dict[str, Buffer]

    @functools.cached_property
    def kernels(self) -> list[Kernel]:
        bodies = dict(
            re.findall(r"^(triton_\w+) = async_compile\.triton\('\w+', '''(.*?)'''", self.source, re.S | re.M)
        )
        assert len(bodies) == self.source.count("@triton.jit")
        kernels = []
        for name, arguments in re.findall(r"^ +(triton_\w+)\.run\((.*), stream=\w+\)$", self.source, re.M):
            parameters = re.search(rf"^def {name}\((.*?)\):", bodies[name], re.M)
            assert parameters is not None
            pointers = re.findall(r"\b(?:in|out|in_out)_ptr\w*", parameters[1])
            given = [self.buffers[a] for a in arguments.split(", ") if not a.isdigit()]
            buffer_of = dict(zip(pointers, given, strict=True))
            loads, stores = (re.findall(rf"tl\.{access}\((\w+)", bodies[name]) for access in ("load", "store"))
            kernels.append(Kernel(name, tuple(buffer_of[p] for p in loads), tuple(buffer_of[p] for p in stores)))
        assert {k.name for k in kernels} == set(bodies)
        return kernels

    def inputs(self, shape: tuple[int, ...]) -> list[Buffer]:
        return [b for b in self.buffers.values() if b.is_input and b.shape == shape]

    def that_load(self, *buffers: Buffer) -> list[Kernel]:
        return [k for k in self.kernels if set(buffers) & set(k.loads)]

    @property
    def calls_of_our_operators(self) -> list[str]:
        return [
            line for line in self.source.splitlines() if "autosparse." in line and not line.lstrip().startswith("#")
        ]


def on_cuda(t: Tensor) -> Tensor:
    with t.fake_mode:  # type: ignore[attr-defined]
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=CUDA)


def without_caches() -> None:
    """Forget what Inductor remembers about devices."""
    DeviceProperties.create.cache_clear()
    for module in (torch._inductor.utils, torch.utils._triton):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


@pytest.fixture
def sm90_codes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Appends the CUDA code of every graph that Inductor is given; the graph itself then runs as it is, on the CPU."""
    codes: list[Code] = []
    compile_fx_inner = inductor.compile_fx_inner

    def generate(graph: GraphLowering) -> Any:
        source = graph.codegen()[0].value
        named = {**graph.name_to_buffer, **graph.graph_inputs}
        buffers = {
            name: Buffer(name, tuple(map(int, b.get_size())), b.get_dtype(), name in graph.graph_inputs)
            for name, b in named.items()
            if b.maybe_get_size() is not None
        }
        codes.append(Code(source, buffers))
        return types.SimpleNamespace(call=lambda args: [], __file__=__file__, runner=None, partitions=None)

    def compile_for_sm90(gm: torch.fx.GraphModule, example_inputs: list[Any], **kwargs: Any) -> Any:
        runs_here = make_boxed_func(copy.deepcopy(gm))
        for node in gm.graph.nodes:
            node.meta["val"] = tree_map_only(Tensor, on_cuda, node.meta.get("val"))
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": CUDA}
        answers: dict[str, Callable[..., Any]] = {
            "get_device_properties": lambda device=None: SM90,
            "current_device": lambda: 0,
            "device_count": lambda: 1,
            "is_bf16_supported": lambda *args, **kwargs: True,
        }
        on_interface = {name: staticmethod(answer) for name, answer in answers.items()}
        with (
            mock.patch.multiple(torch.cuda, get_device_capability=lambda device=None: (9, 0), **answers),
            mock.patch.multiple(device_interface.CudaInterface, **on_interface),
            mock.patch.dict(device_interface.caching_worker_device_properties, {"cuda": [SM90]}),
            mock.patch.dict(device_interface.caching_worker_current_devices, {"cuda": 0}),
            mock.patch.object(torch._inductor.scheduler, "has_triton", lambda *args, **kwargs: True),
            mock.patch.object(torch.utils._triton, "triton_hash_with_backend", lambda *args, **kwargs: "fake"),
            mock.patch.object(GraphLowering, "compile_to_module", generate),
        ):
            compile_fx_inner(gm, [on_cuda(i) if isinstance(i, Tensor) else i for i in example_inputs], **kwargs)
        return runs_here

    without_caches()
    monkeypatch.setattr(inductor, "compile_fx", functools.partial(inductor.compile_fx, inner_compile=compile_for_sm90))
    yield codes
    monkeypatch.undo()
    without_caches()


LINEAR, CONV = (4096, 1024), (256, 128, 3, 3)
WEIGHTS = [
    pytest.param(LINEAR, torch.contiguous_format, id="linear"),
    pytest.param(CONV, torch.channels_last, id="conv channels_last"),
    pytest.param(CONV, torch.contiguous_format, id="conv"),
]


def layer(shape: tuple[int, ...], memory_format: torch.memory_format, granularity: str = "layer") -> nn.Module:
    made = nn.Linear(*shape[::-1], bias=False) if len(shape) == 2 else nn.Conv2d(*shape[1::-1], 3, bias=False)
    assert made.weight.shape == shape
    config = AutoSparse(target_sparsity=None, threshold_init=-2.5, granularity=granularity)
    return autosparse_fx.sparsify(nn.Sequential(made), config).to(memory_format=memory_format)


def step(model: nn.Module, shape: tuple[int, ...], *, bf16: bool = False, input_gradient: bool = False) -> None:
    """One forward and backward pass under our backend."""
    x = torch.randn(8, shape[1], *[5 for _ in shape[2:]], requires_grad=input_gradient)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = torch.compile(model, backend="autosparse", fullgraph=True)(x)
    out.float().square().sum().backward()


def the_only(found: list[Any]) -> Any:
    assert len(found) == 1, found
    return found[0]


def assert_fuses_and_keeps_no_mask(codes: list[Code]) -> None:
    for code in codes:
        assert not code.calls_of_our_operators
        assert all(stored.dtype.is_floating_point for kernel in code.kernels for stored in kernel.stores)


def annealing_kernel(backward: Code, shape: tuple[int, ...]) -> tuple[Kernel, list[Buffer]]:
    """The one kernel that anneals, and what it stores beside the gradient of the weight.

    It reads the gradient, the weight and alpha once each, and nothing else reads the gradient.
    """
    weight, alpha = the_only(backward.inputs(shape)), the_only(backward.inputs(()))
    kernel: Kernel = the_only(backward.that_load(alpha))
    assert kernel.loads.count(weight) == kernel.loads.count(alpha) == 1
    gradient = the_only([b for b in kernel.loads if b.shape == shape and b != weight])
    assert backward.that_load(gradient) == [kernel]
    d_weight = the_only([b for b in kernel.stores if b.shape == shape])
    assert d_weight.dtype == weight.dtype
    return kernel, [b for b in kernel.stores if b.shape != shape]


@needs_triton
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        *WEIGHTS[:2],
        pytest.param(
            *WEIGHTS[2].values,
            id="conv",
            marks=pytest.mark.xfail(
                strict=True,
                reason="Inductor's layout optimization has the kernel store a channels_last copy of the dense weight "
                "too, which it then keeps for the backward pass instead of the parameter",
            ),
        ),
    ],
)
def test_forward_is_one_pointwise_kernel_that_casts_too(
    sm90_codes: list[Code], shape: tuple[int, ...], memory_format: torch.memory_format, bf16: bool
) -> None:
    step(layer(shape, memory_format), shape, bf16=bf16)
    forward, _ = sm90_codes
    assert_fuses_and_keeps_no_mask(sm90_codes)
    weight = the_only(forward.inputs(shape))
    kernel = the_only(forward.that_load(weight))
    assert not kernel.reduces
    logit = the_only([b for b in kernel.loads if b != weight])
    assert logit.shape == (1,)
    masked = the_only(list(kernel.stores))
    assert masked.shape == shape and masked.dtype == (torch.bfloat16 if bf16 else torch.float32)
    # The logit, offset + scale * threshold, is computed for the backward pass too, and by a launch of its own.
    assert [k.stores for k in forward.kernels if logit in k.stores] == [(logit,)]
    assert not forward.that_load(*forward.inputs(()))  # alpha


@needs_triton
@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("bf16", [False, True])
def test_backward_of_a_linear_layer_has_no_other_kernels(sm90_codes: list[Code], granularity: str, bf16: bool) -> None:
    step(layer(LINEAR, torch.contiguous_format, granularity), LINEAR, bf16=bf16)
    _, backward = sm90_codes
    assert_fuses_and_keeps_no_mask(sm90_codes)
    kernel, _ = annealing_kernel(backward, LINEAR)
    assert kernel.reduces
    assert backward.kernels[0] == kernel
    assert len(backward.kernels) == (2 if granularity == "layer" else 1)


@needs_triton
def test_backward_recomputes_the_mask_in_the_same_pass(sm90_codes: list[Code]) -> None:
    step(layer(LINEAR, torch.contiguous_format), LINEAR, bf16=True, input_gradient=True)
    _, backward = sm90_codes
    weight = the_only(backward.inputs(LINEAR))
    kernel = the_only(backward.that_load(weight))
    assert sorted(str(b.dtype) for b in kernel.stores if b.shape == LINEAR) == ["torch.bfloat16", "torch.float32"]


# In float32: fake convolutions choose other strides in bfloat16 than cuDNN would.
@needs_triton
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        WEIGHTS[0],
        *(
            pytest.param(
                *case.values,
                id=case.id,
                marks=pytest.mark.xfail(
                    strict=True,
                    reason="the partial sums and the gradient of the weight are two passes: the 36 * 8192 of the split "
                    "sum are no multiple of the kernel's 9, and Inductor does not see that both read the same",
                ),
            )
            for case in WEIGHTS[1:]
        ),
    ],
)
def test_backward_of_a_layer_threshold_is_one_pass_and_a_tiny_sum(
    sm90_codes: list[Code], shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    step(layer(shape, memory_format), shape)
    _, backward = sm90_codes
    assert_fuses_and_keeps_no_mask(sm90_codes)
    _, others = annealing_kernel(backward, shape)
    partial = the_only(others)
    count = torch.Size(partial.shape).numel()
    assert 1 < count <= 4096
    sums: Kernel = the_only(backward.that_load(partial))
    assert sums.reduces
    assert {b.shape for b in sums.loads} <= {partial.shape, (1,)}
    assert [b.shape for b in sums.stores] == [(1,)]


@needs_triton
@pytest.mark.parametrize(("shape", "memory_format"), WEIGHTS)
def test_backward_of_channel_thresholds_is_one_kernel(
    sm90_codes: list[Code], shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    step(layer(shape, memory_format, "channel"), shape)
    _, backward = sm90_codes
    assert_fuses_and_keeps_no_mask(sm90_codes)
    kernel, others = annealing_kernel(backward, shape)
    d_threshold = the_only(others)
    assert kernel.reduces and d_threshold.shape == shape[:1]
    assert not backward.that_load(d_threshold)
    assert [k for k in backward.kernels if k.reduces] == [kernel]


@needs_triton
@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize(("shape", "memory_format"), WEIGHTS)
def test_without_a_threshold_gradient_nothing_is_summed(
    sm90_codes: list[Code], shape: tuple[int, ...], memory_format: torch.memory_format, granularity: str
) -> None:
    model = layer(shape, memory_format, granularity)
    model[0].weight_threshold.requires_grad_(False)
    step(model, shape)
    _, backward = sm90_codes
    assert_fuses_and_keeps_no_mask(sm90_codes)
    _, others = annealing_kernel(backward, shape)
    assert not others
    assert not any(k.reduces for k in backward.kernels)


@needs_triton
def test_a_fallback_would_be_seen(sm90_codes: list[Code], monkeypatch: pytest.MonkeyPatch) -> None:
    step(layer(LINEAR, torch.contiguous_format), LINEAR)
    assert not any(code.calls_of_our_operators for code in sm90_codes)
    torch._dynamo.reset()
    for op in (torch.ops.autosparse.threshold_mask.default, torch.ops.autosparse.anneal_gradient.default):
        monkeypatch.delitem(lowerings, op)
    step(layer(LINEAR, torch.contiguous_format), LINEAR)
    assert [len(code.calls_of_our_operators) for code in sm90_codes[2:]] == [1, 1]


@needs_triton
@pytest.mark.skipif(
    not hasattr(inductor_config, "combo_kernel_peak_memory_pct_threshold"),
    reason="this torch has no combo_kernel_peak_memory_pct_threshold",
)
def test_combo_kernels_merge_the_masks_of_several_layers(sm90_codes: list[Code]) -> None:
    def model(x: Tensor) -> Tensor:
        for weight in weights:
            x = F.linear(x, threshold_mask(weight, s, alpha))
        return x

    weights = [torch.randn(256, 256) for _ in range(4)]
    s, alpha, x = torch.tensor([-2.5]), torch.tensor(0.5), torch.randn(8, 256)
    merge = {"combo_kernels": True, "combo_kernel_peak_memory_pct_threshold": None}
    for options in ({}, merge):
        torch._dynamo.reset()
        torch.compile(model, backend="autosparse", options=options)(x)
    apart, merged = sm90_codes
    assert len(apart.that_load(*apart.inputs((256, 256)))) == len(apart.kernels) == 4
    assert len(merged.that_load(*merged.inputs((256, 256)))) == len(merged.kernels) == 1
    assert_fuses_and_keeps_no_mask(sm90_codes)


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 3)
        self.fc = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


def train_on_cuda(mode: str | None, alphas: list[float]) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of some steps and the gradients of the first; alpha and the offsets change before each step."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = AutoSparse(target_sparsity=None, threshold_init=-2.5, rules={"fc.weight": {"granularity": "channel"}})
    model = autosparse_fx.sparsify(Both(), config).cuda()
    x = torch.randn(16, 3, 12, 12).cuda()
    call = model if mode is None else torch.compile(model, backend="autosparse", mode=mode, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses, gradients = [], {}
    for alpha in alphas:
        torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad()
        with torch.no_grad():
            model.conv._buffers["autosparse_alpha"].fill_(alpha)
            for name, buffer in model.named_buffers():
                if name.endswith("_offset"):
                    buffer.add_(0.05)
        loss = call(x).square().sum()
        loss.backward()
        gradients = gradients or {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        losses.append(loss.item())
    return losses, gradients


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # what Inductor advises for a device is no error
def test_on_a_gpu_it_equals_eager_with_and_without_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.cudagraph_trees import get_manager

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    alphas = [1.0, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1, 0.0]
    losses, gradients = train_on_cuda(None, alphas)
    assert len(set(losses)) == len(alphas)
    counters.clear()
    for mode in ("default", "reduce-overhead"):
        seen, seen_gradients = train_on_cuda(mode, alphas)
        torch.testing.assert_close(seen, losses, rtol=1e-3, atol=1e-5, msg=lambda m, mode=mode: f"{mode}: {m}")
        torch.testing.assert_close(seen_gradients, gradients, rtol=1e-3, atol=1e-4)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert get_manager(torch.cuda.current_device(), create_if_none_exists=False) is not None
    constant, _ = train_on_cuda("reduce-overhead", [alphas[0]] * len(alphas))
    assert abs(constant[-1] - losses[-1]) > 2e-3 * abs(losses[-1])  # so that a frozen alpha would have been seen

    torch._dynamo.reset()
    model = layer(LINEAR, torch.contiguous_format).cuda()
    compiled = torch.compile(model, backend="autosparse", fullgraph=True)
    x = torch.randn(8, LINEAR[1]).cuda()
    _, sources = run_and_get_code(lambda: compiled(x).square().sum().backward())
    launched = [re.findall(r"(triton_\w+)\.run\(", source) for source in sources]
    assert len(launched) == 2
    assert len([name for name in launched[0] if "threshold_mask" in name]) == 1
    assert len([name for name in launched[1] if "anneal_gradient" in name]) == 2
