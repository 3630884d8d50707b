"""Steps that are worked on tile by tile, be it that one looks through a window at what those before it leave."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from kernels.compare import Net, machine, poison, sparse, threads

from autosparse_fx.kernels import chains
from autosparse_fx.kernels.chains import Chain, find_chains, ring_columns
from autosparse_fx.kernels.memory import tiled_buffers
from autosparse_fx.kernels.step_writer import StepWriter
from autosparse_fx.kernels.steps import Buffer, Layout, Step, Window


@pytest.fixture
def nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains of small images too, as of such as no cache keeps."""
    monkeypatch.setattr(chains, "STAYS", 0)


def inverted_residual(size: int, wide: int, stride: int = 1) -> tuple[list[Step], list[Buffer]]:
    """1x1, depthwise, 1x1, and the 1x1 of the next block."""
    out = -(-size // stride)
    before, after = Window((size, size), (size, size)), Window((out, out), (out, out))
    look = Window((size, size), (out, out), (stride, stride), (1, 1))
    steps = [
        Step(0, 1, sparse(wide, 16, 1, 1), torch.zeros(wide), before),
        Step(1, 2, sparse(wide, 1, 3, 3), torch.zeros(wide), look, groups=wide),
        Step(2, 3, sparse(16, wide, 1, 1), torch.zeros(16), after),
        Step(3, 4, sparse(wide, 16, 1, 1), torch.zeros(wide), after),
    ]
    sizes = [(16, size), (wide, size), (wide, out), (16, out), (wide, out)]
    kinds = ["input", "arena", "arena", "arena", "output"]
    return steps, [Buffer(kind, c, n * n) for kind, (c, n) in zip(kinds, sizes, strict=True)]


def chains_of(steps: Sequence[Step], buffers: Sequence[Buffer], images: int = 0) -> list[Chain]:
    steps = [replace(step, layout=Layout(is_coded=False)) for step in steps]  # all tiles equally wide
    writers = [StepWriter(step, machine(), images=images) for step in steps]
    tiled = tiled_buffers(writers, buffers)
    for writer in writers:
        if writer.mode == "plain" and writer.step.source in tiled:
            writer.read_tiles()
    found = find_chains(writers, buffers)
    for number, columns in ring_columns(writers, buffers, found).items():
        assert buffers[number].kind == "arena" and columns % writers[number - 1].width == 0
    return found


def lengths(found: Sequence[Chain]) -> list[tuple[int, int]]:
    return [(chain.length, chain.window - chain.first if chain.window >= 0 else -1) for chain in found]


# Which steps make a chain.


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_layer_follows_its_expansion(stride: int) -> None:
    assert lengths(chains_of(*inverted_residual(112, 96, stride))) == [(4, 1)]


def test_what_a_cache_keeps_is_not_computed_twice_at_the_seam() -> None:
    assert lengths(chains_of(*inverted_residual(14, 96))) == [(1, -1), (3, -1)]


def test_images_side_by_side_see_no_window_ahead(nothing_stays: None) -> None:
    assert lengths(chains_of(*inverted_residual(7, 96), images=2)) == [(1, -1), (3, -1)]


def test_nobody_else_may_read_what_comes_before_a_window() -> None:
    steps, buffers = inverted_residual(112, 96)
    taken = Step(1, 5, sparse(8, 96, 1, 1), torch.zeros(8), steps[0].window)
    assert lengths(chains_of([*steps, taken], [*buffers, Buffer("output", 8, 112 * 112, 1)]))[0] == (1, -1)
    buffers[1] = Buffer("output", 96, 112 * 112, 1)
    assert lengths(chains_of(steps, buffers)) == [(1, -1), (3, -1)]


def test_a_chain_ends_before_the_expansion_of_the_next_window() -> None:
    """The wide tensor is worth more than the narrow one in front of it; a narrow one is not."""
    steps, buffers = inverted_residual(112, 96)
    look = Window((112, 112), (112, 112), (1, 1), (1, 1))
    buffers[4:] = [Buffer("arena", 96, 112 * 112), Buffer("output", 96, 112 * 112)]
    follow = Step(4, 5, sparse(96, 1, 3, 3), torch.zeros(96), look, groups=96)
    assert lengths(chains_of([*steps, follow], buffers)) == [(3, 1), (2, 1)]
    # A bottleneck: wide, narrow, window.
    bottleneck = [
        Step(0, 1, sparse(96, 16, 3, 3), torch.zeros(96), look),
        Step(1, 2, sparse(16, 96, 1, 1), torch.zeros(16), steps[0].window),
        Step(2, 3, sparse(16, 16, 3, 3), torch.zeros(16), look),
        Step(3, 4, sparse(96, 16, 1, 1), torch.zeros(96), steps[0].window, residual=1),
    ]
    channels = [("input", 16), ("arena", 96), ("arena", 16), ("arena", 16), ("output", 96)]
    buffers = [Buffer(kind, c, 112 * 112) for kind, c in channels]
    assert lengths(chains_of(bottleneck, buffers)) == [(2, -1), (2, -1)]


def test_a_ring_holds_what_a_window_reads() -> None:
    """Of a 3x3 window over images 64 wide, tiles of two rows: four rows, and the tile has one to spare on each side."""
    step, writers = Window((64, 64), (64, 64), (1, 1), (1, 1)), []
    for source, weight, groups in ((0, sparse(32, 8, 1, 1), 1), (1, sparse(32, 1, 3, 3), 32)):
        window = step if groups > 1 else Window((64, 64), (64, 64))
        vectors = 128 // machine().vector_length
        writers.append(StepWriter(Step(source, source + 1, weight, torch.zeros(32), window, groups, vectors=vectors),
                                  machine()))  # fmt: skip
    buffers = [Buffer(kind, c, 64 * 64) for kind, c in (("input", 8), ("arena", 32), ("output", 32))]
    found = find_chains(writers, buffers)
    assert lengths(found) == [(2, 1)]
    assert found[0].reads is not None
    assert found[0].reads[[0, 1, -1]].tolist() == [[0, 2], [0, 3], [30, 32]]
    assert ring_columns(writers, buffers, found) == {1: 3 * 128}


# What they compute.


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("mode", ["grid", "gathered", "depthwise"])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), [(3, 1, 1, 1), (3, 2, 1, 1), (5, 2, 0, 1), (3, 1, 4, 2), (1, 3, 0, 1)]
)
def test_windows_over_a_ring(
    nothing_stays: None, mode: str, kernel: int, stride: int, padding: int, dilation: int, count: int
) -> None:
    net = Net()
    x = net.layer(net.input(5, (37, 29)), 12, activation="relu", vectors=2)
    groups = 12 if mode == "depthwise" else 1
    y = net.layer(x, 12, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, mode=mode,
                  vectors=1, activation="silu")  # fmt: skip
    end = net.layer(y, 7, vectors=1)
    with threads(count):
        poison()
        for batch in (1, 3):
            inputs = net.random_inputs(batch)
            for images in (0, 1):
                found = net.run(inputs, [end], is_coded=False, images=images)
                torch.testing.assert_close(found[0].double(), net.expected(inputs, [end])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vectors", [(8, 1), (1, 8), (3, 2), (0, 0)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_inverted_residuals_one_after_the_other(nothing_stays: None, vectors: tuple[int, int], count: int) -> None:
    net = Net()
    x = net.input(8, (30, 26))
    for stride in (1, 2, 1, 1):
        y = net.layer(x, 40, activation="clamp", vectors=vectors[0])
        y = net.layer(y, 40, 3, stride=stride, padding=1, groups=40, activation="clamp", vectors=vectors[1])
        x = net.layer(y, 8, residual=x if stride == 1 else -1, vectors=vectors[1])
    with threads(count):
        poison()
        net.check([x], 1)
        net.check([x], 4)
