"""FSDP2 in one process: a sharded sparse model trains exactly like the plain one. FSDP1 is refused."""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import reference
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autosparse_fx import AutoSparse, GradientAnnealing, dense_weights, finalize, report, sparsify, sparsity, thresholds
from autosparse_fx.integrations.run import SparseRun

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

STEPS = 12


@pytest.fixture(autouse=True)
def process_group(tmp_path: Path) -> Iterator[None]:
    """A world of one process, found through a file."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def mesh() -> dist.DeviceMesh:
    return dist.init_device_mesh("cpu", (1,))


def fully_shard(module: nn.Module, **arguments: object) -> nn.Module:
    from torch.distributed.fsdp import fully_shard as shard

    return shard(module, mesh=mesh(), **arguments)  # type: ignore[no-any-return, call-overload]


def by_block(model: nn.Module) -> nn.Module:
    for child in model.children():
        if any(True for _ in child.parameters()):
            fully_shard(child)
    return fully_shard(model)


def whole(model: nn.Module) -> nn.Module:
    return fully_shard(model)


class Transformer(nn.Module):
    """Attention, batch norm's kin, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))


def batches(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    if isinstance(model, Transformer):
        return [(torch.randint(11, (8, 5)), torch.randint(4, (8,))) for _ in range(STEPS)]
    shape = (1, 8, 8) if isinstance(model, reference.ConvNet) else (16,)
    return list(reference.classification_batches(STEPS, shape))


def full(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def full_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(t).detach().clone() for name, t in model.state_dict().items()}


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
}


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("shard", [by_block, whole])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("make", [reference.mlp, reference.ConvNet, Transformer], ids=lambda f: f.__name__)
def test_sharded_training_equals_the_plain_one(
    make: Callable[[], nn.Module], optimizer: str, shard: Callable[[nn.Module], nn.Module], granularity: str
) -> None:
    """With annealing and steering; every weight and every threshold is a DTensor, and every one of them moves."""
    plain = sparsify(make(), AutoSparse(0.8, granularity=granularity))
    sharded = shard(copy.deepcopy(plain))
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    start = full_state(plain)
    data = batches(plain)
    for model in (plain, sharded):
        stepper = OPTIMIZERS[optimizer](model)
        annealer = GradientAnnealing(model, STEPS, stepper)
        reference.train(model, stepper, iter(data))
        assert annealer.alpha == 0
    expected, found = full_state(plain), full_state(sharded)
    assert list(found) == list(expected)
    for name, t in expected.items():
        torch.testing.assert_close(found[name], t, rtol=1e-6, atol=1e-6, msg=name)
        if name.endswith(("weight", "_threshold", "_offset")) and "norm" not in name and "bn" not in name:
            assert not torch.equal(t, start[name]), name


def test_counts_thresholds_and_report_are_those_of_the_plain_model() -> None:
    plain = sparsify(reference.mlp(), AutoSparse(threshold_init=-2.5))
    sharded = by_block(copy.deepcopy(plain))
    for _ in range(2):
        assert sparsity(sharded) == sparsity(plain) > 0
        assert [(x.name, x.zeros, x.numel, x.shape) for x in report(sharded).layers] == [
            (x.name, x.zeros, x.numel, x.shape) for x in report(plain).layers
        ]
        assert report(sharded).parameters == report(plain).parameters
        assert "2.weight" in str(report(sharded))
        x = torch.randn(2, 16)
        assert [layer.cost for layer in report(sharded, x).layers] == [layer.cost for layer in report(plain, x).layers]
        for name, s in thresholds(plain).items():
            assert torch.equal(full(thresholds(sharded)[name]), s)
        assert torch.equal(sharded(x), plain(x))  # and once more after a forward


