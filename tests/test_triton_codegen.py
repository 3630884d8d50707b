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

CUDA = torch.device("cuda", 0)
SM90 = types.SimpleNamespace(name="fake sm_90", major=9, minor=0, gcnArchName="", warp_size=32, total_memory=2**37)
SM90.multi_processor_count, SM90.regs_per_multiprocessor, SM90.L2_cache_size = 132, 2**16, 50 * 2**20
SM90.max_threads_per_block, SM90.max_threads_per_multi_processor = 1024, 2048
SM90.shared_memory_per_block, SM90.shared_memory_per_block_optin = 48 * 2**10, 227 * 2**10


@dataclass(frozen=True)
class Buffer:
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
        definition = r"^(triton_\w+) = async_compile\.triton\('\w+', '''(.*?)'''"
        bodies = dict(re.findall(definition, self.source, re.S | re.M))
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
        return re.findall(r"^(?!\s*#).*autosparse\..*$", self.source, re.M)


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
    if torch.version.cuda is None or not torch.utils._triton.has_triton_package():
        pytest.skip("no CUDA build of torch, or no triton")
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
            # Unavailable, or Inductor would keep the state of its random numbers. Lightning, once a test imports it,
            # has torch.cuda.is_available() ask device_count().
            mock.patch.multiple(
                torch.cuda, is_available=lambda: False, get_device_capability=lambda device=None: (9, 0), **answers
            ),
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


LINEAR, CONV, CHANNELS_LAST = (4096, 1024), (256, 128, 3, 3), torch.channels_last
# The shape of a weight, its memory format, and whether it is used in bfloat16.
CASES = {
    "linear": (LINEAR, torch.contiguous_format, False),
    "linear bfloat16": (LINEAR, torch.contiguous_format, True),
    "linear 768": ((512, 768), torch.contiguous_format, False),
    "conv": (CONV, torch.contiguous_format, False),
    "conv bfloat16": (CONV, torch.contiguous_format, True),
    "conv channels_last": (CONV, CHANNELS_LAST, False),
    "conv channels_last bfloat16": (CONV, CHANNELS_LAST, True),
}
# Without those for the backward pass: fake convolutions have other strides in bfloat16 than cuDNN gives them.
BACKWARD = [name for name in CASES if name not in ("conv bfloat16", "conv channels_last bfloat16")]

IS_2_11 = torch.__version__ < "2.12"


def cases(names: list[str], expected_to_fail: str = "", because: str = "") -> pytest.MarkDecorator:
    marks = pytest.mark.xfail(strict=True, raises=AssertionError, reason=because)
    return pytest.mark.parametrize(
        "case",
        [pytest.param(CASES[n], id=n, marks=marks if re.fullmatch(expected_to_fail, n) else ()) for n in names],
    )


def step(case: Any, granularity: str = "layer", *, trains: bool = True, input_gradient: bool = False) -> None:
    """One forward and backward pass of a layer under our backend."""
    shape, _, bf16 = case
    x = torch.randn(8, shape[1], *[5 for _ in shape[2:]], requires_grad=input_gradient)
    model = layer(case, granularity)
    model[0].weight_threshold.requires_grad_(trains)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = torch.compile(model, backend="autosparse", fullgraph=True)(x)
    out.float().square().sum().backward()


def layer(case: Any, granularity: str = "layer") -> Any:
    shape, memory_format, _ = case
    made = nn.Linear(*shape[::-1], bias=False) if len(shape) == 2 else nn.Conv2d(*shape[1::-1], 3, bias=False)
    assert made.weight.shape == shape
    config = AutoSparse(target_sparsity=None, threshold_init=-2.5, granularity=granularity)
    return autosparse_fx.sparsify(nn.Sequential(made), config).to(memory_format=memory_format)


def the_only(found: Any) -> Any:
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


@cases(
    list(CASES),
    "conv( bfloat16)?",
    "Inductor's layout optimization has the kernel store a channels_last copy of the dense weight as well, which is "
    "kept for the backward pass in place of the parameter",
)
def test_forward_is_one_pointwise_kernel_that_casts_too(sm90_codes: list[Code], case: Any) -> None:
    step(case)
    forward, _ = sm90_codes
    assert_fuses_and_keeps_no_mask(sm90_codes)
    shape, _, bf16 = case
    weight = the_only(forward.inputs(shape))
    kernel = the_only(forward.that_load(weight))
    assert not kernel.reduces
    threshold, offset = (b for b in kernel.loads if b != weight)  # the logit is computed in the same kernel
    assert threshold.is_input and offset.is_input and threshold.shape == offset.shape == (1,)
    assert not forward.that_load(*forward.inputs(()))  # alpha
    masked = the_only(kernel.stores)
    assert masked.shape == shape and masked.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert not [stored for k in forward.kernels for stored in k.stores if stored.shape == (1,)]


