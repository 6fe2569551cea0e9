"""JSON records, read from regular files and checked against their type, ours and foreign ones.

A kind of record is a ``TypedDict`` (or any type that pydantic checks), declared where the record
belongs; what is read is plain dicts and lists. An error names the file, the line and the field.
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic

MAX_BYTES = 1 << 30  # of a JSON document; nothing here comes near it
# For ``pydantic.with_config``: further fields are kept as they are.
OPEN = pydantic.ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class RecordError(ValueError):
    """A record cannot be used; the message names file and field, and says what to do."""


def regular(path: Path, limit: int | None = None) -> int:
    """Check that a path is a regular file and return its size.

    Anything else may never end when it is read: a pipe waits for a writer, a device has no end.

    Raises:
      OSError: there is no such file, or it may not be looked at.
      RecordError: it is something else, or larger than ``limit`` bytes.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(found.st_mode), "a device")
        raise RecordError(f"{path} is {kind}: expected a regular file; give another one")
    if limit is not None and found.st_size > limit:
        raise RecordError(
            f"{path} has {found.st_size} bytes: expected at most {limit} of such a file; look what "
            "it is, and give the right one"
        )
    return found.st_size


def read(path: Path, kind: Any, *, change: str) -> Any:
    """Read a JSON file that holds one record.

    Args:
      path: the file.
      kind: its type.
      change: what to do about a damaged one, for the message.

    Raises:
      OSError: it is not there, or cannot be read.
      RecordError: it is no regular file, not JSON, or not of that kind.
    """
    regular(path, MAX_BYTES)
    return parse(path.read_bytes(), kind, where=str(path), change=change)


def lines(path: Path, kind: Any, *, change: str) -> Iterator[Any]:
    """Read a file of JSON lines one by one, without a last line that is still being written.

    Raises:
      OSError, RecordError: as :func:`read`.
    """
    regular(path)
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                return
            if line.strip():
                yield parse(line, kind, where=str(path), line=number, change=change)


def parse(data: str | bytes, kind: Any, *, where: str, change: str, line: int | None = None) -> Any:
    """Check a JSON text against a type.

    Raises:
      RecordError: it is not JSON, or not of that type.
    """
    try:
        return _adapter(kind).validate_json(data)
    except pydantic.ValidationError as error:
        damaged = "is damaged" if line is None else f"is damaged in line {line}"
        told = _told(error).replace("is damaged", damaged, 1)
        raise RecordError(f"{where} {told}; {change}") from error


def check(value: Any, kind: Any, *, where: str, change: str) -> Any:
    """Check a Python value against a type, as :func:`parse` checks a text.

    Raises:
      RecordError: it is not of that type.
    """
    try:
        return _adapter(kind).validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        raise RecordError(f"{where} {_told(error)}; {change}") from error


@functools.cache
def _adapter(kind: Any) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(kind)


def _told(error: pydantic.ValidationError) -> str:
    """The first fault in words: the field, what was found, what was expected."""
    first = error.errors(include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        what = message.removeprefix("Invalid JSON: ")
        return f"is damaged (not JSON: {what}); expected a JSON document"
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"is damaged: field {field!r} is missing; expected one"
    place = f"field {field!r}" if field else "the document"
    found = repr(first["input"])
    found = found if len(found) <= 60 else f"{found[:57]}..."
    expected = message.removeprefix("Input should be ")
    return f"is damaged: {place} is {found}; expected {expected[0].lower()}{expected[1:]}"
