"""Files that are written whole or not at all."""

import os
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
    """A temporary file beside ``target`` that takes its place when the block ends without an error."""
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
    os.close(descriptor)
    partial = Path(name)
    try:
        yield partial
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)  # mkstemp's are private
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
