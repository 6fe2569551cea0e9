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
from typing import Annotated, Any, NotRequired

import jax
import pydantic
from typing_extensions import TypedDict

from opd_jax import config as settings
from opd_jax import files, records
from opd_jax.files import write_atomic
from opd_jax.store import fingerprint

PACKAGES = ("opd-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
PACKAGES += ("transformers", "ml-collections", "libtpu")

# Where a run may go on with other values: how long, what is watched and written, and on which mesh.
MAY_CHANGE = ("prediction", "train.steps", "train.max_truncated", "train.truncated_steps")
MAY_CHANGE += ("log.*", "checkpoint.*", "eval.*", "mesh.*", "teacher.offload")

# Prompts that were given as lists, put here before the run begins.
KEPT_PROMPTS = ("prompts.jsonl", "heldout.jsonl")

_PUT_BACK = "put back a copy, or give another --workdir"


class WorkdirError(RuntimeError):
    """The workdir cannot be used for this run; the message says why and what to do."""


class FilesOfModel(TypedDict):
    """A model, or a file of prompts, that a run was started on."""

    path: str
    files: dict[str, str]  # name -> fingerprint


def _typed(found: dict[str, Any]) -> dict[str, Any]:
    """A flat config whose known keys are of their type."""
    for key in settings.recorded().keys() & found.keys():
        settings.check_type(key, found[key])
    return found


def setting(record: Mapping[str, Any], key: str) -> Any:
    """A key of the config in ``run.json``; one that is younger than the run by its default."""
    return record["config"].get(key, settings.recorded()[key][1])


def teachers(record: Mapping[str, Any]) -> dict[str, str]:
    """The models of the teachers in ``run.json`` by name; of one, perhaps none, the name is ""."""
    named = {name: path for name, path in setting(record, "teacher.paths")}
    return named or {"": setting(record, "teacher.path")}


class Origin(TypedDict):
    """The step of another run that a run began from."""

    name: str
    files: dict[str, str]  # what makes that model -> fingerprint


class Resumed(TypedDict):
    """Another start of a run."""

    changed: dict[str, Any]


@pydantic.with_config(records.OPEN)
class RunRecord(TypedDict):
    """What ``run.json`` holds."""

    config: Annotated[dict[str, Any], pydantic.AfterValidator(_typed)]  # flat, dotted keys
    command: NotRequired[list[str]]
    time: NotRequired[str]  # UTC, as files.TIME
    data: NotRequired[str]  # digest of the training prompts
    stop_ids: NotRequired[list[int]]
    inputs: NotRequired[dict[str, FilesOfModel]]
    init_from: NotRequired[Origin]
    pinned: NotRequired[dict[str, str]]  # Hub names as they were asked for -> with their commit
    resumed: NotRequired[list[Resumed]]


def write_run(workdir: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Write ``run.json`` (atomically; process 0 only).

    Raises:
      WorkdirError: the folder cannot be written.
    """
    if jax.process_index() != 0:
        return
    path = Path(workdir) / "run.json"
    try:
        write_atomic(path, json.dumps(record, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise WorkdirError(
            f"cannot write {path}: {error}; expected a writable folder with free space; make room, "
            "make it writable, or give another --workdir"
        ) from error


def read_run(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """Read ``run.json``; None if there is none.

    Raises:
      WorkdirError: it is not the record of a run.
    """
    path = Path(workdir) / "run.json"
    try:
        return dict(records.read(path, RunRecord, change=_PUT_BACK))
    except FileNotFoundError:
        return None
    except records.RecordError as error:
        raise WorkdirError(str(error)) from error
    except OSError as error:  # a file in its place, no right to read
        raise WorkdirError(
            f"{workdir} cannot be the workdir ({error}): expected a folder that can be read and "
            "written; make it one or give another --workdir"
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
    config: Mapping[str, Any],
    *,
    seed: int,
    command: Sequence[str] = (),
    repo: str | None = None,
    now: str | None = None,
) -> dict[str, Any]:
    """Describe a run: resolved config (flat, dotted keys), versions, devices, command, time.

    ``now`` is when it starts, as :func:`timestamp` writes it; default: now.
    """
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    device = jax.devices()[0]
    return {
        "config": dict(config),
        "seed": seed,
        "command": list(command),
        "time": now or timestamp(),
        "git": _git_revision(repo or str(Path(__file__).parent)),
        "versions": versions,
        "devices": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
    }


def timestamp() -> str:
    """The time now, as ``run.json`` has it (UTC)."""
    return time.strftime(files.TIME, time.gmtime())


def check_same_run(
    old: Mapping[str, Any], new: Mapping[str, Any], ignore: Sequence[str] = MAY_CHANGE
) -> None:
    """Check that two flat configs describe the same run, up to keys matching ``ignore`` (fnmatch).

    Raises:
      WorkdirError: they do not; names each differing key with both values.
    """
    old, new = _plain(old), _plain(new)
    # A key that is younger than the run had the effect of its default.
    younger = _plain({key: default for key, (_, default) in settings.recorded().items()})
    old |= {k: v for k, v in younger.items() if k in new and k not in old}
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


@pydantic.with_config(records.OPEN)
class MetricsLine(TypedDict):
    """A line of ``metrics.jsonl``: values by name, null where nothing was measured."""

    step: int


def begun(workdir: str | os.PathLike) -> int:
    """The last training step that ``metrics.jsonl`` tells of; 0 without any."""
    path, last = Path(workdir) / "metrics.jsonl", 0
    if not path.is_file():
        return 0
    with path.open("rb") as lines:
        for line in lines:
            with contextlib.suppress(records.RecordError):  # damaged: said elsewhere
                values = records.parse(line, MetricsLine, where="", change="")
                last = max(last, values["step"]) if "loss" in values else last
    return last


def check_inputs(workdir: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Check that what a run was started on is still what its paths hold.

    Args:
      workdir: of the run, for the message.
      old, new: ``inputs`` of ``run.json`` and of now: files of the models, digests of the prompts.
        What either does not say is not compared.

    Raises:
      WorkdirError: something differs; says which file, and how.
    """
    for name in [name for name in new if old.get(name) and new[name]]:
        then, now = old[name], new[name]
        told = fingerprint.changes(then["files"], now["files"])
        what = _INPUTS.get(name) or f"another {name}"  # one of several teachers
        if told:
            more = f" and {len(told) - 3} more" if len(told) > 3 else ""
            raise WorkdirError(
                f"{workdir} was started on {what} than {now['path']} holds now: "
                f"{'; '.join(told[:3])}{more}; expected the same files, as one run must not mix "
                "two; put them back, give another --workdir, or start a new run from this one's "
                f"weights with --config.init_from={workdir}"
            )


def check_model(
    workdir: Path, record: Mapping[str, Any], name: str, folder: str, *, weights: bool = True
) -> None:
    """Check that a model of a run is still what its folder holds: see :func:`check_inputs`.

    Args:
      workdir: of the run.
      record: its ``run.json``.
      name: ``student`` or ``teacher``.
      folder: where the model is.
      weights: False looks at tokenizer and config only.

    Raises:
      WorkdirError: it is not.
    """
    then = (record.get("inputs") or {}).get(name)
    if not then or not Path(folder).is_dir():
        return  # a run that does not say, or a folder whose absence is told by who opens it
    now = fingerprint.of_model(Path(folder), weights=weights)
    kept = {n: x for n, x in then["files"].items() if weights or not n.endswith(".safetensors")}
    old, new = {name: then | {"files": kept}}, {name: {"path": folder, "files": now}}
    check_inputs(workdir, old, new)


TEACHER = "teacher"  # in the inputs of a run; each of several by its name behind it
_INPUTS = {
    "student": "another student",
    TEACHER: "another teacher",
    "prompts": "other prompts",
    "grader": "another grader",
    "heldout": "other held-out prompts",
}


def enter_workdir(
    workdir: str | os.PathLike,
    record: Mapping[str, Any],
    ignore: Sequence[str] = MAY_CHANGE,
    *,
    has_begun: bool = True,
) -> bool:
    """Start a run in an empty folder (writes ``run.json``) or go on with the run that is there.

    Going on appends when, how and with which versions to ``resumed`` in ``run.json``. A run that
    ended before its first step does not own the folder: its ``run.json`` is replaced.

    Args:
      workdir: the folder.
      record: of the run that is to be.
      ignore: keys of the config that may differ (fnmatch).
      has_begun: whether a run that is there has finished a step.

    Returns:
      Whether a run was there, and is gone on with.

    Raises:
      WorkdirError: the folder holds another run, or files but no run.
    """
    folder = Path(workdir)
    old = read_run(folder)
    if old is None or not has_begun:
        if old is None:
            check_free(folder)
        write_run(folder, record)
        return False
    check_same_run(old["config"], record["config"], ignore)
    inputs = old.get("inputs") or _older_inputs(old, record)
    check_inputs(folder, inputs, record.get("inputs") or {})
    config = _plain(record["config"])
    again = {k: v for k, v in record.items() if k not in ("config", "inputs")}
    again["changed"] = {k: v for k, v in config.items() if v != old["config"].get(k)}
    # What an earlier start did not read, such as held-out prompts, is noted now.
    known = {**(record.get("inputs") or {}), **inputs}
    old = {**old, "inputs": known} if known else old
    write_run(folder, {**old, "resumed": [*old.get("resumed", []), again]})
    return True


def _older_inputs(old: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """What a ``run.json`` without ``inputs`` says of them: the digest of its prompts."""
    now = (record.get("inputs") or {}).get("prompts")
    if not now or "data" not in old:
        return {}
    return {"prompts": now | {"files": dict.fromkeys(now["files"], old["data"])}}


def check_free(folder: Path) -> None:
    """Check that a folder without ``run.json`` is free for a run.

    Raises:
      WorkdirError: it holds files.
    """
    names = sorted(f.name for f in folder.iterdir()) if folder.is_dir() else []
    names = [name for name in names if name[0] != "." and name not in KEPT_PROMPTS]
    # The lock of a run that was refused, or killed at once, is nobody's.
    left = [name for name in names if not _is_unused(folder / name)]
    if left:
        raise WorkdirError(
            f"{folder} is not empty ({', '.join(left[:3])}{', ...' * (len(left) > 3)}) and "
            "has no run.json; expected an empty folder or one of this run; give another "
            "--workdir"
        )


def _is_unused(path: Path) -> bool:
    return path.name == "checkpoints" and path.is_dir() and {*os.listdir(path)} <= {"lock"}


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
