"""What the files of a run say: its curves, its models, the tokens that carry most of the KL."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_jax.store import workdir as workdirs


@dataclasses.dataclass(frozen=True)
class Series:
    """Measured values by step; what was not measured is left out."""

    steps: list[int]
    values: list[float]


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """What the files of a run say that its figure shows.

    Attributes:
      train_kl: mean KL(student || teacher) of the student's rollouts, nats per token.
      heldout_kl: the same on held-out prompts.
      accuracy: share of held-out prompts answered correctly, 0 to 1; empty if not graded.
      rocks: rows of ``summary.json``, highest share of KL first.
      student: name of the model that was trained.
      teacher: name of the model it was trained towards.
    """

    train_kl: Series
    heldout_kl: Series
    accuracy: Series
    rocks: list[dict[str, Any]]
    student: str
    teacher: str


def read(workdir: str | os.PathLike) -> RunFiles:
    """Read the files of a run.

    Raises:
      WorkdirError: one is missing, cannot be read, or has no measurement.
    """
    folder = Path(workdir)
    lines = read_lines(folder / "metrics.jsonl")
    summary = parse(folder / "summary.json", read_text(folder / "summary.json"))
    config = parse(folder / "run.json", read_text(folder / "run.json")).get("config", {})
    run = RunFiles(
        train_kl=series(lines, "kl_nats"),
        heldout_kl=series(lines, "eval/kl_nats"),
        accuracy=series(lines, "eval/accuracy"),
        rocks=sorted(summary.get("rocks", []), key=lambda row: -row["share"]),
        student=model_name(config.get("student.path", "student")),
        teacher=model_name(config.get("teacher.path", "teacher")),
    )
    if not (run.train_kl.steps or run.heldout_kl.steps or run.accuracy.steps):
        raise workdirs.WorkdirError(
            f"{folder / 'metrics.jsonl'} has {len(lines)} lines and no measured KL or accuracy; "
            "expected at least one step or evaluation; train for a step first"
        )
    return run


def series(lines: Sequence[Mapping[str, Any]], name: str) -> Series:
    """The values of one metric where it was measured (null says that it was not)."""
    pairs = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    pairs = [(step, value) for step, value in pairs if math.isfinite(value)]
    return Series([step for step, _ in pairs], [value for _, value in pairs])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file, without a last one that is still being written.

    Raises:
      WorkdirError: it cannot be read.
    """
    whole = read_text(path).rpartition("\n")[0]
    # Not splitlines(): it also splits at U+2028, which a JSON string may hold.
    return [parse(path, line) for line in whole.split("\n") if line]


def read_text(path: Path) -> str:
    """The text of a run's file.

    Raises:
      WorkdirError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise workdirs.WorkdirError(
            f"cannot read {path} ({error.strerror}); expected the folder of a run that has ended "
            "or was stopped, with run.json, metrics.jsonl and summary.json; give its --workdir, "
            "or let the run end first"
        ) from error


def parse(path: Path, text: str) -> dict[str, Any]:
    """The JSON of a run's file.

    Raises:
      WorkdirError: it is not JSON.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise workdirs.WorkdirError(
            f"{path} is damaged ({error}): {text[:80]!r}; expected JSON objects as a run writes "
            "them; put back a copy, or run the same command again from a good checkpoint"
        ) from error


def model_name(path: str) -> str:
    """The last part of a folder's path, of a repository's name or of ``embedded:teacher``."""
    return re.split(r"[/\\:]", path.rstrip("/\\"))[-1] or path
