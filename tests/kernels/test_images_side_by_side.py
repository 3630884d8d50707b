"""The last layers of a network have few pixels: several images stand side by side in their tiles."""

import random

import pytest
import torch
from kernels.compare import Net, assert_close, machine, poison, random_net, run_guarded, threads

from autosparse_fx.kernels.step_writer import StepWriter
from autosparse_fx.kernels.steps import JOINT_COLUMNS, Layout


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    poison()


def narrowing() -> tuple[Net, list[int]]:
    """A bottleneck block that halves 14x14 images, and one behind it, as at the end of a ResNet."""
    net = Net()
    x = net.layer(net.input(48, 14), 96, activation="relu")
    first = net.layer(net.layer(x, 100, activation="relu"), 100, 3, stride=2, padding=1, activation="relu")
    short = net.layer(x, 130, stride=2)
    y = net.layer(first, 130, activation="relu", residual=short)
    second = net.layer(net.layer(y, 100, activation="relu"), 100, 3, padding=1, activation="relu")
    return net, [net.layer(second, 130, activation="relu", residual=y)]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 9])
def test_any_number_of_images(batch: int, count: int) -> None:
    """Programs laid out for four images per thread run with fewer, and with more."""
    torch.manual_seed(batch)
    net, outputs = narrowing()
    with threads(count):
        net.check(outputs, batch)


def test_images_do_not_see_each_other() -> None:
    """Images give the same alone, bit for bit, and a bad one harms no other."""
    torch.manual_seed(0)
    net, outputs = narrowing()
    [x] = net.random_inputs(4)
    program = net.assemble(outputs, images=4)
    with threads(1):
        [together] = run_guarded(program, [x], [net.shape(outputs[0], 4)])
        for number in range(4):
            [alone] = run_guarded(program, [x[number : number + 1]], [net.shape(outputs[0], 1)])
            assert torch.equal(alone[0], together[number])
        x[2] = torch.nan
        [spoiled] = run_guarded(program, [x], [net.shape(outputs[0], 4)])
    assert spoiled[2].isnan().all()
    assert torch.equal(spoiled[[0, 1, 3]], together[[0, 1, 3]])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [1, 3, 7, 8])
def test_inputs_and_outputs_lie_image_by_image(size: int, channels_last: bool) -> None:
    net = Net()
    x, other = net.input(40, size), net.input(33, size)
    y = net.layer(x, 33, residual=other, activation="relu")
    z = net.layer(y, 20)
    with threads(1):
        net.check([y, z, net.layer(x, 9)], 6, channels_last=channels_last)


def test_layers_in_blocks() -> None:
    net = Net()
    x = net.layer(net.input(50, 7), 120, 3, padding=1, block_channels=7)
    with threads(1):
        net.check([net.layer(x, 60, block_channels=9)], 4)


@pytest.mark.parametrize("dilation", [12, 17, 24, 30])
@pytest.mark.parametrize("batch", [2, 4, 9])
def test_windows_as_wide_as_the_image_see_no_other(batch: int, dilation: int) -> None:
    net = Net()
    x = net.input(88, 8)
    with threads(1):
        net.check([net.layer(x, 88, 3, padding=dilation, dilation=dilation, density=0.2)], batch)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel, dilation", [(2, 1), (3, 2), (5, 1)])
def test_windows(kernel: int, dilation: int, stride: int) -> None:
    net = Net()
    x = net.input(13, (9, 11))
    with threads(1):
        net.check([net.layer(x, 100, kernel, stride=stride, padding=2, dilation=dilation)], 5)


def test_random_networks() -> None:
    with threads(1):
        for seed in range(60):
            torch.manual_seed(seed)
            net, outputs = random_net(random.Random(seed))
            inputs = net.random_inputs(7)
            shapes = [net.shape(number, 7) for number in outputs]
            found = run_guarded(net.assemble(outputs, images=3), inputs, shapes)
            for y, expected in zip(found, net.expected(inputs, outputs), strict=True):
                assert_close(y, expected)


def test_only_narrow_layers_at_the_end() -> None:
    net, _ = narrowing()
    narrow = [StepWriter(step, machine()).may_be_joint for step in net.steps]
    assert narrow == [False, False, True, True, True, True, True, True]

    net = Net()
    x = net.input(8, 8)
    net.layer(x, 200, 3, padding=1)
    net.layer(x, 8, 3, padding=1)  # few rows read its columns: it packs a grid of one image
    net.layer(x, 8, 3, padding=1, groups=8)
    net.layer(x, 8, mode="plain", padding=0)
    assert [StepWriter(step, machine()).may_be_joint for step in net.steps] == [True, False, True, True]
    assert net.sizes[1][1][0] * net.sizes[1][1][1] == JOINT_COLUMNS


def test_one_image_per_thread_keeps_narrow_tiles() -> None:
    net, outputs = narrowing()
    assert torch.equal(net.assemble(outputs, False, 1).data, net.assemble(outputs, False, 0).data)
    assert not torch.equal(net.assemble(outputs, False, 1).data, net.assemble(outputs, False, 2).data)


def test_shared_images_have_tiles_to_share() -> None:
    """Machine code likes wide tiles, but an image that threads share needs one for each of them."""
    net = Net()
    net.layer(net.input(256, 14), 256, layout=Layout(machine().runs_code))
    [step] = net.steps
    assert StepWriter(step, machine(), is_narrow=True).width < net.sizes[1][1][0] ** 2


@pytest.mark.parametrize("density", [0.0, 0.2])
def test_tiles_are_equally_wide_where_any_step_is_no_machine_code(density: float) -> None:
    """Steps on images of one size hand each other tiles, which are narrow unless all of them are machine code."""
    if not machine().runs_code:
        pytest.skip("patterns are no machine code here")

    def data(*layouts: Layout) -> torch.Tensor:
        torch.manual_seed(0)
        net = Net()
        x = net.input(256, 28)
        for layout in layouts:
            x = net.layer(x, 256, density=density, layout=layout)
        x = net.layer(x, 256, 2, stride=2, density=density, layout=Layout(True))  # of another size
        net.check([x], 2)
        found = net.assemble([x]).data.clone()
        found[32:40] = 0  # where it lies in memory
        return found

    coded, narrow, not_coded = Layout(True), Layout(True, machine().most_vectors), Layout(False)
    assert torch.equal(data(coded, not_coded), data(narrow, not_coded))
    assert not torch.equal(data(coded, coded), data(narrow, narrow))


@pytest.mark.parametrize("stride", [2, 3, (1, 2)])
def test_pixels_are_picked_out_of_tiles_of_several_images(stride: int | tuple[int, int]) -> None:
    net = Net()
    behind = net.layer(net.input(13, 5), 11, vectors=1)
    net.check([net.layer(behind, 14, stride=stride, vectors=1)], 5)
