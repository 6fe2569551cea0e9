"""A folder takes its place whole or not at all, whatever becomes of who fills it."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from opd_jax import files

CHILD = """
import sys
from pathlib import Path
from opd_jax import files

with files.new_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("")
    print("filling", flush=True)
    sys.stdin.readline()
    (folder / "whole").write_text("")
"""
# Both write again and again; one finds a whole folder or is told of the other.
RACE = """
import os, sys
from pathlib import Path
from opd_jax import files

path, done = Path(sys.argv[1]), 0
while done < 60:
    try:
        with files.new_folder(path) as folder:
            for name in "abc":
                (folder / name).write_text(name)
    except FileExistsError:
        continue
    taken = path.rename(f"{path}-{os.getpid()}-{done}")
    assert sorted(x.name for x in taken.iterdir()) == ["a", "b", "c"]
    done += 1
"""


def child(code: str, path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def names(folder) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def filling(path) -> subprocess.Popen:
    started = child(CHILD, path)
    assert started.stdout.readline() == "filling\n"
    return started


def test_what_a_killed_writer_left_gives_way_to_the_next(tmp_path):
    started = filling(tmp_path / "out")
    started.send_signal(signal.SIGKILL)
    started.communicate()
    assert ".out.partial/folder/half" in names(tmp_path)
    with files.new_folder(tmp_path / "other"):  # of another name: none of its business
        pass
    assert ".out.partial/folder/half" in names(tmp_path)
    with files.new_folder(tmp_path / "out") as folder:
        assert names(folder) == []
        (folder / "whole").write_text("")
    assert names(tmp_path) == ["other", "out", "out/whole"]


def test_what_a_living_writer_fills_is_left_alone(tmp_path):
    started = filling(tmp_path / "out")
    for _ in range(2):
        with (
            pytest.raises(FileExistsError, match=r"out is being written by another process.*wait"),
            files.new_folder(tmp_path / "out"),
        ):
            pass
    started.communicate("go on\n")
    assert started.returncode == 0
    assert names(tmp_path) == ["out", "out/half", "out/whole"]


def test_two_writers_never_meet_in_one_folder(tmp_path):
    started = [child(RACE, tmp_path / "out") for _ in range(2)]
    for process in started:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert len(list(tmp_path.iterdir())) == 120


def test_a_lock_that_its_holder_has_just_removed_is_none(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []

    def late(lock, how):
        if not calls:  # the other writer ends between our opening and our locking
            (tmp_path / ".out.partial" / "lock").unlink()
            (tmp_path / ".out.partial").rmdir()
        calls.append(how)
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with files.new_folder(tmp_path / "out"):
        assert (tmp_path / ".out.partial" / "lock").exists()
    assert len(calls) == 2
    assert names(tmp_path) == ["out"]


def test_an_error_leaves_nothing_behind(tmp_path):
    def fill():
        with files.new_folder(tmp_path / "a" / "out") as folder:
            (folder / "half").write_text("")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fill()
    assert names(tmp_path) == ["a"]


def test_a_folder_that_holds_something_is_refused_and_an_empty_one_taken(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    for name in ("link", "out"):
        path = tmp_path / name
        with files.new_folder(path) as folder:
            (folder / "mine").write_text("")
        assert names(tmp_path / "out") == ["mine"]
        with pytest.raises(FileExistsError, match="not an empty folder"), files.new_folder(path):
            pass
        (tmp_path / "out" / "mine").unlink()
    monkeypatch.chdir(tmp_path / "out")
    with files.new_folder(Path(".")) as folder:
        (folder / "mine").write_text("")
    assert names(tmp_path) == ["link", "out", "out/mine"]


def test_without_locks_the_first_one_is_left_alone(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with files.new_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("")
        with (
            pytest.raises(FileExistsError, match=r"no locks to tell which.*remove it"),
            files.new_folder(tmp_path / "out"),
        ):
            pass
        assert os.listdir(folder) == ["whole"]
    assert names(tmp_path) == ["out", "out/whole"]


def test_a_file_is_held_by_one_until_it_is_closed(tmp_path):
    """The one owner of all locks: of folders being written, of outputs and of checkpoints."""
    lock, unlocked = files.hold(tmp_path / "lock")
    assert unlocked is None
    with pytest.raises(BlockingIOError):
        files.hold(tmp_path / "lock")
    (tmp_path / "lock").write_text("7")
    os.close(lock)
    lock, _ = files.hold(tmp_path / "lock")
    os.close(lock)
    assert (tmp_path / "lock").read_text() == "7"  # what a holder wrote stays
    with pytest.raises(FileNotFoundError):
        files.hold(tmp_path / "no" / "lock")


def _half_written(path):
    with files.replacing(path, "wb") as stream:
        stream.write(b"half")
        raise KeyError


def test_a_file_takes_its_place_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file"
    files.write_atomic(path, "täxt\n")
    assert path.read_text(encoding="utf-8") == "täxt\n"
    with pytest.raises(KeyError):
        _half_written(path)
    assert path.read_text(encoding="utf-8") == "täxt\n"
    assert names(tmp_path) == ["new", "new/file"]
    with pytest.raises(OSError, match="file"):
        files.write_atomic(path / "beneath", "")
