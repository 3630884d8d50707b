"""Saved weights, read without running any code that the file may hold."""

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import autosparse_fx
from autosparse_fx.config import masking_exactly
from autosparse_fx.masked_state import saved_thresholds, tells_scale
from autosparse_fx.sparse_files import is_sparse_file


def read_file(path: Path) -> dict[str, Any]:
    """Read tensors and plain values.

    Raises:
        ValueError: if the file holds anything else, or is truncated.
        ImportError: if it is one of ``save_sparse``, and safetensors is not installed.
        OSError: if it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    if is_sparse_file(path):
        return autosparse_fx.load_sparse(path)  # with the metadata of its modules
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(path)!r} holds more than tensors and plain values, or is damaged; nothing in it was run. Save "
            "model.state_dict(), not the model"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is damaged, or no file of torch.save ({type(error).__name__})") from error
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{str(path)!r} holds a {type(state).__name__}, not the state_dict of a model")
    return state


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"to read {str(path)!r}, install safetensors (the extra 'files')") from error
    try:
        return dict(safetensors.torch.load_file(path))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{str(path)!r} is damaged, or no file of safetensors ({error})") from error


def architecture(state: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """The torchvision model that a checkpoint of the training example is of, and its options.

    Raises:
        ValueError: if the file does not tell, or names a network of the example's own.
    """
    known = state.get("architecture")
    if not isinstance(known, dict) or not isinstance(known.get("name"), str):
        raise ValueError(
            f"{str(path)!r} holds weights and does not say of which model: autosparse-fx COMMAND MODEL --weights {path}"
        )
    name = known["name"]
    from torchvision import models

    if name not in models.list_models():
        raise ValueError(
            f"{str(path)!r} is of {name!r}, which is no model of torchvision: name a callable that builds it, as in "
            f"autosparse-fx COMMAND package.module:callable --weights {path}"
        )
    return name, {"num_classes": int(known["num_classes"])} if "num_classes" in known else {}


def load_weights(model: nn.Module, state: dict[str, Any], example_inputs: Any, path: Path) -> None:
    """Put saved weights into ``model``; where they have thresholds, make it sparse first.

    Raises:
        ValueError: if they do not fit the model.
    """
    weights = next((state[key] for key in ("model", "state_dict") if isinstance(state.get(key), dict)), state)
    masked = saved_thresholds(weights)
    if masked:
        saved = state.get("config")
        scale = saved["threshold_scale"] if isinstance(saved, dict) and "threshold_scale" in saved else None
        if scale is None and not tells_scale(weights) and any(bool(threshold.any()) for threshold in masked.values()):
            print(
                f"{str(path)!r} does not tell the threshold_scale of its training, which is taken to be the default, "
                f"{autosparse_fx.AutoSparse().threshold_scale}: if it was another, all sparsities are wrong, and "
                "torch.save(model.state_dict(), ...) or autosparse_fx.save_sparse writes a file that tells it",
                file=sys.stderr,
            )
        autosparse_fx.sparsify(model, masking_exactly(masked, scale), example_inputs=example_inputs)
    own = model.state_dict()
    weights = _with_shared(weights, own)
    misfits = [f"{key} is missing" for key in own if key not in weights]
    misfits += [f"{key} is not in the model" for key in weights if key not in own]
    misfits += [
        f"{key} is {_shape(weights[key])} and not {_shape(value)}"
        for key, value in own.items()
        if key in weights and _shape(weights[key]) != _shape(value)
    ]
    if misfits:
        more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise ValueError(
            f"the weights in {str(path)!r} do not fit {type(model).__name__}: {', '.join(misfits[:3])}{more}"
        )
    model.load_state_dict(weights)
    if isinstance(state.get("thresholds"), dict):
        autosparse_fx.load_state_dict(model, state["thresholds"])


def _with_shared(weights: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The weights under all names of the model's own tensors, of which safetensors keeps one."""
    complete = copy.copy(weights)  # with its metadata
    tensors = {key: t for key, t in own.items() if isinstance(t, torch.Tensor) and t.numel() and not t.is_meta}
    kept = {(tensor.data_ptr(), tensor.shape): key for key, tensor in tensors.items() if key in weights}
    for key, tensor in tensors.items():
        other = kept.get((tensor.data_ptr(), tensor.shape))
        if key not in weights and other is not None:
            complete[key] = weights[other]
    return complete


def _shape(value: Any) -> list[int] | str:
    return list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
