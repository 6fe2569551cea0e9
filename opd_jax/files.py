"""Paths and files: what a path means, and writing that is whole or not there."""

from __future__ import annotations

import contextlib
import importlib.resources
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

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
    """Write a file so that a reader, or the next start, sees the old one or the new one."""
    with replacing(path, "w") as stream:
        stream.write(text)


@contextlib.contextmanager
def replacing(path: Path, mode: str) -> Iterator[IO[Any]]:
    """Open a file that takes the place of ``path`` once it is whole and on disk."""
    part = path.with_name(f".{path.name}.part")
    with part.open(mode, encoding=None if "b" in mode else "utf-8") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)
