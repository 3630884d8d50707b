"""Programs over tokens, on several threads, and at random, against dense PyTorch in float64.

All runs have NaNs around their inputs and in the memory that threads keep, and guards around their outputs.
"""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kernels.compare import ACTIVATIONS, Net, assert_close, machine, poison, random_net, run_guarded, sparse, threads
from torch import Tensor

from autosparse_fx.kernels import chains
from autosparse_fx.kernels.program import Buffer, Step, Window, assemble
from autosparse_fx.kernels.steps import Layout


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    poison()


# Tokens.


@pytest.mark.parametrize("count", [1, 2, 3, 15, 16, 17, 63, 127, 128, 129, 197, 300, 500])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_tokens(number: int, count: int) -> None:
    net = Net(is_tokens=True)
    x = net.input(37)
    for rows in (50, 33, 21)[:number]:
        x = net.layer(x, rows, activation="gelu")
    net.check([x], count)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_of_tokens(activation: str) -> None:
    net = Net(is_tokens=True)
    net.check([net.layer(net.input(19), 23, activation=activation)], 70)


@pytest.mark.parametrize("count", [1, 40, 300])
def test_products_of_the_same_tokens(count: int) -> None:
    net = Net(is_tokens=True)
    x = net.input(24)
    heads = [net.layer(x, rows) for rows in (24, 24, 31)]
    net.check([*heads, net.layer(heads[0], 7), net.layer(x, 1)], count)


def test_tokens_in_blocks() -> None:
    net = Net(is_tokens=True)
    x = net.layer(net.input(700), 300, density=0.05, activation="relu")
    net.check([net.layer(x, 40, density=0.05)], 150)
    net = Net(is_tokens=True)
    net.check([net.layer(net.input(40), 30, block_channels=7)], 150)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 15])
@pytest.mark.parametrize("number", [1, 2, 11])
def test_few_tokens(count: int, number: int) -> None:
    """As decoding has them; in blocks, of dense and empty rows, and in steps that read what others leave."""
    net = Net(is_tokens=True)
    weight = sparse(33, 300, 1, 1, density=0.3)
    weight[4], weight[5] = 0, 1
    x = net.layer(net.input(300), 33, weight=weight, block_channels=70, activation="gelu")
    y = net.layer(net.layer(x, 50, activation="relu"), 19, density=1.0)
    with threads(number):
        net.check([net.layer(x, 21), y], count)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 4)])
@pytest.mark.parametrize("number", [1, 2])
def test_images_of_few_pixels_with_residuals(size: tuple[int, int], number: int) -> None:
    net = Net()
    x = net.layer(net.input(40, size), 33, activation="silu")
    y = net.layer(x, 33, residual=x, activation="relu", block_channels=9)
    in_place = net.layer(net.layer(y, 20), 33, residual=y, activation="relu")
    with threads(number):
        net.check([net.layer(in_place, 7, residual=net.input(7, size))], 3)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_tokens_with_zero_and_dense_weight(density: float) -> None:
    net = Net(is_tokens=True)
    net.check([net.layer(net.layer(net.input(20), 30, density=density), 9, density=density)], 33)


@pytest.mark.parametrize("vectors", [1, 3, 8])
def test_tokens_in_narrow_tiles(vectors: int) -> None:
    net = Net(is_tokens=True)
    net.check([net.layer(net.input(20), 30, vectors=vectors)], 150)
    net = Net(is_tokens=True)
    a = net.layer(net.input(20), 30, vectors=vectors)
    b, c = net.layer(a, 12, vectors=vectors), net.layer(a, 9, vectors=vectors)
    net.check([c, net.layer(b, 7, vectors=vectors)], 150)


@pytest.mark.parametrize("is_tokens", [False, True], ids=["images", "tokens"])
def test_batch_of_none(is_tokens: bool) -> None:
    net = Net(is_tokens=is_tokens)
    y = net.layer(net.layer(net.input(20), 30), 4)
    (found,) = net.run(net.random_inputs(0), [y])
    assert found.shape[:2] == (0, 4)


# Threads.


