"""Arguments of the wrong type: refused by the name of the function, with what it got."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autosparse_fx
from autosparse_fx.arguments import unknown_names

X = torch.ones(2, 8)
OF_A_MODEL: dict[str, Callable[[Any, Path], object]] = {
    "sparsify": lambda model, _: autosparse_fx.sparsify(model),
    "finalize": lambda model, _: autosparse_fx.finalize(model),
    "GradientAnnealing": lambda model, _: autosparse_fx.GradientAnnealing(model, 10),
    "report": lambda model, _: autosparse_fx.report(model),
    "sparsity": lambda model, _: autosparse_fx.sparsity(model),
    "thresholds": lambda model, _: autosparse_fx.thresholds(model),
    "dense_weights": lambda model, _: autosparse_fx.dense_weights(model).__enter__(),
    "repack": lambda model, _: autosparse_fx.repack(model),
    "advise": lambda model, _: autosparse_fx.advise(model, X, ()),
    "visualize": lambda model, folder: autosparse_fx.visualize(model, X, folder / "graph.html"),
    "state_dict": lambda model, _: autosparse_fx.state_dict(model),
    "load_state_dict": lambda model, _: autosparse_fx.load_state_dict(model, {}),
}


@pytest.mark.parametrize(
    ("model", "given"),
    [
        (None, "NoneType"),
        ("resnet50", "str"),
        ({"weight": X}, "dict"),
        (lambda x: x, "function"),
        (nn.Linear, "the class Linear"),
        (torch.optim.SGD([nn.Parameter(X)], lr=0.1), "SGD"),
    ],
    ids=["None", "name", "state", "function", "class", "optimizer"],
)
@pytest.mark.parametrize("name", OF_A_MODEL)
def test_what_is_no_module_is_refused_by_the_name_of_the_function(
    name: str, model: object, given: str, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match=rf"^{name} takes a torch\.nn\.Module, got {given}$"):
        OF_A_MODEL[name](model, tmp_path)


@pytest.mark.parametrize("name", ["report", "sparsity", "thresholds", "dense_weights", "repack"])
def test_wrappers_are_modules(name: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    OF_A_MODEL[name](model, tmp_path)
    OF_A_MODEL[name](torch.compile(autosparse_fx.sparsify(model), backend="eager"), tmp_path)


def test_unknown_names_are_shown_with_what_they_may_be_a_slip_of() -> None:
    known = ["target_sparsity", "alpha", "alpha_end"]
    assert unknown_names(["target_sparisty", "x", 3], known) == (
        "'target_sparisty' (do you mean 'target_sparsity'?), 'x', 3"
    )
    assert unknown_names(["alpha_edn"], known) == "'alpha_edn' (do you mean 'alpha_end', 'alpha'?)"
