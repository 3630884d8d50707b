"""The operators of sparse inference: reference implementations, fake kernels, and what inputs they take."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernels.compare import ACTIVATIONS, CONSTANTS, Net, assert_close, sparse, threads
from torch import Tensor
from torch._subclasses import FakeTensorMode

from autosparse_fx.kernels.ops import flatten_shapes

CONV = torch.ops.autosparse.sparse_conv.default
LINEAR = torch.ops.autosparse.sparse_linear.default
PROGRAM = torch.ops.autosparse.run_program.default
CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


def constants_of(activation: str) -> list[float]:
    return list(CONSTANTS.get(activation, ()))


def conv_arguments(activation: str = "none", *, residual: bool = False, groups: int = 1, **changes: Any) -> list[Any]:
    named: dict[str, Any] = {
        "x": torch.randn(2, 6, 9, 8), "weight": sparse(8, 6 // groups, 3, 3, density=0.5), "bias": torch.randn(8),
        "residual": torch.randn(2, 8, 5, 4) if residual else None,
        "stride": [2, 2], "padding": [1, 1], "dilation": [1, 1], "groups": groups,
        "activation": activation, "constants": constants_of(activation),
    }  # fmt: skip
    return list({**named, **changes}.values())


def linear_arguments(activation: str = "none", x: Tensor | None = None) -> list[Any]:
    x = torch.randn(5, 6) if x is None else x
    return [x, sparse(8, 6, density=0.5), torch.randn(8), activation, constants_of(activation)]


def program_arguments() -> tuple[list[Any], list[Tensor]]:
    net = Net()
    x, y = net.input(6, (5, 4)), net.input(8, (5, 4))
    a = net.layer(x, 8, 3, padding=1, residual=y, activation="relu")
    b = net.layer(y, 4, activation="silu")
    inputs = net.random_inputs(3)
    program = net.assemble([a, b])
    return [program.data, inputs, program.any_layout, [3, 8, 5, 4, 3, 4, 5, 4]], net.expected(inputs, [a, b])


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_convolution(activation: str, residual: bool) -> None:
    arguments = conv_arguments(activation, residual=residual)
    x, weight, bias, added, *_ = arguments
    expected = F.conv2d(x.double(), weight.double(), bias.double(), 2, 1)
    expected = ACTIVATIONS[activation](expected if added is None else expected + added.double())
    found = CONV(*arguments)
    assert_close(found, expected)
    assert found.is_contiguous()


@pytest.mark.parametrize("groups", [2])
def test_grouped_convolution(groups: int) -> None:
    arguments = conv_arguments(groups=groups)
    x, weight, bias, *_ = arguments
    assert_close(CONV(*arguments), F.conv2d(x.double(), weight.double(), bias.double(), 2, 1, 1, groups))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_product(activation: str) -> None:
    arguments = linear_arguments(activation)
    x, weight, bias, *_ = arguments
    expected = ACTIVATIONS[activation](F.linear(x.double(), weight.double(), bias.double()))
    assert_close(LINEAR(*arguments), expected)


def test_program() -> None:
    arguments, expected = program_arguments()
    for found, wanted in zip(PROGRAM(*arguments), expected, strict=True):
        assert_close(found, wanted)
        assert found.is_contiguous()


# torch's own opcheck reads .grad of the copies that it made of its arguments.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck_is_clean(activation: str) -> None:
    torch.library.opcheck(CONV, conv_arguments(activation, residual=True))
    torch.library.opcheck(CONV, conv_arguments(activation, x=torch.randn(2, 8, 9, 6).permute(0, 3, 2, 1)[:, :, :, :8]))
    torch.library.opcheck(LINEAR, linear_arguments(activation))
    torch.library.opcheck(LINEAR, linear_arguments(activation, torch.randn(6, 5).t()))


def test_opcheck_of_a_program_is_clean() -> None:
    torch.library.opcheck(PROGRAM, program_arguments()[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_results_are_new_and_contiguous_even_where_nothing_is_done(activation: str) -> None:
    """Neither operator may give back its input, or a view of it."""
    x = torch.randn(2, 6, 9, 8).to(memory_format=torch.channels_last)
    found = CONV(*conv_arguments(activation, x=x))
    with FakeTensorMode() as mode:
        fake = CONV(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in conv_arguments(activation, x=x)])
    assert found.is_contiguous() and fake.stride() == found.stride() and fake.shape == found.shape


@pytest.mark.parametrize("shapes", [[], [[8]], [[8, 5, 4]], [[8, 5, 4], [3], [2, 1, 1]]])
@pytest.mark.parametrize("batch", [0, 1, 7])
def test_fake_shapes_of_a_program(shapes: list[list[int]], batch: int) -> None:
    with FakeTensorMode():
        program, x = torch.empty(64, dtype=torch.uint8), torch.empty(batch, 6, 5, 4)
        found = PROGRAM(program, [x], [], flatten_shapes(shapes))
    assert [list(y.shape) for y in found] == [[batch, *shape] for shape in shapes]
    assert all(y.dtype == torch.float32 and y.is_contiguous() for y in found)


def test_program_keeps_a_symbolic_batch() -> None:
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * 3])
    x = mode.from_tensor(torch.empty(7, 6, 5, 4), symbolic_context=context)
    with mode:
        (y,) = PROGRAM(torch.empty(64, dtype=torch.uint8), [x], [], [3, 8, 5, 4])
    assert isinstance(x.shape[0], torch.SymInt) and str(y.shape[0]) == str(x.shape[0])
    assert y.shape[1:] == (8, 5, 4)


def layouts(x: Tensor) -> list[Tensor]:
    """The same numbers, laid out in memory in all kinds of ways."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
    wide[..., ::2] = x
    return [
        x,
        x.to(memory_format=torch.channels_last),
        x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x.transpose(0, 1).contiguous().transpose(0, 1),
        wide[..., ::2],
        torch.cat([torch.full_like(x[:, :1], torch.nan), x], 1)[:, 1:],
        torch.cat([torch.full_like(x[:, :1], torch.nan), x], 1).to(memory_format=torch.channels_last)[:, 1:],
    ]


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("number", range(8))
def test_program_takes_inputs_of_any_layout(number: int, kernel: int) -> None:
    net = Net()
    y = net.layer(net.input(6, (5, 4)), 8, kernel, padding=kernel // 2)
    (x,) = net.random_inputs(3)
    program = net.assemble([y])
    (found,) = PROGRAM(program.data, [layouts(x)[number]], program.any_layout, [3, 8, 5, 4])
    assert_close(found, net.expected([x], [y])[0])


def test_program_takes_an_expanded_residual_and_tokens_that_are_not_contiguous() -> None:
    net = Net()
    x, r = net.input(6, (5, 4)), net.input(8, (5, 4))
    y = net.layer(x, 8, residual=r)
    x, r = torch.randn(3, 6, 5, 4), torch.randn(3, 8, 1, 1).expand(3, 8, 5, 4)
    program = net.assemble([y])
    (found,) = PROGRAM(program.data, [x, r], program.any_layout, [3, 8, 5, 4])
    assert_close(found, net.expected([x, r], [y])[0])

    net = Net(is_tokens=True)
    y = net.layer(net.input(6), 8)
    x = torch.randn(6, 33).t()
    program = net.assemble([y])
    (found,) = PROGRAM(program.data, [x], program.any_layout, [1, 8])
    assert_close(found, net.expected([x], [y])[0])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_program_runs_on_the_threads_of_torch(count: int) -> None:
    arguments, expected = program_arguments()
    with threads(count):
        for found, wanted in zip(PROGRAM(*arguments), expected, strict=True):
            assert_close(found, wanted)
