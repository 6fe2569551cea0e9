r"""Tasks: problems with right answers, read from JSON lines as the field's data sets have them.

One object a line. Names of fields count whatever their case; further fields are left alone.

=============== ==============================================================================
``question``    the problem as text; or ``problem`` (MATH-500, AIME, HMMT), or ``prompt``, or
                ``messages`` (a list of ``{"role", "content"}``): exactly one of them
``answer``      the right answer: a number, an expression, a word; a worked solution that marks
                it (GSM8K: ``#### 18``; ``\boxed{18}``); of a multiple choice the letter, the
                place from 0 (a number), or the text of an option
``solution``    taken where there is no ``answer``
``choices``     options of a multiple choice, at least two texts (or ARC's ``{"text": [...]}``);
                they are written below the question as ``A. ...``
``grader``      of this line; default: ``choice`` where there are options, else the command's
``id``          a name to find the problem again; default: its line
=============== ==============================================================================

Lines of IFEval have ``instruction_id_list`` and ``kwargs`` in place of an answer, and are graded by
``ifeval``.

How a problem becomes a prompt is :class:`Form`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_jax import bounded, records
from opd_jax.data import tokenizer as tokenizers
from opd_jax.data.prompts import Example
from opd_jax.evaluate import grading, instructions
from opd_jax.files import path_of

FORMATS = ("auto", "chat", "raw")
_QUESTIONS = ("messages", "prompt", "problem", "question")
_FIELDS = (*_QUESTIONS, "answer", "solution", "choices", "grader", "id")
_MAX_BYTES = 1 << 30


class TaskError(ValueError):
    """A task cannot be used; the message names file and line, and says what to do."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One line of a task.

    Attributes:
      index: its line in the file, from 0.
      id: its name.
      question: text, or chat messages.
      answer: the right answer.
      grader: what compares answers with it.
      choices: options of a multiple choice.
    """

    index: int
    id: str
    question: str | list[dict[str, Any]]
    answer: str
    grader: str
    choices: tuple[str, ...] = ()


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
      TaskError: a line is not as the module's docstring says.
      GraderError: there is no such grader.
    """
    file = Path(path_of(path))
    if not file.is_file():
        raise FileNotFoundError(
            f"task {path!r} does not exist: expected a file with one JSON object a line; correct "
            "--tasks"
        )
    records.regular(file, _MAX_BYTES)
    problems = []
    for index, line in enumerate(file.read_bytes().splitlines()):
        if limit and len(problems) == limit:
            break
        if not line.strip():
            continue
        try:
            problems.append(_problem(line, index, grader))
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{path}:{index + 1}: {error}") from error
    if not problems:
        raise TaskError(f"{path} holds no problem: expected one JSON object a line; fill it")
    return Task(file.stem, path, tuple(problems))


def read_all(paths: str, *, grader: str = "math", limit: int = 0) -> list[Task]:
    """Read tasks named in one text, with commas between.

    Raises:
      FileNotFoundError, TaskError, GraderError: as :func:`read`; two tasks of one name.
    """
    names = [part.strip() for part in paths.split(",") if part.strip()]
    if not names:
        raise TaskError("no task given: expected --tasks=FILE,... with JSON lines; give one")
    found = [read(name, grader=grader, limit=limit) for name in names]
    twice = {task.name for task in found if sum(other.name == task.name for other in found) > 1}
    if twice:
        raise TaskError(f"two tasks are called {min(twice)!r}: expected a name each; rename a file")
    return found


