"""The two ops under torch.func, export and make_fx."""

from collections.abc import Callable

import pytest
import reference
import torch
import torch.nn.functional as F
from op_weights import ANNEAL, MASK, THRESHOLDS, make_threshold, run_op
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import autosparse_fx
from autosparse_fx.ops import threshold_mask


def count(graph: torch.fx.Graph, op: object) -> int:
    return sum(node.target is op for node in graph.nodes)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_bad_weights_are_refused_under_functorch_too(dtype: torch.dtype) -> None:
    weight = torch.ones(3, 2, dtype=dtype)
    with pytest.raises(TypeError, match=f"floating-point.*{dtype}"):
        torch.func.vmap(lambda w: threshold_mask(w, torch.zeros(1), torch.tensor(0.5)))(weight)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", THRESHOLDS)
def test_func_grad_of_the_op_equals_autograd(kind: str, alpha: float) -> None:
    weight, c = torch.randn(4, 5), torch.randn(4, 5)
    weight[0, 0] = 0
    s, a = make_threshold(kind, weight), torch.tensor(alpha)
    dw, ds = torch.func.grad(lambda w, s: (threshold_mask(w, s, a) * c).sum(), argnums=(0, 1))(weight, s)
    _, expected_dw, expected_ds = run_op(weight, s, a, c)
    torch.testing.assert_close(dw, expected_dw, rtol=1e-6, atol=0)
    torch.testing.assert_close(ds, expected_ds, rtol=1e-5, atol=1e-6)
    d_alpha = torch.func.grad(lambda a: (threshold_mask(weight, s, a) * c).sum())(a)
    assert d_alpha == 0


def test_vmap_of_the_op_equals_a_loop() -> None:
    weights, s, alpha = torch.randn(3, 4, 5), torch.tensor([[-1.0], [0.0], [1.0]]), torch.tensor(0.5)
    batched = torch.func.vmap(threshold_mask, in_dims=(0, 0, None))(weights, s, alpha)
    looped = torch.stack([threshold_mask(w, t, alpha) for w, t in zip(weights, s, strict=True)])
    assert torch.equal(batched, looped)
    assert not bool(torch.signbit(batched[batched == 0]).any())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # which torch itself uses here
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("grad", [True, False])
def test_dual_numbers_have_the_tangents_of_torch_func(grad: bool) -> None:
    weight, tangent, s, alpha = torch.randn(4, 3), torch.randn(4, 3), torch.full((1,), 0.1), torch.tensor(0.3)
    _, expected = torch.func.jvp(lambda w: threshold_mask(w, s, alpha), (weight,), (tangent,))
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        found = forward_ad.unpack_dual(threshold_mask(forward_ad.make_dual(weight, tangent), s, alpha)).tangent
    assert 0 < int((expected != tangent).sum()) < 12
    torch.testing.assert_close(found, expected)


def test_jacrev_of_the_op_is_the_annealed_diagonal() -> None:
    weight, s, alpha = torch.tensor([2.0, 0.1, 0.0]), torch.tensor([0.0]), torch.tensor(0.25)
    jacobian = torch.func.jacrev(threshold_mask)(weight, s, alpha)
    assert torch.equal(jacobian, torch.diag(torch.tensor([1.0, 0.25, 0.25])))


def test_second_derivatives_by_torch_func_equal_the_reference() -> None:
    weight, s, alpha = torch.randn(6, dtype=torch.float64), torch.tensor([-0.3], dtype=torch.float64), torch.tensor(0.4)

    def hessian(mask: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        return torch.func.jacrev(torch.func.grad(lambda s: (mask(weight, s, alpha) ** 2).sum()))(s)

    assert bool((hessian(threshold_mask) != 0).all())
    torch.testing.assert_close(hessian(threshold_mask), hessian(reference.masked))


def sparse_linear(granularity: str = "layer") -> nn.Linear:
    config = autosparse_fx.AutoSparse(threshold_init=-1.5, granularity=granularity)
    return autosparse_fx.sparsify(nn.Linear(6, 4), config)


def autograd_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (model(x) ** 2).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_func_grad_over_a_sparse_module_equals_autograd(granularity: str) -> None:
    model, x = sparse_linear(granularity), torch.randn(3, 6)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    seen = torch.func.grad(lambda p: (torch.func.functional_call(model, p, (x,)) ** 2).sum())(parameters)
    expected = autograd_of(model, x)
    assert set(seen) == set(expected) == {"weight", "bias", "weight_threshold"}
    assert bool((expected["weight_threshold"] != 0).any())
    for name in expected:
        torch.testing.assert_close(seen[name], expected[name])


def test_per_sample_gradients_of_a_sparse_module_equal_a_loop() -> None:
    model, xs = sparse_linear(), torch.randn(5, 6)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return (torch.func.functional_call(model, p, (x[None],)) ** 2).sum()

    seen = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, xs)
    for i, x in enumerate(xs):
        for name, expected in autograd_of(model, x[None]).items():
            torch.testing.assert_close(seen[name][i], expected)


