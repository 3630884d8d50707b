"""Sparse inference with weights that change, and from several threads."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from kernels.graphs import prune
from kernels.models import Mlp, Seen, Stack, assert_same, check, compiled, dense, inputs_of, made
from threads import is_free
from torch import Tensor, nn
from torch.nn.utils import prune as pruning

from autosparse_fx import inference
from autosparse_fx._compat import dynamo
from autosparse_fx.compiled_weights import Compiled

X = torch.randn(2, 16, 12, 14, generator=torch.Generator().manual_seed(0))


# Weights that change.


def writes(model: nn.Module) -> dict[str, Callable[[], Any]]:
    weight = model.first.weight

    def step() -> None:
        weight.grad = torch.randn_like(weight)
        torch.optim.SGD([weight], lr=0.1).step()
        weight.grad = None

    def fused_step() -> None:
        """Which autograd does not count."""
        weight.grad = torch.randn_like(weight)
        torch.optim.AdamW([weight], lr=0.1, fused=True).step()
        weight.grad = None

    def through_a_view() -> None:
        with torch.no_grad():
            weight[0, 0] = 3.0

    def other_data() -> None:
        """Which autograd does not count either."""
        nn.utils.vector_to_parameters(2 * nn.utils.parameters_to_vector([weight]), [weight])

    def rounded() -> None:
        model.bfloat16().float()

    def through_detach() -> None:
        weight.detach().mul_(2.0)

    def no_grad(function: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                function()

        return run

    return {
        "add_": no_grad(lambda: weight.add_(0.5)),
        "copy_": no_grad(lambda: weight.copy_(torch.randn_like(weight))),
        "zero_": no_grad(weight.zero_),
        "view": through_a_view,
        "detach": through_detach,
        "other data": other_data,
        "rounded": rounded,
        "bias": no_grad(lambda: model.second.bias.add_(1.0)),
        "load_state_dict": lambda: model.load_state_dict(prune(Stack()).state_dict()),
        "assign": lambda: model.load_state_dict(prune(Stack()).state_dict(), assign=True),
        "optimizer": step,
        "fused": fused_step,
        "foreach": no_grad(lambda: torch._foreach_add_(list(model.parameters()), 0.25)),
        "parameter": lambda: setattr(model.first, "weight", nn.Parameter(prune(Stack()).first.weight.detach().clone())),
        "module": lambda: setattr(model, "second", prune(Stack()).second),
    }


@pytest.mark.parametrize("how", writes(Stack()))
def test_writes_are_noticed(how: str, seen: Seen) -> None:
    model = made()
    fast = compiled(model)
    before = check(fast, model, X)
    writes(model)[how]()
    assert not torch.equal(check(fast, model, X), before)
    count = seen.compilations
    check(fast, model, X)
    assert seen.compilations == count  # only once for a write


@pytest.mark.parametrize("how", ["add_", "assign", "parameter", "load_state_dict"])
def test_writes_are_noticed_where_guards_on_modules_are_skipped(how: str, seen: Seen) -> None:
    model = made()
    fast = compiled(model, options={"guard_filter_fn": torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe})
    before = check(fast, model, X)
    writes(model)[how]()
    assert not torch.equal(check(fast, model, X), before)


def test_statistics_that_are_written_are_noticed() -> None:
    model, x = made("residual"), inputs_of("residual")
    fast = compiled(model)
    before = check(fast, model, x)
    model.stem[1].running_mean.add_(1.0)
    assert not torch.equal(check(fast, model, x), before)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_statistics_that_training_mode_writes_are_noticed(dtype: torch.dtype, tolerance: float) -> None:
    model, x = made("residual").to(dtype), inputs_of("residual").to(dtype)
    fast = compiled(model)
    before = check(fast, model, x, tolerance=tolerance)
    with torch.no_grad():
        model.train()(9 + 9 * inputs_of("residual", 4).to(dtype))
    after = check(fast.eval(), model, x, tolerance=tolerance)
    assert (after - before).abs().max() > 0.1 * before.abs().max()


@pytest.mark.parametrize("variance", [0.0, float("inf")])
def test_statistics_are_noticed_beside_those_of_a_channel_that_is_pruned(variance: float, seen: Seen) -> None:
    """Which stay what they are."""
    model, x = made("residual"), inputs_of("residual")
    with torch.no_grad():
        model.stem[0].weight[0] = 0.0
        model.stem[1].running_mean[0] = 0.0
        model.stem[1].running_var[0] = variance
    fast = compiled(model)
    before = check(fast, model, x)
    assert torch.equal(check(fast, model, x), before)
    assert seen.compilations == 1
    with torch.no_grad():
        model.stem[1].train()(model.stem[0](9 + 9 * inputs_of("residual", 4)))
    model.stem[1].eval()
    check(fast, model, x)
    assert seen.compilations == 2


def test_writes_that_are_not_counted_need_repack(seen: Seen) -> None:
    model = made()
    fast = compiled(model)
    check(fast, model, X)
    model.first.weight.data.mul_(2.0)
    assert inference.repack(model) == 1
    check(fast, model, X)
    assert seen.programs == 2
    assert inference.repack(Stack()) == 0


def test_weights_that_keep_changing_run_dense_in_the_end(seen: Seen, caplog: pytest.LogCaptureFixture) -> None:
    model = made()
    fast = compiled(model)
    for number in range(inference.MOST_REWRITES + 3):
        check(fast, model, X)
        assert seen.programs == min(number, inference.MOST_REWRITES) + 1
        with torch.no_grad():
            model.first.weight.mul_(1.1)
    assert "dense kernels from now on" in caplog.text
    compilations = seen.compilations
    check(fast, model, X)
    assert seen.compilations == compilations


def test_weights_that_become_dense_run_dense(seen: Seen) -> None:
    model = made()
    fast = compiled(model)
    check(fast, model, X)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    check(fast, model, X)
    assert seen.programs == 1


def test_fused_steps_of_other_models_write_no_versions(seen: Seen) -> None:
    check(compiled(model := made()), model, X)
    other = nn.Parameter(torch.zeros(3))
    other.grad = torch.ones(3)
    before = other._version
    torch.optim.SGD([other], lr=0.1, fused=True).step()
    assert other._version == before


def scatter(model: nn.Module, sparsity: float = 0.9) -> None:
    """New weights, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    prune(model, sparsity)


