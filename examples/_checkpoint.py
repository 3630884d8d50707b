"""Checkpoints that are never half written, and that put the random state back."""

import os
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Replace the checkpoint at `path` in one step: a crash leaves the old file or the new one, never a part.

    The temporary file has a fixed name, so that what a crash leaves behind is overwritten by the next save.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, tensors and plain values only, onto the CPU."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"cannot read the checkpoint {path}: {error}") from error
    if not isinstance(state, dict) or "recipe" not in state:
        raise ValueError(f"{path} is not a checkpoint of this script: it holds no recipe")
    return state


def rng_state() -> dict[str, Any]:
    """Take the state of the global generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` took; GPU states only where there are as many GPUs as there were."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
