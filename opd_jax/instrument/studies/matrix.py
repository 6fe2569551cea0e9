"""Every checkpoint of a run answers, and every checkpoint scores all the answers."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from opd_jax import files, processes, records
from opd_jax.data.prompts import Example
from opd_jax.instrument import collect
from opd_jax.instrument.corpus import DAMAGED, Corpus, Occurrences, load_npz
from opd_jax.pytrees import Params
from opd_jax.store import checkpoint
from opd_jax.store import pair as pairs
from opd_jax.store.pair import Pair

MANIFEST = "matrix.json"  # whose answers and scores a folder holds


class MatrixError(ValueError):
    """The matrix cannot be measured as asked; the message says why and what to change."""


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Every corpus scored by every model.

    Attributes:
      models: names in the order of training.
      corpora: names; a corpus that a model wrote has the model's name.
      cells: by (model, corpus) index the scored positions, or the file that holds them.
    """

    models: tuple[str, ...]
    corpora: tuple[str, ...]
    cells: Mapping[tuple[int, int], Occurrences | Path]

    def cell(self, model: str, corpus: str) -> Occurrences:
        """The scored positions of one cell; read from its file each time, to keep memory small."""
        found = self.cells[self.models.index(model), self.corpora.index(corpus)]
        return Occurrences.load(found) if isinstance(found, Path) else found


def of_run(
    out: str | Path,
    run_dir: str | Path,
    pair: Pair,
    *,
    rows: Sequence[Example],
    max_new: int,
    steps: Sequence[int] | None = None,
    with_teacher: bool = False,
    temperature: float = 1.0,
    samples: int = 1,
    seed: int = 0,
    batch: int = 16,
    slots: int = 0,
    say: Callable[[str], None] = print,
) -> Matrix:
    """Let the checkpoints of a run answer and score each other's answers.

    Models and corpora are named ``step-N``. Corpora go to ``out/corpora/NAME``, scores to
    ``out/scores/MODEL-on-CORPUS.npz``; what is there, of the same run and teacher, is not done
    again.

    Args:
      out: folder of the results.
      run_dir: workdir of the run.
      pair: gives teacher, tokenizer and mesh; its student has the run's architecture.
      rows: prompts that every corpus answers.
      steps: checkpoints; default all. Step 0, the student before training, is always there.
      with_teacher: also score a corpus that the teacher writes, which no checkpoint has seen.
      max_new, temperature, samples, seed, batch, slots: see :func:`collect.write`.
      say: receives lines of progress.

    Raises:
      MatrixError: the run has not kept a step that is asked for, or has kept none; ``out`` holds
        the matrix of another run or teacher.
      CorpusError, ModelError: see :func:`collect.write`, :func:`models.load`.
    """
    out = Path(out)
    students = {f"step-{step}": f"{run_dir}@{step}" for step in _steps(run_dir, steps)}
    _enter(out / "corpora", {"run": str(run_dir), "teacher": pair.teacher_name})
    answers = functools.partial(
        collect.write,
        pair=pair,
        rows=rows,
        max_new=max_new,
        temperature=temperature,
        samples=samples,
        seed=seed,
        batch=batch,
        slots=slots,
        say=processes.indented(say, "  "),
    )
    corpora = {}
    for name, ref in students.items():
        say(f"persistence: {name} answers {len(rows)} prompts")
        corpora[name] = answers(out / "corpora" / name, writer=pairs.load(ref, pair), name=name)
    if with_teacher:
        say(f"persistence: the teacher answers {len(rows)} prompts")
        corpora["teacher"] = answers(
            out / "corpora" / "teacher",
            writer=pair.teacher,
            name=pair.teacher_name,
            cfg=pair.cfg.teacher,
        )
    loaders = {name: functools.partial(pairs.load, ref, pair) for name, ref in students.items()}
    return score(corpora, loaders, pair, folder=out / "scores", batch=batch, say=say)


def score(
    corpora: Mapping[str, Corpus],
    students: Mapping[str, Callable[[], Params]],
    pair: Pair,
    *,
    folder: Path,
    batch: int = 16,
    say: Callable[[str], None] = print,
) -> Matrix:
    """Score every corpus by every student, forward passes only.

    Each cell is a file of ``folder``, written whole; one that is there and belongs to the corpus
    is kept. A student is loaded only where a cell of its row is missing, one at a time.
    """
    cells = {}
    for i, (name, load) in enumerate(students.items()):
        row = {corpus: folder / f"{name}-on-{corpus}.npz" for corpus in corpora}
        missing = [corpus for corpus, path in row.items() if not _is_of(path, corpora[corpus])]
        student = load() if missing else None
        for corpus in missing:
            say(f"persistence: {name} reads the answers of {corpus}")
            found = collect.score(
                corpora[corpus],
                pair,
                student=student,
                batch=batch,
                say=processes.indented(say, "  "),
            )
            if jax.process_index() == 0:
                found.save(row[corpus])
        cells |= {(i, j): path for j, path in enumerate(row.values())}
    processes.meet("matrix scored")  # the others read what process 0 wrote
    return Matrix(tuple(students), tuple(corpora), cells)


def _enter(folder: Path, owner: Mapping[str, str]) -> None:
    """Claim a folder; steps of two runs, and scores under two teachers, have the same names."""
    path = folder / MANIFEST
    try:
        change = f"remove {folder}, or give another folder"
        held = records.read(path, dict[str, str], change=change) if path.exists() else owner
    except records.RecordError as error:
        raise MatrixError(str(error)) from error
    if held != owner:
        raise MatrixError(
            f"{folder} is of {held}, now it is {owner}: expected the same run and teacher to go "
            "on; give another folder"
        )
    processes.meet("matrix looked at")  # before process 0 changes it
    if jax.process_index() == 0:
        files.write_atomic(path, json.dumps(owner) + "\n")


def _steps(run_dir: str | Path, steps: Sequence[int] | None) -> list[int]:
    with checkpoint.open(run_dir) as saves:
        kept = saves.steps()
    wanted = kept if steps is None else list(steps)
    lost = sorted({*wanted} - {0, *kept})
    if lost or not {*wanted} - {0}:
        raise MatrixError(
            f"{run_dir} has checkpoints of steps {kept}, not of {lost or 'any step after 0'}: "
            "expected at least one to compare with step 0; give other steps, or train with "
            "--config.checkpoint.every and --config.checkpoint.keep"
        )
    return sorted({0, *wanted})


def _is_of(path: Path, corpus: Corpus) -> bool:
    """Whether the file holds scores of this very corpus."""
    if not path.exists():
        return False
    try:
        with load_npz(path) as file:
            return np.array_equal(file["token_id"], corpus.token_id)
    except DAMAGED:
        return False  # it is made again
