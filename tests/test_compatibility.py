"""The script that checks the models of other libraries: a model that passes, one that cannot, and the page of both."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hidden.compare import without_inductor
from torch import Tensor, nn

pytest.importorskip("transformers")

import _compatibility_checks as checks
import _compatibility_tables as tables
import compatibility
from _compatibility_case import Case, Family

# transformers and its dependencies warn about themselves, and Dynamo of computed tensors that begin a graph.
pytestmark = pytest.mark.filterwarnings("default::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_inductor(monkeypatch)


@pytest.mark.parametrize("name", ["gpt2", "albert", "convnext"])
def test_models_of_transformers_pass(name: str, tmp_path: Path) -> None:
    found = compatibility.check("transformers", name, tmp_path / "found.json")
    assert list(found["checks"]) == list(checks.CHECKS)
    assert not tables.failures(found), found
    assert json.loads((tmp_path / "found.json").read_text()) == found
    assert 0 < found["masked"] <= found["parameters"]


class Changing(nn.Module):
    """Never the same outputs twice, for the same inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(8, 64), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x + torch.rand_like(x)).relu())


def changing() -> Case:
    torch.manual_seed(0)
    return Case("none", Changing(), {"x": torch.randn(4, 8)}, lambda out: out.square().mean(), lambda model, _: model)


def test_what_is_not_as_it_should_be_is_found_and_told() -> None:
    seen: list[Any] = []
    found = checks.Checks(changing, lambda found: seen.append(dict(found["checks"]))).run()
    assert [*tables.failures(found)] == ["state", "finalize", "reload"]
    assert "Mismatch: outputs of the loaded model differ by" in found["checks"]["state"]["error"]
    assert len(seen) == len(found["checks"])

    family = Family("none", "https://example.org", {"changing": changing, "other": changing}, {"changing": "It is."})
    versions = {"torch": "2.14"}
    page = tables.page(family, {"versions": versions, "models": {"changing": found}})
    assert "0 of 1 small models" in page and "* **changing**: It is.\n  * state: `Mismatch: " in page
    assert "Not checked yet: other." in page
