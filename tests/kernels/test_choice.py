"""choose: which layers run sparse by the estimate, and what is said about it."""

import pytest
import torch

from autosparse_fx._compat import cpu
from autosparse_fx.kernels.choice import Choice, choose


@pytest.fixture(params=["whole", "halved", "short"], autouse=True)
def vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said here holds for processors of all kinds."""
    monkeypatch.setattr(cpu, "has_avx512", lambda: request.param != "short")
    monkeypatch.setattr(cpu, "halves_avx512", lambda: request.param == "halved")


def of(sparsity: float, *, rows: int = 256, depth: int = 2304, columns: int = 196, is_plain: bool = False,
       runs_code: bool | None = None) -> Choice:  # fmt: skip
    entries = round((1 - sparsity) * rows * depth)
    channels = depth if is_plain else depth // 9
    return choose(
        entries=entries,
        rows=rows,
        depth=depth,
        channels=channels,
        columns=columns,
        is_plain=is_plain,
        runs_code=cpu.has_avx512() if runs_code is None else runs_code,
    )


@pytest.mark.parametrize("is_plain", [False, True])
def test_dense_weight_stays_and_a_very_sparse_one_does_not(is_plain: bool) -> None:
    assert not of(0.0, is_plain=is_plain).is_sparse
    assert of(0.9, is_plain=is_plain).is_sparse
    assert of(1.0, is_plain=is_plain).is_sparse


@pytest.mark.parametrize("columns", [16, 49, 196, 3136])
@pytest.mark.parametrize("is_plain", [False, True])
def test_more_zeros_never_make_a_layer_dense(is_plain: bool, columns: int) -> None:
    chosen = [of(n / 20, is_plain=is_plain, columns=columns).is_sparse for n in range(21)]
    assert chosen == sorted(chosen)


def gain(sparsity: float, *, columns: int = 196, units: int = 1) -> float:
    entries = round((1 - sparsity) * 512 * 2304)
    reason = choose(
        entries=entries, rows=512, depth=2304, channels=256, columns=columns, units=units, is_plain=False,
        runs_code=cpu.has_avx512(),
    ).reason  # fmt: skip
    return float(reason.split("estimated ")[1].split("x")[0])


def test_small_images_fill_vectors_side_by_side() -> None:
    threads = torch.get_num_threads()
    assert gain(0.9, columns=49, units=4 * threads) > gain(0.9, columns=49, units=threads)
    assert gain(0.9, columns=49, units=8 * threads) == gain(0.9, columns=49, units=4 * threads)


@pytest.mark.parametrize("is_plain", [False, True])
@pytest.mark.parametrize("columns", [49, 196])
def test_sparse_layers_save_cycles_the_more_the_more_zeros_they_have(is_plain: bool, columns: int) -> None:
    chosen = [of(n / 20, is_plain=is_plain, columns=columns) for n in range(21)]
    assert all(choice.saved > 0 and choice.gains_alone for choice in chosen if choice.is_sparse)
    assert [choice.saved for choice in chosen] == sorted(choice.saved for choice in chosen)


@pytest.mark.parametrize("by_code", [True, False])
@pytest.mark.parametrize("is_plain", [True, False])
def test_least_zeros_that_gain_are_those_of_the_table_in_the_documentation(
    is_plain: bool, by_code: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of large layers, in percent, within two points."""
    table = {  # docs/inference.md: machine code: 1x1, others; without: 1x1, others
        "whole": (43, 56, 58, 75),
        "halved": (32, 31, 56, 60),
        "short": (62, 67, 62, 67),
    }
    monkeypatch.setattr("autosparse_fx.kernels.choice.gains", lambda *_: by_code)
    expected = table[request.node.callspec.params["vectors"]][2 * (not by_code) + (not is_plain)]
    chosen = [of(n / 100, rows=512, depth=2304, is_plain=is_plain, runs_code=by_code and cpu.has_avx512()).is_sparse
              for n in range(100)]  # fmt: skip
    assert abs(chosen.index(True) - expected) <= 2


@pytest.mark.parametrize("columns", [1, 2, 8])
def test_a_few_tokens_cost_what_reading_the_weight_does(columns: int) -> None:
    chosen = [of(n / 20, rows=3072, depth=768, columns=columns, is_plain=True).is_sparse for n in range(21)]
    assert chosen == sorted(chosen) and not chosen[8] and chosen[18]
    half = choose(
        entries=235_930, rows=3072, depth=768, channels=768, columns=columns, is_plain=True, runs_code=False,
        dtype=torch.bfloat16,
    )  # fmt: skip
    assert half.dense < of(0.9, rows=3072, depth=768, columns=columns, is_plain=True, runs_code=False).dense


def test_small_layers_stay_however_many_zeros_there_are() -> None:
    choice = of(1.0, rows=4, depth=9, columns=49)
    assert not choice.is_sparse and "too small" in choice.reason


def test_reason_says_what_is_gained() -> None:
    assert "estimated" in of(0.9).reason and "x" in of(0.9).reason
    gain = [float(of(s).reason.split("estimated ")[1].split("x")[0]) for s in (0.0, 0.5, 0.9, 0.95)]
    assert gain == sorted(gain) and gain[0] <= 1 < gain[-1]


@pytest.mark.parametrize("arguments", [
    {"entries": 0, "rows": 0, "depth": 0, "channels": 0, "columns": 0, "is_plain": True},
    {"entries": 0, "rows": 8, "depth": 8, "channels": 8, "columns": 0, "is_plain": True},
    {"entries": 0, "rows": 1, "depth": 1, "channels": 1, "columns": 1, "is_plain": False},
])  # fmt: skip
def test_layers_of_nothing(arguments: dict[str, int]) -> None:
    assert not choose(**arguments, runs_code=True).is_sparse  # type: ignore[arg-type]