def test_weights_that_become_sparse_run_sparse(seen: Seen) -> None:
    model = prune(Stack(), 0.0).eval()
    fast = compiled(model)
    check(fast, model, X)
    assert (seen.programs, seen.compilations) == (0, 1)
    scatter(model)
    for _ in range(2):
        check(fast, model, X)
    assert (seen.programs, seen.compilations) == (2, 2)
    scatter(model, 0.0)
    check(fast, model, X)
    scatter(model)
    check(fast, model, X)
    assert seen.programs == 3


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for every time that the passes of inference ran over a graph."""
    found: list[Any] = []
    original = inference._make_sparse

    def make_sparse(graph: Any) -> bool:
        found.append(original(graph))
        return found[-1]

    monkeypatch.setattr(inference, "_make_sparse", make_sparse)
    return found


def test_weights_that_stay_dense_are_looked_at_once(seen: Seen, attempts: list[Any]) -> None:
    """However often they are written to: an average of a model in training is, before every call."""
    model = prune(Stack(), 0.0).eval()
    fast = compiled(model)
    for _ in range(inference.MOST_REWRITES + 3):
        check(fast, model, X)
        with torch.no_grad():
            model.first.weight.mul_(0.9)
    assert len(attempts) == seen.compilations == 1
    scatter(model)
    check(fast, model, X)
    assert attempts == [False, True]


class Remembering(nn.Module):
    """Keeps its last output, as recurrent models do their state."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers
        self.register_buffer("last", torch.zeros(2, 16, 12, 14))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x + self.last)
        self.last = y * 0.1
        return y


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_buffers_that_are_exchanged_at_every_call(sparsity: float, seen: Seen, attempts: list[Any]) -> None:
    model = Remembering(prune(Stack(), sparsity)).eval()
    wide = copy.deepcopy(model).double()
    fast = compiled(model)
    for _ in range(2 * inference.MOST_REWRITES):
        with torch.no_grad():
            assert_same(fast(X), wide(X.double()))
    assert len(attempts) <= (1 if sparsity == 0 else 3)
    assert (seen.programs > 0) == (sparsity > 0)
    if sparsity:
        with torch.no_grad():
            for changed in (model, wide):
                changed.layers.first.weight.mul_(2.0)
            assert_same(fast(X), wide(X.double()))
        assert len(attempts) == 4  # the weights are constants all the same


@pytest.mark.parametrize("times", [1, 2, 5])
def test_statistics_that_are_written_again_and_again_stay_right(times: int, seen: Seen) -> None:
    model = nn.Sequential(prune(Stack()), nn.BatchNorm2d(16)).eval()
    fast = compiled(model)
    for _ in range(times):
        model[1].running_mean.normal_()
        check(fast, model, X)
    assert seen.programs > 0


def test_masks_that_become_sparse_in_place(seen: Seen) -> None:
    model = prune(Stack(), 0.0).eval()
    for layer in (model.first, model.second):
        pruning.identity(layer, "weight")
    fast = compiled(model)
    check(fast, model, X)
    assert seen.programs == 0
    for layer in (model.first, model.second):
        layer.weight_mask.copy_(torch.rand_like(layer.weight_mask) > 0.9)
    check(fast, model, X)
    assert seen.programs == 1


