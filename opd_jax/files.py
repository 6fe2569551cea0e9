"""Paths and files: what a path means, and writing that is whole or not there."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.resources
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TextIO

TIME = "%Y-%m-%dT%H:%M:%SZ"  # how a moment is written, in UTC
EMBEDDED = "embedded:"  # prefix of paths inside the package's own demo pair


def path_of(name: str | os.PathLike[str]) -> str:
    """A path as given, ``~`` expanded, or a part of the embedded demo pair (``embedded:teacher``).

    Whoever opens a file asks; a config and ``run.json`` keep the name, which means the same on
    every machine.
    """
    text = os.fspath(name)
    if not text.startswith(EMBEDDED):
        return os.path.expanduser(text)
    return str(importlib.resources.files("opd_jax") / "demo_pair" / text.removeprefix(EMBEDDED))


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader, or the next start, sees the old one or the new one.

    Its folder is made where there is none.
    """
    with replacing(path, "w") as stream:
        stream.write(text)


@contextlib.contextmanager
def replacing(path: Path, mode: str) -> Iterator[IO[Any]]:
    """Open a file that takes the place of ``path`` once it is whole and on disk.

    Its folder is made where there is none; an error on the way leaves nothing behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open(mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder that takes the place of ``path``, which is absent or empty, once it is whole.

    It grows in ``.NAME.partial`` beside it, under a lock that ends with its writer, however that
    ends: what a killed writer left gives way to the next one.

    Raises:
      FileExistsError: ``path`` holds something, or another process is writing it.
      OSError: it cannot be written; nothing is left behind.
    """
    _check_free(path)  # before anything is written beside it
    target = path.resolve()
    partial = target.parent / f".{target.name}.partial"
    folder = partial / "folder"
    with _locked(partial, path) as is_held:
        if is_held:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir()
        except FileExistsError:  # without locks nobody can tell whether its writer lives
            raise FileExistsError(
                f"{partial} is there, being written or left by a killed process, and its file "
                "system has no locks to tell which: expected it gone; wait for the other process, "
                "or remove it"
            ) from None
        try:
            _check_free(path)  # another writer may have ended since
            yield folder
            folder.replace(target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                (partial / LOCK).unlink()
                partial.rmdir()  # the lock still held: to all others the folder was in use so far


def append(stream: TextIO, lines: Sequence[Mapping[str, Any]]) -> None:
    """Append JSON lines to a file that grows, and put them on disk."""
    stream.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    stream.flush()
    os.fsync(stream.fileno())


def cut(path: Path, keep: int) -> None:
    """Cut a file of lines back to its first ones; nothing where there is no file."""
    if not path.exists():
        return
    with path.open("rb+") as stream:
        for _ in range(keep):
            stream.readline()
        stream.truncate(stream.tell())


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Be the only process that writes into a folder, which is made where there is none.

    Raises:
      FileExistsError: another one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock, _ = hold(folder / LOCK)
    except BlockingIOError:
        raise FileExistsError(
            f"{folder} is being written by another process: expected to be the only one; wait for "
            "it to end, or give another --out"
        ) from None
    try:
        yield
    finally:
        os.close(lock)


LOCK = "lock"  # the file in a folder that its only writer holds


def hold(file: Path) -> tuple[int, OSError | None]:
    """Open a file, made where there is none, and lock it, until it is closed or the process ends.

    Returns:
      Its descriptor; and why it is not locked, where the file system has no locks.

    Raises:
      BlockingIOError: another process holds it.
      OSError: it cannot be opened.
    """
    lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise
    except OSError as error:
        return lock, error
    return lock, None


def _check_free(path: Path) -> None:
    try:
        is_free = not os.listdir(path)
    except FileNotFoundError:
        is_free = True
    except NotADirectoryError:
        is_free = False
    if not is_free:
        raise FileExistsError(
            f"{path} exists and is not an empty folder: expected a new one; choose another path or "
            "remove it"
        )


@contextlib.contextmanager
def _locked(folder: Path, path: Path) -> Iterator[bool]:
    """Make a folder and hold the lock in it; False where the file system has no locks."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock, unlocked = hold(folder / LOCK)
        except FileNotFoundError:  # its writer ended in this moment and removed the folder
            continue
        except BlockingIOError:
            raise FileExistsError(
                f"{path} is being written by another process, in {folder}: expected to be the only "
                "one; wait for it to end, or choose another path"
            ) from None
        if os.fstat(lock).st_nlink:
            break
        os.close(lock)  # its holder has just removed it: what was locked is no longer there
    try:
        yield unlocked is None
    finally:
        os.close(lock)
