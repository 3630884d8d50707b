"""The benchmark's end of a system that runs in a process of its own."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from _inference_systems import SYSTEMS

SERVER = Path(__file__).resolve().parent / "_inference_systems.py"
# Threads of OpenMP spin for some milliseconds after the last work, which then is not the time of another system.
REST_SECONDS = 0.1


class SystemProcess:
    """A system in its own process, possibly of another Python."""

    def __init__(self, name: str, python: str | None, folder: Path, threads: int) -> None:
        self.name = name
        self._log = (folder / f"{name}.log").open("w+")
        counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        environment = {**os.environ, **counts, "NM_DISABLE_ANALYTICS": "1"}
        if python is not None:
            environment.pop("PYTHONPATH", None)  # its packages are for this Python
        self._process = subprocess.Popen(
            [python or sys.executable, str(SERVER), name],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def __enter__(self) -> "SystemProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what a process that died did not read
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Return the answer; a failure of an optional system is a reason to skip it, of another one an error."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer: dict[str, Any] = json.loads(line) if line else {"failed": f"the process ended ({self._process.wait()})"}
        reason = answer.get("failed") or answer.get("skipped")
        if reason and SYSTEMS[self.name].required:
            raise SystemExit(f"{self.name}: {reason}\n{self._last_words()}")
        return {"skipped": "; ".join(filter(None, (reason, self._last_words(1))))} if "failed" in answer else answer

    def rested_burst(self, seconds: float) -> dict[str, Any]:
        """A burst that starts when the system before it has come to rest."""
        time.sleep(REST_SECONDS)
        return self.ask(do="burst", seconds=seconds)

    def _last_words(self, lines: int = 20) -> str:
        self._log.flush()
        self._log.seek(0)
        return "\n".join(self._log.read().splitlines()[-lines:])
