"""What an analysis is about: the models, the prompts and the writer that its flags name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd_jax import config as settings
from opd_jax.files import path_of
from opd_jax.instrument import corpus as corpora
from opd_jax.instrument.flags import Flags, RocksError
from opd_jax.store import hub
from opd_jax.store import pair as pairs
from opd_jax.store import workdir as workdirs
from opd_jax.store.pair import Reference


@dataclasses.dataclass(frozen=True)
class Subject:
    """The flags' models, text and writer, resolved without reading weights.

    Attributes:
      student, teacher: what is compared.
      writer: the reference of who answers.
      prompts: the file of prompts, or what ``--corpus`` names.
      corpus: folder of the answers that ``--corpus`` means; None: they are written.
      config: settings of the run, empty without one.
      started: when the run was, which is the date that chat templates write.
    """

    student: Reference
    teacher: Reference
    writer: str
    prompts: str
    corpus: Path | None
    config: Mapping[str, Any]
    started: str | None

    @classmethod
    def of(cls, flags: Flags) -> Subject:
        """Resolve the flags.

        Raises:
          RocksError: ``--run`` is no run.
          ModelError, CorpusError, WorkdirError: what is named cannot be used.
        """
        config: dict[str, Any] = {}
        started = None
        student, teacher = flags.student, flags.teacher
        if flags.run:
            workdir = Path(path_of(flags.run))
            record = workdirs.read_run(workdir)
            if record is None:
                raise RocksError(
                    f"{flags.run} has no run.json: expected the workdir of a training run; give "
                    "--run that folder"
                )
            config = {key: workdirs.setting(record, key) for key in settings.recorded()}
            started = record.get("time")
            if config["data.teacher_prompt"] or config["data.teacher_system"]:
                raise RocksError(
                    f"the teacher of {flags.run} read prompts of its own (data.teacher_prompt, "
                    "data.teacher_system), and here both models read the same: expected a run of "
                    "one prompt; to compare both behind the student's prompts, give --student="
                    f"{flags.run} --teacher={config['teacher.path']}"
                )
            if named := config["teacher.paths"]:
                told = ", ".join(f"{name} {path}" for name, path in named)
                raise RocksError(
                    f"{flags.run} has several teachers ({told}): expected one, which all tokens "
                    f"are compared with; give --student={flags.run} --teacher=MODEL, one of them, "
                    "and --prompts=FILE with the prompts that it teaches"
                )
            student = f"{flags.run}@{pairs.LAST if flags.step is None else flags.step}"
            teacher = config["teacher.path"]
            workdirs.check_model(workdir, record, "teacher", hub.folder(teacher))
        assert student is not None  # Flags has seen to it
        assert teacher is not None
        models = {"student": pairs.resolve(student), "teacher": pairs.resolve(teacher)}
        corpus = _corpus(flags.corpus) if flags.corpus else None
        if corpus is not None:
            writer = str(corpora.read(corpus).info.get("writer"))
        else:
            named = flags.writer or "student"
            writer = (models.get(named) or pairs.resolve(named)).name
        prompts = flags.corpus or flags.prompts or config.get("data.heldout")
        prompts = prompts or config["data.prompts"]
        return cls(**models, writer=writer, prompts=prompts, corpus=corpus, config=config,
                   started=started)  # fmt: skip

    def setting(self, name: str, given: Any = None) -> Any:
        """What a flag gives, else what the run was set to; None where neither says."""
        return given or self.config.get(name)


def _corpus(given: str) -> Path:
    """The folder of answers in an earlier ``--out``, or the folder itself."""
    folder = Path(path_of(given))
    inside = folder / "corpus"
    return inside if (inside / corpora.MANIFEST).exists() else folder
