"""What was measured on this machine, kept in Inductor's cache directory."""

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from autosparse_fx._compat import inductor


def remembered(kind: str, key: bytes, measure: Callable[[], Any]) -> Any:
    """Return what ``measure`` gave for this key before, in any process on this machine, or gives now.

    Args:
        kind: the name of a folder.
        key: all that the result depends on, besides the processor, the number of threads, and the passes and kernels.
        measure: returns plain values, fit for JSON.
    """
    machine = repr((_processor(), os.cpu_count(), torch.get_num_threads()))
    name = hashlib.sha256(machine.encode() + _sources() + key).hexdigest()
    path = inductor.inductor_cache_dir() / "autosparse_fx" / kind / f"{name}.json"
    if path.is_file():
        return json.loads(path.read_text())
    found = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(json.dumps(found))
    Path(file.name).replace(path)  # whole or not at all, whoever else writes the same
    return found


@cache
def _processor() -> str:
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    return next((line for line in lines if line.startswith("model name")), platform.processor())


@cache
def _sources() -> bytes:
    """The code that estimates, lays out and compiles: what another version of it measured says nothing of this one."""
    from autosparse_fx import passes

    folders = (Path(__file__).parent, Path(passes.__file__).parent)
    return b"".join(path.read_bytes() for folder in folders for path in sorted(folder.glob("*.[pch]*")))
