"""What the files of a run say: its curves, its models, the tokens that carry most of the KL."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypeVar

import annotated_types
import pydantic
from typing_extensions import TypedDict

from opd_jax import records
from opd_jax.files import path_of
from opd_jax.store import hub
from opd_jax.store import workdir as workdirs

T = TypeVar("T")


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


class RockRow(TypedDict):
    """A type with a high Rock Score, in ``summary.json``."""

    token_id: int
    token: str
    share: float  # of all KL
    kl_mean: float  # nats
    token_share: float
    member: bool


Evaluation = dict[str, float | None]  # ``heldout.FIELDS``; null: not measured


@pydantic.with_config(records.OPEN)
class Summary(TypedDict):
    """What ``summary.json`` holds, written at the end of every process of a run."""

    before: Evaluation
    after: Evaluation
    steps: int
    seconds: float
    compiles: int
    first_step_s: float | None
    median_s: dict[str, float]
    phase_share: dict[str, float]
    is_finished: bool
    rocks: list[RockRow]
    teacher: NotRequired[Evaluation | None]  # None: not measured
    padding_share: NotRequired[float | None]
    rocks_steps: NotRequired[int | None]  # that ``rocks`` reaches back


class Sample(TypedDict):
    """A decoded answer, in ``samples.jsonl``."""

    prompt: str
    answer: str
    ids: list[int]
    truncated: bool
    kl_nats: NotRequired[list[float]]  # of each id, where there is a teacher


class SamplesLine(TypedDict):
    """A line of ``samples.jsonl``."""

    step: int
    samples: list[Sample]


@pydantic.with_config(records.OPEN)
class GradedLine(TypedDict):
    """A line of ``graded.jsonl``: which answers to which held-out prompts were right."""

    step: int
    index: list[int]
    correct: list[list[bool]]
    reason: NotRequired[list[list[str]]]
    unparsed: NotRequired[list[list[bool]]]
    text: NotRequired[list[list[str]]]


@pydantic.with_config(records.OPEN)
class EvaluationFile(TypedDict):
    """What ``evaluations/seed-N.json`` holds: a finished run, evaluated with other draws."""

    step: int
    result: Evaluation
    index: list[int]
    correct: list[list[bool]]


TEACHER, QUESTIONS = "teacher.json", "questions.json"


class Question(TypedDict):
    """A graded prompt, in ``questions.json``: what lines of ``graded.jsonl`` answer by index."""

    index: int
    prompt: str
    gold: str | list[str]


@pydantic.with_config(records.OPEN)
class TeacherFile(TypedDict):
    """What ``teacher.json`` holds: how the teacher was asked, and how it answered."""

    how: dict[str, Any]
    result: Evaluation
    index: list[int]
    correct: list[list[bool]]


@pydantic.with_config(records.OPEN)
class Arm(TypedDict):
    """An arm of a sweep, over its seeds."""

    arm: str
    runs: list[str]
    seeds: list[int]
    normaliser: str
    masked_share: float | None
    metrics: dict[str, dict[str, Any]]


@pydantic.with_config(records.OPEN)
class Comparison(TypedDict):
    """An arm against the baseline, by one metric."""

    arm: str
    metric: str
    delta: float | None
    low: float | None
    high: float | None
    p: float | None
    p_adjusted: float | None


@pydantic.with_config(records.OPEN)
class Sweep(TypedDict):
    """What ``sweep.json`` holds."""

    baseline: str
    arms: Annotated[list[Arm], annotated_types.MinLen(1)]
    comparisons: list[Comparison]


MetricValues = dict[str, float | int | None]  # a line of metrics.jsonl
_CHANGE = "put back a copy, or run the same command again from a good checkpoint"


def read(workdir: str | os.PathLike) -> RunFiles:
    """Read the files of a run.

    Raises:
      WorkdirError: one is missing, cannot be read, or has no measurement.
    """
    folder = Path(path_of(workdir))
    lines = metrics(folder)
    told = summary(folder)
    settings = record(folder)
    teachers = [model_name(path or "teacher") for path in workdirs.teachers(settings).values()]
    run = RunFiles(
        train_kl=series(lines, "kl_nats"),
        heldout_kl=series(lines, "eval/kl_nats"),
        accuracy=series(lines, "eval/accuracy"),
        rocks=sorted(map(dict, told["rocks"]), key=lambda row: -row["share"]),
        student=model_name(workdirs.setting(settings, "student.path") or "student"),
        teacher=" and ".join(dict.fromkeys(teachers)),
    )
    if not (run.train_kl.steps or run.heldout_kl.steps or run.accuracy.steps):
        raise workdirs.WorkdirError(
            f"{folder / 'metrics.jsonl'} has {len(lines)} lines and no measured KL or accuracy; "
            "expected at least one step or evaluation; train for a step first"
        )
    return run


def record(workdir: Path) -> dict[str, Any]:
    """The ``run.json`` of a run that must be there.

    Raises:
      WorkdirError: it is missing or damaged.
    """
    return dict(load(workdir / "run.json", workdirs.RunRecord))


def summary(workdir: Path) -> Summary:
    """The ``summary.json`` of a run.

    Raises:
      WorkdirError: it is missing or damaged.
    """
    return load(workdir / "summary.json", Summary)


def metrics(workdir: Path) -> list[MetricValues]:
    """The lines of ``metrics.jsonl``.

    Raises:
      WorkdirError: it is missing or damaged.
    """
    path = workdir / "metrics.jsonl"
    found = load_lines(path, MetricValues)
    for number, line in enumerate(found, 1):
        if type(line.get("step")) is not int:
            raise workdirs.WorkdirError(
                f"{path} is damaged in line {number}: field 'step' is {line.get('step')!r}; "
                f"expected a whole number; {_CHANGE}"
            )
    return found


def last_graded(workdir: Path, *, step: int | None = None) -> GradedLine | None:
    """What was graded last, or at a step; None where nothing was.

    Raises:
      WorkdirError: ``graded.jsonl`` is damaged.
    """
    path = workdir / "graded.jsonl"
    lines = load_lines(path, GradedLine) if path.exists() else []
    lines = [line for line in lines if step in (None, line["step"])]
    return lines[-1] if lines else None


def load(path: Path, kind: type[T]) -> T:
    """Read a JSON file of a run.

    Raises:
      WorkdirError: it is missing, damaged, or not of that kind.
    """
    try:
        return records.read(path, kind, change=_CHANGE)
    except (OSError, records.RecordError) as error:
        raise _unread(path, error) from error


def load_lines(path: Path, kind: type[T]) -> list[T]:
    """Read the JSON lines of a run's file, without a last one that is still being written.

    Raises:
      WorkdirError: it is missing, damaged, or not of that kind.
    """
    try:
        return list(records.lines(path, kind, change=_CHANGE))
    except (OSError, records.RecordError) as error:
        raise _unread(path, error) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a run's file, whatever they hold.

    Raises:
      WorkdirError: as :func:`load_lines`.
    """
    return load_lines(path, dict[str, Any])


