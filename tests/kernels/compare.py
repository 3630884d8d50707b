"""Programs and the dense computation that they stand for, in float64."""

import math
import random
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autosparse_fx.kernels.library import library
from autosparse_fx.kernels.program import Buffer, Machine, Program, Step, Window, assemble
from autosparse_fx.kernels.steps import Layout

TOLERANCE = 1e-5  # of the largest output
GUARD = 1027  # floats around what a program may touch; odd, so that nothing is aligned
SENTINEL = -98765.0

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "clamp": lambda x: x.clamp(-0.5, 0.75),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "elu": lambda x: F.elu(x, 1.5),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "mish": F.mish,
}
CONSTANTS = {"clamp": (-0.5, 0.75), "leaky_relu": (0.2,), "elu": (1.5, 1.0)}


def machine() -> Machine:
    return library().machine


def sparse(*shape: int, density: float = 0.2) -> Tensor:
    """Random numbers of which about so many are kept, scaled so that layers keep the size of their inputs."""
    kept = torch.rand(shape) < density
    return torch.randn(shape) * kept / max(1.0, density * math.prod(shape[1:])) ** 0.5


def pair(number: int | tuple[int, int]) -> tuple[int, int]:
    return number if isinstance(number, tuple) else (number, number)


class Net:
    """Steps in a row over numbered buffers, to be run as a program and densely."""

    def __init__(self, *, is_tokens: bool = False) -> None:
        self.is_tokens = is_tokens
        self.sizes: list[tuple[int, tuple[int, int]]] = []  # channels and image of every buffer
        self.inputs: list[int] = []
        self.steps: list[Step] = []

    def input(self, channels: int, size: int | tuple[int, int] = 1) -> int:
        self.sizes.append((channels, pair(size)))
        self.inputs.append(len(self.sizes) - 1)
        return self.inputs[-1]

    def layer(
        self,
        source: int,
        rows: int,
        kernel: int | tuple[int, int] = 1,
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        density: float = 0.2,
        weight: Tensor | None = None,
        **others: Any,
    ) -> int:
        """Add a step, and return the number of its target."""
        channels, size = self.sizes[source]
        kernel, stride, padding, dilation = pair(kernel), pair(stride), pair(padding), pair(dilation)
        out = tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
        )
        assert min(out) > 0
        if weight is None:
            weight = sparse(rows, channels // groups, *kernel, density=density)
        self.sizes.append((rows, (out[0], out[1])))
        target = len(self.sizes) - 1
        others["constants"] = (*CONSTANTS.get(others.get("activation", ""), ()), 0.0, 0.0)[:2]
        window = Window(size, (out[0], out[1]), stride, padding, dilation)
        self.steps.append(Step(source, target, weight, 0.3 * torch.randn(rows), window, groups, **others))
        return target

    def assemble(
        self, outputs: Sequence[int], is_coded: bool | None = None, images: int = 1, tokens: int = 0
    ) -> Program:
        buffers = []
        for number, (channels, size) in enumerate(self.sizes):
            kind, index = "arena", 0
            if number in self.inputs:
                kind, index = "input", self.inputs.index(number)
            elif number in outputs:
                kind, index = "output", list(outputs).index(number)
            buffers.append(Buffer(kind, channels, 0 if self.is_tokens else size[0] * size[1], index))
        steps = self.steps if is_coded is None else [replace(step, layout=Layout(is_coded)) for step in self.steps]
        return assemble(steps, buffers, machine(), is_tokens=self.is_tokens, images=images, tokens=tokens)

    def shape(self, number: int, batch: int) -> tuple[int, ...]:
        channels, size = self.sizes[number]
        return (batch, channels) if self.is_tokens else (batch, channels, *size)

    def random_inputs(self, batch: int) -> list[Tensor]:
        return [torch.randn(self.shape(number, batch)) for number in self.inputs]

    def expected(self, inputs: Sequence[Tensor], outputs: Sequence[int]) -> list[Tensor]:
        values = {number: x.double() for number, x in zip(self.inputs, inputs, strict=True)}
        for step in self.steps:
            x, weight, w = values[step.source], step.weight.double(), step.window
            if self.is_tokens:
                y = F.linear(x, weight[:, :, 0, 0], step.bias.double())
            else:
                y = F.conv2d(x, weight, step.bias.double(), w.stride, w.padding, w.dilation, step.groups)
            if step.residual >= 0:
                y = y + values[step.residual]
            values[step.target] = ACTIVATIONS[step.activation](y)
        return [values[number] for number in outputs]

    def run(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[int],
        *,
        channels_last: bool = False,
        is_coded: bool | None = None,
        images: int = 1,
        tokens: int = 0,
    ) -> list[Tensor]:
        """Run the program on inputs that lie among NaNs, and see that it writes nothing but its outputs."""
        return run_guarded(
            self.assemble(outputs, is_coded, images, tokens),
            inputs,
            [self.shape(n, inputs[0].shape[0]) for n in outputs],
            channels_last=channels_last,
        )

    def check(self, outputs: Sequence[int], batch: int = 5, *, channels_last: bool = False) -> list[Tensor]:
        """Compare runs with the dense computation.

        Patterns are entries, or machine code where that can be; images come one after the other, or side by side, and
        tokens in programs for any number, for one and for nearly a vector.
        """
        inputs = self.random_inputs(batch)
        entries, coded = {"is_coded": False}, {"is_coded": machine().runs_code}
        layouts: list[dict[str, int]] = [entries, entries | {"images": 2}, coded | {"images": 4}]
        if self.is_tokens:
            counts = (0, 1, machine().vector_length - 1)
            layouts = [pattern | {"tokens": count} for pattern in (entries, coded) for count in counts]
        for layout in layouts:
            found = self.run(inputs, outputs, channels_last=channels_last, **layout)
            for y, expected in zip(found, self.expected(inputs, outputs), strict=True):
                assert_close(y, expected)
        return found


def run_guarded(
    program: Program, inputs: Sequence[Tensor], shapes: Sequence[Sequence[int]], *, channels_last: bool = False
) -> list[Tensor]:
    placed = [among_nans(x, channels_last and number in program.any_layout) for number, x in enumerate(inputs)]
    memory = [torch.full([torch.Size(shape).numel() + 2 * GUARD], SENTINEL) for shape in shapes]
    outputs = [m[GUARD:-GUARD].view(shape) for m, shape in zip(memory, shapes, strict=True)]
    library().run(program.data, placed, outputs)
    for m in memory:
        assert (m[:GUARD] == SENTINEL).all() and (m[-GUARD:] == SENTINEL).all(), "written outside of an output"
    return outputs


def among_nans(x: Tensor, channels_last: bool = False) -> Tensor:
    memory = torch.full([x.numel() + 2 * GUARD], torch.nan)
    view = memory[GUARD:-GUARD]
    if channels_last:
        batch, channels, height, width = x.shape
        placed = view.view(batch, height, width, channels).permute(0, 3, 1, 2)
    else:
        placed = view.view(x.shape)
    return placed.copy_(x)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    assert not found.isnan().any()
    error, peak = (found.double() - expected.double()).abs().max().item(), expected.abs().max().item()
    assert error <= tolerance * max(peak, 1e-3), f"off by {error:.3g}, where the largest output is {peak:.3g}"


@contextmanager
def threads(count: int) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def poison() -> None:
    """Leave NaNs in the memory that every thread keeps for its next program."""
    net = Net()
    x = net.input(64, 40)
    y = net.layer(net.layer(x, 64, 3, padding=1, mode="gathered"), 64)
    z = net.layer(y, 64, 3, padding=1, mode="grid")
    library().run(
        net.assemble([z]).data,
        [torch.full(net.shape(x, torch.get_num_threads()), torch.nan)],
        [torch.empty(net.shape(z, torch.get_num_threads()))],
    )


def random_net(rng: random.Random) -> tuple[Net, list[int]]:
    """A net of one to six steps, and the numbers of its outputs."""
    net = Net()
    size = rng.randint(1, 14), rng.randint(1, 14)
    buffers = [net.input(rng.randint(1, 20), size)]
    for _ in range(rng.randint(1, 6)):
        source = rng.choice(buffers[-3:])
        channels, size = net.sizes[source]
        plain = rng.random() < 0.5
        kernel = (1, 1) if plain or rng.random() < 0.3 else (rng.randint(1, 5), rng.randint(1, 5))
        dilation = (1, 1) if plain else (rng.randint(1, 2), rng.randint(1, 3))
        padding = (0, 0) if plain or rng.random() < 0.3 else (rng.randint(0, 3), rng.randint(0, 3))
        if any(n + 2 * p < d * (k - 1) + 1 for n, k, p, d in zip(size, kernel, padding, dilation, strict=True)):
            kernel, padding = (1, 1), (0, 0)
        stride = (1, 1) if plain else (rng.randint(1, 3), rng.randint(1, 4))
        groups = rng.choice([g for g in (1, 2, 3, channels) if channels % g == 0])
        rows = channels if rng.random() < 0.5 else groups * rng.randint(1, 24 // groups + 1)
        modes = ["grid", "gathered", *(["depthwise", "depthwise"] if groups == channels else [])]
        if kernel == (1, 1) and padding == (0, 0):
            modes = ["plain"] if stride == (1, 1) else [*modes, "gathered", "gathered"]
        others: dict[str, Any] = {
            "activation": rng.choice(list(ACTIVATIONS)),
            "mode": rng.choice(["", *modes]),
            "vectors": rng.choice([0, 0, 0, 1, 2, 5, 8]),
            "block_channels": rng.choice([0, 0, 0, 1, 3]),
            "density": rng.choice([0.0, 0.1, 0.3, 1.0]),
        }
        target = net.layer(source, rows, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups,
                           **others)  # fmt: skip
        same = [b for b in buffers if net.sizes[b] == net.sizes[target]]
        if same and rng.random() < 0.7:
            net.steps[-1] = with_residual(net.steps[-1], rng.choice(same))
        elif rng.random() < 0.2:  # another input, to be added
            net.sizes.append(net.sizes[target])
            net.inputs.append(len(net.sizes) - 1)
            net.steps[-1] = with_residual(net.steps[-1], net.inputs[-1])
        buffers.append(target)
    read = {n for step in net.steps for n in (step.source, step.residual)}
    targets = [step.target for step in net.steps]
    return net, [t for t in targets if t not in read or rng.random() < 0.2]


def with_residual(step: Step, residual: int) -> Step:
    return replace(step, residual=residual)