def test_jacrev_over_a_sparse_module_is_the_masked_weight() -> None:
    model = sparse_linear()
    jacobian = torch.func.jacrev(model)(torch.randn(6))
    torch.testing.assert_close(jacobian, model.weight.detach())
    assert bool((model.weight == 0).any()) and not bool((model.weight == 0).all())


def test_an_ensemble_of_sparse_modules_runs_under_vmap() -> None:
    models, x = [sparse_linear(), sparse_linear()], torch.randn(3, 6)
    parameters, buffers = torch.func.stack_module_state(models)
    seen = torch.func.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(seen, torch.stack([m(x) for m in models]))


def test_transforms_of_a_sparse_module_inside_a_compiled_region_equal_those_outside() -> None:
    model, xs = sparse_linear(), torch.randn(5, 6)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return (torch.func.functional_call(model, p, (x,)) ** 2).sum()

    def per_sample(p: dict[str, Tensor], xs: Tensor) -> dict[str, Tensor]:
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(p, xs)  # type: ignore[no-any-return]

    torch._dynamo.reset()
    compiled = torch.compile(per_sample, backend="aot_eager", fullgraph=True)
    seen, expected = compiled(parameters, xs), per_sample(parameters, xs)
    assert set(seen) == {"weight", "bias", "weight_threshold"}
    for name in expected:
        torch.testing.assert_close(seen[name], expected[name])


def test_export_sees_exactly_one_mask_node() -> None:
    model, x = sparse_linear(), torch.randn(3, 6)
    program = torch.export.export(model, (x,))
    assert count(program.graph, MASK) == 1
    assert not [n for n in program.graph.nodes if n.target in (torch.ops.aten.clamp.Tensor, torch.ops.aten.where.self)]
    torch.testing.assert_close(program.module()(x), model(x))


def test_make_fx_sees_one_mask_forward_and_one_annealed_gradient_backward() -> None:
    s, alpha, weight, x = torch.tensor([-1.0]), torch.tensor(0.5), torch.randn(4, 6), torch.randn(3, 6)

    def step(weight: Tensor, s: Tensor, alpha: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        w, t = weight.detach().requires_grad_(), s.detach().requires_grad_()
        loss = F.linear(x, threshold_mask(w, t, alpha)).square().sum()
        return torch.autograd.grad(loss, (w, t))

    traced: GraphModule = make_fx(step)(weight, s, alpha, x)
    assert count(traced.graph, MASK) == 1
    assert count(traced.graph, ANNEAL) == 1
    for seen, expected in zip(traced(weight, s, alpha, x), step(weight, s, alpha, x), strict=True):
        torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx_over_a_sparse_module_sees_one_mask_node(tracing_mode: str) -> None:
    model, x = sparse_linear("channel"), torch.randn(3, 6)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: t.detach() for name, t in state.items()}
    traced = make_fx(lambda st, x: torch.func.functional_call(model, st, (x,)), tracing_mode=tracing_mode)(state, x)
    assert count(traced.graph, MASK) == 1
    torch.testing.assert_close(traced(state, x), model(x))


def test_the_decomposition_table_holds_both_ops() -> None:
    weight, s, alpha = torch.randn(4, 6), torch.tensor([-1.0]), torch.tensor(0.5)
    table = torch._decomp.get_decompositions([MASK, ANNEAL])
    decomposed = make_fx(lambda w, s, a: MASK(w, s, a), decomposition_table=table)(weight, s, alpha)
    assert count(decomposed.graph, MASK) == 0
    assert torch.equal(decomposed(weight, s, alpha), threshold_mask(weight, s, alpha))
