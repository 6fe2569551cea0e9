"""What a run did to its student's answers: before and after on the same held-out problems.

Numbers alone, from the files of the run; ``story`` puts them into words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opd_jax import stats
from opd_jax.report import accuracy
from opd_jax.report.accuracy import Measured
from opd_jax.store import run_files

# By (right before, right after).
KINDS = {
    (False, True): "fixed",
    (True, False): "broken",
    (True, True): "still right",
    (False, False): "still wrong",
}


@dataclasses.dataclass(frozen=True)
class Reply:
    """One answer to a problem.

    Attributes:
      text: as it was sampled.
      is_correct: the grader's verdict.
      reason: of the verdict; empty where the run did not write it.
    """

    text: str
    is_correct: bool
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A held-out problem with its answers by who gave them: "before", "after", "teacher"."""

    index: int
    kind: str  # of KINDS
    prompt: str
    gold: tuple[str, ...]
    replies: Mapping[str, Reply]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run's answers changed.

    Attributes:
      before, after, teacher: accuracies; None: not measured.
      change: after minus before, problem by problem; None where not both were graded.
      gap: the teacher minus after, problem by problem; None without a teacher's grades.
      counts: problems of each of KINDS; a problem with several answers is right where more than
        half of them are.
      p_mcnemar: exact, of ``counts``; None where ``change`` is.
      samples: answers to a problem, at most.
      problems: those whose answers were kept as text, in the order of the file.
    """

    before: Measured | None
    after: Measured | None
    teacher: Measured | None
    change: stats.Interval | None
    gap: stats.Interval | None
    counts: Mapping[str, int]
    p_mcnemar: float | None
    samples: int
    problems: tuple[Problem, ...]

    @property
    def way(self) -> float | None:
        """The share of the way to the teacher; None where an end is not known or not above."""
        if self.before is None or self.after is None or self.teacher is None:
            return None
        return accuracy.way(self.before.value, self.after.value, self.teacher.value)


def read(run: Path) -> Outcome:
    """Compare a run's first and last graded answers, and the last with the teacher's.

    Raises:
      WorkdirError: a file of the run is damaged.
    """
    before, after = accuracy.sides(run)
    lines = accuracy.graded(run)
    first = _rows(run / "graded.jsonl", lines[0]) if lines and lines[0]["step"] == 0 else {}
    last = _rows(run / "graded.jsonl", lines[-1]) if lines and lines[-1]["step"] else {}
    path = run / run_files.TEACHER
    taught = _rows(path, run_files.load(path, run_files.TeacherFile)) if path.exists() else {}
    common = [index for index in first if index in last]
    kinds = {i: KINDS[_is_right(first[i]), _is_right(last[i])] for i in common}
    counts = {kind: sum(k == kind for k in kinds.values()) for kind in KINDS.values()}
    p = None
    if common:
        p = stats.mcnemar(*([float(_is_right(rows[i])) for i in common] for rows in (first, last)))
    return Outcome(
        before=before,
        after=after,
        teacher=accuracy.ceiling(run),
        change=_difference(first, last),
        gap=_difference(last, taught),
        counts=counts,
        p_mcnemar=p,
        samples=max((len(row) for rows in (first, last) for row in rows.values()), default=1),
        problems=_problems(run, kinds, {"before": first, "after": last, "teacher": taught}),
    )


def _rows(path: Path, line: Mapping[str, Any]) -> dict[int, list[Reply]]:
    """The answers of a graded evaluation by the problem's index."""
    verdicts = line["correct"]
    with run_files.used(path):
        texts = [text for row in line.get("text") or () for text in row]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("an answer is no text")
        return {
            index: [Reply(*reply) for reply in zip(texts, right, reasons, strict=True)]
            for index, texts, right, reasons in zip(
                line["index"],
                line.get("text") or [[""] * len(right) for right in verdicts],
                verdicts,
                line.get("reason") or [[""] * len(right) for right in verdicts],
                strict=True,
            )
        }


def _share(replies: Sequence[Reply]) -> float:
    return float(np.mean([reply.is_correct for reply in replies]))


def _is_right(replies: Sequence[Reply]) -> bool:
    return _share(replies) > 0.5


def _difference(
    base: Mapping[int, Sequence[Reply]], arm: Mapping[int, Sequence[Reply]]
) -> stats.Interval | None:
    common = [index for index in base if index in arm]
    if not common:
        return None
    return stats.paired_bootstrap(*([_share(rows[i]) for i in common] for rows in (base, arm)))


def _problems(
    run: Path, kinds: Mapping[int, str], answers: Mapping[str, Mapping[int, Sequence[Reply]]]
) -> tuple[Problem, ...]:
    """The problems with both answers as text; none for a run that did not write them."""
    path = run / run_files.QUESTIONS
    if not path.exists():
        return ()
    found = []
    for question in run_files.load(path, list[run_files.Question]):
        index = question["index"]
        if index not in kinds:
            continue
        replies = {who: rows[index][0] for who, rows in answers.items() if index in rows}
        if not (replies["before"].text or replies["after"].text):
            continue
        gold = question["gold"]
        told = (gold,) if isinstance(gold, str) else tuple(gold)
        found.append(Problem(index, kinds[index], question["prompt"], told, replies))
    return tuple(found)
