"""Slices and copies of containers of parameters: what they hold is masked, and trained."""

import copy

import pytest
import torch
from masked_names import masked_names
from torch import Tensor, nn

from autosparse_fx import AutoSparse, dense_weights, finalize, sparsify

# All of torch itself: where a compiled graph begins with a computed tensor.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

CONFIG = AutoSparse(alpha=0.5, threshold_init=-2.5)


class Parts(nn.Module):
    """Takes its parameters from slices and copies of their containers."""

    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ParameterList(torch.randn(8, 8) / 3 for _ in range(4))
        self.dict = nn.ParameterDict({name: torch.randn(8, 8) / 3 for name in "ab"})
        self.more = nn.ParameterDict({"c": torch.randn(8) / 3})

    def forward(self, x: Tensor) -> Tensor:
        for w in self.list[:-1]:
            x = (x @ w).relu()
        for w in self.dict.copy().values():
            x = (x @ w).relu()
        united = self.more | self.dict
        return x @ self.list[-1] @ united["a"] + (self.dict | {"c": self.more["c"]})["c"] * united["c"]


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_slices_and_copies_of_containers_are_masked_and_trained(backend: str | None) -> None:
    x = torch.randn(3, 8)
    model = sparsify(Parts(), CONFIG, example_inputs=x)
    twin = copy.deepcopy(model)
    assert masked_names(model) == {*(f"list.{i}" for i in range(4)), "dict.a", "dict.b"}
    reads = [twin.list[i] for i in range(4)], {name: twin.dict[name] for name in "ab"}, twin.more["c"]
    (first, *middle, last), named, c = reads
    expected = (x @ first).relu()
    for w in (*middle, *named.values()):
        expected = (expected @ w).relu()
    expected = expected @ last @ named["a"] + c * c
    found = (model if backend is None else torch.compile(model, backend=backend))(x)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    expected.sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_containers_give_containers_where_they_hold_the_stored_weights() -> None:
    model = sparsify(Parts(), AutoSparse(target_sparsity=None), example_inputs=torch.randn(3, 8))
    with dense_weights(model):
        assert type(model.list[1:]) is nn.ParameterList and type(model.dict.copy()) is nn.ParameterDict
        assert model.list[1:][0] is model.list[1]
        assert type(model.dict | model.more) is type(model.more | model.dict) is nn.ParameterDict
    finalize(model)
    assert type(model.list[1:]) is nn.ParameterList and type(model.dict.copy()) is nn.ParameterDict
