"""Programs over images: every kind of layer, by itself and in a row, against dense PyTorch in float64.

All runs have NaNs around their inputs and in the memory that threads keep, and guards around their outputs.
"""

from dataclasses import replace

import pytest
import torch
from kernels.compare import ACTIVATIONS, Net, assert_close, poison, sparse, threads

from autosparse_fx.kernels.step_writer import StepWriter
from autosparse_fx.kernels.steps import Machine, Step, Window

WINDOW_MODES = ["grid", "gathered"]


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    poison()


def one_layer(channels: int, size: int | tuple[int, int], rows: int, *args: object, **kwargs: object) -> Net:
    net = Net()
    net.layer(net.input(channels, size), rows, *args, **kwargs)  # type: ignore[arg-type]
    return net


# One layer.


@pytest.mark.parametrize("size", [1, 2, (1, 17), 7, (9, 13), 16, 23])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_plain(size: int | tuple[int, int], batch: int) -> None:
    one_layer(37, size, 19).check([1], batch)


@pytest.mark.parametrize("mode", WINDOW_MODES)
@pytest.mark.parametrize("kernel", [1, 2, 3, (1, 5), (5, 1), (3, 4), 7])
@pytest.mark.parametrize("stride", [1, 2, 3, (1, 2), (3, 1)])
def test_kernel_and_stride(kernel: int | tuple[int, int], stride: int | tuple[int, int], mode: str) -> None:
    one_layer(5, (13, 17), 7, kernel, stride=stride, padding=1, mode=mode).check([1])


@pytest.mark.parametrize("mode", WINDOW_MODES)
@pytest.mark.parametrize("padding", [0, 1, 4, (0, 3), (6, 0)])
@pytest.mark.parametrize("dilation", [1, 2, 3, (1, 4), (4, 1)])
def test_padding_and_dilation(padding: int | tuple[int, int], dilation: int | tuple[int, int], mode: str) -> None:
    one_layer(3, (11, 10), 9, 3, padding=padding, dilation=dilation, mode=mode, stride=2).check([1])


@pytest.mark.parametrize("mode", WINDOW_MODES)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 3), (5, 31), (40, 3)])
def test_image_smaller_than_its_padding_and_odd_ones(size: tuple[int, int], mode: str) -> None:
    one_layer(4, size, 6, 3, padding=5, mode=mode).check([1], 3)
    one_layer(4, size, 6, 3, padding=2, stride=4, mode=mode).check([1], 3)


@pytest.mark.parametrize("mode", WINDOW_MODES)
def test_taps_that_see_nothing_but_padding(mode: str) -> None:
    one_layer(4, 2, 6, 3, padding=9, dilation=7, mode=mode).check([1])


@pytest.mark.parametrize(("size", "stride", "mode"), [((9, 300), 1, "gathered"), ((9, 224), 2, "gathered"),
                                                      ((9, 56), 1, "grid"), ((9, 28), 2, "grid")])  # fmt: skip
