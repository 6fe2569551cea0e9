"""Problems of tasks, ready to be asked of one model, and their graded answers."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from opd_jax import processes
from opd_jax.data import widths
from opd_jax.data.prompts import Example
from opd_jax.evaluate import finding, grading, tasks
from opd_jax.evaluate.grading import Verdict
from opd_jax.evaluate.problems import Problem
from opd_jax.evaluate.results import EvalRecord
from opd_jax.evaluate.tasks import Form, Task
from opd_jax.store import fingerprint, pair, workdir
from opd_jax.store.pair import Model


@dataclasses.dataclass(frozen=True)
class Row:
    """A problem, ready to be asked."""

    task: Task
    problem: Problem
    example: Example
    width: int  # padded

    def verdict(self, text: str, *, truncated: bool) -> Verdict:
        """Grade a response to it.

        Raises:
          ValueError, GraderError: as the graders do.
        """
        return grading.named(self.problem.grader)(
            text,
            self.problem.answer,
            truncated=truncated,
            in_thought=finding.opens_thought(self.example.text),
        )


def begun(old: EvalRecord | None) -> str:
    """When a folder's problems were first asked, on every process: now, where it is new.

    A chat template may write the date, and what goes on must ask what it asked before.
    """
    return processes.agreed_text(old["time"] if old else workdir.timestamp())


def rows(model: Model, given: Sequence[Task], max_new: int, form: Form, *, begun: str) -> list[Row]:
    """All problems as prompts: task by task, narrow ones first.

    Args:
      model: that answers.
      given: the tasks.
      max_new: most ids of an answer.
      form: how their problems are put.
      begun: when they were first asked: the date that chat templates write, but for a run's model,
        which has the date of its run.

    Raises:
      ValueError: the model has no positions for answers of ``max_new`` ids.
      TaskError: a problem cannot be rendered, or is too long.
    """
    room = model.cfg.max_positions - max_new
    if room < 1:
        raise ValueError(
            f"max-new is {max_new}: expected below the {model.cfg.max_positions} "
            f"positions of {model.reference.name}, which hold prompt and answer; lower --max-new"
        )
    found = []
    for task in given:
        now = model.started or begun
        examples = tasks.prompts(task, form, model.tokenizer, max_prompt=room, now=now)
        asked = [
            Row(task, problem, example, min(widths.padded(len(example.ids)), room))
            for problem, example in zip(task.problems, examples, strict=True)
        ]
        found += sorted(asked, key=lambda row: row.width)
    return found


def groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Neighbours of one task and width, which one program serves."""
    group: list[Row] = []
    for row in rows:
        if group and (row.task.name, row.width) != (group[0].task.name, group[0].width):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def key_of(task: str, seed: int) -> jax.Array:
    """The key of all draws of a task: a response does not depend on the tasks beside it."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(task.encode()))


def record(
    model: Model, given: Sequence[Task], form: Form, settings: Mapping[str, Any], *, begun: str
) -> EvalRecord:
    """What answers are of: the model, its files and its tasks, and how it was asked.

    Args:
      model: that answers.
      given: the tasks.
      form: how their problems are put.
      settings: whatever else the answers depend on.
      begun: as :func:`rows` had it.
    """
    told = {**settings, **dataclasses.asdict(form), "template": dict(form.template)}
    told |= {"dtype": model.cfg.dtype, "stop_ids": list(model.stop_ids)}
    return {
        "model": model.reference.name,
        "files": pair.identity(model.reference),
        "tasks": [
            {
                "name": task.name,
                "path": task.path,
                "digest": task.digest,
                "problems": len(task.problems),
            }
            for task in given
        ],
        "settings": told | _own_graders(given),
        "time": begun,
    }


def _own_graders(given: Sequence[Task]) -> dict[str, str]:
    """Fingerprints of the files of the user's own graders."""
    names = {problem.grader for task in given for problem in task.problems}
    return {
        f"grader {name}": fingerprint.of_file(path)
        for name in sorted(names)
        if (path := grading.source(name))
    }
