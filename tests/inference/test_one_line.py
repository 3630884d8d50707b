"""A model that was trained in the one-line form and finalized runs on sparse kernels, through the same object."""

import logging

import pytest
import torch
import torch.nn.functional as F
from kernels.models import Seen
from torch import Tensor, nn

import autosparse_fx

X = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(8)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 64))


def trained(model: nn.Module, *, validated: bool) -> nn.Module:
    """The compiled model after a whole training."""
    compiled = torch.compile(model, backend="autosparse", options={"target_sparsity": 0.9, "total_steps": 20})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(20):
        if validated and step in (0, 10):
            evaluated(compiled)
        compiled.train()
        F.cross_entropy(compiled(X), TARGETS).backward()
        optimizer.step()
        optimizer.zero_grad()
    return compiled


def evaluated(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(X)


@pytest.mark.parametrize("validated", [False, True])
def test_sparse_kernels_once_it_is_finalized(validated: bool, seen: Seen) -> None:
    model = net()
    compiled = trained(model, validated=validated)
    masked = evaluated(compiled)
    assert seen.programs == 0
    autosparse_fx.finalize(compiled)
    found = evaluated(compiled)
    assert seen.programs > 0
    for expected in (masked, evaluated(model)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_writes_to_weights_are_noticed_and_gradients_still_flow(seen: Seen) -> None:
    model = net()
    compiled = trained(model, validated=True)
    autosparse_fx.finalize(model)
    evaluated(compiled)
    with torch.no_grad():
        model[0].weight.mul_(2)
        model[1].running_var.fill_(3)
    torch.testing.assert_close(evaluated(compiled), evaluated(model), rtol=1e-4, atol=1e-5)
    programs = seen.programs
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert seen.programs == programs


def test_a_graph_of_two_instances_runs_each_as_it_is(seen: Seen) -> None:
    """Dynamo calls one graph for both, of which one is still being trained."""
    done, other = net(), net()
    compiled = torch.compile(
        lambda model, x: model(x),
        backend="autosparse",
        options={"target_sparsity": None, "total_steps": 10, "threshold_init": -2.0},
    )
    for model in (done, other):
        compiled(model.eval(), X).sum().backward()
    autosparse_fx.finalize(done)
    with torch.no_grad():
        for model in (done, other, done):
            before = seen.programs
            found = compiled(model, X)
            assert (seen.programs > before) == (model is done)
            assert torch.allclose(found, model(X), rtol=1e-4, atol=1e-5) == (model is done)


def test_the_log_says_why_a_masked_model_runs_dense(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    with caplog.at_level(logging.INFO, logger="autosparse_fx"):
        compiled = trained(model, validated=True)
        assert "the weights are masked, which ends with autosparse_fx.finalize(model)" in caplog.text
        caplog.clear()
        autosparse_fx.finalize(model)
        torch._dynamo.reset()
        evaluated(compiled)
        assert "masked" not in caplog.text and "sparse programs" in caplog.text


def test_a_default_device_is_that_of_the_caller(seen: Seen) -> None:
    model = net()
    compiled = trained(model, validated=True)
    autosparse_fx.finalize(model)
    expected = evaluated(model)
    torch.set_default_device("meta")
    try:
        first = evaluated(compiled)
        with torch.no_grad():
            model[0].weight.mul_(1)
        second = evaluated(compiled)
    finally:
        torch.set_default_device(None)
    assert seen.programs > 1
    for found in (first, second):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_compiled_anew_where_no_kernel_is_sparse(seen: Seen) -> None:
    model = nn.Sequential(nn.Linear(8, 8)).double()
    compiled = torch.compile(model, backend="autosparse", options={"target_sparsity": None, "total_steps": 2})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(3, 8, dtype=torch.float64)
    for _ in range(2):
        compiled(x).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        compiled(x)
        before = seen.compilations
        autosparse_fx.finalize(model)
        torch.testing.assert_close(compiled(x), model(x))
    assert seen.compilations == before
