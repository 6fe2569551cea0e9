"""One line of a task as a problem: its fields, as data sets call them, and what they must hold.

:mod:`tasks` has the table of fields. A field that is read decides what a model is asked and what
counts as right, so nothing here is guessed: a line that says two things is refused.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opd_jax.evaluate import grading

_QUESTIONS = ("messages", "prompt", "problem", "question")
_ANSWERS = ("answer", "answerkey")  # one of them; the latter is ARC's
_CHOICES = ("choices", "options")  # one of them; the latter is MMLU-Pro's
_FIELDS = (*_QUESTIONS, *_ANSWERS, *_CHOICES, "solution", "grader", "id")
_LETTERS = string.ascii_uppercase


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


def lettered(choices: Sequence[str]) -> list[tuple[str, str]]:
    """Options with their letters."""
    return list(zip(_LETTERS, choices, strict=False))


def read(line: bytes, index: int, grader: str) -> Problem:
    """Read a line.

    Args:
      line: a JSON object.
      index: of the line, from 0.
      grader: where the line names none and has no options.

    Raises:
      ValueError: it is not as the table of fields says, or its grader cannot use its answer.
      ImportError, JudgeError: what its grader needs is not installed.
    """
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error}): expected one object a line; mend it") from error
    if not isinstance(value, Mapping):
        raise ValueError(f"found {type(value).__name__}: expected a JSON object; write {{...}}")
    fields = _fields(value)
    asked = _only(fields, _QUESTIONS)
    if asked is None:
        raise ValueError(
            f"found no question among fields {sorted(value)}: expected exactly one of "
            f"{', '.join(_QUESTIONS)}{_nearest(value, _QUESTIONS)}; rename or remove"
        )
    choices, labels = _choices(fields)
    if "instruction_id_list" in fields:
        fields |= {"answer": _instructions(fields, asked), "grader": "ifeval"}
    told = _only(fields, _ANSWERS) or "solution"
    if told not in fields:
        raise ValueError(
            f"no `answer` among fields {sorted(value)}: expected the right answer"
            f"{_nearest(value, ('answer', 'solution'))}; add it"
        )
    own = fields.get("grader", "choice" if choices else grader)
    if not isinstance(own, str):
        raise ValueError(f"`grader` is {own!r}: expected a name; correct it")
    grading.named(own)
    if own == "ifeval":
        answer = fields[told]
    elif choices:
        answer = _chosen(fields[told], choices, labels, told, fields)
    else:
        answer = _answer(fields[told], told)
    grading.check(own, answer)
    question = _question(fields[asked], asked)
    return Problem(index, _id(fields.get("id", index)), question, answer, own, choices)


def _fields(value: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by their names in lower case.

    Raises:
      ValueError: two that are read differ in case alone, or one is surely meant to be read and is
        called otherwise.
    """
    fields: dict[str, Any] = {}
    for name, found in value.items():
        lower = str(name).lower()
        if found is None:
            continue
        if lower in fields and lower in _FIELDS:
            raise ValueError(f"found `{lower}` twice, in other case: expected it once; remove one")
        fields[lower] = found
    for name, found in fields.items():
        # A misspelt field that must be there is missed; one of these would be left out in silence.
        is_list = isinstance(found, list | Mapping) and len(found) > 1
        wanted = _CHOICES if is_list else ("grader",) if _names_a_grader(found) else ()
        near = difflib.get_close_matches(name, wanted, 1, 0.8)
        if near and name not in _FIELDS:
            raise ValueError(
                f"`{name}` looks like `{near[0]}`, and is not read: expected that name, or another "
                "one; rename it"
            )
    if "a" in fields and "b" in fields and not fields.keys() & {*_CHOICES}:
        told = str(fields.get("answer", "")).strip().lower()
        if len(told) == 1 and told in fields:
            raise ValueError(
                "found options in fields `A`, `B`, ...: expected them in one list; write "
                '"choices": [...]'
            )
    return fields


def _names_a_grader(value: Any) -> bool:
    return isinstance(value, str) and (value in grading.GRADERS or ":" in value)


