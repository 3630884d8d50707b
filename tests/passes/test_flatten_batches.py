"""flatten_batches: batched products by one constant matrix become products that run sparse; all others stay."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernels.graphs import SPARSE_LINEAR, Captured, Function, prune
from torch import Tensor, nn

from autosparse_fx import report
from autosparse_fx.passes import flatten_batches, fold_constants, fuse_sparse_programs, lower_sparse_linear

X = torch.randn(3, 64, 128, generator=torch.Generator().manual_seed(0))
aten = torch.ops.aten
Forward = Callable[[Any, Tensor], Tensor]


def model_of(forward: Forward) -> nn.Module:
    return prune(Function(forward, a=nn.Linear(128, 96), b=nn.Linear(96, 128)))


def captured(forward: Forward, x: Tensor = X) -> Captured:
    return Captured(model_of(forward), x)


FLATTENED: dict[str, Forward] = {
    "einsum": lambda m, x: torch.einsum("btc,oc->bto", x, m.a.weight),
    "einsum with the weight first": lambda m, x: torch.einsum("oc,btc->bto", m.a.weight, x),
    "einsum over channels": lambda m, x: torch.einsum("bct,oc->bot", x.mT, m.a.weight),
    "einsum into heads": lambda m, x: torch.einsum("btc,hdc->bhtd", x, m.a.weight.view(4, 24, 128)),
    "batch of one": lambda m, x: torch.bmm(x[:1], m.a.weight.t()[None]),
    "expanded": lambda m, x: torch.bmm(x, m.a.weight.t().expand(len(x), 128, 96)),
    "expanded by matmul": lambda m, x: x[:, None] @ m.a.weight.t()[None, None],
    "rows elsewhere": lambda m, x: torch.bmm(x.transpose(0, 1), m.a.weight.t().expand(64, 128, 96)),
    "bias": lambda m, x: torch.baddbmm(m.a.bias, x, m.a.weight.t().expand(len(x), 128, 96)),
    "bias of three dimensions": lambda m, x: torch.baddbmm(
        m.a.bias[None, None], x, m.a.weight.t().expand(len(x), 128, 96)
    ),
}
LEFT_ALONE: dict[str, Forward] = {
    "several matrices": lambda m, x: torch.bmm(x, m.a.weight.view(3, 32, 128).mT),
    "a computed matrix": lambda m, x: torch.bmm(x, (m.a.weight * x.mean()).t().expand(3, 128, 96)),
    "attention": lambda m, x: x @ x.mT,
    "a scaled bias": lambda m, x: torch.baddbmm(m.a.bias, x, m.a.weight.t().expand(3, 128, 96), beta=0.5),
    "a sum": lambda m, x: torch.baddbmm(x[..., :96], x, m.a.weight.t().expand(3, 128, 96)),
}


@pytest.mark.parametrize("name", FLATTENED)
def test_flattens(name: str) -> None:
    graph = captured(FLATTENED[name])
    assert graph.apply(flatten_batches) == 1
    assert not graph.count(aten.bmm.default) and not graph.count(aten.baddbmm.default)
    assert graph.apply(fold_constants, lower_sparse_linear) == 1


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_leaves_alone(name: str) -> None:
    graph = captured(LEFT_ALONE[name])
    assert graph.apply(flatten_batches) == 0
    assert graph.count(aten.bmm.default) + graph.count(aten.baddbmm.default) == 1


def mlp(m: Any, x: Tensor) -> Tensor:
    hidden = F.gelu(torch.einsum("btc,oc->bto", x, m.a.weight) + m.a.bias)
    return torch.einsum("bto,co->btc", hidden, m.b.weight)


def test_products_that_follow_one_another_run_in_one_go() -> None:
    graph = captured(mlp)
    assert graph.apply(flatten_batches, fold_constants, lower_sparse_linear) == 2
    assert [node.args[3] for node in graph.nodes(SPARSE_LINEAR)] == ["gelu", "none"]
    assert graph.apply(fuse_sparse_programs) == 1


@pytest.mark.parametrize("forward", [*FLATTENED.values(), mlp], ids=[*FLATTENED, "mlp"])
def test_sizes_that_are_dynamic(forward: Forward) -> None:
    graphs: list[Any] = []
    model = model_of(forward).eval()

    def compile_fx(gm: Any, inputs: Any, **_: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
        compiled = torch.compile(model, backend="autosparse", dynamic=True)
        for batch in (3, 5):
            x = torch.randn(batch, 64, 128)
            torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1


def test_reports_name_the_weight() -> None:
    (a, _) = report(model_of(FLATTENED["einsum"]).eval(), X).layers
    assert a.kernel == "sparse"
