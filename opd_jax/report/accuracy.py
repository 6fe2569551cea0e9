"""A run's accuracy on held-out prompts with its intervals, and the teacher's, its ceiling."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opd_jax import stats
from opd_jax.store import run_files

Ends = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Measured:
    """An accuracy and, where it is known, its interval; as text ``59.4% [53.3%, 65.2%]``."""

    value: float
    ends: Ends | None = None

    def __str__(self) -> str:
        return told(self.value, self.ends)


def graded(run: str | os.PathLike) -> list[run_files.GradedLine]:
    """The lines of ``graded.jsonl`` that hold verdicts; none for an ungraded run.

    Raises:
      WorkdirError: it is damaged.
    """
    path = Path(run) / "graded.jsonl"
    lines = run_files.load_lines(path, run_files.GradedLine) if path.exists() else []
    return [line for line in lines if line["correct"] and all(line["correct"])]


def intervals(run: str | os.PathLike) -> dict[int, Ends]:
    """Ends of the interval by step, problems being the units; empty for an ungraded run.

    Raises:
      WorkdirError: ``graded.jsonl`` is damaged.
    """
    return {line["step"]: share_ends(line["correct"]) for line in graded(run)}


def share_ends(correct: Sequence[Sequence[bool]]) -> Ends:
    """The interval of the share of right answers, a row for each problem."""
    return stats.share_interval([float(np.mean(right)) for right in correct])


def measured(result: Mapping[str, Any] | None, ends: Ends | None = None) -> Measured | None:
    """The accuracy of an evaluation; None where it was not measured.

    Args:
      result: a side of ``summary.json``.
      ends: of its interval, where the evaluation itself, an older one, has none.
    """
    if not result or result.get("accuracy") is None:
        return None
    own = (result.get("accuracy_low"), result.get("accuracy_high"))
    return Measured(result["accuracy"], ends if None in own else own)  # pyright: ignore


def sides(run: str | os.PathLike) -> tuple[Measured | None, Measured | None]:
    """Accuracy before the first step and at the last evaluation.

    Raises:
      WorkdirError: a file of the run is damaged.
    """
    summary, ends = run_files.summary(Path(run)), intervals(run)
    return (
        measured(summary.get("before"), ends.get(0)),
        measured(summary.get("after"), ends[max(ends)] if ends else None),
    )


def ceiling(run: str | os.PathLike) -> Measured | None:
    """What the teacher itself reaches on the held-out prompts; None where it was not asked.

    Raises:
      WorkdirError: a file of the run is damaged.
    """
    if found := measured(run_files.summary(Path(run)).get("teacher")):
        return found
    path = Path(run) / run_files.TEACHER  # a run that was killed has no place for it in a summary
    return (
        measured(run_files.load(path, run_files.TeacherFile)["result"]) if path.exists() else None
    )


def way(before: float, after: float, teacher: float) -> float | None:
    """The share of the way from before to the teacher; None where the teacher is not above."""
    return (after - before) / (teacher - before) if teacher > before else None


def told(value: float, ends: Sequence[float] | None) -> str:
    """``59.4% [53.3%, 65.2%]``, or the value alone."""
    return f"{value:.1%}" + (f" [{ends[0]:.1%}, {ends[1]:.1%}]" if ends else "")