def prompts(
    task: Task, form: Form, tokenizer: Any, *, max_prompt: int, now: str | None = None
) -> list[Example]:
    """Render and tokenise the problems of a task.

    Args:
      task: problems.
      form: how.
      tokenizer: of the model.
      max_prompt: most ids of a prompt.
      now: the date that a chat template writes; None: today.

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
    behind = [f"{letter}. {text}" for letter, text in _lettered(problem.choices)]
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


def _lettered(choices: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(string.ascii_uppercase, choices, strict=False))


def _problem(line: bytes, index: int, grader: str) -> Problem:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error}): expected one object a line; mend it") from error
    if not isinstance(value, Mapping):
        raise ValueError(f"found {type(value).__name__}: expected a JSON object; write {{...}}")
    fields = {str(name).lower(): found for name, found in value.items() if found is not None}
    asked = [name for name in _QUESTIONS if name in fields]
    if len(asked) != 1:
        raise ValueError(
            f"found {' and '.join(f'`{name}`' for name in asked) or 'no question'} among fields "
            f"{sorted(value)}: expected exactly one of {', '.join(_QUESTIONS)}"
            f"{_nearest(value, _QUESTIONS) if not asked else ''}; rename or remove"
        )
    choices = _choices(fields.get("choices"))
    if "instruction_id_list" in fields:
        fields |= {"answer": _instructions(fields, asked[0]), "grader": "ifeval"}
    told = fields.get("answer", fields.get("solution"))
    if told is None:
        raise ValueError(
            f"no `answer` among fields {sorted(value)}: expected the right answer"
            f"{_nearest(value, ('answer', 'solution'))}; add it"
        )
    own = fields.get("grader", "choice" if choices else grader)
    if not isinstance(own, str):
        raise ValueError(f"`grader` is {own!r}: expected a name; correct it")
    grading.named(own)
    answer = told if own == "ifeval" else _answer(told, choices)
    question = _question(fields[asked[0]], asked[0])
    return Problem(index, str(fields.get("id", index)), question, answer, own, choices)


def _nearest(value: Mapping[str, Any], wanted: Sequence[str]) -> str:
    """A hint where a field is spelt nearly as a wanted one."""
    for name in value:
        near = difflib.get_close_matches(str(name).lower(), wanted, 1, 0.6)
        if near and str(name).lower() not in _FIELDS:
            return f" ({name!r} looks like `{near[0]}`)"
    return ""


def _question(value: Any, name: str) -> str | list[dict[str, Any]]:
    if name != "messages":
        return _text(value, f"`{name}`")
    if not isinstance(value, list) or not value:
        raise ValueError('`messages` is no list: expected {"role", "content"} objects; write them')
    for message in value:
        if not isinstance(message, Mapping):
            raise ValueError(f'a message is {message!r}: expected {{"role", "content"}}; write it')
        _text(message.get("role"), "`role`")
        _text(message.get("content"), "`content`")
    if value[-1]["role"] == "assistant":
        raise ValueError("the last of `messages` is the assistant's: expected the turn to answer")
    return [dict(message) for message in value]


def _instructions(fields: Mapping[str, Any], asked: str) -> str:
    """The gold answer of a line of IFEval."""
    names = ("instruction_id_list", "kwargs")
    gold = {name: fields.get(name) for name in names} | {"prompt": fields[asked]}
    text = json.dumps(gold)
    instructions.read(text)
    return text


def _choices(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, Mapping):
        value = value.get("text")
    if not isinstance(value, list) or not 2 <= len(value) <= len(string.ascii_uppercase):
        raise ValueError(f"`choices` is {value!r}: expected a list of 2 to 26 texts; mend it")
    return tuple(_text(str(text), "`choices`") for text in value)


def _answer(value: Any, choices: Sequence[str]) -> str:
    letters = dict(_lettered(choices))
    if choices:
        if isinstance(value, int) and not isinstance(value, bool):
            if not 0 <= value < len(choices):
                raise ValueError(f"`answer` is {value}: expected 0 to {len(choices) - 1}")
            return string.ascii_uppercase[value]
        if isinstance(value, str) and value.strip().strip("().").upper() in letters:
            return value.strip().strip("().").upper()
        named = [letter for letter, text in letters.items() if text == value]
        if len(named) == 1:
            return named[0]
        raise ValueError(
            f"`answer` is {value!r}: expected a letter up to {max(letters)}, a place from 0, or "
            "the text of one option; correct it"
        )
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    return grading.gold_answer(_text(value, "`answer`"))


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is {value!r}: expected a string with text in it; fill it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half a surrogate pair: expected text; mend it") from error
    return value
