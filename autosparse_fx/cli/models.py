"""From the name of a model on the command line to the model and the arguments of one call."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autosparse_fx.cli.weights import architecture, load_weights, read_file


def make_model(name: str, weights: Path | None, inputs: Sequence[str] | None) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Return a model, the arguments of one call, and the checkpoint that was read (empty where there was none).

    Raises:
        ValueError, TypeError, ImportError, OSError: naming what is wrong with the name, the file or the shapes.
    """
    if weights is None and _is_file(name):
        weights = Path(name)
    state = {} if weights is None else read_file(weights)
    torchvision_name = name
    options: dict[str, Any] = {}
    if weights is not None and _is_file(name):
        torchvision_name, options = architecture(state, weights)
    if ":" in torchvision_name:
        model = _imported(torchvision_name)
        if inputs is None:
            raise ValueError(f"say with --input what {torchvision_name} takes, such as --input 1x3x224x224")
        arguments = tuple(map(_tensor, inputs))
    else:
        model, example = _from_torchvision(torchvision_name, options)
        arguments = example if inputs is None else tuple(map(_tensor, inputs))
    model.eval()  # in which an example of one image is enough
    if weights is not None:
        load_weights(model, state, arguments, weights)
    return model, arguments, state


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors") or Path(name).is_file()


def _imported(name: str) -> nn.Module:
    module, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"cannot import {module!r} of {name!r}: {error}") from error
    for atom in attribute.split("."):
        if not hasattr(found, atom):
            raise ValueError(f"module {module!r} has no {attribute!r}")
        found = getattr(found, atom)
    model = found if isinstance(found, nn.Module) else found()
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} gives a {type(model).__name__}, not a torch.nn.Module")
    return model


def _from_torchvision(name: str, options: dict[str, Any]) -> tuple[nn.Module, tuple[Any, ...]]:
    from torchvision import models

    if name not in models.list_models():
        close = [known for known in models.list_models() if name.lower().replace("-", "_") in known][:5]
        hint = f" (do you mean {', '.join(close)}?)" if close else ""
        raise ValueError(
            f"{name!r} is no model of torchvision.models{hint}, no file, and no package.module:callable to import"
        )
    builder = models.get_model_builder(name)
    if builder.__module__.startswith(("torchvision.models.detection", "torchvision.models.segmentation")):
        options = {"weights_backbone": None, **options}
    model: nn.Module = models.get_model(name, weights=None, **options)
    return model, _example(model, name, builder.__module__)


def _example(model: nn.Module, name: str, module: str) -> tuple[Any, ...]:
    """The arguments that a model of torchvision is made for.

    Of the only size that it takes (a ViT), or else of the size that its own weights were trained at.
    """
    from torchvision import models

    if ".detection." in module:
        return ([torch.rand(3, 320, 320)],)
    if ".optical_flow." in module:
        return torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)
    size = getattr(model, "image_size", None)
    if isinstance(size, int):
        return (torch.rand(1, 3, size, size),)
    transforms: Any = next(iter(models.get_model_weights(name))).transforms()
    crop = getattr(transforms, "crop_size", None) or [224]
    height, width = crop if len(crop) == 2 else [crop[0], crop[0]]
    return (torch.rand(1, 3, *([16] if ".video." in module else []), height, width),)


def _tensor(text: str) -> Tensor:
    """``1x3x224x224`` or ``1x128:int64``."""
    shape, _, kind = text.partition(":")
    dtype = getattr(torch, kind or "float32", None)
    if not isinstance(dtype, torch.dtype) or not all(size.isdigit() for size in shape.split("x")):
        raise ValueError(f"--input {text!r} is no shape such as 1x3x224x224, or 1x128:int64 with a dtype of torch")
    sizes = [int(size) for size in shape.split("x")]
    return torch.rand(sizes, dtype=dtype) if dtype.is_floating_point else torch.zeros(sizes, dtype=dtype)
