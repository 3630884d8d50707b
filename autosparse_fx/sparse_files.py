"""save_sparse and load_sparse: checkpoints that leave zeros out, as safetensors files.

The tensors of a file are those of the state dict, under their own names, either whole or as the values that are not
zero, beside ``<name>:bitmap`` with one bit for every element (see :func:`autosparse_fx.bitmap.pack`). The metadata of
the file hold, as text,

* ``autosparse_fx``: a JSON object, the index, with the format version; for each name of the state dict, in its order,
  dtype, shape, and the keys of its parts, or the name that it is tied to; the SHA-256 of what is stored at each key;
  and the versions of the modules (``state_dict()._metadata``), by which modules recognize old state dicts.
* ``autosparse_fx.sha256``: the SHA-256 of the file up to its tensors, with 64 zeros in place of these 64 digits.

So every byte of a file is under a checksum, and its header is checked before anything in it is believed.
"""

import hashlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from autosparse_fx.bitmap import DTYPES, bitwise_copy, bytes_of, pack, unpack
from autosparse_fx.files import checked_path, written

__all__ = ["SparseFileError", "load_sparse", "save_sparse"]

FORMAT = 1
_INDEX, _SEAL = "autosparse_fx", "autosparse_fx.sha256"
_BLANK = "0" * 64
# Compact JSON, as safetensors writes it. Inside a string the quotes would be escaped.
_SEAL_PATTERN = re.compile(b'"' + re.escape(_SEAL.encode()) + b'":"([0-9a-f]{64})"')
_LARGEST_HEADER = 100_000_000  # that of safetensors
_TORCH_SAVE = (b"PK\x03\x04", b"\x80")  # how its files begin: a zip archive, or a pickle


class SparseFileError(ValueError):
    """A state dict cannot be stored, or a file cannot be trusted; says which file, which tensor, and what to do."""