# What goes wrong where JSON has another form than the code that reads it expects.
_OF_ANOTHER_FORM = (
    KeyError,
    TypeError,
    ValueError,
    IndexError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


@contextlib.contextmanager
def used(path: Path) -> Iterator[None]:
    """Use what a file without a declared type holds: if it has another form, the file is damaged.

    Raises:
      WorkdirError: it has.
    """
    try:
        yield
    except workdirs.WorkdirError:
        raise
    except _OF_ANOTHER_FORM as error:
        what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)[:200]
        raise workdirs.WorkdirError(
            f"{path} is damaged ({type(error).__name__}: {what}); expected what its command "
            f"writes; {_CHANGE}"
        ) from error


def _unread(path: Path, error: Exception) -> workdirs.WorkdirError:
    if not isinstance(error, OSError):
        return workdirs.WorkdirError(str(error))
    return workdirs.WorkdirError(
        f"cannot read {path} ({error.strerror}); expected the folder of a run that has ended "
        "or was stopped, with run.json, metrics.jsonl and summary.json; give its --workdir, "
        "or let the run end first"
    )


def series(lines: Sequence[Mapping[str, Any]], name: str) -> Series:
    """The values of one metric where it was measured (null says that it was not)."""
    pairs = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    pairs = [(step, value) for step, value in pairs if math.isfinite(value)]
    return Series([step for step, _ in pairs], [value for _, value in pairs])


def model_name(path: str) -> str:
    """The last part of a folder's path, of a repository's name or of ``embedded:teacher``."""
    path = hub.public_name(path) or path
    return re.split(r"[/\\:]", path.rstrip("/\\"))[-1] or path
