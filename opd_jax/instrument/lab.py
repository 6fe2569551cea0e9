"""The models of an analysis at work: they answer its prompts, and score answers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from opd_jax import mesh as meshlib
from opd_jax import processes
from opd_jax.data import prompts as prompt_files
from opd_jax.data.prompts import Example
from opd_jax.files import path_of
from opd_jax.instrument import collect
from opd_jax.instrument import corpus as corpora
from opd_jax.instrument.corpus import Corpus, Occurrences
from opd_jax.instrument.flags import MAX_NEW, Flags, RocksError
from opd_jax.instrument.subject import Subject
from opd_jax.pytrees import Params
from opd_jax.rollout import answers as drawing
from opd_jax.store import pair as pairs
from opd_jax.store.pair import Pair


class Lab:
    """Student and teacher on their mesh, the prompts, and how they are answered.

    Nothing is loaded before it is needed.
    """

    def __init__(self, flags: Flags, subject: Subject, say: Callable[[str], None]):
        self.flags, self.subject, self.say = flags, subject, say

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The devices, as the flags split them.

        Raises:
          RocksError, ValueError: they do not divide so, or the flags' slots over them.
        """
        fsdp, model, devices = self.flags.mesh_fsdp, self.flags.mesh_model, jax.device_count()
        if min(fsdp, model) < 1 or devices % (fsdp * model):
            raise RocksError(
                f"--mesh-fsdp is {fsdp} and --mesh-model {model} on {devices} devices: expected "
                f"positive numbers whose product divides {devices}; change them"
            )
        mesh = meshlib.make(fsdp=fsdp, model=model)
        drawing.check_slots(self.flags.slots, self.flags.batch, self.flags.samples or 1, mesh)
        return mesh

    @functools.cached_property
    def pair(self) -> Pair:
        """Student and teacher."""
        student, teacher = self.subject.student.name, self.subject.teacher.name
        self.say(f"  loading {student} and {teacher}, {self.mesh.size} device(s)")
        try:
            return pairs.open_pair(student, teacher, mesh=self.mesh, say=self.say)
        except ValueError as error:
            # A mesh that does not divide the models is told in the flags of a training run.
            message = str(error).replace("--config.mesh.", "--mesh-")
            raise RocksError(message) from error

    def load(self, ref: str) -> Params:
        """Another student of the same architecture."""
        return pairs.load(ref, self.pair)

    @functools.cached_property
    def max_new(self) -> int:
        """Most ids of an answer."""
        given = self.subject.setting("rollout.max_new", self.flags.max_new)
        return given or min(MAX_NEW, self.pair.max_positions // 2)

    @functools.cached_property
    def rows(self) -> list[Example]:
        """The prompts, tokenised: of the file, or those that the given answers belong to."""
        flags, subject = self.flags, self.subject
        if self.given is not None:
            return prompts_of(self.given, self.pair.tokenizer)
        room = self.pair.max_positions - self.max_new
        if room < 1:
            raise RocksError(
                f"--max-new is {self.max_new}: expected below the {self.pair.max_positions} "
                "positions of the models, which hold prompt and answer; lower --max-new"
            )
        limit = subject.setting("data.max_prompt", flags.max_prompt) or room
        template = subject.setting("data.template") or ()
        columns = () if flags.prompts else subject.setting("data.columns") or ()
        spec = prompt_files.DataSpec(
            max_prompt=min(limit, room),
            columns=tuple((ours, theirs) for ours, theirs in columns),
            system=subject.setting("data.system") or "",
            template=tuple((name, value) for name, value in template),
        )
        rows, counts = prompt_files.examples(
            path_of(subject.prompts), spec, self.pair.tokenizer, now=subject.started
        )
        first = f", the first {flags.limit} used" if flags.limit else ""
        self.say(f"  {subject.prompts}: {counts}{first}")
        if not subject.setting("data.heldout", flags.prompts):
            self.say("  the run has no held-out prompts: these are the ones it trained on")
        rows = rows[: flags.limit]
        if len(rows) < 2:
            raise RocksError(
                f"{len(rows)} prompt of {subject.prompts} to answer: expected at least 2, as "
                "rocks are selected again on either half of them; raise --limit or --max-prompt, "
                "or give other --prompts"
            )
        return rows

    @functools.cached_property
    def given(self) -> Corpus | None:
        """The answers that ``--corpus`` gives."""
        return None if self.subject.corpus is None else corpora.read(self.subject.corpus)

    @property
    def writing(self) -> dict[str, Any]:
        """Arguments of ``collect.write``, the same for every corpus that this command writes."""
        flags = self.flags
        how = {
            "temperature": 1.0 if flags.temperature is None else flags.temperature,
            "samples": flags.samples or 1,
            "seed": flags.seed,
        }
        if self.given is not None:
            info = self.given.info
            how |= {name: info[name] for name in (*how, "max_new") if name in info}
        return {"max_new": self.max_new, **how, "batch": flags.batch, "slots": flags.slots}

    def write(self, folder: Path, ref: str, say: Callable[[str], None]) -> Corpus:
        """Let a model (a reference, "student" or "teacher") answer the prompts into a folder."""
        return collect.write(
            folder, self.pair, self.rows, **self._writer(ref), **self.writing, say=say
        )

    def _writer(self, ref: str) -> dict[str, Any]:
        teacher = self.subject.teacher.name
        if ref in ("student", self.subject.student.name):
            return {}
        if ref in ("teacher", teacher):
            return {"writer": self.pair.teacher, "cfg": self.pair.cfg.teacher, "name": teacher}
        return {"writer": self.load(ref), "name": pairs.resolve(ref).name}

    def scored(self, path: Path, corpus: Corpus, student: Params | None = None) -> Occurrences:
        """A corpus scored against the teacher; read from ``path`` where that is there."""
        if not path.exists():
            found = collect.score(
                corpus,
                self.pair,
                student=student,
                batch=self.flags.batch,
                say=processes.indented(self.say, "  "),
            )
            processes.on_first(lambda: found.save(path))
        return Occurrences.load(path)


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
