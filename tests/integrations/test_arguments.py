"""What the callbacks of all frameworks take as arguments, and how they are shown."""

import importlib
from typing import Any

import pytest
import torch

from autosparse_fx import AutoSparse

PACKAGES = {"lightning": ["lightning.pytorch"], "transformers": ["transformers", "accelerate"]}


@pytest.fixture(params=PACKAGES)
def framework(request: pytest.FixtureRequest) -> str:
    for package in PACKAGES[request.param]:
        pytest.importorskip(package)
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def callback(framework: str) -> Any:
    """The class."""
    return importlib.import_module(f"autosparse_fx.integrations.{framework}").AutoSparseCallback


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": 0.9}, TypeError, "no argument 'target'"),
        ({"sparsity": 0.9}, TypeError, r"no argument 'sparsity' \(do you mean 'target_sparsity'"),
        ({"target_sparsity": 1.5}, ValueError, "target_sparsity"),
        ({"config": AutoSparse(), "alpha": 0.5}, TypeError, "set these in the configuration"),
        (
            {"config": 0.9},
            TypeError,
            r"^AutoSparseCallback takes an AutoSparse .*: pass AutoSparse\(target_sparsity=0.9\)",
        ),
        ({"finalize": "yes"}, TypeError, "finalize must be True or False, got 'yes'"),
        ({"total_steps": 100.0}, ValueError, "whole number of optimizer steps, got 100.0: pass int"),
        ({"total_steps": 0}, ValueError, "total_steps must be a positive whole number"),
    ],
)
def test_bad_arguments(callback: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        callback(**arguments)


def test_total_steps_of_any_whole_type_are_plain(callback: Any) -> None:
    assert type(callback(total_steps=torch.tensor(40))._run.total_steps) is int


def test_callback_is_shown_as_it_was_made(callback: Any, framework: str) -> None:
    config = AutoSparse(target_sparsity=0.9)
    assert repr(callback()) == "AutoSparseCallback()"
    assert (
        repr(callback(target_sparsity=0.9, total_steps=40)) == f"AutoSparseCallback(config={config!r}, total_steps=40)"
    )
    if framework == "lightning":
        shown = f"AutoSparseCallback(config={config!r}, submodule='model', finalize=True)"
        assert repr(callback(config, submodule="model", finalize=True)) == shown
