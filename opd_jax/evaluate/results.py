"""The folder of an evaluation: what it was of, every response with its verdict, what it comes to.

======================  ====================================================================
``eval.json``           model, tasks and settings: what a resumed evaluation must share
``completions.jsonl``   one line per response, in order, written as they come
``summary.json``        the measures with their intervals; there once all is done
======================  ====================================================================

The folder of several models (training seeds) has such a folder of each, and ``seeds.json`` with
what they come to together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired

import pydantic
from typing_extensions import TypedDict

from opd_jax import files, records
from opd_jax.evaluate import metrics
from opd_jax.store import fingerprint

RECORD, LINES, SUMMARY = "eval.json", "completions.jsonl", "summary.json"
SEEDS = "seeds.json"
_CHANGE = "put back a copy, or evaluate again into another --out"


class TaskRecord(TypedDict):
    """A task as it was read."""

    name: str
    path: str
    digest: str
    problems: int


@pydantic.with_config(records.OPEN)
class EvalRecord(TypedDict):
    """What ``eval.json`` holds.

    ``settings`` are all that responses and verdicts follow from, beside model and tasks.
    """

    model: str
    files: dict[str, str]  # fingerprints, by name
    tasks: list[TaskRecord]
    settings: dict[str, Any]
    time: str


@pydantic.with_config(records.OPEN)
class Line(TypedDict):
    """A line of ``completions.jsonl``."""

    task: str
    index: int  # of the problem: its line in the task, from 0
    id: str
    sample: int
    response: str
    gold: str
    grader: str
    correct: bool
    reason: str
    found: str | None  # null: no recognisable answer
    tokens: int
    truncated: bool
    prompt: NotRequired[str]  # with the first sample


class ResultError(ValueError):
    """The folder of an evaluation cannot be used; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Results:
    """A finished evaluation of one model.

    Attributes:
      folder: its folder.
      record: what it was of.
      problems: graded samples, by task and then by index of the problem.
    """

    folder: Path
    record: EvalRecord
    problems: Mapping[str, Mapping[int, Sequence[metrics.Sample]]]

    def in_order(self, task: str) -> list[Sequence[metrics.Sample]]:
        """The problems of a task by their index."""
        problems = self.problems[task]
        return [problems[index] for index in sorted(problems)]


def read(folder: Path) -> list[Results]:
    """Read the folder of an evaluation: one entry, or one per model in it.

    Raises:
      ResultError: it is none, is not finished, or is damaged.
    """
    if (folder / RECORD).is_file():
        return [_read(folder)]
    parts = sorted(path.parent for path in folder.glob(f"*/{RECORD}"))
    if not parts:
        raise ResultError(
            f"{folder} has no {RECORD}: expected the --out of opd-jax eval; give that folder"
        )
    return [_read(part) for part in parts]


def _read(folder: Path) -> Results:
    record = load_record(folder)
    assert record is not None
    lines = list(load_lines(folder))
    samples = int(record["settings"].get("samples", 1))
    expected = sum(task["problems"] for task in record["tasks"]) * samples
    if len(lines) != expected:
        raise ResultError(
            f"{folder / LINES} has {len(lines)} of {expected} responses: expected a finished "
            "evaluation; start the same command again, which goes on"
        )
    found: dict[str, dict[int, list[metrics.Sample]]] = {t["name"]: {} for t in record["tasks"]}
    for line in lines:
        if line["task"] not in found:
            raise ResultError(f"{folder / LINES} has a task {line['task']!r} too many; {_CHANGE}")
        found[line["task"]].setdefault(line["index"], []).append(sample(line))
    return Results(folder, record, found)


def sample(line: Line) -> metrics.Sample:
    """The graded response of a line."""
    vote = metrics.vote(line["correct"], line["found"], line["response"], line["grader"])
    return metrics.Sample(line["correct"], line["found"], line["truncated"], line["tokens"], vote)


def load_record(folder: Path) -> EvalRecord | None:
    """``eval.json``; None where there is none.

    Raises:
      ResultError: it cannot be read, or the folder is a file.
    """
    if folder.is_file():
        raise ResultError(
            f"{folder} is a file: expected the folder of an evaluation; correct --out"
        )
    return _load(folder / RECORD, EvalRecord)


def _load(path: Path, kind: Any) -> Any:
    try:
        return records.read(path, kind, change=_CHANGE)
    except FileNotFoundError:
        return None
    except (OSError, records.RecordError) as error:
        raise ResultError(str(error)) from error


def load_lines(folder: Path) -> Iterator[Line]:
    """Lines of ``completions.jsonl``, without a last one that was cut by a kill.

    Raises:
      ResultError: a line is damaged.
    """
    try:
        yield from records.lines(folder / LINES, Line, change=_CHANGE)
    except FileNotFoundError:
        return
    except (OSError, records.RecordError) as error:
        raise ResultError(str(error)) from error


