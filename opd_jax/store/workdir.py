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
import subprocess
import time
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


def _git_revision(folder: str) -> str | None:
    """Revision of the source tree, "-dirty" appended if changed; None outside a repository."""
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
