"""What a checkpoint holds: ``record.json``, with size and CRC-32 of every other file."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
from typing_extensions import TypedDict

from opd_jax import records
from opd_jax.files import write_atomic

RECORD = "record.json"
READ_BYTES = 1 << 22


class Sealed(TypedDict):
    """What ``record.json`` holds: the text of the record, and its checksum."""

    crc32: int
    record: str


@pydantic.with_config(records.OPEN)
class CheckpointRecord(TypedDict):
    """The record of a checkpoint."""

    format: int
    step: int
    metrics: dict[str, float | None]
    leaves: dict[str, dict[str, Any]]  # shape and dtype by name
    keys: dict[str, str]  # implementation of typed keys by name
    data: Any  # what was saved beside the state
    files: dict[str, tuple[int, int]]  # size and CRC-32 by name


class DamagedRecord(RuntimeError):
    """A checkpoint's record is missing or unreadable; the text is the bare reason."""


def seal(path: Path, record: Mapping[str, Any]) -> None:
    """Write a checkpoint's ``record.json``, with size and CRC-32 of every file that is there."""
    files = sorted(f for f in path.rglob("*") if f.is_file())
    sums = {str(f.relative_to(path)): [f.stat().st_size, _crc32(f)] for f in files}
    text = json.dumps({**record, "files": sums}, sort_keys=True, allow_nan=False)
    write_atomic(path / RECORD, json.dumps({"crc32": zlib.crc32(text.encode()), "record": text}))


def read(path: Path) -> dict[str, Any]:
    """Read and check ``record.json``; the error's text is the bare reason."""
    try:
        outer = records.read(path / RECORD, Sealed, change="")
        if zlib.crc32(outer["record"].encode()) != outer["crc32"]:
            raise DamagedRecord(f"{RECORD} does not match its own checksum")
        return dict(records.parse(outer["record"], CheckpointRecord, where=RECORD, change=""))
    except FileNotFoundError as error:
        raise DamagedRecord(f"{RECORD} is missing") from error
    except (OSError, records.RecordError) as error:
        raise DamagedRecord(f"{RECORD} cannot be read ({error})") from error


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if nothing is."""
    try:
        for name, (size, crc) in read(path)["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, {size} were written"
            if _crc32(file) != crc:
                return f"{name} does not match its checksum"
    except (DamagedRecord, OSError) as error:
        return str(error)
    return None


def plain(value: Any) -> Any:
    """A value as it comes back from JSON.

    Raises:
      TypeError: it is not JSON, or would come back different.
    """
    try:
        text = json.dumps(value)
        same = json.loads(text) == value
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"data_state {type(value).__name__} is not JSON ({error}); expected dicts with "
            "string keys, lists, strings, numbers; convert the iterator's state first"
        ) from error
    if not same:
        raise TypeError(
            f"data_state changes when written as JSON: {text[:200]}; expected string keys, and "
            "lists instead of tuples; convert the iterator's state first"
        )
    return json.loads(text)


def set_aside(path: Path) -> Path:
    """Rename a checkpoint so that it no longer counts: a kill while deleting damages nothing."""
    doomed = path.with_name(f"{path.name}.deleting")
    shutil.rmtree(doomed, ignore_errors=True)
    return path.rename(doomed)


def remove(path: Path) -> None:
    """Delete a checkpoint, first out of sight, then file by file."""
    shutil.rmtree(set_aside(path), ignore_errors=True)


def _crc32(file: Path) -> int:
    """CRC-32 of a file: orbax loads a flipped bit without complaint; this runs at disk speed."""
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(READ_BYTES):
            crc = zlib.crc32(block, crc)
    return crc