def test_gradients_reach_weights_and_thresholds() -> None:
    """Without a special case for reads while it is sharded, FSDP2 trained nothing, silently."""
    plain = sparsify(reference.mlp(), AutoSparse(alpha=0.5, threshold_init=-2.5))
    sharded = by_block(copy.deepcopy(plain))
    x = torch.randn(4, 16)
    for model in (plain, sharded):
        model(x).square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None, name
        torch.testing.assert_close(full(q.grad), p.grad, msg=name)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_sharded_training_equals_the_plain_one(backend: str) -> None:
    plain = sparsify(reference.mlp(), AutoSparse(0.8))
    sharded = by_block(copy.deepcopy(plain))
    data = batches(plain)
    for model in (plain, sharded):
        stepper = OPTIMIZERS["sgd"](model)
        GradientAnnealing(model, STEPS, stepper)
        step = torch.compile(model, backend=backend) if model is sharded else model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Dynamo about FSDP's own hooks
            reference.train(step, stepper, iter(data))
    found = full_state(sharded)
    for name, t in full_state(plain).items():
        torch.testing.assert_close(found[name], t, rtol=1e-5, atol=1e-6, msg=name)


def test_mixed_precision_keeps_thresholds_in_float32() -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = sparsify(reference.mlp(), AutoSparse(threshold_init=-2.5))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    sharded = fully_shard(model, mp_policy=policy)
    out = sharded(torch.randn(4, 16))
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(p.dtype == torch.float32 for p in sharded.parameters())
    assert all(p.grad is not None and torch.isfinite(full(p.grad)).all() for p in sharded.parameters())


def test_state_dict_loads_into_the_plain_model_and_back() -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )

    plain = sparsify(reference.mlp(), AutoSparse(threshold_init=-2.5))
    sharded = by_block(copy.deepcopy(plain))
    with torch.no_grad():
        for p in sharded.parameters():
            p.add_(0.1)
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    assert not any(isinstance(t, DTensor) for t in state.values())
    plain.load_state_dict(state)
    x = torch.randn(2, 16)
    assert torch.equal(plain(x), sharded(x))
    other = by_block(sparsify(reference.mlp(), AutoSparse(threshold_init=-2.5)))
    set_model_state_dict(other, state, options=StateDictOptions(full_state_dict=True))
    assert torch.equal(other(x), plain(x))


def test_meta_model_is_sharded_and_then_made_real() -> None:
    source = sparsify(reference.mlp(), AutoSparse(alpha=0.5, threshold_init=-2.5))
    with torch.device("meta"):
        model = sparsify(reference.mlp(), AutoSparse(alpha=0.5, threshold_init=-2.5))
    by_block(model)
    model.to_empty(device="cpu")
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("_threshold"):
            assert not full(t).any(), name
        elif name.endswith("_offset"):
            assert (full(t) == -2.5).all(), name
        elif "alpha" in name:
            assert full(t).item() == 0.5
    with torch.no_grad():
        for p, q in zip(model.parameters(), source.parameters(), strict=True):
            assert isinstance(p, DTensor)
            p.to_local().copy_(q)
    x = torch.randn(2, 16)
    assert torch.equal(model(x), source(x))


def test_finalizing_a_sharded_model_is_refused_with_the_cure() -> None:
    sharded = by_block(sparsify(reference.mlp(), AutoSparse(threshold_init=-2.5)))
    before = full_state(sharded)
    classes = [type(m) for m in sharded.modules()]
    with pytest.raises(RuntimeError, match=r"(?s)fully_shard.*finalize a plain copy"):
        finalize(sharded)
    assert [type(m) for m in sharded.modules()] == classes
    for name, t in full_state(sharded).items():
        assert torch.equal(t, before[name]), name


def test_finalizing_is_refused_where_only_what_is_around_the_layers_was_sharded() -> None:
    model = sparsify(nn.Sequential(nn.Sequential(nn.Linear(16, 8), nn.ReLU()), nn.Linear(8, 4)))
    fully_shard(model[0])
    fully_shard(model)
    with torch.no_grad():
        model(torch.randn(2, 16))  # what leaves the outermost weights gathered
    before = full_state(model)
    with pytest.raises(RuntimeError, match=r"(?s)fully_shard.*finalize a plain copy"):
        finalize(model)
    assert all(torch.equal(t, before[name]) for name, t in full_state(model).items())


