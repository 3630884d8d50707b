"""Finalized models that are compiled again, without options or with them."""

import copy
import io
from collections.abc import Callable

import pytest
import reference
import torch
import torch.nn.functional as F
from hidden.compare import INIT, Mlp, error, one_line, without_inductor
from torch import Tensor, nn

from autosparse_fx import AutoSparse, finalize, sparsify, sparsity, thresholds

# All of torch itself: where a compiled graph begins with a computed tensor.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_inductor(monkeypatch)


def finalized(threshold_init: float = -2.0) -> Mlp:
    return finalize(sparsify(Mlp(), AutoSparse(target_sparsity=None, threshold_init=threshold_init)))


def loaded(model: nn.Module) -> nn.Module:
    made = Mlp()
    made.load_state_dict(model.state_dict())
    return made


def unpickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    found: nn.Module = torch.load(file, weights_only=False)
    return found


# Without options.


@pytest.mark.parametrize("copied", [copy.deepcopy, loaded, unpickled])
def test_a_copy_of_a_finalized_model_trains_as_it_is(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = copied(finalized())
    plain = torch.compile(model, backend="autosparse")
    torch.testing.assert_close(plain(X), model(X))
    plain(X).sum().backward()
    assert model[0].weight.grad is not None and not thresholds(model)


def test_a_model_of_which_less_than_half_is_zero_is_refused() -> None:
    text = error(torch.compile(copy.deepcopy(finalized(-3.5)), backend="autosparse"), X)
    assert "is not sparse" in text and "at least half" in text


def test_layers_that_were_initialised_with_zeros_make_no_sparse_model() -> None:
    model = Mlp()
    nn.init.zeros_(model[2].weight)  # two thirds of all elements
    assert "is not sparse" in error(torch.compile(model, backend="autosparse"), X)
    model = Mlp()
    for i in (0, 2, 4):
        nn.init.zeros_(model[i].weight)
    assert "is not sparse" in error(torch.compile(model, backend="autosparse"), X)


def test_the_zeros_of_the_whole_model_count_for_each_of_its_graphs() -> None:
    model = copy.deepcopy(finalized())
    with torch.no_grad():
        model[0].weight.fill_(0.1)  # a layer that stayed dense
    first = torch.compile(model[0], backend="autosparse")
    torch.testing.assert_close(first(X), model[0](X))


# With options.


def train(model: nn.Module, call: Callable[..., Tensor], steps: int = 10) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for x, y in reference.classification_batches(steps):
        optimizer.zero_grad()
        F.cross_entropy(call(x), y).backward()
        optimizer.step()


def test_a_model_that_was_prepared_and_finalized_is_made_sparse_anew() -> None:
    model = finalized()
    train(model, one_line(model, target_sparsity=0.95))
    assert set(thresholds(model)) == {"0.weight", "2.weight", "4.weight"}
    assert sparsity(model) == pytest.approx(0.95, abs=0.005)


def test_a_one_line_model_is_made_sparse_anew_by_other_options() -> None:
    model = Mlp()
    first = one_line(model, target_sparsity=0.6)
    train(model, first)
    finalize(model)
    train(model, one_line(model, target_sparsity=0.9))
    assert len(thresholds(model)) == 3 and sparsity(model) == pytest.approx(0.9, abs=0.005)
    finalize(model)
    train(model, model, 2)  # tuned by no options, while compiled models are still there
    assert not thresholds(model)


def test_the_same_options_are_an_error_of_the_first_step_that_says_what_to_do() -> None:
    model = Mlp()
    step = one_line(model, target_sparsity=0.6)
    train(model, step)
    finalize(model)
    for call in (step, one_line(model, target_sparsity=0.6)):
        with pytest.raises(RuntimeError, match=r"'0\.weight' .* was finalized(?s:.)*without options(?s:.)*deepcopy"):
            train(model, call, 1)
    model.zero_grad()
    train(model, torch.compile(model, backend="autosparse"), 2)
    twin = copy.deepcopy(model)
    train(twin, one_line(twin, target_sparsity=0.6))
    assert len(thresholds(twin)) == 3 and not thresholds(model)


def test_to_evaluate_a_finalized_model_with_options_changes_nothing() -> None:
    model = finalized()
    step = one_line(model)
    with torch.no_grad():
        torch.testing.assert_close(step(X), model(X))
    assert not thresholds(model)
    step(X)
    assert len(thresholds(model)) == 3
    with torch.no_grad():
        assert not torch.allclose(step(X), model(X))  # it is in training again


def test_code_shared_with_an_evaluated_teacher_masks_the_student() -> None:
    teacher, student = finalized(), Mlp()
    step = torch.compile(lambda m, x: m(x), backend="autosparse", options={"total_steps": 10, "threshold_init": INIT})
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(step(teacher, X), teacher(X))
        step(student, X).sum().backward()
    assert len(thresholds(student)) == 3 and not thresholds(teacher)