def test_wide_images_are_packed_a_row_per_tap(size: tuple[int, int], stride: int, mode: str) -> None:
    """In a grid is all between the taps of a tile: of rows longer than it, most is read by none."""
    out = (size[0] - 1) // stride + 1, (size[1] - 1) // stride + 1
    window = Window(size, out, (stride, stride), (1, 1))
    for groups in (1, 3):
        step = Step(0, 1, torch.ones(6, 6 // groups, 3, 3), torch.zeros(6), window, groups)
        assert StepWriter(step, Machine(16, 8, False)).mode == mode
        one_layer(6, size, 6, 3, stride=stride, padding=1, groups=groups).check([1], 2)


@pytest.mark.parametrize("kernel", [1, 2, 3, (1, 5), 5])
@pytest.mark.parametrize("stride", [1, 2, 3, (1, 2)])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("dilation", [1, 2, (1, 3)])
def test_depthwise(
    kernel: int | tuple[int, int], stride: int | tuple[int, int], padding: int, dilation: int | tuple[int, int]
) -> None:
    for size, multiplier in (((13, 17), 1), ((30, 19), 2)):
        window = {"stride": stride, "padding": padding, "dilation": dilation, "groups": 6}
        one_layer(6, size, 6 * multiplier, kernel, mode="depthwise", density=0.8, **window).check([1], 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (40, 3), (7, 7), (14, 14), (28, 56)])
@pytest.mark.parametrize("vectors", [0, 1, 3, 8])
def test_depthwise_of_many_sizes(size: tuple[int, int], vectors: int) -> None:
    one_layer(5, size, 5, 3, padding=1, groups=5, density=1.0, vectors=vectors).check([1], 3)
    one_layer(5, size, 5, 3, padding=1, groups=5, density=1.0, stride=2, vectors=vectors).check([1], 1)


@pytest.mark.parametrize("kernel", [(1, 9), (9, 1), (1, 25), (25, 1), 3, 5])
@pytest.mark.parametrize("stride", [2, (1, 2), (3, 2)])
def test_depthwise_of_as_many_taps_as_a_square_has(
    kernel: int | tuple[int, int], stride: int | tuple[int, int]
) -> None:
    for multiplier in (1, 2):
        net = one_layer(6, (30, 41), 6 * multiplier, kernel, stride=stride, padding=1, groups=6, density=0.8)
        net.check([1], 3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("team", [1, 3])
def test_depthwise_of_stride_2_with_a_residual(activation: str, team: int) -> None:
    net = Net()
    x, added = net.input(6, (27, 41)), net.input(12, (14, 21))
    y = net.layer(x, 12, 3, stride=2, padding=1, groups=6, activation=activation)
    net.steps[-1] = replace(net.steps[-1], residual=added)
    with threads(team):
        net.check([y], 1)


@pytest.mark.parametrize("size", [(12, 16), (9, 16), (10, 14), (21, 28), (144, 1), (9, 7)])
def test_tiles_are_of_whole_rows_only_where_all_are_as_wide(size: tuple[int, int]) -> None:
    net = Net()
    wide = net.layer(net.input(8, size), 40)
    seen = net.layer(wide, 40, 3, padding=1, groups=40)
    y = net.layer(seen, 16)
    vectors = -(-size[0] * size[1] // 16)
    for step in net.steps:
        tile = StepWriter(step, Machine(16, 8, False)).vectors
        tiles = -(-vectors // 8)
        assert tile == -(-vectors // tiles)
    for team in (1, 2, 3):
        with threads(team):
            net.check([y], 1)


@pytest.mark.parametrize("size", [56, 112])
def test_tiles_of_large_images_are_of_whole_rows(size: int) -> None:
    step = Step(0, 1, torch.ones(6, 1, 3, 3), torch.zeros(6), Window((size, size), (size, size), (1, 1), (1, 1)), 6)
    assert StepWriter(step, Machine(16, 8, False)).width % size == 0


@pytest.mark.parametrize("mode", ["", *WINDOW_MODES])
@pytest.mark.parametrize("groups", [2, 4, 12])
@pytest.mark.parametrize("multiplier", [1, 3])
def test_groups(groups: int, multiplier: int, mode: str) -> None:
    one_layer(12, (9, 11), 12 * multiplier, 3, padding=1, groups=groups, density=0.6, mode=mode).check([1], 3)
    one_layer(12, (30, 31), 12 * multiplier, 3, padding=1, groups=groups, stride=2, mode=mode).check([1], 1)


@pytest.mark.parametrize("groups", [2, 12])
def test_grouped_plain(groups: int) -> None:
    one_layer(12, (9, 11), 24, groups=groups).check([1])


@pytest.mark.parametrize("mode", ["plain", *WINDOW_MODES])
@pytest.mark.parametrize("vectors", range(1, 9))
def test_width_of_tiles(vectors: int, mode: str) -> None:
    one_layer(6, (13, 11), 10, 1 if mode == "plain" else 3, vectors=vectors, mode=mode).check([1])


@pytest.mark.parametrize("mode", ["plain", *WINDOW_MODES])
@pytest.mark.parametrize("block_channels", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("groups", [1, 2])
def test_blocks_of_channels(block_channels: int, groups: int, mode: str) -> None:
    kernel = 1 if mode == "plain" else 3
    net = one_layer(14, (13, 17), 10, kernel, block_channels=block_channels, groups=groups, mode=mode, vectors=2)
    net.check([1])


@pytest.mark.parametrize(("kernel", "mode"), [((33, 33), "gathered"), ((64, 64), "gathered"), ((40, 90), "")])
def test_windows_so_large_that_their_tiles_are_narrow(kernel: tuple[int, int], mode: str) -> None:
    """An entry's offset has two bytes."""
    step = Step(0, 1, torch.ones(3, 2, *kernel), torch.zeros(3), Window((80, 120), (80, 120)), mode=mode)
    for vector_length in (4, 8, 16):
        writer = StepWriter(step, Machine(vector_length, 8, False))
        assert writer.block_channels * writer.packing.floats <= 2**16
    one_layer(2, (80, 120), 3, kernel, padding=30, density=0.02, mode=mode).check([1], 1)


def test_a_window_that_offsets_do_not_reach() -> None:
    step = Step(0, 1, torch.ones(3, 2, 65, 65), torch.zeros(3), Window((80, 80), (16, 16)), mode="gathered")
    with pytest.raises(ValueError, match="65 x 65 is too large"):
        StepWriter(step, Machine(16, 8, False))


@pytest.mark.parametrize("rows", [95, 96, 130])  # around where packing a row per tap begins
def test_default_mode_by_rows(rows: int) -> None:
    one_layer(20, 14, rows, 3, padding=1).check([1])


def test_default_blocks_of_a_layer_that_needs_several() -> None:
    one_layer(300, 14, 40, 3, padding=1, density=0.05).check([1], 1)
    one_layer(700, 14, 40, density=0.05).check([1], 1)


@pytest.mark.parametrize("mode", ["plain", *WINDOW_MODES])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation(activation: str, with_residual: bool, mode: str) -> None:
    net = Net()
    x = net.input(8, (7, 9))
    residual = net.input(12, (7, 9)) if with_residual else -1
    kernel, padding = (1, 0) if mode == "plain" else (3, 1)
    y = net.layer(x, 12, kernel, padding=padding, residual=residual, activation=activation, mode=mode)
    net.check([y])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_of_large_and_tiny_numbers(activation: str) -> None:
    net = one_layer(1, (1, 21), 1, weight=torch.ones(1, 1, 1, 1), activation=activation)
    object.__setattr__(net.steps[0], "bias", torch.zeros(1))
    x = torch.tensor([0.0, 1e-30, 1e-6, 1e-3, 0.1, 1, 5, 20, 88, 100, 3e4])
    x = torch.cat([-x.flip(0)[:-1], x]).view(1, 1, 1, 21)
    (found,), (expected,) = net.run([x], [1]), net.expected([x], [1])
    error = (found.double() - expected).abs() / expected.abs().clamp(min=1)
    assert error.max() < 1e-5


@pytest.mark.parametrize("mode", ["plain", *WINDOW_MODES])
@pytest.mark.parametrize("density", [0.0, 1.0], ids=["all zero", "dense"])
def test_zero_and_dense_weight(density: float, mode: str) -> None:
    net = one_layer(40, (7, 9), 30, 1 if mode == "plain" else 3, density=density, mode=mode)
    (y,) = net.check([1])
    if density == 0:
        assert torch.equal(y, net.steps[0].bias.view(1, -1, 1, 1).expand_as(y))


@pytest.mark.parametrize("mode", ["plain", *WINDOW_MODES])
def test_rows_and_channels_that_are_zero(mode: str) -> None:
    kernel = 1 if mode == "plain" else 3
    weight = sparse(20, 16, kernel, kernel, density=0.5)
    weight[[0, 1, 7, 19]] = 0
    weight[:, [0, 8, 15]] = 0
    one_layer(16, 9, 20, kernel, weight=weight, mode=mode, block_channels=4).check([1])


def test_channels_that_no_weight_reads_may_hold_anything() -> None:
    weight = sparse(6, 4, 3, 3, density=0.5)
    weight[:, 2] = 0
    net = one_layer(4, 6, 6, 3, weight=weight, padding=1)
    x = torch.randn(2, 4, 6, 6)
    expected = net.expected([x], [1])[0]
    x[:, 2] = torch.nan
    assert_close(net.run([x], [1])[0], expected)


@pytest.mark.parametrize("mode", ["", *WINDOW_MODES])
@pytest.mark.parametrize("stride", [2, 3, (1, 2), (4, 1), 20])
@pytest.mark.parametrize("size", [(13, 17), (8, 8), (1, 30)])
def test_strided_1x1(size: tuple[int, int], stride: int | tuple[int, int], mode: str) -> None:
    one_layer(9, size, 7, 1, stride=stride, mode=mode, block_channels=4).check([1], 3)


# Several layers.


def test_chain_of_plain_layers_behind_a_window() -> None:
    net = Net()
    x = net.input(24, 14)
    wide = net.layer(x, 128, 3, padding=1, activation="relu")
    middle = net.layer(wide, 32, activation="gelu")
    end = net.layer(net.layer(middle, 64), 16, activation="relu")
    net.check([end], 3)


def test_residual_that_is_read_late() -> None:
    """Whatever takes the place of a buffer in the arena must wait until its last reader is through."""
    net = Net()
    first = net.layer(net.input(16, (9, 7)), 16, 3, padding=1)
    x = first
    for _ in range(6):
        x = net.layer(x, 16, 3, padding=1, activation="silu")
    net.check([net.layer(x, 16, residual=first)], 3)


@pytest.mark.parametrize("kernel", [1, 3])
def test_bottlenecks(kernel: int) -> None:
    net = Net()
    x = net.layer(net.input(3, 28), 32, 7, stride=2, padding=3, activation="relu", density=0.7)
    for number in range(4):
        y = net.layer(x, 8, activation="relu")
        y = net.layer(y, 8, kernel, padding=kernel // 2, activation="relu", groups=2 if number % 2 else 1, density=0.5)
        x = net.layer(y, 32, residual=x, activation="relu")
    net.check([x], 3)


def test_inverted_residuals() -> None:
    net = Net()
    x = net.input(16, (15, 13))
    for stride in (1, 2, 1):
        y = net.layer(x, 48, activation="clamp")
        y = net.layer(y, 48, 3, stride=stride, padding=1, groups=48, density=1.0, activation="clamp")
        x = net.layer(y, 16, residual=x if stride == 1 else -1)
    net.check([x], 2)


@pytest.mark.parametrize("mode", WINDOW_MODES)
def test_target_that_windows_and_plain_layers_read(mode: str) -> None:
    net = Net()
    shared = net.layer(net.input(10, (9, 11)), 24)
    plain = net.layer(shared, 24)
    window = net.layer(shared, 24, 3, padding=1, mode=mode, residual=plain)
    net.check([net.layer(window, 5, residual=-1), net.layer(window, 24, residual=shared)])


def test_outputs_that_are_read_by_later_steps() -> None:
    net = Net()
    a = net.layer(net.input(12, (7, 9)), 20, activation="relu")
    b = net.layer(a, 20, 3, padding=1)
    c = net.layer(b, 20, residual=a)
    net.check([a, b, c])
    net.check([c, a])
    net.check([b, c], 1)


@pytest.mark.parametrize("behind", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_strided_layer_reads_the_tiles_of_the_stage_before(behind: int, count: int) -> None:
    net = Net()
    x = net.layer(net.input(6, (22, 20)), 20, 3, padding=1, mode="gathered")
    y = net.layer(x, 20, residual=x, activation="relu")
    side = net.layer(y, 24, stride=2)
    main = net.layer(net.layer(y, 8), 8, 3, stride=2, padding=1)
    end = net.layer(net.layer(main, 24, residual=side, activation="relu"), 5, behind, padding=behind // 2)
    with threads(count):
        poison()
        net.check([end], 1)
        net.check([end], 4)


def test_strided_layer_of_one_channel() -> None:
    net = Net()
    x = net.layer(net.input(6, (22, 20)), 1)
    net.check([net.layer(net.layer(x, 1), 4, stride=2), net.layer(x, 3)], 3)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_residuals_that_are_overwritten_where_they_are(count: int) -> None:
    """A long row of sums, of which some are read once more later, and some by two."""
    net = Net()
    x = net.layer(net.input(6, (22, 20)), 16, 3, padding=1)
    kept = []
    for number in range(8):
        y = net.layer(net.layer(x, 16, activation="relu"), 16, residual=x, activation="silu")
        kept.append(y if number % 3 == 0 else x)
        x = y
    for other in kept[::2]:
        x = net.layer(x, 16, residual=other)
    with threads(count):
        poison()
        net.check([x], 1)
        net.check([x, kept[0]], 4)


def test_several_inputs_of_different_sizes() -> None:
    net = Net()
    x, y, z = net.input(7, (9, 8)), net.input(11, (9, 8)), net.input(5, 3)
    a = net.layer(x, 11, residual=y)
    net.check([net.layer(a, 4, 3), net.layer(z, 9), net.layer(y, 3, residual=-1)], 3)


def test_step_whose_source_is_its_residual() -> None:
    net = Net()
    a = net.layer(net.input(12, (5, 6)), 16)
    b = net.layer(a, 16, residual=a, activation="relu")
    net.check([net.layer(b, 16, residual=b)])


def test_input_that_is_source_and_residual() -> None:
    net = Net()
    x = net.input(12, (5, 6))
    net.check([net.layer(x, 12, residual=x)], channels_last=True)


def test_tiles_of_different_widths_in_a_row() -> None:
    net = Net()
    x = net.input(12, (13, 11))
    for vectors in (2, 2, 3, 1, 1, 8):
        x = net.layer(x, 14, vectors=vectors, activation="relu")
    net.check([x])


def test_arena_is_shared_by_buffers_that_do_not_live_at_one_time() -> None:
    def arena_bytes(layers: int) -> int:
        net = Net()
        x = net.input(16, 32)
        for _ in range(layers):
            x = net.layer(x, 16, 3, padding=1)
        header = net.assemble([x]).data[:48].view(torch.int64)
        return int(header[3])

    assert arena_bytes(4) == arena_bytes(9) < 3 * (4 * 16 * 1024 + 4096 + 64)


# Layout of inputs.


@pytest.mark.parametrize("size", [1, (1, 7), (9, 11), 16])
@pytest.mark.parametrize("channels", [1, 5, 16, 37])
def test_channels_last_input(size: int | tuple[int, int], channels: int) -> None:
    net = one_layer(channels, size, 9)
    assert net.assemble([1]).any_layout == [0]
    net.check([1], 3, channels_last=True)


def test_inputs_that_windows_or_residuals_read_must_be_contiguous() -> None:
    net = Net()
    x, y, z = net.input(6, 5), net.input(6, 5), net.input(6, 5)
    a = net.layer(x, 6, 3, padding=1)
    b = net.layer(y, 6, residual=z)
    c = net.layer(z, 6)
    assert net.assemble([a, b, c]).any_layout == [1]
    net.check([a, b, c], channels_last=True)
