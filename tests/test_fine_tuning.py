"""Fine-tuning: a trained dense model becomes sparse without a shock, and a finalized one trains on with its zeros."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer

import autosparse_fx
from autosparse_fx import AutoSparse, GradientAnnealing, finalize, sparsify

# All of torch itself: where a compiled graph begins with a computed tensor.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

# What docs/training.md says for training on with the zeros as they are.
FROZEN = AutoSparse(target_sparsity=None, alpha=0.0, threshold_init=-50.0)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (reference.mlp, (16,)),
    "convolutions": (reference.ConvNet, (1, 8, 8)),
}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-fused": lambda p: AdamW(p, lr=0.01, fused=True),
    "adafactor": lambda p: Adafactor(p, lr=0.05),
}


def accuracy(model: nn.Module, shape: tuple[int, ...]) -> float:
    ((x, y),) = reference.classification_batches(1, shape, batch=512)
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == y).float().mean())


@pytest.fixture(scope="module", params=list(MODELS))
def pretrained(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    make, shape = MODELS[request.param]
    model = make()
    reference.train(model, SGD(model.parameters(), lr=0.1), reference.classification_batches(150, shape))
    return model.eval(), shape


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_pretrained_model_computes_nearly_the_same_at_first(
    pretrained: tuple[nn.Module, tuple[int, ...]], granularity: str
) -> None:
    dense, shape = pretrained
    sparse = sparsify(copy.deepcopy(dense), AutoSparse(target_sparsity=0.9, granularity=granularity))
    x = torch.randn(64, *shape)
    with torch.no_grad():
        expected, found = dense(x), sparse(x)
    assert 0 < autosparse_fx.sparsity(sparse) < 0.05
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert accuracy(sparse, shape) == pytest.approx(accuracy(dense, shape), abs=0.01)


def test_pretrained_model_is_not_shaken_by_its_first_steps(pretrained: tuple[nn.Module, tuple[int, ...]]) -> None:
    dense, shape = pretrained
    sparse = sparsify(copy.deepcopy(dense), AutoSparse(target_sparsity=0.8))
    optimizer = SGD(sparse.parameters(), lr=0.02, momentum=0.9)
    GradientAnnealing(sparse, 400, optimizer)
    before = accuracy(dense, shape)
    reference.train(sparse.train(), optimizer, reference.classification_batches(10, shape))
    assert accuracy(sparse, shape) > before - 0.02
    reference.train(sparse.train(), optimizer, reference.classification_batches(390, shape))
    assert accuracy(sparse, shape) > before - 0.05
    assert reference.total_sparsity(sparse) == pytest.approx(0.8, abs=0.005)


# A finalized model, trained on.


def finalized(model: nn.Module, sparsity: float = 0.8) -> nn.Module:
    model = sparsify(copy.deepcopy(model), AutoSparse(target_sparsity=sparsity))
    return finalize(model, reach_target=True)


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {name: p == 0 for name, p in model.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_and_the_rest_trains(
    pretrained: tuple[nn.Module, tuple[int, ...]], name: str, granularity: str
) -> None:
    dense, shape = pretrained
    model = finalized(dense)
    before, where, x = accuracy(model, shape), zeros(model), torch.randn(8, *shape)
    start = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(x)
    sparsify(model, AutoSparse(target_sparsity=None, alpha=0.0, threshold_init=-50.0, granularity=granularity))
    with torch.no_grad():
        assert torch.equal(model(x), expected)  # to the last bit
    optimizer = OPTIMIZERS[name](model.parameters())
    losses = reference.train(model.train(), optimizer, reference.classification_batches(60, shape))
    finalize(model)
    assert sum(losses[-5:]) < sum(losses[:5])
    assert accuracy(model, shape) >= before
    for key, found in zeros(model).items():
        assert torch.equal(found, where[key]), key
        assert not torch.equal(model.get_parameter(key), start.get_parameter(key))


def test_weights_train_as_under_a_fixed_mask() -> None:
    """Projecting gradients is what it replaces: the two are the same."""
    torch.manual_seed(0)
    plain = finalized(reference.mlp())
    model = sparsify(copy.deepcopy(plain), FROZEN)
    where = zeros(plain)
    make = OPTIMIZERS["sgd"]
    reference.train(model, make(model.parameters()), reference.classification_batches(30))
    optimizer = make(plain.parameters())
    for x, y in reference.classification_batches(30):
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        for name, p in plain.named_parameters():
            if name in where and p.grad is not None:
                p.grad.masked_fill_(where[name], 0)
        optimizer.step()
    finalize(model)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_zeros_of_half_precision_weights_stay(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = finalized(reference.mlp()).to(dtype)
    where, x = zeros(model), torch.randn(8, 16, dtype=dtype)
    expected = model(x)
    sparsify(model, FROZEN)
    assert torch.equal(model(x), expected)
    optimizer = SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    finalize(model)
    assert all(bool((model.get_parameter(name) == 0)[zero].all()) for name, zero in where.items())


@pytest.mark.slow
def test_zeros_stay_in_a_compiled_training() -> None:
    torch.manual_seed(0)
    model = sparsify(finalized(reference.mlp()), FROZEN)
    where = {name: weight.detach() == 0 for name, _, weight, _ in reference.masked_parameters(model)}
    step = torch.compile(model, backend="autosparse")
    optimizer = AdamW(model.parameters(), lr=0.01)
    for x, y in reference.classification_batches(20):
        optimizer.zero_grad()
        F.cross_entropy(step(x), y).backward()
        optimizer.step()
    finalize(model)
    for name, zero in where.items():
        assert torch.equal(model.get_parameter(name) == 0, zero), name
