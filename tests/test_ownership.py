"""Who holds a parameter, asked of the garbage collector."""

import copy
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import reference
import torch
import torch.distributed as dist
from torch import nn

from autosparse_fx import AutoSparse, finalize, ownership, sparsify
from autosparse_fx.ownership import is_finalized, places, remember_finalized, unprepared, was_masked


def names(parameter: nn.Parameter) -> tuple[str, ...]:
    return places([parameter])[id(parameter)].names


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.head = nn.Linear(4, 4)


# Names and roots.


def test_names_are_relative_to_the_outermost_module() -> None:
    model = Outer(Outer(reference.mlp()))
    place = places([model.inner.inner[2].weight])[id(model.inner.inner[2].weight)]
    assert place.names == ("inner.inner.2.weight",)
    assert place.root is model and place.scope is model


def test_all_other_parameters_of_the_model_are_found_too() -> None:
    model = Outer(reference.mlp())
    found = places([model.inner[0].weight])
    assert set(found) == {id(p) for p in model.parameters()}
    assert found[id(model.head.bias)].names == ("head.bias",)


def test_other_models_are_left_out() -> None:
    model, other = reference.mlp(), reference.mlp()
    assert not set(places([model[0].weight])) & {id(p) for p in other.parameters()}


def test_parameter_that_no_module_holds_is_missing() -> None:
    free, model = nn.Parameter(torch.zeros(3)), nn.Linear(2, 2)
    assert places([free]) == {}
    assert set(places([free, model.weight])) == {id(model.weight), id(model.bias)}
    assert places([]) == {}


def test_parameter_of_a_module_that_is_gone_is_missing() -> None:
    model = nn.Linear(2, 2)
    weight = model.weight
    del model
    gc.collect()
    assert places([weight]) == {}


def test_parameters_of_several_models_each_have_their_root() -> None:
    a, b = reference.mlp(), Outer(nn.Linear(2, 2))
    found = places([a[0].weight, b.inner.weight])
    assert found[id(a[0].weight)].root is a and found[id(b.inner.weight)].root is b


def test_copies_are_models_of_their_own() -> None:
    model = Outer(nn.Linear(2, 2))
    twin = copy.deepcopy(model)
    assert places([twin.head.weight])[id(twin.head.weight)].root is twin
    assert id(model.head.weight) not in places([twin.head.weight])


def test_lists_and_dicts_of_modules_hold_them() -> None:
    model = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(2, 2)])})
    assert names(model["a"][0].weight) == ("a.0.weight",)
    plain = [nn.Linear(2, 2)]  # not a module: the layer is the outermost
    assert names(plain[0].weight) == ("weight",)


# Shared parameters.


def test_tied_parameter_has_all_of_its_names_in_order() -> None:
    model = reference.Tied()
    assert names(model.embed.weight) == ("embed.weight", "head.weight")


def test_module_used_under_two_names() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    assert names(model["a"].weight) == ("a.weight", "b.0.weight")


def test_parameter_shared_by_two_models_has_names_in_both() -> None:
    a, b = nn.Linear(2, 2), Outer(nn.Linear(2, 2))
    b.inner.weight = a.weight
    assert set(names(a.weight)) == {"weight", "inner.weight"}
    assert {id(a.bias), id(b.head.weight)} <= set(places([a.weight]))


def test_module_held_by_two_models_has_names_in_both() -> None:
    backbone = reference.mlp()
    one, other = Outer(backbone), nn.Sequential(backbone)
    assert set(names(backbone[0].weight)) == {"inner.0.weight", "0.0.weight"}
    assert len(one.inner) == len(other[0])


# What was given to torch.compile.


def test_wrapper_of_torch_compile_is_stripped() -> None:
    model = reference.mlp()
    compiled = torch.compile(model, backend="eager")
    place = places([model[0].weight])[id(model[0].weight)]
    assert place.names == ("0.weight",) and place.root is model and place.scope is model
    assert compiled._orig_mod is model


def test_names_are_also_relative_to_a_compiled_part() -> None:
    model = Outer(reference.mlp())
    model.inner = torch.compile(model.inner, backend="eager")
    weight = model.inner._orig_mod[0].weight
    found = places([weight])
    assert found[id(weight)].names == ("inner.0.weight", "0.weight")
    assert found[id(weight)].root is model and found[id(weight)].scope is model.inner._orig_mod
    assert found[id(model.head.weight)].scope is model


