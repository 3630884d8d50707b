"""files: written whole or not at all."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from autosparse_fx.files import checked_path, written


@pytest.fixture
def umask() -> Iterator[int]:
    """One that differs from the usual and from a temporary file's."""
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_the_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    target.write_text("old")
    with written(target) as partial:
        assert partial.parent == tmp_path and partial.suffix == ".csv"
        partial.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("old", ["old", None])
def test_an_error_leaves_what_was_there(tmp_path: Path, error: type[BaseException], old: str | None) -> None:
    target = tmp_path / "out.csv"
    if old is not None:
        target.write_text(old)
    with pytest.raises(error), written(target) as partial:
        partial.write_text("half")
        raise error
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == ({"out.csv": old} if old else {})


def test_a_file_that_was_not_written_is_empty(tmp_path: Path) -> None:
    with written(tmp_path / "out.csv"):
        pass
    assert (tmp_path / "out.csv").read_text() == ""


def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    """As those of any new file, where a temporary one is for its owner only."""
    with written(tmp_path / "out.csv") as partial:
        assert partial.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "out.csv").stat().st_mode & 0o777 == 0o666 & ~umask
    assert os.umask(umask) == umask


def test_a_name_relative_to_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with written(checked_path("out.csv")) as partial:
        partial.write_text("new")
    assert (tmp_path / "out.csv").read_text() == "new"


def test_a_link_is_followed(tmp_path: Path) -> None:
    """As it is by open()."""
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    with written(tmp_path / "link.csv") as partial:
        partial.write_text("new")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "real.csv").read_text() == "new"


def test_an_old_file_keeps_its_permissions(tmp_path: Path) -> None:
    """One that was made private stays so."""
    target = tmp_path / "out.csv"
    target.write_text("old")
    target.chmod(0o600)
    with written(target) as partial:
        partial.write_text("new")
    assert target.stat().st_mode & 0o777 == 0o600


def test_a_name_as_long_as_names_may_be(tmp_path: Path) -> None:
    target = tmp_path / ("x" * 251 + ".csv")
    with written(target) as partial:
        partial.write_text("new")
    assert target.read_text() == "new"


def test_paths_are_checked_before_any_work(tmp_path: Path) -> None:
    assert checked_path(str(tmp_path / "a.SVG"), (".png", ".svg")) == tmp_path / "a.SVG"
    assert checked_path(tmp_path / "no suffix") == tmp_path / "no suffix"
    for name in ("a.txt", "a", "a.png.txt", ".png"):
        with pytest.raises(ValueError, match=r"must end in one of \.png, \.svg"):
            checked_path(tmp_path / name, (".png", ".svg"))
    with pytest.raises(FileNotFoundError, match=r"'.*missing' of '.*a\.png' is not there: make it first"):
        checked_path(tmp_path / "missing" / "a.png", (".png",))
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder\.png' is a directory: give the name of a file"):
        checked_path(tmp_path / "folder.png", (".png",))
    assert not (tmp_path / "missing").exists()


def test_what_is_no_file_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with written(pipe) as partial:
        partial.write_text("whole")
    assert os.read(reader, 10) == b"whole" and pipe.is_fifo()
    os.close(reader)
