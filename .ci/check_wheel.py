"""Check built distributions: what is in them, and that the installed wheel works away from the source tree.

    python .ci/check_wheel.py DIST      where DIST holds the sdist and the wheel that `python -m build` made of it

The wheel is installed by itself into a new environment, which sees the packages of this one (torch among them).
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = ("*.cpp", "*.h", "py.typed", "assets/*")  # what is no Python and must be shipped

SMOKE = """
import sys, torch, autosparse_fx
from pathlib import Path

folder = Path(autosparse_fx.__file__).parent
assert folder.is_relative_to(sys.prefix), f"imported from {folder}, not from the wheel"
model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
model = autosparse_fx.sparsify(model, autosparse_fx.AutoSparse(target_sparsity=0.9))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
annealer = autosparse_fx.GradientAnnealing(model, total_steps=3, optimizer=optimizer)
step, x = torch.compile(model, backend="autosparse"), torch.randn(64, 256)
for _ in range(3):
    step(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
assert annealer.steps == 3 and abs(autosparse_fx.sparsity(model) - 0.9) < 0.005
autosparse_fx.visualize(model, x, "model.html")
model = autosparse_fx.finalize(model).eval()
with torch.no_grad():
    torch.testing.assert_close(torch.compile(model, backend="autosparse")(x), model(x), rtol=1e-4, atol=1e-5)
from autosparse_fx.kernels.library import library
library()  # the C++ is there, and compiles
print("the wheel works:", folder)
"""


def contents(wheel: Path) -> dict[str, int]:
    """The names of all files but the record of them, with their checksums."""
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.CRC for entry in archive.infolist() if not entry.filename.endswith("/RECORD")}


def check_contents(wheel: Path, scratch: Path) -> None:
    """All of the source tree is in the wheel, and the wheel of the sdist is the wheel of the tree."""
    shipped = contents(wheel)
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "autosparse_fx").rglob("*.py")}
    expected |= {f"autosparse_fx/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "passes").rglob("*.py")}
    for pattern in DATA:
        found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "autosparse_fx").rglob(pattern)}
        assert found, f"nothing in the source tree is called {pattern}"
        expected |= found
    missing = sorted(expected - shipped.keys())
    assert not missing, f"not in the wheel: {', '.join(missing)}"
    run(sys.executable, "-m", "build", "--wheel", "--outdir", scratch, ROOT)
    (direct,) = scratch.glob("*.whl")
    built = contents(direct)
    different = sorted(n for n in built.keys() | shipped.keys() if built.get(n) != shipped.get(n))
    assert not different, f"not the same in the wheel of the sdist and in that of the tree: {', '.join(different)}"


def check_installed(wheel: Path, scratch: Path) -> None:
    """Install the wheel and run it, in a folder where the source tree is not."""
    run(sys.executable, "-m", "venv", "--without-pip", scratch / "env")
    python = next(path for path in (scratch / "env").glob("*/python*") if path.stem == "python")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel)
    (site,) = (scratch / "env").rglob("site-packages")
    (site / "outer.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("-packages")))
    run(python, "-c", SMOKE, cwd=scratch)


def run(*command: object, cwd: Path | None = None) -> None:
    subprocess.run([str(part) for part in command], check=True, cwd=cwd)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path, help="folder with one wheel and its sdist")
    (wheel,) = parser.parse_args().dist.resolve().glob("*.whl")
    with tempfile.TemporaryDirectory() as scratch:
        check_contents(wheel, Path(scratch))
        check_installed(wheel, Path(scratch))


if __name__ == "__main__":
    main()