@torch._inductor.config.patch(freezing=True)
def test_writes_to_dense_weights_are_noticed_where_inductor_freezes() -> None:
    model = prune(Stack(), 0.0).eval()
    fast = compiled(model)
    check(fast, model, X)
    for sparsity in (0.0, 0.9, 0.0):
        scatter(model, sparsity)
        check(fast, model, X)


def test_dense_weights_that_are_written_through_data_are_seen_by_repack(seen: Seen) -> None:
    model = prune(Stack(), 0.0).eval()
    fast = compiled(model)
    check(fast, model, X)
    for parameter in model.parameters():
        parameter.data.copy_(prune(nn.ParameterList([parameter.detach().clone()])).get_parameter("0"))
    assert inference.repack(model) == 1
    check(fast, model, X)
    assert seen.programs == 1


def test_instances_that_share_a_graph_have_weights_of_their_own(seen: Seen) -> None:
    models = [made(), made(), made(sparsity=0.8)]
    fast = [compiled(model) for model in models]
    for _ in range(2):
        for function, model in zip(fast, models, strict=True):
            check(function, model, X)
    assert seen.programs == 6 and seen.compilations == 3  # and not one of them twice
    with torch.no_grad():
        models[1].first.weight.mul_(2.0)
    for function, model in zip(fast, models, strict=True):
        check(function, model, X)
    assert seen.compilations == 4


def test_model_that_is_gone_is_not_kept(seen: Seen) -> None:
    model = made()
    weight = weakref.ref(model.first.weight)
    fast = compiled(model)
    check(fast, model, X)
    del model, fast
    torch._dynamo.reset()
    seen.graphs.clear()
    gc.collect()
    assert weight() is None


def test_constants_of_a_model_that_is_gone_are_freed_at_once(seen: Seen) -> None:
    """And those of another that shares its graph are not, nor is that compiled again."""
    gone, kept = made(), made()
    fast, other = compiled(gone), compiled(kept)
    check(fast, gone, X)
    check(other, kept, X)
    first, second = map(weakref.ref, seen.graphs)
    seen.graphs.clear()
    del gone, fast
    gc.collect()
    assert first() is None and second() is not None
    check(other, kept, X)
    assert seen.compilations == 0 and seen.programs == 3


# Threads.


def together(count: int, work: Callable[[int], None]) -> None:
    ready = threading.Barrier(count)

    def run(number: int) -> None:
        ready.wait()
        work(number)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(run, range(count)))


def test_threads_that_call_one_model(seen: Seen) -> None:
    model = made("residual")
    fast = compiled(model)
    batches = [inputs_of("residual", 2) for _ in range(4)]
    expected = [dense(model, x) for x in batches]
    check(fast, model, batches[0])
    count = seen.compilations

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                assert_same(fast(batches[number]), expected[number])

    together(4, work)
    assert seen.compilations == count


def test_threads_that_meet_a_write_compile_once_and_stay_sparse(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    fast = compiled(model)
    check(fast, model, X)
    with torch.no_grad():
        model.first.weight.mul_(2.0)
    expected = dense(model, X)
    count = inference.MOST_REWRITES + 4
    arrived, local, original = threading.Barrier(count), threading.local(), Compiled.fits

    def fits(self: Any, tensors: Sequence[Tensor]) -> bool:
        """All threads are inside of a call before one compares versions."""
        if not hasattr(local, "waited"):
            local.waited = True
            arrived.wait(60)
        return original(self, tensors)

    monkeypatch.setattr(Compiled, "fits", fits)

    def work(_: int) -> None:
        with torch.no_grad():
            assert_same(fast(X), expected)

    before = seen.compilations
    together(count, work)
    assert seen.compilations == before + 1
    programs = seen.programs
    monkeypatch.setattr(Compiled, "fits", original)
    check(fast, model, X)
    assert seen.programs == programs + 1


def test_weights_are_compiled_anew_while_no_other_thread_compiles(seen: Seen) -> None:
    """The lock is held as long (``seen`` looks at it), and no longer."""
    model = made()
    fast = compiled(model)
    for count in (1, 2, 3):
        check(fast, model, X)
        assert seen.compilations == count and is_free(dynamo.compile_lock())
        with torch.no_grad():
            model.first.weight.mul_(2.0)


def test_mlp_keeps_nothing_of_its_input() -> None:
    """The same compiled model, with inputs that are overwritten between calls."""
    model = prune(Mlp())
    fast = compiled(model)
    x = inputs_of("mlp")
    for _ in range(3):
        check(fast, model, x)
        x.normal_()
