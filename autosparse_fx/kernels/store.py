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
        key: all that the result depends on, besides the processor and the number of threads.
        measure: returns plain values, fit for JSON.
    """
    machine = repr((_processor(), os.cpu_count(), torch.get_num_threads()))
    name = hashlib.sha256(machine.encode() + key).hexdigest()
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
