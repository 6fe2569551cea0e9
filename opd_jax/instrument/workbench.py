"""What the stages of ``opd-jax rocks`` share: the folder, the models, the answers, the rocks.

Each thing is made when a stage first needs it, so that a command that only goes on with the last
stage loads no model.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NotRequired

import jax
import numpy as np
import pydantic
from typing_extensions import TypedDict

from opd_jax import config as settings
from opd_jax import files, processes, records
from opd_jax import mesh as meshlib
from opd_jax.data import prompts as prompt_files
from opd_jax.data.prompts import Example
from opd_jax.files import path_of
from opd_jax.instrument import collect
from opd_jax.instrument import controls as select
from opd_jax.instrument import corpus as corpora
from opd_jax.instrument.corpus import Corpus, Occurrences, TypeStats
from opd_jax.instrument.flags import MAX_NEW, Flags, RocksError, flag
from opd_jax.pytrees import Params
from opd_jax.store import fingerprint
from opd_jax.store import pair as pairs
from opd_jax.store import workdir as workdirs
from opd_jax.store.pair import Pair

MANIFEST = "rocks.json"
_MAY_CHANGE = ("out", "extras", "batch", "mesh_fsdp", "mesh_model")  # do not change a result
_SELECTING = ("k", "skip_top", "min_count", "score")  # may change until types are selected
SELECTED = "summary.json"  # the last file of the selection
PERSISTENCE = "persistence.json"
_LARGE = ("reader.json",)  # written without line breaks


_REMAKE = "expected what this command wrote; remove the file to have it made again"


@pydantic.with_config(records.OPEN)
class Manifest(TypedDict):
    """What ``rocks.json`` holds: what the folder is about."""

    student: str
    teacher: str
    writer: str
    prompts: str | None
    flags: dict[str, Any]
    files: NotRequired[dict[str, dict[str, str]]]


class Workbench:
    """One folder of results and what is needed to fill it."""

    def __init__(self, flags: Flags, say: Callable[[str], None]):
        self.flags, self.say, self.out = flags, say, Path(path_of(flags.out))
        self.config: Mapping[str, Any] = {}
        self.started: str | None = None  # when the run did: the date that chat templates write
        student, teacher = flags.student, flags.teacher
        if flags.run:
            workdir = Path(path_of(flags.run))
            record = workdirs.read_run(workdir)
            if record is None:
                raise RocksError(
                    f"{flags.run} has no run.json: expected the workdir of a training run; give "
                    "--run that folder"
                )
            self.config = {key: workdirs.setting(record, key) for key in settings.recorded()}
            self.started = record.get("time")
            student = f"{flags.run}@{pairs.LAST if flags.step is None else flags.step}"
            teacher = self.config["teacher.path"]
            workdirs.check_model(workdir, record, "teacher", path_of(teacher))
        assert student is not None  # Flags has seen to it
        assert teacher is not None
        self.student, self.teacher = pairs.resolve(student), pairs.resolve(teacher)
        self.rule = select.Rule(flags.score, flags.skip_top, flags.min_count)

    def enter(self) -> None:
        """Start in an empty folder, or go on in that of the same analysis.

        Raises:
          RocksError: the folder holds something else, or an analysis with other flags.
        """
        new = {
            "student": self.student.name,
            "teacher": self.teacher.name,
            "writer": self.writer_name,
            "prompts": self.flags.corpus or self.prompts_file,
            "flags": dataclasses.asdict(self.flags),
            "files": {
                "student": pairs.identity(self.student),
                "teacher": pairs.identity(self.teacher),
            },
        }
        held = [f.name for f in self.out.iterdir()] if self.out.is_dir() else []
        if MANIFEST in held:
            old = self.read(MANIFEST)
            if len(held) > 1:  # else a command refused what it was given, and made nothing
                self._check_same(old, json.loads(json.dumps(new)))
            if (self.out / PERSISTENCE).exists() and "persistence" not in self.flags.extras:
                new["flags"]["checkpoints"] = old["flags"]["checkpoints"]  # those of that file
        elif held or (self.out.exists() and not self.out.is_dir()):
            found = sorted(held) or ["a file"]
            raise RocksError(
                f"{self.out} holds {', '.join(found[:3])}{', ...' * (len(found) > 3)} and no "
                f"{MANIFEST}: expected a new folder or one of this command; give another --out"
            )
        versions = {name: importlib.metadata.version(name) for name in ("opd-jax", "jax", "numpy")}
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        processes.meet("the folder is looked at")  # before anybody changes it
        self.write(MANIFEST, new | {"versions": versions, "time": stamp})

    def _check_same(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        change = f"or give another --out (--corpus={self.out} uses its answers again)"
        for name in ("student", "teacher", "writer", "prompts"):
            if old[name] != new[name]:
                raise RocksError(
                    f"{self.out} is about the {name} {old[name]!r}, now it is {new[name]!r}: "
                    f"expected the same to go on; set it back, {change}"
                )
        for name, now in new["files"].items():
            told = fingerprint.changes(old.get("files", {}).get(name, now), now)
            if told:
                raise RocksError(
                    f"{self.out} is about the {name} {new[name]!r} as it was: "
                    f"{'; '.join(told[:3])}; expected the same files to go on; put them back, "
                    f"{change}"
                )
        free = _MAY_CHANGE + (() if (self.out / SELECTED).exists() else _SELECTING)
        if "persistence" not in self.flags.extras or not (self.out / PERSISTENCE).exists():
            free += ("checkpoints",)
        for name, value in new["flags"].items():
            if name not in free and old["flags"].get(name) != value:
                raise RocksError(
                    f"{self.out} was made with {flag(name)} {old['flags'].get(name)!r}, now it is "
                    f"{value!r}: expected the same to go on; set it back, {change}"
                )

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder.

        Raises:
          RocksError: it is damaged.
        """
        kind = Manifest if name == MANIFEST else dict[str, Any]
        try:
            return dict(records.read(self.out / name, kind, change=_REMAKE))
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
        if jax.process_index() == 0:
            (self.out / name).parent.mkdir(parents=True, exist_ok=True)
            files.write_atomic(self.out / name, value)
        processes.meet(f"{name} is written")

    @property
    def prompts_file(self) -> str:
        """The file of prompts."""
        given = self.flags.prompts or self.config.get("data.heldout")
        return given or self.config["data.prompts"]

    @property
    def writer_name(self) -> str:
        """The reference of who answers."""
        if self.flags.corpus:
            return str(corpora.read(self.corpus_source).info.get("writer"))
        named = {"student": self.student, "teacher": self.teacher}
        writer = self.flags.writer or "student"
        return (named.get(writer) or pairs.resolve(writer)).name

    @property
    def corpus_source(self) -> Path:
        """The folder that --corpus means."""
        folder = Path(path_of(str(self.flags.corpus)))
        inside = folder / "corpus"
        return inside if (inside / corpora.MANIFEST).exists() else folder

    @functools.cached_property
    def pair(self) -> Pair:
        """Student and teacher."""
        fsdp, model, devices = self.flags.mesh_fsdp, self.flags.mesh_model, jax.device_count()
        if min(fsdp, model) < 1 or devices % (fsdp * model):
            raise RocksError(
                f"--mesh-fsdp is {fsdp} and --mesh-model {model} on {devices} devices: expected "
                f"positive numbers whose product divides {devices}; change them"
            )
        self.say(f"  loading {self.student.name} and {self.teacher.name}, {devices} device(s)")
        mesh = meshlib.make(fsdp=fsdp, model=model)
        try:
            return pairs.open_pair(self.student.name, self.teacher.name, mesh=mesh, say=self.say)
        except ValueError as error:
            # A mesh that does not divide the models is told in the flags of a training run.
            message = str(error).replace("--config.mesh.", "--mesh-")
            raise RocksError(message) from error

    def writer(self, ref: str) -> dict[str, Any]:
        """Arguments of ``collect.write`` for who answers: a reference, "student" or "teacher"."""
        if ref in ("student", self.student.name):
            return {}
        if ref in ("teacher", self.teacher.name):
            cfg = self.pair.cfg.teacher
            return {"writer": self.pair.teacher, "cfg": cfg, "name": self.teacher.name}
        return {"writer": self.load(ref), "name": pairs.resolve(ref).name}

    def load(self, ref: str) -> Params:
        """Another student of the same architecture."""
        return pairs.load(ref, self.pair)

    @functools.cached_property
    def max_new(self) -> int:
        """Most ids of an answer."""
        given = self.flags.max_new or self.config.get("rollout.max_new")
        return given or min(MAX_NEW, self.pair.max_positions // 2)

    @functools.cached_property
    def rows(self) -> list[Example]:
        """The prompts, tokenised: of the file, or those that the given answers belong to."""
        if self.flags.corpus:
            return prompts_of(self.corpus, self.pair.tokenizer)
        room = self.pair.max_positions - self.max_new
        if room < 1:
            raise RocksError(
                f"--max-new is {self.max_new}: expected below the {self.pair.max_positions} "
                "positions of the models, which hold prompt and answer; lower --max-new"
            )
        limit = self.flags.max_prompt or self.config.get("data.max_prompt") or room
        template = self.config.get("data.template") or ()
        spec = prompt_files.PromptSpec(
            path_of(self.prompts_file),
            max_prompt=min(limit, room),
            template=tuple((name, value) for name, value in template),
            now=self.started,
        )
        rows, counts = prompt_files.examples(spec, self.pair.tokenizer)
        first = f", the first {self.flags.limit} used" if self.flags.limit else ""
        self.say(f"  {self.prompts_file}: {counts}{first}")
        if not (self.flags.prompts or self.config.get("data.heldout")):
            self.say("  the run has no held-out prompts: these are the ones it trained on")
        rows = rows[: self.flags.limit]
        if len(rows) < 2:
            raise RocksError(
                f"{len(rows)} prompt of {self.prompts_file} to answer: expected at least 2, as "
                "rocks are selected again on either half of them; raise --limit or --max-prompt, "
                "or give other --prompts"
            )
        return rows

    @property
    def writing(self) -> dict[str, Any]:
        """Arguments of ``collect.write``, the same for every corpus that this command writes."""
        flags = self.flags
        given = {
            "temperature": 1.0 if flags.temperature is None else flags.temperature,
            "samples": flags.samples or 1,
            "seed": flags.seed,
        }
        if flags.corpus:
            given |= {n: self.corpus.info[n] for n in (*given, "max_new") if n in self.corpus.info}
        return {"max_new": self.max_new, **given, "batch": flags.batch}

    def copy_corpus(self) -> None:
        """Take over the answers that --corpus means."""
        target = self.out / "corpus"
        if jax.process_index() == 0:
            part = self.out / ".corpus.part"
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(self.corpus_source, part)
            part.rename(target)
        processes.meet("the corpus is copied")

    @functools.cached_property
    def corpus(self) -> Corpus:
        """The answers."""
        return corpora.read(self.out / "corpus")

    @property
    def scores_file(self) -> Path:
        """The answers' positions, scored by the student."""
        return self.out / "scores" / "student.npz"

    @functools.cached_property
    def found(self) -> Occurrences:
        """The scored positions."""
        return Occurrences.load(self.scores_file)

    @functools.cached_property
    def sums(self) -> TypeStats:
        """Sums of the scored positions by type."""
        return TypeStats.of_occurrences(self.found)

    @functools.cached_property
    def rocks(self) -> np.ndarray:
        """Ids of the rocks, in their order."""
        rule = dataclasses.asdict(self.rule)
        return select.rocks(self.sums, self.flags.k, **rule)

    def scored(self, path: Path, corpus: Corpus, student: Params | None = None) -> Occurrences:
        """A corpus scored against the teacher; read from ``path`` where that is there."""
        if not path.exists():
            found = collect.score(corpus, self.pair, student=student, batch=self.flags.batch)
            if jax.process_index() == 0:
                found.save(path)
            processes.meet(f"{path.name} is written")
        return Occurrences.load(path)

    def before(self) -> Occurrences:
        """The answers scored by the student before training."""
        ref, path = f"{self.student.run}@0", self.out / "scores" / "undistilled.npz"
        return self.scored(path, self.corpus, None if path.exists() else self.load(ref))


def prompts_of(corpus: Corpus, tokenizer: Any) -> list[Example]:
    """The prompts of a corpus, each once."""
    _, first = np.unique(corpus.problem_A, return_index=True)
    return [
        Example(
            ids=tuple(int(i) for i in corpus.prompts[index]),
            answer=None,
            text=tokenizer.decode(corpus.prompts[index].tolist()),
            index=int(corpus.problem_A[index]),
        )
        for index in sorted(first.tolist())
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")