def save_sparse(model_or_state_dict: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write a state dict to a safetensors file in which zeros take one bit each.

    Every tensor comes back from :func:`load_sparse` with every bit that it had, whatever is in it; tensors with many
    zeros take less space, and each is stored whole if that is smaller. The weights of a model that is being trained
    sparse are dense (zeros are in what its layers read, not in its ``state_dict()``): its file is exact, thresholds
    included, but not small. ``autosparse_fx.finalize`` puts the zeros into the weights.

    The file appears under its name when it is whole. Weights must not be written to meanwhile.

    Args:
        model_or_state_dict: a module, or a mapping from names to tensors, on any device. Tensors that share all their
            memory (tied weights) are stored once.
        path: where to write, by custom ``<name>.safetensors``. A file that is there is replaced.

    Raises:
        SparseFileError: if an entry cannot be stored: it is no tensor, not a plain dense one, or has no data.
        TypeError: if ``model_or_state_dict`` is neither module nor mapping.
        OSError: if the file cannot be written.
        ImportError: if safetensors is not installed.
    """
    state = model_or_state_dict.state_dict() if isinstance(model_or_state_dict, nn.Module) else model_or_state_dict
    if not isinstance(state, Mapping):
        raise TypeError(f"save_sparse takes a module or its state_dict(), got {type(state).__name__}")
    target = checked_path(path)
    safetensors = _safetensors()
    stored, index = _encoded(state)
    metadata = {_INDEX: json.dumps(index, separators=(",", ":")), _SEAL: _BLANK}
    with written(target) as unsealed:
        try:
            safetensors.torch.save_file(stored, str(unsealed), metadata)
        except safetensors.SafetensorError as error:
            raise SparseFileError(f"safetensors cannot write {str(target)!r}: {error}") from error
        _seal(unsealed)


def is_sparse_file(path: Path) -> bool:
    """Whether a file seems to be one of :func:`save_sparse`, damaged or not."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return length <= _LARGEST_HEADER and _SEAL_PATTERN.search(file.read(length)) is not None


def load_sparse(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a file of :func:`save_sparse`: a dense state dict, on the CPU, for ``model.load_state_dict``.

    No code in the file is run, and every byte of it is checked against a checksum: a file that is truncated or changed
    in any place is refused. (That finds damage, not a forger, who can compute checksums too. What a forged file can do
    is hold wrong numbers.) Tensors are contiguous; names that were tied hold the same tensor again.

    Raises:
        SparseFileError: if it is no such file, is damaged, or was written by a newer version.
        OSError: if it cannot be read.
        ImportError: if safetensors is not installed.
    """
    source = Path(path)
    safetensors = _safetensors()
    seal = _checked_seal(source)
    try:
        with safetensors.safe_open(str(source), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get(_SEAL) != seal:
                raise SparseFileError(f"{str(source)!r} was replaced while it was read: load it again")
            return _decoded(source, file, _parsed(source, metadata.get(_INDEX, "")))
    except safetensors.SafetensorError as error:
        raise _damaged(source, f"truncated, or no safetensors file: {error}") from error


def _safetensors() -> ModuleType:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "save_sparse and load_sparse need the package safetensors: pip install 'autosparse-fx[files]'"
        ) from error
    return safetensors


def _encoded(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of the file by their keys, and the index."""
    stored: dict[str, Tensor] = {}
    tensors: dict[str, dict[str, Any]] = {}
    holders: dict[Any, tuple[str, Tensor]] = {}  # who stores some memory, and what keeps it from being used again
    memory: set[int] = set()

    def store(name: str, tensor: Tensor) -> str:
        key = name.encode("utf-8", "backslashreplace").decode()
        while key in stored or key == "__metadata__":
            key += "'"
        address = tensor.untyped_storage().data_ptr()  # safetensors refuses tensors that overlap
        stored[key] = bitwise_copy(tensor) if address in memory else tensor
        memory.add(address)
        return key

    for name, value in state.items():
        tensor = _storable(name, value)
        if tensor.numel():
            same = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride(), _lazy_bits(value))
            holder, _ = holders.setdefault(same, (name, value))
            if holder != name:
                tensors[name] = {"same_as": holder}
                continue
        tensors[name] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": [*tensor.shape]}
        for part, data in pack(tensor).items():
            tensors[name][part] = store(name if part == "values" else f"{name}:{part}", data)
    modules = dict(getattr(state, "_metadata", None) or {})
    try:
        kept = json.loads(json.dumps(modules)) == modules
    except (TypeError, ValueError, RecursionError):
        kept = False
    if not kept or not _is_metadata(modules):
        raise SparseFileError(
            "the `_metadata` of the state dict hold more than plain values by the names of modules: store a plain "
            "dict(state_dict) if no module needs them"
        )
    sums = {key: hashlib.sha256(bytes_of(tensor)).hexdigest() for key, tensor in stored.items()}
    return stored, {"format": FORMAT, "tensors": tensors, "sha256": sums, "modules": modules}


def _storable(name: object, value: object) -> Tensor:
    """Return a plain contiguous tensor on the CPU, or refuse."""
    entry = f"entry {name!r} of the state dict"
    if not isinstance(name, str):
        raise SparseFileError(f"{entry} is not named by a string")
    is_extra = name.endswith("_extra_state")  # what modules return of their own
    if isinstance(value, Mapping) and not is_extra and any(isinstance(inner, Tensor) for inner in value.values()):
        raise SparseFileError(f"{entry} is itself a dict of tensors: pass checkpoint[{name!r}] of a whole checkpoint")
    if not isinstance(value, Tensor):
        raise SparseFileError(
            f"{entry} is of type {type(value).__name__}, and only tensors are stored: leave it out, and save it in a "
            "file of its own"
        )
    if nn.parameter.is_lazy(value):
        raise SparseFileError(f"{entry} is not initialised yet: call the model once before it is saved")
    if hasattr(value, "__tensor_flatten__"):
        raise SparseFileError(
            f"{entry} is a {type(value).__name__}, which holds other tensors: store the plain one, of a DTensor "
            "its full_tensor()"
        )
    if value.is_meta:
        raise SparseFileError(f"{entry} is on the meta device, without any data: save a model that has its weights")
    if value.layout != torch.strided or value.is_nested or value.dtype not in DTYPES.values():
        raise SparseFileError(
            f"{entry} is a tensor with layout {value.layout} and dtype {value.dtype}: store a plain dense one "
            "(.to_dense(), .dequantize())"
        )
    return value.detach().as_subclass(Tensor).resolve_conj().resolve_neg().cpu().contiguous()


def _lazy_bits(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_conj(), tensor.is_neg()


def _seal(path: Path) -> None:
    """Write the checksum of everything before the tensors into its place there."""
    with path.open("r+b") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
        (place,) = _SEAL_PATTERN.finditer(header)
        file.seek(len(length) + place.start(1))
        file.write(hashlib.sha256(length + header).hexdigest().encode())


def _checked_seal(path: Path) -> str:
    """Check everything before the tensors, and return its checksum."""
    with path.open("rb") as file:
        available = os.fstat(file.fileno()).st_size - 8
        length = file.read(8)
        size = int.from_bytes(length, "little")
        if size > _LARGEST_HEADER and length.startswith(_TORCH_SAVE):
            raise _other_kind(path)
        if size > min(available, _LARGEST_HEADER):
            raise _damaged(path, "truncated, or no safetensors file")
        header = file.read(size)
    found = list(_SEAL_PATTERN.finditer(header))
    if len(found) != 1:
        raise _other_kind(path)
    start, end = found[0].span(1)
    if hashlib.sha256(length + header[:start] + _BLANK.encode() + header[end:]).hexdigest().encode() != found[0][1]:
        raise _damaged(path, "its header does not fit its checksum")
    return found[0][1].decode()


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        index = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its index is no JSON: {error}") from error
    if not isinstance(index, dict) or type(index.get("format")) is not int:
        raise _damaged(path, "its index has no format version")
    if index["format"] != FORMAT:
        raise SparseFileError(
            f"{str(path)!r} has format {index['format']}, and this version of autosparse_fx reads {FORMAT}: "
            "pip install --upgrade autosparse-fx"
        )
    if not all(isinstance(index.get(part), dict) for part in ("tensors", "sha256", "modules")):
        raise _damaged(path, "its index is incomplete")
    for name, entry in index["tensors"].items():
        if not isinstance(entry, dict):
            raise _damaged(path, f"tensor {name!r}: its entry in the index is no object")
        if "same_as" not in entry and entry.get("dtype") not in list(DTYPES):
            raise SparseFileError(
                f"{str(path)!r}: tensor {name!r} has dtype {entry.get('dtype')!r}, which torch {torch.__version__} "
                "does not know: read it with a newer torch"
            )
    return index


def _decoded(path: Path, file: Any, index: dict[str, Any]) -> dict[str, Tensor]:
    state: OrderedDict[str, Tensor] = OrderedDict()
    unread = set(file.keys())

    def read(entry: Mapping[str, object], part: str, shape: list[int], dtype: str) -> Tensor:
        """Copy what is stored, so that nothing can change it behind the checksum."""
        key = entry.get(part)
        if not isinstance(key, str) or key not in unread:
            raise ValueError(f"its {part} are not stored, or claimed twice")
        unread.remove(key)
        form = file.get_slice(key)
        if form.get_shape() != shape or form.get_dtype() != dtype:
            raise ValueError(f"its {part} are {form.get_dtype()} {form.get_shape()}, and should be {dtype} {shape}")
        tensor = bitwise_copy(file.get_tensor(key))
        if hashlib.sha256(bytes_of(tensor)).hexdigest() != index["sha256"].get(key):
            raise ValueError(f"its {part} do not fit their checksum")
        return tensor

    for name, entry in index["tensors"].items():
        try:
            if "same_as" in entry:
                holder = entry["same_as"]
                if not isinstance(holder, str) or holder not in state:
                    raise ValueError(f"it is tied to {holder!r}, which is not there")
                state[name] = state[holder]
            else:
                state[name] = unpack(entry, partial(read, entry), _checked_shape(entry), DTYPES[entry["dtype"]])
        except ValueError as error:
            raise _damaged(path, f"tensor {name!r}: {error}") from error
    if unread:
        raise _damaged(path, f"{min(unread)!r} is not in its index")
    if not _is_metadata(index["modules"]):
        raise _damaged(path, "its index holds no versions of modules")
    state._metadata = OrderedDict(index["modules"])  # type: ignore[attr-defined]
    return state


def _checked_shape(entry: Mapping[str, object]) -> list[int]:
    shape = entry.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise ValueError(f"{shape!r} is no shape")
    most = 2**56  # so that neither bytes nor strides overflow
    for size in shape:
        most //= max(size, 1)
    if not most:
        raise ValueError(f"no tensor can have the shape {shape}")
    return shape


def _is_metadata(modules: Mapping[Any, Any]) -> bool:
    return all(isinstance(module, str) and isinstance(kept, dict) for module, kept in modules.items())


def _other_kind(path: Path) -> SparseFileError:
    return SparseFileError(
        f"{str(path)!r} is no file of save_sparse, or damaged: read a file of torch.save with torch.load(..., "
        "weights_only=True), and another safetensors file with safetensors.torch.load_file"
    )


def _damaged(path: Path, what: str) -> SparseFileError:
    return SparseFileError(
        f"{str(path)!r} is damaged ({what}): nothing of it was loaded; copy or download it again, or go back to an "
        "earlier checkpoint"
    )
