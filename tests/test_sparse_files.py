"""save_sparse and load_sparse: every bit comes back, and zeros take little space."""

import copy
import json
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import reference
import safetensors
import safetensors.torch
import torch
import torchvision
from hypothesis import strategies as st
from torch import Tensor, nn

import autosparse_fx
from autosparse_fx import AutoSparse, SparseFileError, bitmap, load_sparse, save_sparse, sparse_files

# Of torch itself, about any tensor of this dtype.
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

OPEN_LOOP = AutoSparse(target_sparsity=None, threshold_init=-2.5)
# Examples that hypothesis thinks up share the directory of their test: each replaces the file of the one before.
thorough = hypothesis.settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


def bits(tensor: Tensor) -> bytes:
    plain = tensor.resolve_conj().resolve_neg().contiguous()
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy().tobytes()


def round_trip(state: Any, path: Path) -> dict[str, Tensor]:
    save_sparse(state, path)
    return load_sparse(path)


def assert_same(loaded: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    assert list(loaded) == list(state)
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape, name
        assert bits(loaded[name]) == bits(tensor), name
        assert loaded[name].is_contiguous() and not loaded[name].requires_grad and loaded[name].device.type == "cpu"


def parts_of(path: Path) -> dict[str, list[str]]:
    with safetensors.safe_open(path, "pt") as file:
        index = json.loads(file.metadata()["autosparse_fx"])
    return {name: sorted(set(entry) - {"dtype", "shape"}) for name, entry in index["tensors"].items()}


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Of any dtype and bits, with as many zeros and minus zeros as it happens."""
    dtype = bitmap.DTYPES[draw(st.sampled_from(sorted(bitmap.DTYPES)))]
    shape = draw(st.lists(st.integers(0, 40), max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    data = rng.integers(0, 256, (int(np.prod(shape)), dtype.itemsize), dtype=np.uint8)
    data[rng.random(len(data)) < draw(st.floats(0, 1))] = 0
    zeros = ~data.any(1) & (rng.random(len(data)) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])))
    data[zeros, -1] = 128
    tensor = torch.from_numpy(data % 2 if dtype == torch.bool else data)
    return tensor.reshape(-1).view(dtype).view(shape)


@thorough
@hypothesis.given(state=st.dictionaries(st.text(max_size=8), tensors(), max_size=4))
def test_every_bit_comes_back(state: dict[str, Tensor], tmp_path: Path) -> None:
    assert_same(round_trip(state, tmp_path / "a"), state)


@pytest.mark.parametrize("dtype", bitmap.DTYPES.values(), ids=list(bitmap.DTYPES))
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    data = torch.randint(0, 256, (6400, dtype.itemsize), dtype=torch.uint8) & (1 if dtype == torch.bool else 255)
    zeros = torch.rand(6400) < 0.9
    some = data.masked_fill(zeros[:, None], 0)
    signed = some.clone()
    signed[zeros & (torch.rand(6400) < 0.5), -1] = 128
    state = {"none": data, "some": some, "signed": signed, "all": data * 0}
    state = {name: tensor.reshape(-1).view(dtype).view(64, 100) for name, tensor in state.items()}
    state |= {"empty": state["none"][:0], "scalar": state["none"][0, 0], "one": state["none"][:1, 0]}
    assert_same(round_trip(state, tmp_path / "a"), state)
    parts = parts_of(tmp_path / "a")
    assert parts["some"] == parts["all"] == ["bitmap", "values"] and parts["scalar"] == parts["empty"] == ["values"]
    halves = dtype == torch.complex128  # has no one bit that is its sign
    assert parts["signed"] == (["bitmap", "values"] if halves else ["bitmap", "signs", "values"])


def test_minus_zero_and_the_payloads_of_nan(tmp_path: Path) -> None:
    words = torch.tensor([0, -(2**31), 0x7FC00001, -0x3FEDCC, 1, 0x7F800000], dtype=torch.int32)
    weight = torch.cat([words, torch.zeros(1000, dtype=torch.int32), words]).view(torch.float32)
    assert_same(round_trip({"w": weight}, tmp_path / "a"), {"w": weight})
    assert parts_of(tmp_path / "a") == {"w": ["bitmap", "values"]}  # so few signs are cheaper among the values


def test_weights_in_other_layouts(tmp_path: Path) -> None:
    base = torch.randn(30, 40) * (torch.rand(30, 40) < 0.1)
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state = {
        "transposed": base.T,
        "strided": base[::2, ::3],
        "one element": base[:1, ::3][:, :1],
        "expanded": base[:1].expand(50, 40),
        "channels_last": image,
        "conjugated": torch.view_as_complex(torch.randn(4, 2)).conj(),
        "negated": torch.view_as_complex(torch.randn(4, 2)).conj().imag,
        "parameter": nn.Parameter(base.clone()),
        "many dimensions": torch.ones([1] * 70),
        "large and empty": torch.ones(0, 2**40),
    }
    assert_same(round_trip(state, tmp_path / "a"), {name: tensor.detach() for name, tensor in state.items()})


def test_bool_with_other_bytes_than_0_and_1(tmp_path: Path) -> None:
    """torch takes any but 0 for True, and so do its copies make 1 of them."""
    flags = torch.tensor([2, 0, 1, 255], dtype=torch.uint8).view(torch.bool)
    assert_same(round_trip({"flags": flags}, tmp_path / "a"), {"flags": flags})


def test_views_of_one_memory(tmp_path: Path) -> None:
    """What overlaps without being the same is stored by itself; safetensors would refuse it."""
    base = torch.randn(8, 8)
    state = {"all": base, "flat": base.view(-1), "half": base[:4], "transposed": base.T, "first": base[0, 0]}
    loaded = round_trip(state, tmp_path / "a")
    assert_same(loaded, state)
    assert len({tensor.data_ptr() for tensor in loaded.values()}) == 5


def test_tied_weights_are_stored_once_and_are_one_tensor_again(tmp_path: Path) -> None:
    model = reference.Tied()
    assert model.head.weight is model.embed.weight
    loaded = round_trip(model, tmp_path / "a")
    assert_same(loaded, model.state_dict())
    assert loaded["head.weight"] is loaded["embed.weight"]
    assert list(parts_of(tmp_path / "a").values()).count(["same_as"]) == 1
    fresh = reference.Tied()
    fresh.load_state_dict(loaded)
    assert fresh.head.weight is fresh.embed.weight
    assert_same(fresh.state_dict(), model.state_dict())


NAMES = [
    "",
    " ",
    "a.b",
    "é\n\t\"'\\",
    "名前",
    "\0",
    "__metadata__",
    "__metadata__'",
    "autosparse_fx",
    "format",
    "x" * 5000,
]
NAMES += ["autosparse_fx.sha256", '"autosparse_fx.sha256":"' + "0" * 64 + '"', "\ud800", "\\ud800", "../../etc", "w"]
NAMES += ["w:bitmap", "w:bitmap'", "w:bitmap:bitmap", "w:signs", "same_as", "values"]


@pytest.mark.parametrize("order", [1, -1])
def test_names(order: int, tmp_path: Path) -> None:
    state = {name: torch.randn(3000) * (torch.rand(3000) < 0.02 * i) for i, name in enumerate(NAMES[::order])}
    assert_same(round_trip(state, tmp_path / "a"), state)


@pytest.mark.parametrize("name", ["no suffix", "é 名前.safetensors", "a'\"b", "x" * 251 + ".bin"])
def test_names_of_files(name: str, tmp_path: Path) -> None:
    state = {"w": torch.randn(3)}
    assert_same(round_trip(state, tmp_path / name), state)
    assert_same(round_trip(state, str(tmp_path / name)), state)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_without_tensors(tmp_path: Path) -> None:
    assert round_trip({}, tmp_path / "a") == {} and round_trip(nn.ReLU(), tmp_path / "a") == {}


def test_a_finalized_model(tmp_path: Path) -> None:
    model = autosparse_fx.finalize(autosparse_fx.sparsify(reference.ConvNet(), OPEN_LOOP)).eval()
    save_sparse(model, tmp_path / "a.safetensors")
    fresh = reference.ConvNet().eval()
    fresh.load_state_dict(load_sparse(tmp_path / "a.safetensors"), strict=True)
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))
    assert_same(fresh.state_dict(), model.state_dict())
    assert autosparse_fx.sparsity(fresh) == autosparse_fx.sparsity(model) > 0


def test_a_model_in_training(tmp_path: Path) -> None:
    """Its weights are dense; thresholds and offsets are entries like others."""
    model = autosparse_fx.sparsify(reference.ConvNet(), OPEN_LOOP)
    loaded = round_trip(model, tmp_path / "a")
    assert_same(loaded, model.state_dict())
    assert any(name.endswith("_threshold") for name in loaded)
    fresh = autosparse_fx.sparsify(reference.ConvNet(), OPEN_LOOP)
    fresh.load_state_dict(loaded, strict=True)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(fresh(x), model(x))


class Migrating(nn.Module):
    """Doubles the weights of state dicts that are older than itself."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        if local_metadata.get("version", 1) < 2:
            state_dict[prefix + "weight"] = 2 * state_dict[prefix + "weight"]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_modules_know_the_version_of_a_state_dict(tmp_path: Path) -> None:
    model, fresh = nn.Sequential(Migrating()), nn.Sequential(Migrating())
    fresh.load_state_dict(round_trip(model, tmp_path / "a"))
    assert_same(fresh.state_dict(), model.state_dict())
    fresh.load_state_dict(round_trip(dict(model.state_dict()), tmp_path / "a"))
    assert torch.equal(fresh[0].weight, 2 * model[0].weight)


@pytest.mark.parametrize("signed", [False, True])
def test_resnet50_at_90_percent(signed: bool, tmp_path: Path) -> None:
    """Also with weights that were multiplied by a mask, where half of the zeros are -0.0."""
    model = torchvision.models.resnet50()
    with torch.no_grad():
        for weight in (weight for weight in model.parameters() if weight.dim() > 1):
            mask = torch.rand_like(weight) < 0.1
            weight.copy_(weight * mask if signed else torch.where(mask, weight, 0.0))
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    loaded = round_trip(model, tmp_path / "sparse.safetensors")
    assert_same(loaded, model.state_dict())
    ratio = (tmp_path / "sparse.safetensors").stat().st_size / (tmp_path / "dense.pt").stat().st_size
    assert ratio < (0.17 if signed else 0.14)  # asked for: a quarter


def test_a_dense_file_costs_little_more(tmp_path: Path) -> None:
    model = torchvision.models.resnet18()
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    save_sparse(model, tmp_path / "sparse.safetensors")
    assert (tmp_path / "sparse.safetensors").stat().st_size < 1.001 * (tmp_path / "dense.pt").stat().st_size


def read(file: Any, name: str) -> np.ndarray:
    """As docs/files.md has it, with safetensors and NumPy alone."""
    tensors = json.loads(file.metadata()["autosparse_fx"])["tensors"]
    entry = tensors[tensors[name].get("same_as", name)]
    values = file.get_tensor(entry["values"])
    if values.dtype != entry["dtype"]:
        values = values.view(entry["dtype"])[..., 0]
    if "bitmap" not in entry:
        return values
    array = np.zeros(entry["shape"], entry["dtype"])
    kept = np.unpackbits(file.get_tensor(entry["bitmap"]), count=array.size, bitorder="little") == 1
    array.flat[kept] = values
    if "signs" in entry:
        left_out = np.flatnonzero(~kept)
        signs = np.unpackbits(file.get_tensor(entry["signs"]), count=len(left_out), bitorder="little") == 1
        array.flat[left_out[signs]] = -0.0
    return array


def test_other_programs_read_it(tmp_path: Path) -> None:
    weight = torch.randn(20, 30) * (torch.rand(20, 30) < 0.1)
    state = {"bias": torch.ones(4), "weight": weight, "tied": weight, "positive": weight.abs()}
    state |= {"scalar": torch.tensor(3), "flags": torch.eye(3) > 0, "phase": torch.randn(2, 3, dtype=torch.complex64)}
    state["spectrum"] = weight.abs().to(torch.complex64)
    save_sparse(state, tmp_path / "a")
    stored = safetensors.torch.load_file(tmp_path / "a")
    assert {"bias", "weight", "weight:bitmap", "weight:signs"} < stored.keys()
    assert torch.equal(stored["bias"], torch.ones(4)) and torch.equal(stored["weight"], weight[weight != 0])
    parts = parts_of(tmp_path / "a")
    assert parts["positive"] == parts["spectrum"] == ["bitmap", "values"] and parts["tied"] == ["same_as"]
    with safetensors.safe_open(tmp_path / "a", "np") as file:
        for name, tensor in state.items():
            array = read(file, name)
            assert array.shape == tensor.shape and array.dtype == tensor.numpy().dtype, name
            assert bits(torch.from_numpy(array)) == bits(tensor), name


REFUSED: dict[str, tuple[Any, str]] = {
    "checkpoint": ({"w": torch.ones(3)}, r"is itself a dict of tensors: pass checkpoint\['my.name'\]"),
    "extra state": ({"at": 3}, "is of type dict, and only tensors are stored: leave it out"),
    "number": (3, "is of type int"),
    "none": (None, "is of type NoneType"),
    "sparse": (torch.eye(3).to_sparse(), r"layout torch.sparse_coo .*: store a plain dense one"),
    "meta": (torch.ones(3, device="meta"), "meta device, without any data: save a model that has its weights"),
    "lazy": (nn.UninitializedParameter(), "not initialised yet: call the model once"),
    "bits": (torch.ones(3, dtype=torch.uint8).view(torch.bits8), "dtype torch.bits8"),
}


@pytest.mark.parametrize(("value", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_stored_is_named(value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(SparseFileError, match=f"entry 'my.name' of the state dict .*{message}"):
        save_sparse({"fine": torch.ones(3), "my.name": value}, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_holds_others_is_named(tmp_path: Path) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    with pytest.raises(SparseFileError, match=r"'w' of .* is a TwoTensor, .* of a DTensor its full_tensor\(\)"):
        save_sparse({"w": TwoTensor(torch.ones(3), torch.ones(3))}, tmp_path / "a")


def test_other_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"takes a module or its state_dict\(\), got list"):
        save_sparse([torch.ones(3)], tmp_path / "a")  # type: ignore[arg-type]
    with pytest.raises(SparseFileError, match="entry 3 of the state dict is not named by a string"):
        save_sparse({3: torch.ones(3)}, tmp_path / "a")  # type: ignore[dict-item]
    with pytest.raises(SparseFileError, match=r"_extra_state' .* is of type dict, and only tensors are stored: leave"):
        save_sparse({"m._extra_state": {"scale": torch.ones(3)}}, tmp_path / "a")  # type: ignore[dict-item]
    with pytest.raises(FileNotFoundError, match="make it first"):
        save_sparse({}, tmp_path / "missing" / "a")
    state: Any = OrderedDict(w=torch.ones(3))
    for metadata in ({"": {"version": object()}}, {3: {}}, {"": 1}, {"": (1,)}):
        state._metadata = metadata
        with pytest.raises(SparseFileError, match=r"`_metadata` .* more than plain values"):
            save_sparse(state, tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_sparse({"w": torch.ones(3)}, tmp_path / "a")

    def fail(path: Path) -> None:
        raise error

    monkeypatch.setattr(sparse_files, "_seal", fail)
    with pytest.raises(error):
        save_sparse({"w": torch.zeros(3)}, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert torch.equal(load_sparse(tmp_path / "a")["w"], torch.ones(3))


def test_nothing_is_changed_or_shared(tmp_path: Path) -> None:
    """Loaded tensors are not the file: it may be replaced while they are in use."""
    state = {"w": torch.randn(300), "z": torch.zeros(300)}
    before = copy.deepcopy(state)
    loaded = round_trip(state, tmp_path / "a")
    with (tmp_path / "a").open("r+b") as file:
        file.write(bytes((tmp_path / "a").stat().st_size))
    assert_same(loaded, before)
    assert_same(state, before)


@pytest.mark.gpu
def test_weights_on_a_gpu_are_loaded_to_the_cpu(tmp_path: Path) -> None:
    model = reference.ConvNet().cuda()
    assert_same(round_trip(model, tmp_path / "a"), {name: t.cpu() for name, t in model.state_dict().items()})


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"need the package safetensors: pip install 'autosparse-fx\[files\]'"):
        save_sparse({}, tmp_path / "a")
    with pytest.raises(ImportError, match=r"pip install 'autosparse-fx\[files\]'"):
        load_sparse(tmp_path / "a")


def test_tensors_that_are_made_when_asked_for_are_not_taken_for_one_another(tmp_path: Path) -> None:
    """Each may lie where one lay that is gone."""

    class Made(Mapping[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            return torch.full((64, 64), float(name)).triu()

        def __iter__(self) -> Iterator[str]:
            return iter(map(str, range(1, 30)))

        def __len__(self) -> int:
            return 29

    save_sparse(Made(), tmp_path / "a")
    assert_same(load_sparse(tmp_path / "a"), dict(Made()))