def resnet_like() -> tuple[Net, list[int]]:
    net = Net()
    x = net.layer(net.input(3, 29), 24, 3, stride=2, padding=1, activation="relu", density=0.6)
    for groups in (1, 4, 12):
        y = net.layer(net.layer(x, 12, activation="relu"), 12, 3, padding=1, groups=groups, density=0.5)
        x = net.layer(y, 24, residual=x, activation="relu")
    return net, [x, net.layer(net.layer(x, 120, 3, stride=2), 5)]


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_thread_counts_agree_and_runs_are_equal_to_the_last_bit(batch: int) -> None:
    net, outputs = resnet_like()
    inputs = net.random_inputs(batch)
    with threads(1):
        alone = net.run(inputs, outputs)
    for y, expected in zip(alone, net.expected(inputs, outputs), strict=True):
        assert_close(y, expected)
    for count in (2, 3):
        with threads(count):
            poison()
            first, *others = [net.run(inputs, outputs) for _ in range(4)]
        for y, expected in zip(first, alone, strict=True):
            assert_close(y, expected, 1e-6)
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("count", [1, 16, 17, 33, 130, 300])
def test_thread_counts_agree_on_tokens(count: int) -> None:
    net = Net(is_tokens=True)
    outputs = [net.layer(net.layer(net.input(37), 50, activation="gelu"), 21)]
    inputs = net.random_inputs(count)
    expected = net.expected(inputs, outputs)[0]
    for number in (1, 2, 3, 11):  # also more of them than chunks of tokens, which they share then
        with threads(number):
            poison()
            (first,), (second,) = net.run(inputs, outputs), net.run(inputs, outputs)
        assert torch.equal(first, second)
        assert_close(first, expected, 2e-6)


def test_python_threads_run_one_program_at_once() -> None:
    net, outputs = resnet_like()
    program = net.assemble(outputs)
    batches = [net.random_inputs(batch) for batch in (1, 2, 3, 4)]
    expected = [net.expected(inputs, outputs) for inputs in batches]
    ready = threading.Barrier(len(batches))

    def work(inputs: list[Tensor], wanted: list[Tensor]) -> None:
        ready.wait()
        for _ in range(10):
            found = run_guarded(program, inputs, [y.shape for y in wanted])
            for y, other in zip(found, wanted, strict=True):
                assert_close(y, other)

    with ThreadPoolExecutor(len(batches)) as pool:
        list(pool.map(work, batches, expected))


def test_program_that_grew_takes_more_memory() -> None:
    """The memory that a thread keeps is that of the largest program so far."""

    def work() -> None:
        for size in (3, 60, 5, 90):
            net = Net()
            x = net.layer(net.input(8, size), 8, 3, padding=1)
            net.check([net.layer(x, 8, 3, padding=1)], 1)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


# Whatever comes.


@pytest.mark.parametrize("seed", range(60))
def test_random_programs(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if seed % 2:
        monkeypatch.setattr(chains, "STAYS", 0)  # chains of small images too
    rng = random.Random(seed)
    torch.manual_seed(seed)
    net, outputs = random_net(rng)
    with threads(rng.randint(1, 3)):
        poison()
        net.check(outputs, rng.randint(1, 5), channels_last=rng.random() < 0.5)


def test_assembling_twice_gives_the_same_bytes() -> None:
    net, outputs = resnet_like()
    first, second = (net.assemble(outputs, is_coded=False).data for _ in range(2))
    assert torch.equal(first, second)


def test_zeros_take_no_room() -> None:
    """Packed, a sparse weight is smaller than the dense one."""
    torch.manual_seed(0)
    window, buffers = Window((14, 14), (14, 14)), [Buffer("input", 256, 196), Buffer("output", 256, 196)]
    for density, share, coded_share in ((0.2, 0.45, 0.75), (0.1, 0.25, 0.45)):
        weight = sparse(256, 256, 1, 1, density=density)
        for is_coded, most in ((False, share), (True, coded_share)):
            step = Step(0, 1, weight, torch.zeros(256), window, layout=Layout(is_coded))
            assert assemble([step], buffers, machine()).data.numel() < most * 4 * 256 * 256