def enter(folder: Path, record: EvalRecord, order: Sequence[tuple[str, int]], samples: int) -> int:
    """Take a folder for an evaluation: begin in it, or go on with the same one.

    What a kill left of a problem is cut off, so that the file always holds whole problems.

    Args:
      folder: new, empty, or of the same evaluation.
      record: what is to be evaluated.
      order: task and index of all problems, in the order of the lines.
      samples: lines per problem.

    Returns:
      How many problems are done.

    Raises:
      ResultError: it holds another evaluation, or its lines are not of this one.
      OSError: it cannot be written.
    """
    old = load_record(folder)
    if old is None:
        with contextlib.suppress(FileNotFoundError):
            there = sorted(set(os.listdir(folder)) - {files.LOCK})
            if there:
                raise ResultError(
                    f"{folder} holds {there[0]!r} and no {RECORD}: expected a new folder, or that "
                    "of the same evaluation; give another --out"
                )
        files.write_atomic(folder / RECORD, json.dumps(record, indent=1) + "\n")
    elif told := differences(old, record):
        raise ResultError(
            f"{folder} holds another evaluation: {'; '.join(told[:4])}: expected the same model, "
            "tasks and settings; give another --out, or the old ones"
        )
    done = 0
    for number, line in enumerate(load_lines(folder)):
        place = order[number // samples] if number // samples < len(order) else None
        if place != (line["task"], line["index"]) or line["sample"] != number % samples:
            raise ResultError(
                f"{folder / LINES} line {number + 1} is sample {line['sample']} of {line['task']} "
                f"problem {line['index']}: expected sample {number % samples} of "
                f"{place or 'nothing more'}; {_CHANGE}"
            )
        done = number + 1
    files.cut(folder / LINES, done // samples * samples)
    return done // samples


def differences(old: EvalRecord, new: EvalRecord) -> list[str]:
    """What two evaluations differ in, in words."""
    told = [f"model {name}" for name in fingerprint.changes(old["files"], new["files"])]
    for name in sorted({*old["settings"], *new["settings"]}):
        before, now = old["settings"].get(name), new["settings"].get(name)
        if before != now:
            told.append(f"{name} was {before!r} and is {now!r}")
    tasks = [{task["name"]: task["digest"] for task in side["tasks"]} for side in (old, new)]
    for name in sorted({*tasks[0], *tasks[1]}):
        if tasks[0].get(name) != tasks[1].get(name):
            kind = "changed" if name in tasks[0] and name in tasks[1] else "there only once"
            told.append(f"task {name} is {kind}")
    if not told and list(tasks[0]) != list(tasks[1]):
        told.append("the tasks stand in another order")
    return told


def folders(out: Path, models: Sequence[str]) -> list[Path]:
    """A folder for each of several models, named after it.

    Raises:
      ResultError: one evaluation, or that of a model which is not among them, is there.
      ValueError: a model is named twice.
    """
    names = [re.sub(r"[^\w.@-]+", "-", ref).strip("-.") or "model" for ref in models]
    if len({*names}) < len(names):
        raise ValueError(
            f"models {', '.join(models)}: expected another one each; name every model once"
        )
    if (out / RECORD).exists():
        raise ResultError(
            f"{out} holds the evaluation of one model: expected a new folder for several; give "
            "another --out"
        )
    others = sorted({path.parent.name for path in out.glob(f"*/{RECORD}")} - {*names})
    if others:
        raise ResultError(
            f"{out} holds the evaluation of {others[0]}, which is not among the models: expected "
            "theirs alone, as their mean is over all of them; name it too, or give another --out"
        )
    return [out / name for name in names]


def write_seeds(
    folder: Path, models: Sequence[str], means: Mapping[str, Mapping[str, metrics.Value]]
) -> None:
    """Write ``seeds.json``: the models, and their means by task."""
    content = {
        "models": list(models),
        "tasks": {
            task: {name: dataclasses.asdict(value) for name, value in values.items()}
            for task, values in means.items()
        },
    }
    files.write_atomic(folder / SEEDS, json.dumps(content, indent=1) + "\n")


def write_summary(
    folder: Path,
    measures: Mapping[str, Mapping[str, metrics.Value]],
    reasons: Mapping[str, Mapping[str, int]],
) -> None:
    """Write ``summary.json``: measures by task, and how often each reason was given."""
    content = {
        name: {
            "measures": {k: dataclasses.asdict(v) for k, v in values.items()},
            "reasons": dict(reasons[name]),
        }
        for name, values in measures.items()
    }
    files.write_atomic(folder / SUMMARY, json.dumps(content, indent=1) + "\n")
