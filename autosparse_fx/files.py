"""Files that are written whole or not at all."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def checked_path(path: str | os.PathLike[str], suffixes: Sequence[str] = ()) -> Path:
    """Return ``path`` if a file can be written there, before any work is done for it.

    Raises:
        ValueError: if its suffix is none of ``suffixes``.
        FileNotFoundError: if its directory is not there.
        IsADirectoryError: if it is a directory.
    """
    target = Path(path)
    if suffixes and target.suffix.lower() not in suffixes:
        raise ValueError(f"{str(target)!r} must end in one of {', '.join(suffixes)}, which says what to write")
    if target.is_dir():
        raise IsADirectoryError(f"{str(target)!r} is a directory: give the name of a file in it")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"directory {str(target.parent)!r} of {str(target)!r} is not there: make it first")
    return target


@contextmanager
def written(target: Path) -> Iterator[Path]:
    """A temporary file that takes the place of ``target`` when the block ends without an error.

    As with ``open``, a link is followed, and a file that is there keeps its permissions. What is no file (a pipe, a
    device) is written to.
    """
    if target.exists() and not target.is_file():
        with tempfile.TemporaryDirectory() as folder:
            partial = Path(folder) / f"whole{target.suffix}"
            yield partial
            with partial.open("rb") as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        return
    target = target.resolve()
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".autosparse-", suffix=target.suffix)
    os.close(descriptor)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o666 & ~_umask())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _umask() -> int:
    """What new files are not permitted; it can only be read by setting it."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask
