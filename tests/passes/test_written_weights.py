"""Weights that the graph writes to: a write would be lost in a masked copy, so a request for a mask is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from autosparse_fx import AutoSparse
from autosparse_fx._compat import dynamo_graphs
from autosparse_fx.hidden.graph import mark_weights
from autosparse_fx.hidden.masks import Request, hidden_mask
from autosparse_fx.hidden.registration import undone_on_error
from autosparse_fx.passes import insert_masks
from autosparse_fx.passes.insert_masks import WEIGHT
from autosparse_fx.passes.verify import verify_masked_graph


@torch.library.custom_op("autosparse_tests::project", mutates_args=("w",))
def project(w: Tensor, scale: float) -> None:
    w.mul_(scale)


@torch.library.custom_op("autosparse_tests::add_to", mutates_args=("total",))
def add_to(total: Tensor, w: Tensor) -> None:
    total.add_(w)


MASK = torch.ops.autosparse.threshold_mask.default
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
Statement = Callable[[nn.Parameter], object]


class Net(nn.Module):
    """Does something to one weight in every forward."""

    def __init__(self, statement: Statement) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.statement = statement

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.statement(self.a.weight)
        return self.b(self.a(x))  # type: ignore[no-any-return]


def capture(model: nn.Module, config: AutoSparse) -> GraphModule:
    """The Dynamo graph, with the weights marked that a request for ``config`` marks."""
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(dynamo_graphs.copy_dynamo_graph(gm))
        with undone_on_error():
            mark_weights(graphs[-1], Request(config, 10))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(X)
    (gm,) = graphs
    return gm


def marked(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if WEIGHT in node.meta]


def masked(gm: GraphModule) -> set[Node]:
    return {node.args[0] for node in gm.graph.find_nodes(op="call_function", target=MASK)}


WRITES: dict[str, Statement] = {
    "mul_": lambda w: w.mul_(0.5),
    "copy_": lambda w: w.copy_(torch.ones(6, 6)),
    "out": lambda w: torch.mul(w, 0.5, out=w),
    "init": lambda w: nn.init.zeros_(w),
    "setitem": lambda w: w.__setitem__(0, 0.0),
    "data": lambda w: w.data.mul_(0.5),
    "detach": lambda w: w.detach().mul_(0.5),
    "view": lambda w: w.view(-1).mul_(0.5),
    "row": lambda w: w[0].zero_(),
    "transposed": lambda w: w.T.mul_(0.5),
    "inplace": lambda w: F.relu(w, inplace=True),
    "foreach": lambda w: torch._foreach_mul_([w], 0.5),
    "foreach view": lambda w: torch._foreach_mul_([w.view(-1)], 0.5),
    "checkpoint": lambda w: torch.utils.checkpoint.checkpoint(lambda x: w.mul_(0.5) + x, X[:1], use_reentrant=False),
    "contiguous": lambda w: w.contiguous().mul_(0.5),
    "cast": lambda w: w.float().mul_(0.5),
    "movedim": lambda w: w.movedim(0, 1).mul_(0.5),
    "unfold": lambda w: w.unfold(0, 2, 2).mul_(0.5),
    "imul": lambda w: w.__imul__(0.5),
    "positional inplace": lambda w: F.relu(w, True),
    "dropout": lambda w: F.dropout(w, 0.5, True, True),
    "renormalized rows": lambda w: F.embedding(torch.tensor([0, 1]), w, max_norm=0.1),
    "overload": lambda w: torch.ops.aten.mul_.Tensor(w, 0.5),
    "custom": lambda w: torch.ops.autosparse_tests.project(w, 0.5),
    "outs": lambda w: torch.max(w.clone(), 0, out=(w[0], torch.empty(6, dtype=torch.long))),
}
all_writes = pytest.mark.parametrize("statement", WRITES.values(), ids=WRITES)


@all_writes
def test_request_to_mask_it_is_refused_by_name(statement: Statement) -> None:
    """With the cure; and nothing is left behind."""
    model = Net(statement)
    with pytest.raises(RuntimeError, match=r"writes to its weight 'a\.weight'.*'rules': \{'a\.weight': None\}"):
        capture(model, AutoSparse())
    assert hidden_mask(model.a.weight) is None and hidden_mask(model.b.weight) is None


@all_writes
def test_rule_leaves_it_dense(statement: Statement) -> None:
    model = Net(statement)
    gm = capture(model, AutoSparse(rules={"a.weight": None}))
    assert hidden_mask(model.a.weight) is None and hidden_mask(model.b.weight) is not None
    a, b = marked(gm)
    assert insert_masks(gm) == 1 and masked(gm) == {b}
    assert len(a.users) >= 2
    verify_masked_graph(gm, deduped=True)


READS: dict[str, Statement] = {
    "copy": lambda w: w.clone().mul_(0.5),
    "second operand": lambda w: torch.ones(6, 6).addmm_(w, w),
    "second of foreach": lambda w: torch._foreach_mul_([torch.ones(6, 6)], [w]),
    "out elsewhere": lambda w: torch.mul(w, 0.5, out=torch.empty(6, 6)),
    "set elsewhere": lambda w: torch.zeros(6, 6).__setitem__(0, w[0]),
    "custom": lambda w: torch.ops.autosparse_tests.add_to(torch.zeros(6, 6), w),
    "not inplace": lambda w: F.relu(w, inplace=False),
}


@pytest.mark.parametrize("statement", READS.values(), ids=READS)
def test_read_that_looks_like_a_write_is_none(statement: Statement) -> None:
    gm = capture(Net(statement), AutoSparse())
    assert len(marked(gm)) == 2
    assert insert_masks(gm) >= 2 and masked(gm) == set(marked(gm))
    verify_masked_graph(gm, deduped=True)
