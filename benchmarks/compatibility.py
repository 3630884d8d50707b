"""Check Hugging Face transformers and timm models: made sparse, trained, compiled, finalized, saved and loaded.

    python benchmarks/compatibility.py transformers          (all that have no result yet)
    python benchmarks/compatibility.py timm --only resnet18  (again)
    python benchmarks/compatibility.py --table               (only write docs/compatibility/ from the stored results)

Every model is a small one from its configuration, with random weights: nothing is downloaded. Each is checked in a
process of its own, which may take --timeout seconds.
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _compatibility_case import Family

FAMILIES = ("transformers", "timm")
RESULTS = Path(__file__).resolve().parent / "results" / "compatibility"
DOCS = Path(__file__).resolve().parent.parent / "docs" / "compatibility"


def family(name: str) -> Family:
    found: Family = importlib.import_module(f"_compatibility_{name}").FAMILY
    return found


def check(name: str, model: str, path: Path) -> dict[str, Any]:
    """Run the checks of one model in this process, and write to ``path`` what is found, check by check."""
    from _compatibility_checks import Checks

    return Checks(family(name).models[model], lambda found: _write(path, found)).run()


def check_in_a_process(name: str, model: str, timeout: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder) / "found.json", Path(folder) / "log.txt"
        start, why = time.perf_counter(), None
        with log.open("w") as out:
            command = [sys.executable, __file__, name, "--only", model, "--here", str(path)]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
            try:
                done = subprocess.run(command, env=environment, stdout=out, stderr=out, timeout=timeout, check=False)
                if done.returncode:
                    why = f"the process ended with {done.returncode}: {(log.read_text().splitlines() or [''])[-1]}"
            except subprocess.TimeoutExpired:
                why = f"not done after {timeout:.0f} s"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"checks": {}}
        if why is not None:
            found["checks"]["process"] = {"error": why}
    print(f"{model}: {_outcome(found)}, {time.perf_counter() - start:.0f} s", flush=True)
    return found


def _outcome(found: dict[str, Any]) -> str:
    return "; ".join(f"{name}: {e['error']}" for name, e in found["checks"].items() if "error" in e) or "passed"


def measure(name: str, args: argparse.Namespace) -> None:
    path = args.results / f"{name}.json"
    where = {"versions": versions(name), "machine": {"processor": platform.machine(), "cores": os.cpu_count()}}
    stored = json.loads(path.read_text()) if path.exists() else {**where, "models": {}}
    if stored["versions"] != where["versions"]:
        raise SystemExit(f"{path} is of {stored['versions']}: move it away to measure {where['versions']}")
    models = list(family(name).models)
    if unknown := set(args.only or ()) - set(models):
        raise SystemExit(f"--only: {name} has no {', '.join(sorted(unknown))}; there are {', '.join(models)}")
    chosen = args.only or [model for model in models if model not in stored["models"]]
    end = time.perf_counter() + args.budget

    def one(model: str) -> None:
        if time.perf_counter() < end:
            found = check_in_a_process(name, model, args.timeout)
            stored["models"][model] = found
            stored["models"] = {m: stored["models"][m] for m in models if m in stored["models"]}
            _write(path, stored)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, chosen))


def versions(name: str) -> dict[str, str]:
    return {"python": platform.python_version(), **{package: version(package) for package in ("torch", name)}}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help=f"{' or '.join(FAMILIES)} (default: both)")
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="these, whether they have a result or not")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for each (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no other one begins")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON (default: %(default)s)")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)  # the process of one model: where its result goes
    parser.add_argument("--table", action="store_true", help="write the tables of the stored results, check nothing")
    args = parser.parse_args()
    if unknown := set(args.families) - set(FAMILIES):
        parser.error(f"no family {', '.join(unknown)}: there are {', '.join(FAMILIES)}")
    if args.here is not None:
        check(args.families[0], args.only[0], args.here)
        return
    for name in args.families or FAMILIES:
        if not args.table:
            measure(name, args)
        elif (path := args.results / f"{name}.json").exists():
            from _compatibility_tables import page

            DOCS.mkdir(parents=True, exist_ok=True)
            (DOCS / f"{name}.md").write_text(page(family(name), json.loads(path.read_text())))


if __name__ == "__main__":
    main()
