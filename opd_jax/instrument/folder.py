"""The folder of one analysis: what it is about, and the JSON files in it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
import pydantic
from typing_extensions import TypedDict

from opd_jax import files, processes, records
from opd_jax.instrument.flags import Flags, RocksError, flag
from opd_jax.instrument.subject import Subject
from opd_jax.store import fingerprint
from opd_jax.store import pair as pairs

MANIFEST = "rocks.json"
SELECTED = "summary.json"  # the last file of the selection
PERSISTENCE = "persistence.json"
# Do not change a result.
_MAY_CHANGE = ("out", "extras", "batch", "slots", "mesh_fsdp", "mesh_model")
_SELECTING = ("k", "skip_top", "min_count", "score")  # may change until types are selected
_LARGE = ("reader.json",)  # written without line breaks
_REMAKE = "expected what this command wrote; remove the file to have it made again"


@pydantic.with_config(records.OPEN)
class Manifest(TypedDict):
    """What ``rocks.json`` holds: what the folder is about, and what else can be asked of it."""

    student: str
    teacher: str
    writer: str
    prompts: str | None
    flags: dict[str, Any]
    files: NotRequired[dict[str, dict[str, str]]]
    studies: NotRequired[dict[str, str]]  # questions by the name of their file


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder of results; only process 0 writes, and all wait for it."""

    path: Path

    def enter(self, flags: Flags, subject: Subject, studies: Mapping[str, str]) -> None:
        """Start in an empty folder, or go on in that of the same analysis.

        Args:
          flags, subject: what is asked for.
          studies: the questions that can be asked, by name; they are kept for readers.

        Raises:
          RocksError: the folder holds something else, or an analysis with other flags.
        """
        new: dict[str, Any] = {
            "student": subject.student.name,
            "teacher": subject.teacher.name,
            "writer": subject.writer,
            "prompts": subject.prompts,
            "flags": dataclasses.asdict(flags),
            "files": {
                "student": pairs.identity(subject.student),
                "teacher": pairs.identity(subject.teacher),
            },
        }
        held = [f.name for f in self.path.iterdir()] if self.path.is_dir() else []
        if MANIFEST in held:
            old = self.read(MANIFEST)
            if len(held) > 1:  # else a command refused what it was given, and made nothing
                self._check_same(flags, old, json.loads(json.dumps(new)))
            if (self.path / PERSISTENCE).exists() and "persistence" not in flags.extras:
                new["flags"]["checkpoints"] = old["flags"]["checkpoints"]  # those of that file
        elif held or (self.path.exists() and not self.path.is_dir()):
            found = sorted(held) or ["a file"]
            raise RocksError(
                f"{self.path} holds {', '.join(found[:3])}{', ...' * (len(found) > 3)} and no "
                f"{MANIFEST}: expected a new folder or one of this command; give another --out"
            )
        versions = {name: importlib.metadata.version(name) for name in ("opd-jax", "jax", "numpy")}
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        processes.meet("the folder is looked at")  # before anybody changes it
        about = {"studies": dict(studies), "versions": versions, "time": stamp}
        self.write(MANIFEST, new | about)

    def _check_same(self, flags: Flags, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        change = f"or give another --out (--corpus={self.path} uses its answers again)"
        for name in ("student", "teacher", "writer", "prompts"):
            if old[name] != new[name]:
                raise RocksError(
                    f"{self.path} is about the {name} {old[name]!r}, now it is {new[name]!r}: "
                    f"expected the same to go on; set it back, {change}"
                )
        for name, now in new["files"].items():
            told = fingerprint.changes(old.get("files", {}).get(name, now), now)
            if told:
                raise RocksError(
                    f"{self.path} is about the {name} {new[name]!r} as it was: "
                    f"{'; '.join(told[:3])}; expected the same files to go on; put them back, "
                    f"{change}"
                )
        free = _MAY_CHANGE + (() if (self.path / SELECTED).exists() else _SELECTING)
        if "persistence" not in flags.extras or not (self.path / PERSISTENCE).exists():
            free += ("checkpoints",)
        for name, value in new["flags"].items():
            if name not in free and old["flags"].get(name) != value:
                raise RocksError(
                    f"{self.path} was made with {flag(name)} {old['flags'].get(name)!r}, now it is "
                    f"{value!r}: expected the same to go on; set it back, {change}"
                )

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder.

        Raises:
          RocksError: it is damaged.
        """
        kind = Manifest if name == MANIFEST else dict[str, Any]
        try:
            return dict(records.read(self.path / name, kind, change=_REMAKE))
        except records.RecordError as error:
            raise RocksError(str(error)) from error

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file of the folder, or a text as it is; whole or not at all."""
        if not isinstance(value, str):
            indent = None if name in _LARGE else 1
            text = json.dumps(
                value, ensure_ascii=False, allow_nan=False, default=_plain, indent=indent
            )
            value = text + "\n"
        processes.on_first(lambda: files.write_atomic(self.path / name, value))


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")