def _only(fields: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Which of some names that mean the same is there.

    Raises:
      ValueError: more than one.
    """
    found = [name for name in names if name in fields]
    if len(found) > 1:
        raise ValueError(
            f"found {' and '.join(f'`{name}`' for name in found)} among fields {sorted(fields)}: "
            f"expected exactly one of {', '.join(names)}; rename or remove"
        )
    return found[0] if found else None


def _nearest(value: Mapping[str, Any], wanted: Sequence[str]) -> str:
    """A hint where a field is spelt nearly as a wanted one."""
    for name in value:
        near = difflib.get_close_matches(str(name).lower(), wanted, 1, 0.6)
        if near and str(name).lower() not in _FIELDS:
            return f" ({name!r} looks like `{near[0]}`)"
    return ""


def _question(value: Any, name: str) -> str | list[dict[str, Any]]:
    if name != "messages" and not (name == "prompt" and isinstance(value, list)):
        return _text(value, f"`{name}`")
    if not isinstance(value, list) or not value:
        raise ValueError(
            f'`{name}` is no list of messages: expected {{"role", "content"}} objects; write them'
        )
    for message in value:
        if not isinstance(message, Mapping):
            raise ValueError(f'a message is {message!r}: expected {{"role", "content"}}; write it')
        _text(message.get("role"), "`role`")
        _text(message.get("content"), "`content`")
    if value[-1]["role"] == "assistant":
        raise ValueError(f"the last of `{name}` is the assistant's: expected the turn to answer")
    return [dict(message) for message in value]


def _instructions(fields: Mapping[str, Any], asked: str) -> str:
    """The gold answer of a line of IFEval."""
    names = ("instruction_id_list", "kwargs")
    return json.dumps({name: fields.get(name) for name in names} | {"prompt": fields[asked]})


def _choices(fields: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The options, and their own labels, where they have any."""
    name = _only(fields, _CHOICES)
    if name is None:
        return (), ()
    value, labels = fields[name], ()
    if isinstance(value, Mapping) and "text" in value:  # ARC
        value, labels = value["text"], value.get("label") or ()
    elif isinstance(value, Mapping):  # by letter
        labels, value = tuple(value), list(value.values())
    if not isinstance(value, list) or not 2 <= len(value) <= len(_LETTERS):
        raise ValueError(f"`{name}` is {value!r}: expected a list of 2 to 26 texts; mend it")
    if labels and len(labels) != len(value):
        raise ValueError(
            f"`{name}` has {len(value)} texts and {len(labels)} labels: expected one each; mend it"
        )
    texts = [str(x) if _is_number(x) else x for x in value]
    return tuple(_text(x, f"`{name}`") for x in texts), tuple(str(label) for label in labels)


def _chosen(
    value: Any,
    choices: Sequence[str],
    labels: Sequence[str],
    name: str,
    fields: Mapping[str, Any],
) -> str:
    """The letter of the right option.

    Raises:
      ValueError: there is none, or the answer means more than one.
    """
    found = sorted({*_places(value, choices, labels, fields)})
    if len(found) == 1:
        return _LETTERS[found[0]]
    if found:
        told = " and ".join(f"{_LETTERS[place]} ({choices[place]})" for place in found)
        raise ValueError(
            f"`{name}` is {value!r}, which may mean {told}: expected what means one option; write "
            "its letter where options are numbers, its place from 0 where they are letters"
        )
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(f"`{name}` is {value}: expected 0 to {len(choices) - 1}; correct it")
    letters = f"a letter up to {_LETTERS[len(choices) - 1]}"
    if labels:
        letters = f"one of the labels {', '.join(labels)}"
    raise ValueError(
        f"`{name}` is {value!r}: expected {letters}, a place from 0 (a number), or the text of one "
        "option; correct it"
    )


def _places(
    value: Any, choices: Sequence[str], labels: Sequence[str], fields: Mapping[str, Any]
) -> Iterator[int]:
    """All options that an answer may mean, as places from 0."""
    names = list(labels) if labels else [letter for letter, _ in lettered(choices)]
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value < len(choices):
            yield value
        if str(value) in labels:
            yield labels.index(str(value))
        raw = fields.get("choices", fields.get("options"))
        if isinstance(raw, list) and value in [x for x in raw if _is_number(x)]:
            yield from (place for place, text in enumerate(choices) if text == str(value))
    elif isinstance(value, str):
        told = value.strip().strip("().")
        yield from (n for n, name in enumerate(names) if name.casefold() == told.casefold())
        yield from (n for n, text in enumerate(choices) if text.strip() == value.strip())


def _answer(value: Any, name: str) -> str:
    if _is_number(value):
        value = str(value)
    return grading.gold_answer(_text(value, f"`{name}`"))


def _id(value: Any) -> str:
    return str(value) if _is_number(value) else _text(value, "`id`")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is {value!r}: expected a string with text in it; fill it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half a surrogate pair: expected text; mend it") from error
    return value