def test_part_compiled_in_place() -> None:
    model = Outer(reference.mlp())
    model.inner.compile(backend="eager")
    place = places([model.inner[0].weight])[id(model.inner[0].weight)]
    assert place.names == ("inner.0.weight", "0.weight")
    assert place.root is model and place.scope is model.inner


def test_equal_blocks_that_are_compiled_share_a_short_name() -> None:
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    for block in model:
        block.compile(backend="eager")
    found = places([model[1].weight])
    assert [found[id(block.weight)].names for block in model] == [(f"{i}.weight", "weight") for i in range(3)]
    assert [found[id(block.weight)].scope for block in model] == list(model)


def test_wrapper_of_torch_compile_inside_a_larger_module() -> None:
    model = nn.Sequential(torch.compile(Outer(nn.Linear(2, 2)), backend="eager"))
    assert names(model[0]._orig_mod.inner.weight) == ("0.inner.weight", "inner.weight")


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs gloo")
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("order", ["ddp", "compile(ddp)", "ddp(compile)", "compile(ddp(compile))"])
def test_wrapper_of_data_parallelism_is_stripped(process_group: None, order: str) -> None:
    model: nn.Module = reference.mlp()
    outer = model
    for wrapper in reversed(order.rstrip(")").split("(")):
        wrap = torch.compile if wrapper == "compile" else nn.parallel.DistributedDataParallel
        outer = wrap(outer, backend="eager") if wrapper == "compile" else wrap(outer)
    place = places([model[0].weight])[id(model[0].weight)]
    assert place.names[0] == "0.weight" and place.root is model
    assert outer is not model


# Prepared and finalized.


def is_prepared(parameter: nn.Parameter) -> bool:
    return unprepared([parameter]) == []


def test_owners_of_many_parameters_are_asked_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And for none of those that are known without."""
    walks: list[None] = []
    live_objects = ownership.live_objects
    monkeypatch.setattr(ownership, "live_objects", lambda: (walks.append(None), live_objects())[1])
    prepared, other = sparsify(reference.mlp()), Outer(nn.Linear(2, 2))
    finalized = finalize(sparsify(reference.mlp(), AutoSparse(target_sparsity=None)))
    found = unprepared([*prepared.parameters(), *other.parameters(), *finalized.parameters()])
    assert list(map(id, found)) == list(map(id, other.parameters())) and len(walks) == 1
    assert unprepared(finalized.parameters()) == [] and len(walks) == 1


def test_prepared_is_every_parameter_of_a_model_with_masks() -> None:
    model = Outer(reference.mlp())
    assert not is_prepared(model.inner[0].weight)
    sparsify(model, AutoSparse(rules={"head.weight": None}))
    assert all(is_prepared(p) for p in model.parameters())
    assert is_prepared(copy.deepcopy(model).head.weight)
    assert not is_prepared(nn.Linear(2, 2).weight)


def test_prepared_part_makes_what_is_around_it_prepared() -> None:
    model = Outer(sparsify(reference.mlp()))
    assert is_prepared(model.head.weight)
    assert not is_prepared(nn.Parameter(torch.zeros(2)))


def test_finalized_is_remembered_as_long_as_the_parameter_lives() -> None:
    model = finalize(sparsify(reference.mlp(), AutoSparse(target_sparsity=None)))
    assert all(is_finalized(p) and is_prepared(p) for p in model.parameters())
    assert not is_finalized(reference.mlp()[0].weight)
    free = nn.Parameter(torch.zeros(2))
    masked = nn.Parameter(torch.zeros(2))
    remember_finalized([free, masked], {id(masked)})
    assert is_finalized(free) and is_prepared(free)
    assert was_masked(masked) and not was_masked(free)


def test_nothing_is_held_alive() -> None:
    model = finalize(sparsify(reference.mlp(), AutoSparse(target_sparsity=None)))
    places([model[0].weight])
    is_prepared(model[0].weight)
    refs = [weakref.ref(model), weakref.ref(model[0])]
    del model
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


def test_lazily_loaded_objects_are_not_woken() -> None:
    class Proxy:
        def __getattribute__(self, name: str) -> object:
            if name == "__class__":
                raise AssertionError("woken")
            return super().__getattribute__(name)

    proxies, model = [Proxy()], nn.Linear(2, 2)
    assert names(model.weight) == ("weight",) and len(proxies) == 1
