"""JSON records on disk: what a run is (``run.json``), what a checkpoint holds (``record.json``).

``run.json`` is written before step 0 and compared before a run is gone on with. ``record.json`` is
the last file of a checkpoint and names size and CRC-32 of all others, so that damage is found.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from opd_jax import processes
from opd_jax.files import write_atomic

PACKAGES = ("opd-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
PACKAGES += ("transformers", "ml-collections", "libtpu")

# Where a run may go on with other values: how long, what is watched and written, and on which mesh.
MAY_CHANGE = ("train.steps", "log.*", "checkpoint.*", "eval.*", "mesh.*")

RECORD = "record.json"
READ_BYTES = 1 << 22


class DamagedRecord(RuntimeError):
    """A checkpoint's record is missing or unreadable; the text is the bare reason."""


class WorkdirError(RuntimeError):
    """The workdir cannot be used for this run; the message says why and what to do."""


def write_run(workdir: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Write ``run.json`` (atomically; process 0 only).

    Raises:
      WorkdirError: the folder cannot be written.
    """
    if jax.process_index() != 0:
        return
    path = Path(workdir) / "run.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(record, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise WorkdirError(
            f"cannot write {path}: {error}; expected a writable folder with free space; make room, "
            "make it writable, or give another --workdir"
        ) from error


def read_run(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """Read ``run.json``; None if there is none.

    Raises:
      WorkdirError: it is not JSON.
    """
    path = Path(workdir) / "run.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise WorkdirError(
            f"{path} is damaged ({error}); expected the JSON record of a run; put back a copy, or "
            "give another --workdir"
        ) from error


def require_run(workdir: str | os.PathLike) -> dict[str, Any]:
    """Read ``run.json`` of a run that must be there.

    Raises:
      WorkdirError: there is none, or it is not JSON.
    """
    record = read_run(workdir)
    if record is None:
        raise WorkdirError(
            f"{workdir} has no run.json: expected the --workdir of a run; give that folder"
        )
    return record


def describe(
    config: Mapping[str, Any], *, seed: int, command: Sequence[str] = (), repo: str | None = None
) -> dict[str, Any]:
    """Describe a run: resolved config (flat, dotted keys), versions, devices, command, time."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    device = jax.devices()[0]
    return {
        "config": dict(config),
        "seed": seed,
        "command": list(command),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git": _git_revision(repo or str(Path(__file__).parent)),
        "versions": versions,
        "devices": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
    }


def check_same_run(
    old: Mapping[str, Any], new: Mapping[str, Any], ignore: Sequence[str] = MAY_CHANGE
) -> None:
    """Check that two flat configs describe the same run, up to keys matching ``ignore`` (fnmatch).

    Raises:
      WorkdirError: they do not; names each differing key with both values.
    """
    old, new = _plain(old), _plain(new)
    absent = "(absent)"
    keys = [k for k in sorted({*old, *new}) if old.get(k, absent) != new.get(k, absent)]
    keys = [k for k in keys if not any(fnmatch.fnmatchcase(k, pattern) for pattern in ignore)]
    if keys:
        lines = [
            f"  {k}: this run was started with {old.get(k, absent)!r}, now it is "
            f"{new.get(k, absent)!r}"
            for k in keys
        ]
        raise WorkdirError(
            "\n".join(["the workdir belongs to a run with another config:", *lines])
            + "\nexpected the same values; set them back (--config.KEY=VALUE) or give another "
            "--workdir"
        )


def enter_workdir(
    workdir: str | os.PathLike, record: Mapping[str, Any], ignore: Sequence[str] = MAY_CHANGE
) -> bool:
    """Start a run in an empty folder (writes ``run.json``) or go on with the run that is there.

    Going on appends when, how and with which versions to ``resumed`` in ``run.json``.

    Returns:
      Whether the run was already there.

    Raises:
      WorkdirError: the folder holds another run, or files but no run.
    """
    found, refusal = -1, None
    if jax.process_index() == 0:  # one looks: a second would see what the first has written
        try:
            found = int(_enter(Path(workdir), record, ignore))
        except WorkdirError as error:
            refusal = error
    found = processes.agreed(found)
    if found < 0:
        raise refusal or WorkdirError(f"process 0 refused {workdir}; its message says why")
    return bool(found)


def _enter(folder: Path, record: Mapping[str, Any], ignore: Sequence[str]) -> bool:
    old = read_run(folder)
    if old is None:
        files = sorted(f.name for f in folder.iterdir()) if folder.is_dir() else []
        files = [name for name in files if not name.startswith(".")]
        if files:
            raise WorkdirError(
                f"{folder} is not empty ({', '.join(files[:3])}{', ...' * (len(files) > 3)}) and "
                "has no run.json; expected an empty folder or one of this run; give another "
                "--workdir"
            )
        write_run(folder, record)
        return False
    check_same_run(old["config"], record["config"], ignore)
    config = _plain(record["config"])
    again = {k: v for k, v in record.items() if k != "config"}
    again["changed"] = {k: v for k, v in config.items() if v != old["config"].get(k)}
    write_run(folder, {**old, "resumed": [*old.get("resumed", []), again]})
    return True


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as it looks after a round trip through JSON (tuples become lists)."""
    return json.loads(json.dumps(dict(config)))


def seal(path: Path, record: Mapping[str, Any]) -> None:
    """Write a checkpoint's ``record.json``, with size and CRC-32 of every file that is there."""
    files = sorted(f for f in path.rglob("*") if f.is_file())
    sums = {str(f.relative_to(path)): [f.stat().st_size, _crc32(f)] for f in files}
    text = json.dumps({**record, "files": sums}, sort_keys=True, allow_nan=False)
    write_atomic(path / RECORD, json.dumps({"crc32": zlib.crc32(text.encode()), "record": text}))


def read(path: Path) -> dict[str, Any]:
    """Read and check ``record.json``; the error's text is the bare reason."""
    try:
        outer = json.loads((path / RECORD).read_bytes())
        text = outer["record"]
        if zlib.crc32(text.encode()) != outer["crc32"]:
            raise DamagedRecord(f"{RECORD} does not match its own checksum")
        return json.loads(text)
    except FileNotFoundError as error:
        raise DamagedRecord(f"{RECORD} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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


def _git_revision(folder: str) -> str | None:
    """Revision of the source tree, "-dirty" appended if changed; None outside a repository."""
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _crc32(file: Path) -> int:
    """CRC-32 of a file: orbax loads a flipped bit without complaint; this runs at disk speed."""
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(READ_BYTES):
            crc = zlib.crc32(block, crc)
    return crc
