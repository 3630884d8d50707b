"""Parameters of a user's own module whose code no graph captures: they may be weights, and that is said."""

import gc
import warnings

import pytest
import torch
from hidden.compare import without_inductor
from torch import Tensor, nn

# All of torch itself: where a compiled graph begins with a computed tensor.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_inductor(monkeypatch)
    gc.collect()  # no compiled model of another test


class Own(nn.Module):
    """Multiplies in a loop that breaks the graph, or in one that does not."""

    def __init__(self, *, broken: bool, head: bool = False) -> None:
        super().__init__()
        self.broken = broken
        self.weights = nn.ParameterList(torch.randn(8, 8) / 3 for _ in range(2))
        self.shift, self.unused = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.randn(8, 8))
        self.norm, self.table = nn.LayerNorm([1, 8]), nn.Embedding(2, 8)
        self.head = nn.Linear(8, 8) if head else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm((x + self.shift + self.table(torch.zeros(len(x), dtype=torch.long))).unsqueeze(1)).squeeze(1)
        for weight in self.weights:
            x = (x @ weight).relu()
            if self.broken:
                torch._dynamo.graph_break()
        return x


class Around(nn.Module):
    def __init__(self, own: Own) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        return self.own.head(self.own(x))


def trained(model: nn.Module, **options: object) -> list[str]:
    """What two steps warn of."""
    options = {"total_steps": 10, "threshold_init": -2.5, **options}
    compiled = torch.compile(model, backend="autosparse", options=options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            compiled(X).square().sum().backward()
            optimizer.step()
    return [str(w.message) for w in caught if "compiled graph" in str(w.message)]


@pytest.mark.parametrize("head", [False, True])
def test_what_no_graph_holds_is_warned_of_once(head: bool) -> None:
    (message,) = trained(Around(Own(broken=True, head=head)))
    assert message.startswith("'own.weights.0' [8, 8] (2 parameters in all) is trained, but in no compiled graph")
    assert "example_inputs" in message and "{'rules': {'own.weights.0': None}, ...}" in message


def test_what_graphs_hold_or_rules_leave_dense_is_not() -> None:
    assert trained(Around(Own(broken=False, head=True))) == []
    assert trained(Around(Own(broken=True, head=True)), rules={"own.weights.*": None}) == []


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 8), nn.Parameter(torch.ones(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.linear(x)


def test_one_graph_for_several_instances_holds_the_parameters_of_each() -> None:
    model = nn.Sequential(*(Block() for _ in range(3)))
    for block in model:
        block.compile(backend="autosparse", options={"total_steps": 10, "threshold_init": -2.5})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):  # warnings are errors here
        model(X).square().sum().backward()
        optimizer.step()
