"""Counts in sizes that are symbols: at every size they are what a capture at that size gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flops.compare import Around, count, numbers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autosparse_fx.flops import count_flops

Sizes = dict[str, int]
IMAGE = {0: "n", 2: "h", 3: "w"}
SEQUENCE = {0: "n", 1: "t"}
IMAGES: list[Sizes] = [{"n": 2, "h": 19, "w": 23}, {"n": 1, "h": 32, "w": 17}, {"n": 5, "h": 48, "w": 48}]
SEQUENCES: list[Sizes] = [{"n": 2, "t": 5}, {"n": 1, "t": 8}, {"n": 7, "t": 3}]


def images(size: Sizes) -> Tensor:
    return torch.randn(size["n"], 3, size["h"], size["w"])


def sequences(size: Sizes) -> Tensor:
    return torch.randn(size["n"], size["t"], 8)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, dilation=2, groups=2),
        nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


def resized(self: Any, x: Tensor) -> Tensor:
    return self.conv(F.interpolate(x, scale_factor=0.5))


def attention(self: Any, x: Tensor) -> Tensor:
    return self.layer(x, x, x, need_weights=False)[0]


MODELS: dict[str, Any] = {
    "convolutions": (convolutions, images, IMAGE, IMAGES),
    "linear": (
        lambda: nn.Linear(8, 4),
        lambda size: sequences(size)[:, 0],
        {0: "n"},
        [{"n": 2, "t": 1}, {"n": 9, "t": 1}],
    ),
    "checkpoint": (
        lambda: Around(lambda self, x: checkpoint(self.a, x, use_reentrant=False), a=convolutions()),
        images,
        IMAGE,
        IMAGES[:2],
    ),
    "resized": (lambda: Around(resized, conv=nn.Conv2d(3, 4, 3)), images, IMAGE, IMAGES),
    "linear 3d": (
        lambda: Around(lambda self, x: x @ self.w, w=nn.Parameter(torch.ones(8, 4))),
        sequences,
        SEQUENCE,
        SEQUENCES,
    ),
    "attention": (
        lambda: Around(attention, layer=nn.MultiheadAttention(8, 2, batch_first=True)),
        sequences,
        SEQUENCE,
        SEQUENCES,
    ),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), sequences, SEQUENCE, SEQUENCES),
    "lstm": (lambda: nn.LSTM(8, 4, 2, batch_first=True, bidirectional=True), sequences, SEQUENCE, SEQUENCES),
    "gru, batch": (
        lambda: nn.GRU(8, 4, batch_first=True),
        lambda size: torch.randn(size["n"], 5, 8),
        {0: "n"},
        SEQUENCES,
    ),
    "cell": (lambda: nn.LSTMCell(8, 4), lambda size: sequences(size)[:, 0], {0: "n"}, SEQUENCES),
}


@pytest.mark.parametrize("name", MODELS)
def test_counts_hold_at_every_size(name: str) -> None:
    make, inputs, shapes, sizes = MODELS[name]
    model = make()
    flops = count_flops(model, inputs(sizes[0]), [shapes])
    assert set(flops.sizes) == set(shapes.values())
    for size in sizes:
        known = {key: value for key, value in size.items() if key in flops.sizes}
        static = count_flops(model, inputs(size))
        assert numbers(flops, **known) == numbers(static), size
        assert flops.evaluate(flops.pooling, **known) == int(static.pooling)
        assert {k: flops.evaluate(m.step, **known) for k, m in flops.by_layer().items()} == {
            k: int(m.step) for k, m in static.by_layer().items()
        }


def add(self: Any, x: Tensor, y: Tensor) -> Tensor:
    return self.a(x) + self.b(y)


def adder() -> Around:
    return Around(add, a=nn.Linear(3, 4), b=nn.Linear(5, 4))


@pytest.mark.parametrize(
    ("inputs", "shapes"),
    [
        ((torch.randn(2, 3), torch.randn(2, 5)), [{0: "n"}, {0: "n"}]),
        ({"x": torch.randn(2, 3), "y": torch.randn(2, 5)}, {"x": {0: "n"}, "y": {-2: "n"}}),
    ],
    ids=["by position", "by keyword"],
)
def test_two_inputs_share_a_size(inputs: Any, shapes: Any) -> None:
    flops = count_flops(adder(), inputs, shapes)
    assert flops.sizes == ("n",)
    assert numbers(flops, n=7) == (7 * 32, 0, 7 * 32)


def test_only_the_dimensions_that_are_named_stay_symbols() -> None:
    """None, an empty mapping and an input that is left out are fixed; equal sizes are not taken for one another."""
    x = torch.randn(6, 6, 3)
    for shapes in ([{0: "n"}], ({0: "n"},), {0: "n"}):
        assert set(count_flops(nn.Conv1d(6, 2, 1), x, shapes).sizes) == {"n"}
    for nothing in (None, [], [None], [{}]):
        assert count_flops(nn.Linear(3, 4), x, nothing).sizes == ()
    flops = count_flops(nn.Conv1d(6, 2, 1), torch.randn(7, 6, 7), [{0: "n", 2: "t"}])
    assert flops.evaluate(flops.dense.forward, n=2, t=10) == 2 * 12 * 10


def test_fixed_sizes_and_symbols_of_one_model_do_not_mix() -> None:
    model, x = nn.Linear(3, 4), torch.randn(2, 3)
    counts = [count_flops(model, x, shapes).dense.forward for shapes in ([{0: "n"}], None, [{0: "n"}])]
    assert [str(c) for c in counts] == ["12*n", "24", "12*n"]


def test_names_may_be_those_that_dynamo_uses() -> None:
    from autosparse_fx.capture import capture

    model, x = nn.Conv1d(6, 2, 1), torch.randn(8, 6, 7)
    symbols = {name: str(symbol) for symbol, name in capture(model, x, [{0: "n", 2: "t"}]).names.items()}
    flops = count_flops(model, x, [{0: symbols["t"], 2: symbols["n"]}])
    assert flops.evaluate(flops.dense.forward, **{symbols["t"]: 3, symbols["n"]: 10}) == 12 * 30


def test_one_name_for_two_sizes_is_an_error() -> None:
    model = Around(lambda self, x, y: self.a(x).sum() + self.a(y).sum(), a=nn.Linear(3, 4))
    with pytest.raises(ValueError, match="'n'"):
        count_flops(model, (torch.randn(6, 3), torch.randn(7, 3)), [{0: "n"}, {0: "n"}])


ERRORS: dict[str, tuple[Callable[[], nn.Module], Any, Any, str]] = {
    "fixed by a weight": (
        lambda: nn.Linear(3, 4),
        torch.randn(2, 3),
        [{1: "features"}],
        r"fixes 'features' .*leave it out",
    ),
    "fixed by a view": (
        lambda: Around(lambda self, x: x.view(6, 2, 2)),
        torch.randn(6, 4),
        [{0: "n"}],
        r"Around fixes 'n' \(dimension 0, 6\)",
    ),
    "fixed by a loop": (lambda: nn.GRU(3, 4), torch.randn(7, 2, 3), [{0: "t"}], r"GRU fixes 't'"),
    "of size 1": (lambda: nn.Linear(3, 4), torch.randn(1, 3), [{0: "n"}], "'n' is 1 .*at least 2"),
    "of size 0": (lambda: nn.Linear(3, 4), torch.randn(0, 3), [{0: "n"}], "'n' is 0 .*at least 2"),
    "no such dimension": (lambda: nn.Linear(3, 4), torch.randn(2, 3), [{2: "n"}], r"2 is no dimension of \[2, 3\]"),
    "no such input": (lambda: nn.Linear(3, 4), torch.randn(2, 3), [None, {0: "n"}], r"inputs \[1\].* are \[0\]"),
    "no such keyword": (adder, {"x": torch.randn(2, 3)}, {"z": {0: "n"}}, r"inputs \['z'\].* are \['x'\]"),
    "no tensor": (adder, {"x": 3.0}, {"x": {0: "n"}}, r"\['x'\] must be .*tensor.*float"),
    "no mapping": (lambda: nn.Linear(3, 4), torch.randn(2, 3), ["n"], r"\[0\] must be \{dimension: name\}"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_culprit_and_cure(name: str) -> None:
    make, inputs, shapes, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        count_flops(make(), inputs, shapes)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
def test_graph_breaks_with_dynamic_sizes_are_an_error() -> None:
    def broken(self: Any, x: Tensor) -> Tensor:
        x = self.a(x)
        torch._dynamo.graph_break()
        return self.b(x)

    model = Around(broken, a=nn.Linear(3, 4), b=nn.Linear(4, 5))
    with pytest.raises(ValueError, match=r"breaks into 2 .*graph_break.*leave dynamic_shapes out"):
        count_flops(model, torch.randn(2, 3), [{0: "n"}])
    assert count(model, torch.randn(2, 3)) == (64, 40, 64)


@pytest.mark.parametrize("name", ["count", "sparsities"])
def test_sizes_may_have_any_name(name: str) -> None:
    flops = count_flops(nn.Linear(3, 4), torch.randn(2, 3), [{0: name}])
    assert flops.evaluate(flops.dense.forward, **{name: 5}) == 60


def test_a_mapping_of_dimensions_is_for_a_model_with_one_input() -> None:
    """With two, the mapping is from inputs."""
    model = Around(lambda self, x, y: (self.a(x), self.b(y)), a=nn.Linear(3, 4), b=nn.Linear(5, 4))
    inputs = torch.randn(2, 3), torch.randn(2, 5)
    with pytest.raises(ValueError, match=r"dynamic_shapes\[0\] must be \{dimension: name\}"):
        count_flops(model, inputs, {0: "n"})
    assert count_flops(model, inputs, {0: {0: "n"}}).sizes == ("n",)


def test_a_size_that_no_count_depends_on() -> None:
    """The mean over the sequence comes before the product, so t is no size of the counts."""
    model = Around(lambda self, x: self.a(x.mean(1)), a=nn.Linear(8, 4))
    flops = count_flops(model, torch.randn(2, 5, 8), [SEQUENCE])
    assert flops.sizes == ("n",)
    assert flops.evaluate(flops.dense.forward, n=3) == 96