def test_callback_that_is_to_finalize_a_sharded_model_is_refused_before_the_training() -> None:
    model = by_block(sparsify(reference.mlp()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for finalized in (False, True):
        run = SparseRun(None, {}, total_steps=None, finalize=finalized)
        with pytest.raises(ValueError, match=r"fully_shard.*plain copy") if finalized else contextlib.nullcontext():
            run.begin(model, [optimizer], 10, step=0, saved=None)
        if run.annealer is not None:
            run.annealer.detach()


def test_cure_for_finalizing_works() -> None:
    config = AutoSparse(target_sparsity=None, threshold_init=-2.5)
    sharded = by_block(sparsify(reference.mlp(), config))
    plain = sparsify(reference.mlp(), config)
    plain.load_state_dict(full_state(sharded))
    x = torch.randn(2, 16)
    assert torch.equal(finalize(plain)(x), sharded(x))


def test_dense_weights_of_a_sharded_model_are_dense_inside_only() -> None:
    model = sparsify(reference.mlp(), AutoSparse(threshold_init=-2.5))
    dense = reference.mlp()
    dense.load_state_dict({name: t for name, t in model.state_dict().items() if name in dense.state_dict()})
    x = torch.randn(2, 16)
    expected = model(x)
    sharded = by_block(model)
    with dense_weights(sharded):
        torch.testing.assert_close(sharded(x), dense(x))
    torch.testing.assert_close(sharded(x), expected)


def test_sparsify_after_fully_shard_is_refused() -> None:
    """Thresholds made afterwards would not be FSDP's, so nobody would sum their gradients over the ranks."""
    torch.manual_seed(1)
    model = by_block(reference.mlp())
    with pytest.raises((ValueError, TypeError, RuntimeError), match="fully_shard"):
        sparsify(model)
    assert not any("threshold" in name for name, _ in model.named_parameters())


# FSDP1.


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_refuses_a_sparse_model_by_name(use_orig_params: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = sparsify(reference.mlp(), AutoSparse(threshold_init=-2.5))
    with pytest.raises(RuntimeError, match=r"(?s)weight '0\.weight'.*masked by autosparse_fx.*FSDP2 \(fully_shard\)"):
        FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_sparsify_refuses_an_fsdp1_model() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(reference.mlp(), device_id=torch.device("cpu"))
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r"FullyShardedDataParallel.*FSDP2 \(fully_shard\)"):
        sparsify(model)
    assert list(model.state_dict()) == keys


# DistributedDataParallel, the cure for DataParallel.


def test_ddp_trains_exactly_like_the_plain_model() -> None:
    from torch.nn.parallel import DistributedDataParallel

    plain = sparsify(reference.ConvNet(), AutoSparse(0.8))
    wrapped = DistributedDataParallel(copy.deepcopy(plain))
    data = batches(plain)
    for model in (plain, wrapped):
        stepper = OPTIMIZERS["sgd"](model)
        GradientAnnealing(model, STEPS, stepper)
        reference.train(model, stepper, iter(data))
    for name, t in plain.state_dict().items():
        torch.testing.assert_close(wrapped.module.state_dict()[name], t, rtol=1e-6, atol=1e-6, msg=name)
    assert sparsity(wrapped) == sparsity(plain)


def test_model_in_bfloat16_is_refused_by_fsdp_itself() -> None:
    """FSDP2 wants one dtype per group of parameters, and thresholds stay float32: use a MixedPrecisionPolicy."""
    model = by_block(sparsify(reference.mlp().bfloat16(), AutoSparse(threshold_init=-2.5)))
    with pytest.raises(AssertionError, match="uniform original parameter dtype"):
        model(torch.randn(4, 16, dtype=torch.bfloat16))
