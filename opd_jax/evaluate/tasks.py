r"""Tasks: problems with right answers, read from JSON lines as the field's data sets have them.

One object a line. Names of fields count whatever their case; further fields are left alone.

=============== ==============================================================================
``question``    the problem as text; or ``problem`` (MATH-500, AIME, HMMT), or ``prompt``, or
                ``messages`` (a list of ``{"role", "content"}``, which ``prompt`` may be too):
                exactly one of them
``answer``      the right answer: a number, an expression, a word; a worked solution that marks
                it (GSM8K: ``#### 18``; ``\boxed{18}``); of a multiple choice the letter or label,
                the place from 0 (a number), or the text of an option; or ``answerKey`` (ARC)
``solution``    taken where there is no ``answer``
``choices``     options of a multiple choice, 2 to 26 texts, or ``options`` (MMLU-Pro); or ARC's
                ``{"text": [...], "label": [...]}``, or ``{"A": ..., "B": ...}``; they are written
                below the question as ``A. ...``
``grader``      of this line; default: ``choice`` where there are options, else the command's
``id``          a name to find the problem again, one each; default: its line
=============== ==============================================================================

Lines of IFEval have ``instruction_id_list`` and ``kwargs`` in place of an answer, and are graded by
``ifeval``. An answer that its grader cannot use is refused when the task is read.

How a problem becomes a prompt is :class:`Form`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opd_jax import bounded, records
from opd_jax.data import tokenizer as tokenizers
from opd_jax.data.prompts import Example
from opd_jax.evaluate import problems as reading
from opd_jax.evaluate.problems import Problem, lettered
from opd_jax.files import path_of

FORMATS = ("auto", "chat", "raw")
_MAX_BYTES = 1 << 30


class TaskError(ValueError):
    """A task cannot be used; the message names file and line, and says what to do."""


@dataclasses.dataclass(frozen=True)
class Task:
    """The problems of a file, under the name of the file."""

    name: str
    path: str
    problems: tuple[Problem, ...]

    @property
    def digest(self) -> str:
        """Fingerprint of the problems, as they were read."""
        state = hashlib.sha256()
        for problem in self.problems:
            state.update(json.dumps(dataclasses.astuple(problem), sort_keys=True).encode())
        return state.hexdigest()[:16]

    @property
    def num_repeated(self) -> int:
        """Problems whose question stands before them already."""
        return len(self.problems) - len({repr((p.question, p.choices)) for p in self.problems})


@dataclasses.dataclass(frozen=True)
class Form:
    """How a problem becomes a prompt.

    Attributes:
      format: ``chat``: the question is the user's turn of the chat template; ``raw``: it is
        continued as it is; ``auto``: chat where the tokenizer has a template.
      instruction: put behind every question, on a line of its own.
      system: the system message of a chat; empty for none.
      template: variables of the chat template, by name.
    """

    format: str = "auto"
    instruction: str = ""
    system: str = ""
    template: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self):
        if self.format not in FORMATS:
            raise TaskError(
                f"format is {self.format!r}: expected one of {', '.join(FORMATS)}; set --format"
            )


def read(path: str, *, grader: str = "math", limit: int = 0) -> Task:
    """Read a task.

    Args:
      path: of the JSON lines.
      grader: of lines that name none and have no options.
      limit: only the first problems; 0: all.

    Raises:
      FileNotFoundError: no such file.
      TaskError: a line is not as the module's docstring says, names no grader that there is, or
        has an answer that its grader cannot use.
      ImportError, JudgeError: what a grader needs is not installed.
    """
    if limit < 0:
        raise TaskError(f"limit is {limit}: expected at least 0; set --limit")
    file = Path(path_of(path))
    if not file.exists():
        raise FileNotFoundError(
            f"task {path!r} does not exist: expected a file with one JSON object a line; correct "
            "--tasks"
        )
    records.regular(file, _MAX_BYTES)
    problems: list[Problem] = []
    lines: dict[str, int] = {}  # of each id, from 1
    for index, line in enumerate(file.read_bytes().splitlines()):
        if limit and len(problems) == limit:
            break
        if not line.strip():
            continue
        try:
            problem = reading.read(line, index, grader)
            if problem.id in lines:
                raise ValueError(
                    f"the `id` {problem.id!r} is that of line {lines[problem.id]} too: expected "
                    "another one each; correct it, or drop the field"
                )
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{path}:{index + 1}: {error}") from error
        problems.append(problem)
        lines[problem.id] = index + 1
    if not problems:
        raise TaskError(f"{path} holds no problem: expected one JSON object a line; fill it")
    return Task(file.stem, path, tuple(problems))


def read_all(
    paths: str | Sequence[str | os.PathLike[str]], *, grader: str = "math", limit: int = 0
) -> list[Task]:
    """Read tasks named in one text, with commas between, or one by one.

    Raises:
      FileNotFoundError, TaskError, ImportError: as :func:`read`; two tasks of one name.
    """
    parts = paths.split(",") if isinstance(paths, str) else [os.fspath(path) for path in paths]
    names = [part.strip() for part in parts if part.strip()]
    if not names:
        raise TaskError("no task given: expected --tasks=FILE,... with JSON lines; give one")
    found = [read(name, grader=grader, limit=limit) for name in names]
    twice = {task.name for task in found if sum(other.name == task.name for other in found) > 1}
    if twice:
        raise TaskError(f"two tasks are called {min(twice)!r}: expected a name each; rename a file")
    return found


def prompts(task: Task, form: Form, tokenizer: Any, *, max_prompt: int, now: str) -> list[Example]:
    """Render and tokenise the problems of a task.

    Args:
      task: problems.
      form: how.
      tokenizer: of the model.
      max_prompt: most ids of a prompt.
      now: the date that a chat template writes.

    Raises:
      TaskError: a problem cannot be rendered, or is too long.
      BoundError: rendering takes too long.
    """
    is_chat = form.format == "chat" or (form.format == "auto" and bool(tokenizer.chat_template))

    def work(begin: Callable[[str], None]) -> list[Example]:
        found = []
        for problem in task.problems:
            where = f"{task.path}:{problem.index + 1}"
            begin(f"{where}: rendering and tokenising the problem")
            try:
                asked = _asked(problem, form, is_chat)
                ids = tokenizers.render(tokenizer, asked, now=now, **dict(form.template))
            except MemoryError:
                raise
            except Exception as error:  # a chat template may raise anything
                raise TaskError(f"{where}: {error}") from error
            if len(ids) > max_prompt:
                raise TaskError(
                    f"{where}: the prompt has {len(ids)} ids, and there is room for {max_prompt} "
                    "beside the answer: expected no longer one; lower --max-new, or drop the line"
                )
            text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            found.append(Example(tuple(ids), problem.answer, text, problem.index))
        return found

    return bounded.run(work, change="mend the chat template or the tokenizer, or drop the line")


def _asked(problem: Problem, form: Form, is_chat: bool) -> str | list[dict[str, Any]]:
    """What the model is asked: messages for a chat, else text."""
    behind = [f"{letter}. {text}" for letter, text in lettered(problem.choices)]
    if form.instruction:
        behind.append(form.instruction)
    if isinstance(problem.question, str):
        text = "\n".join([problem.question, *behind])
        if not is_chat:
            return text
        messages: list[dict[str, Any]] = [{"role": "user", "content": text}]
    else:
        if form.format == "raw":
            raise TaskError("`messages` and --format=raw: expected text; use --format=chat")
        messages = [dict(message) for message in problem.question]
        messages[-1]["content"] = "\n".join([messages[-1]["content"], *behind])
    if form.system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": form.system})
    return messages
