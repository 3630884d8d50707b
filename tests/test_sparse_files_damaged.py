"""load_sparse: a file that is not just as it was written is refused, and nothing in it is run."""

import builtins
import hashlib
import json
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import safetensors.torch
import torch
from hypothesis import strategies as st
from torch import Tensor

from autosparse_fx import SparseFileError, load_sparse, save_sparse

SEAL = "autosparse_fx.sha256"
fuzzed = hypothesis.settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


def state() -> dict[str, Tensor]:
    """One tensor for each way of storing it."""
    torch.manual_seed(0)
    sparse = torch.randn(15, 16) * (torch.rand(15, 16) < 0.05)  # half of its zeros are -0.0
    tied = torch.randn(3)
    return {
        "signed": sparse,
        "zeros": torch.zeros(61, dtype=torch.float64),
        "dense": torch.randn(4, 3).bfloat16(),
        "complex": torch.randn(3, dtype=torch.complex64),
        "flags": torch.tensor([True, False]),
        "count": torch.tensor(7),
        "empty": torch.ones(0, 3),
        "tied": tied,
        "tied too": tied,
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_sparse(state(), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def refuse(path: Path, data: bytes, match: str = ".") -> None:
    path.write_bytes(data)
    with pytest.raises(SparseFileError, match=match) as error:
        load_sparse(path)
    assert repr(str(path)) in str(error.value)


def opened(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The index, the rest of the header, and the tensors of a file."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    return json.loads(header["__metadata__"]["autosparse_fx"]), header, data[8 + size :]


def forged(index: Any, header: dict[str, Any], tensors: bytes) -> bytes:
    """A file whose header has been given the checksum that it should have, as the documentation says."""
    header = {**header, "__metadata__": {"autosparse_fx": json.dumps(index), SEAL: "0" * 64}}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = struct.pack("<Q", len(text)) + text
    seal = hashlib.sha256(begin).hexdigest().encode()
    return begin.replace(b'256":"' + b"0" * 64, b'256":"' + seal) + tensors


def test_a_forged_file_without_a_change_is_the_file(path: Path) -> None:
    """So what is refused below is refused for its content."""
    path.write_bytes(forged(*opened(path.read_bytes())))
    loaded = load_sparse(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state().items())


@pytest.fixture
def small_path(tmp_path: Path) -> Path:
    all_of_them = state()
    save_sparse({name: all_of_them[name] for name in ("signed", "flags", "tied", "tied too")}, tmp_path / "small")
    return tmp_path / "small"


def test_every_changed_byte_is_found(small_path: Path) -> None:
    data, rng = small_path.read_bytes(), random.Random(0)
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= rng.randrange(1, 256)
        refuse(small_path, changed)


def test_every_length_but_its_own_is_found(small_path: Path) -> None:
    data = small_path.read_bytes()
    for size in range(len(data)):
        refuse(small_path, data[:size])
    for more in (b"\0", b" ", b"}", data[-1:], data):
        refuse(small_path, data + more)


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Pieces of a file changed, taken out, put in, repeated or exchanged."""
    steps = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["set", "cut", "insert", "repeat", "swap"]),
                st.floats(0, 1, exclude_max=True),
                st.floats(0, 1, exclude_max=True),
                st.integers(1, 64),
                st.binary(min_size=1, max_size=16),
            ),
            min_size=1,
            max_size=4,
        )
    )

    def mutate(data: bytes) -> bytes:
        for kind, one, other, size, new in steps:
            i, j = int(one * len(data)), int(other * len(data))
            piece, rest = data[i : i + size], data[i + size :]
            if kind == "set":
                data = data[:i] + new + data[i + len(new) :]
            elif kind == "cut":
                data = data[:i] + rest
            elif kind == "insert":
                data = data[:i] + new + data[i:]
            elif kind == "repeat":
                data = data[:j] + piece + data[j:]
            else:
                data = data[:i] + data[j : j + size] + rest
        return data

    return mutate


@fuzzed
@hypothesis.given(mutate=mutations())
def test_mutated_files_are_refused(mutate: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_sparse(state(), path)
    data = path.read_bytes()
    changed = mutate(data)
    hypothesis.assume(changed != data)
    refuse(path, changed)


@fuzzed
@hypothesis.given(
    data=st.binary(max_size=200), begin=st.sampled_from([b"", b"\x10" + b"\0" * 7, b"\x02" + b"\0" * 7 + b"{}"])
)
def test_other_files_are_refused(data: bytes, begin: bytes, tmp_path: Path) -> None:
    refuse(tmp_path / "a", begin + data)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=4)
    | st.sampled_from(["float64", "complex128", "U8", "F32", "signed", "signed:bitmap", "zeros", "dense"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


def replaced(draw: st.DrawFn, tree: Any) -> Any:
    """The tree with one node of it taken out or replaced by something, or by another of its nodes."""
    if isinstance(tree, (dict, list)) and tree and draw(st.integers(0, 9)):
        tree = tree.copy()
        key = draw(st.sampled_from(sorted(tree) if isinstance(tree, dict) else range(len(tree))))
        kind = draw(st.integers(0, 9))
        if kind == 0:
            del tree[key]
        elif kind == 1 and isinstance(tree, dict):
            tree[draw(st.sampled_from(sorted(tree)) | st.text(max_size=3) | st.just("same_as"))] = tree[key]
        else:
            tree[key] = replaced(draw, tree[key])
        return tree
    return draw(values)


@fuzzed
@hypothesis.given(data=st.data())
def test_forged_headers_do_no_harm(data: st.DataObject, tmp_path: Path) -> None:
    """With the right checksum, wrong numbers are the worst that they do, and no more of them than a file can hold."""
    path = tmp_path / "a"
    save_sparse(state(), path)
    index, header, tensors = opened(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()) and isinstance(index, dict):
            index = replaced(data.draw, index)
        else:
            changed = replaced(data.draw, {k: v for k, v in header.items() if k != "__metadata__"})
            header = changed if isinstance(changed, dict) else header
    path.write_bytes(forged(index, header, tensors))
    try:
        loaded = load_sparse(path)
    except SparseFileError as error:
        assert repr(str(path)) in str(error)
        return
    memory = {tensor.data_ptr(): tensor.nbytes for tensor in loaded.values()}
    assert sum(memory.values()) <= 128 * len(path.read_bytes())


INDEX: dict[str, tuple[Callable[[Any], object], str]] = {
    "newer format": (lambda i: i.update(format=2), r"format 2, .* reads 1: pip install --upgrade autosparse-fx"),
    "no format": (lambda i: i.pop("format"), "no format version"),
    "no parts": (lambda i: i.pop("sha256"), "its index is incomplete"),
    "modules": (lambda i: i.update(modules={"": 3}), "no versions of modules"),
    "entry": (lambda i: i["tensors"].update(dense=3), "tensor 'dense': its entry in the index is no object"),
    "dtype": (lambda i: i["tensors"]["dense"].update(dtype="load"), "'dense' has dtype 'load', which torch .* newer"),
    "other dtype": (lambda i: i["tensors"]["dense"].update(dtype="float16"), r"'dense': its values are BF16 \[4, 3\]"),
    "shape": (lambda i: i["tensors"]["dense"].update(shape=[3, 4]), r"'dense': its values .* should be BF16 \[3, 4\]"),
    "no shape": (lambda i: i["tensors"]["dense"].update(shape=[-4, -3]), r"\[-4, -3\] is no shape"),
    "fractions": (lambda i: i["tensors"]["dense"].update(shape=[4.0, 3]), "is no shape"),
    "huge": (lambda i: i["tensors"]["zeros"].update(shape=[2**50]), r"'zeros': its bitmap are U8 \[8\]"),
    "huge, dense": (lambda i: i["tensors"]["dense"].update(shape=[2**50]), r"should be BF16 \[1125899906842624\]"),
    "beyond torch": (lambda i: i["tensors"]["empty"].update(shape=[0, 2**62]), "no tensor can have the shape"),
    "fewer elements": (lambda i: i["tensors"]["signed"].update(shape=[239]), "goes on behind|should be"),
    "missing": (lambda i: i["tensors"]["dense"].update(values="what"), "'dense': its values are not stored"),
    "twice": (lambda i: i["tensors"]["dense"].update(values="count"), "'count': its values .* claimed twice|BF16"),
    "no checksum": (lambda i: i["sha256"].pop("dense"), "'dense': its values do not fit their checksum"),
    "unused": (lambda i: i["tensors"].pop("dense"), "'dense' is not in its index"),
    "tied": (lambda i: i["tensors"]["tied too"].update(same_as="later"), "'tied too': it is tied to 'later', which"),
    "signs": (lambda i: i["tensors"]["signed"].pop("signs"), "'signed:signs' is not in its index"),
}


@pytest.mark.parametrize(("change", "message"), INDEX.values(), ids=list(INDEX))
def test_an_index_that_does_not_fit_is_refused(change: Callable[[Any], object], message: str, path: Path) -> None:
    index, header, tensors = opened(path.read_bytes())
    change(index)
    refuse(path, forged(index, header, tensors), message)


def test_a_changed_tensor_is_named(path: Path) -> None:
    data = bytearray(path.read_bytes())
    _, header, tensors = opened(bytes(data))
    begin = len(data) - len(tensors)
    for name, key in (("dense", "dense"), ("signed", "signed:bitmap"), ("signed", "signed:signs"), ("tied", "tied")):
        changed = data.copy()
        changed[begin + header[key]["data_offsets"][0]] ^= 1
        refuse(path, changed, f"damaged .tensor '{name}': its .* do not fit their checksum.*earlier checkpoint")


def test_a_header_that_claims_to_be_huge(path: Path) -> None:
    for size in (2**63, 2**64 - 1, 2**40, 10**8 + 1):
        refuse(path, struct.pack("<Q", size) + path.read_bytes()[8:], "truncated, or no safetensors file")


@pytest.mark.parametrize("lead", [b"\x80", b"PK\x03\x04"])
def test_a_truncated_file_whose_header_is_as_long_as_a_pickle_begins_is_damaged(lead: bytes, tmp_path: Path) -> None:
    refuse(tmp_path / "a", lead.ljust(8, b"\0") + b'{"', "is damaged .truncated, or no safetensors file")


def test_an_index_that_is_nested_deeply(path: Path) -> None:
    _, header, tensors = opened(path.read_bytes())
    deep: Any = "[" * 100_000
    data = forged("deep", header, tensors).replace(b'"\\"deep\\""', json.dumps(deep).encode())
    size = int.from_bytes(data[:8], "little") + len(json.dumps(deep)) - len('"\\"deep\\""')
    text = struct.pack("<Q", size) + data[8 : 8 + size]
    start = text.index(SEAL.encode()) + len(SEAL) + 3
    seal = hashlib.sha256(text[:start] + b"0" * 64 + text[start + 64 :]).hexdigest().encode()
    refuse(path, text[:start] + seal + text[start + 64 :] + tensors, "its index is no JSON")


def test_other_kinds_of_files(tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save({"w": torch.ones(3)}, tmp_path / "a", _use_new_zipfile_serialization=zipped)
        refuse(tmp_path / "a", (tmp_path / "a").read_bytes(), r"no file of save_sparse.*torch\.load\(.*weights_only")
    safetensors.torch.save_file({"w": torch.ones(3)}, tmp_path / "a", {"format": "pt"})
    refuse(tmp_path / "a", (tmp_path / "a").read_bytes(), r"no file of save_sparse.*safetensors\.torch\.load_file")
    with pytest.raises(FileNotFoundError):
        load_sparse(tmp_path / "missing")
    with pytest.raises(IsADirectoryError):
        load_sparse(tmp_path)


class Trap:
    sprung = False

    def __reduce__(self) -> Any:
        return setattr, (Trap, "sprung", True)


def test_no_code_is_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = pickle.dumps(Trap())
    torch.save({"w": Trap()}, path.with_name("trap"))
    index, header, tensors = opened(path.read_bytes())
    index["modules"] = {"": {"version": trap.hex()}}
    path.write_bytes(forged(index, header, tensors))

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("load_sparse must not need this")

    for module, names in (
        (pickle, ("load", "loads", "Unpickler")),
        (builtins, ("eval", "exec", "compile")),
        (torch, ("load",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, fail)
    load_sparse(path)
    for data in (trap, path.with_name("trap").read_bytes()):
        refuse(path, data)
    monkeypatch.undo()
    assert not Trap.sprung
    pickle.loads(trap)
    assert Trap.sprung  # it is one


def test_a_file_that_is_replaced_while_it_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = safetensors.safe_open

    def late(*args: Any, **kwargs: Any) -> Any:
        save_sparse({"other": torch.ones(3)}, path)
        return real(*args, **kwargs)

    monkeypatch.setattr(safetensors, "safe_open", late)
    with pytest.raises(SparseFileError, match="was replaced while it was read: load it again"):
        load_sparse(path)