@cases(BACKWARD)
def test_backward_of_a_layer_threshold_is_one_pass_and_a_tiny_sum(sm90_codes: list[Code], case: Any) -> None:
    step(case)
    _, backward = sm90_codes
    assert_fuses_and_keeps_no_mask(sm90_codes)
    kernel, others = annealing_kernel(backward, case[0])
    partial = the_only(others)
    assert kernel.reduces and 1 < torch.Size(partial.shape).numel() <= 4096
    tiny = the_only(backward.that_load(partial))
    assert tiny.reduces
    assert {b.shape for b in tiny.loads} <= {partial.shape, (1,)}
    assert [b.shape for b in tiny.stores] == [(1,)]
    assert [k for k in backward.kernels if k.reduces] == [kernel, tiny]
    if len(case[0]) == 2:  # convolutions read a masked weight and rearrange their gradient
        assert len(backward.kernels) == 2


@pytest.mark.parametrize(("granularity", "trains"), [("channel", True), ("channel", False), ("layer", False)])
@cases(BACKWARD)
def test_backward_without_a_sum_over_everything_is_one_kernel(
    sm90_codes: list[Code], case: Any, granularity: str, trains: bool
) -> None:
    """That of thresholds per channel, and where thresholds are not trained: that one sums nothing."""
    step(case, granularity, trains=trains)
    _, backward = sm90_codes
    assert_fuses_and_keeps_no_mask(sm90_codes)
    kernel, others = annealing_kernel(backward, case[0])
    assert [b.shape for b in others] == ([case[0][:1]] if trains else [])
    assert [k for k in backward.kernels if k.reduces] == ([kernel] if trains else [])
    assert not backward.that_load(*others)
    if len(case[0]) == 2:
        assert len(backward.kernels) == 1


def test_backward_recomputes_the_mask_in_the_same_pass(sm90_codes: list[Code]) -> None:
    step(CASES["linear bfloat16"], input_gradient=True)
    _, backward = sm90_codes
    kernel = the_only(backward.that_load(the_only(backward.inputs(LINEAR))))
    assert {b.dtype for b in kernel.stores if b.shape == LINEAR} == {torch.bfloat16, torch.float32}


def test_a_fallback_would_be_seen(sm90_codes: list[Code], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)  # where it is set, Inductor refuses to fall back at all
    step(CASES["linear"])
    assert not any(code.calls_of_our_operators for code in sm90_codes)
    torch._dynamo.reset()
    for op in (torch.ops.autosparse.threshold_mask.default, torch.ops.autosparse.anneal_gradient.default):
        monkeypatch.delitem(lowerings, op)
    step(CASES["linear"])
    forward, backward = (code.calls_of_our_operators for code in sm90_codes[2:])
    assert "threshold_mask.default(" in forward[0] and "anneal_gradient.default(" in backward[0]


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
    for options in ({}, {"combo_kernels": True, "combo_kernel_peak_memory_pct_threshold": None}):
        torch._dynamo.reset()
        torch.compile(model, backend="autosparse", options=options)(x)
    assert_fuses_and_keeps_no_mask(sm90_codes)
    apart, merged = sm90_codes
    assert len(apart.that_load(*apart.inputs((256, 256)))) == len(apart.kernels) == 4
    kernel = the_only(merged.kernels)
    assert set(merged.inputs((256, 256))) <= set(kernel.loads) and len(kernel.stores) == 4


RTOL = 1e-4  # of losses


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
            for offset in (model.conv.weight_offset, model.fc.weight_offset):
                offset.add_(0.05)
        loss = (call(x) - 1).square().sum() / 16
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
    counters.clear()
    for mode in ("default", "reduce-overhead"):
        seen, seen_gradients = train_on_cuda(mode, alphas)
        torch.testing.assert_close(seen, losses, rtol=RTOL, atol=0, msg=lambda m, mode=mode: f"{mode}: {m}")
        torch.testing.assert_close(seen_gradients, gradients, rtol=1e-3, atol=1e-5)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert get_manager(torch.cuda.current_device(), create_if_none_exists=False) is not None
    frozen, _ = train_on_cuda("default", alphas[:1] * len(alphas))  # what a replay that missed alpha would give
    assert abs(frozen[-1] - losses[-1]) > 10 * RTOL * losses[-1]

    torch._dynamo.reset()
    model, x = layer(CASES["linear"]).cuda(), torch.randn(8, LINEAR[1]).cuda()
    compiled = torch.compile(model, backend="autosparse", fullgraph=True)
    _, sources = run_and_get_code(lambda: compiled(x).square().sum().backward())
    forward, backward = (re.findall(r"(triton_\w+)\.run\(", source) for source in sources)
    assert sum("threshold_mask" in name for name in forward) == 1
    assert 1 <= sum("anneal_gradient" in name for name in backward) <= (3 if IS_2_11 else 2)
