"""One row of a prompt file, checked: a prompt, the answers that are right, a completion to imitate.

What a row may hold, each under its own name or under the one that ``data.columns`` maps it to:

``prompt``         text, or a list of messages (the Hub's standard)
``messages``       a list of ``{"role", "content"}``
``conversations``  a list of ``{"from", "value"}``, as ShareGPT has them
``answer``         text or a number to grade by, or a list of them, any of which is right
``prompt_ids``     the prompt as ids; a ``prompt`` beside it is what they spell
``completion``     text to imitate, or a list of one message, the assistant's
``completion_ids`` the same as ids; a ``completion`` beside it is what they spell
``teacher``        which of several teachers scores the row

Of the first four a row has one, but for that. Ids are whole as they are: no system prompt and no
template is applied to them, and they count whatever ``data.columns`` calls a prompt in other files.
The content of a message is text, or a list of parts of type ``text``, which are joined. A last
message of the assistant's is taken as the completion: an on-policy student answers the turn before
it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from opd_jax.data.rows import Row, kind

PROMPTS = ("prompt", "messages", "conversations", "prompt_ids")
COMPLETIONS = ("completion", "completion_ids")
TEACHER = "teacher"
NAMES = (*PROMPTS, "answer", *COMPLETIONS, TEACHER)
# What other files call a prompt, and an answer.
_LIKE_PROMPT = ("question", "problem", "instruction", "query", "input", "text", "conversation")
LIKE_ANSWER = ("answers", "solution", "solutions", "ground_truth", "gold", "gold_answer", "target")
LIKE_ANSWER += ("label", "final_answer", "correct_answer", "expected_answer", "reference")
_FROM = {"human": "user", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant"}
_FROM |= {role: role for role in ("user", "assistant", "system", "tool")}

Answer = str | tuple[str, ...]  # a tuple: any of them is right


@dataclasses.dataclass(frozen=True)
class Record:
    """One checked row of a prompt file."""

    prompt: str | list[dict[str, Any]] | tuple[int, ...]  # plain text, chat messages, or ids
    answer: Answer | None
    completion: str | None
    line: int  # from 1; of a file that has no lines, the row
    completion_ids: tuple[int, ...] | None = None
    text: str | None = None  # that stands beside the ids of a prompt
    teacher: str | list[dict[str, Any]] | tuple[int, ...] | None = None  # where it reads another
    taught_by: str = ""  # name of its teacher, where there are several


def checked(row: Row, line: int, columns: Mapping[str, str], system: str = "") -> Record:
    """Check one row.

    Args:
      row: as :mod:`rows` reads it.
      line: its number.
      columns: names of ours, and what the file calls them; ``a.b`` is the field b of the object a.
      system: put in front of messages that have none; a text becomes the user's message behind it.

    Raises:
      ValueError: says what was found, what was expected and what to change.
    """
    name = _prompt_name(row, columns)
    value, shown = value_of(row, columns.get(name, name)), f"`{columns.get(name, name)}`"
    completion = _completion(value_of(row, columns.get("completion", "completion")))
    theirs = columns.get("completion_ids", "completion_ids")
    given = value_of(row, theirs)
    completion_ids = None if given is None else ids_of(given, f"`{theirs}`")
    answer = _answer(value_of(row, columns.get("answer", "answer")))
    if name == "prompt_ids":
        beside = value_of(row, "prompt")
        spelt = beside if isinstance(beside, str) else None
        return Record(ids_of(value, shown), answer, completion, line, completion_ids, spelt)
    if name == "prompt" and not isinstance(value, list):
        prompt: Any = text(value, shown)
        if system:
            prompt = [{"role": "user", "content": prompt}]
    else:
        prompt = messages_of(value, shown)
        if prompt[-1]["role"] == "assistant":
            prompt, completion = _reply_taken(prompt, completion, shown)
    if system and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": system}, *prompt]
    return Record(prompt, answer, completion, line, completion_ids)


def value_of(row: Row, name: str) -> Any:
    """A field of a row, or one inside it by a dotted name; None where there is none."""
    if name in row:
        return row[name]
    outer, dot, inner = name.partition(".")
    value = row.get(outer) if dot else None
    return value_of(value, inner) if isinstance(value, Mapping) else None


def teacher_of(row: Row, columns: Mapping[str, str], names: Sequence[str]) -> str:
    """Which of several teachers scores a row; empty where there is one, which rows do not name.

    Args:
      row: of the file.
      columns: see :func:`checked`.
      names: of the teachers; (): there is one.

    Raises:
      ValueError: the row names none of them, or one where none has a name.
    """
    theirs = columns.get(TEACHER, TEACHER)
    value = value_of(row, theirs)
    if not names and value is None:
        return ""
    if not names:
        raise ValueError(
            f"`{theirs}` is {kind(value)}, and the run has one teacher, without a name: expected "
            "no such column; give the models that it names by --config.teacher.paths.NAME=MODEL "
            "(and --config.teacher.path=), or rename the column"
        )
    if not isinstance(value, str) or value not in names:
        raise ValueError(
            f"`{theirs}` is {kind(value)}: expected who teaches the row, one of "
            f"{', '.join(names)}; write it, name the column that has it by "
            "--config.data.columns.teacher=COLUMN, or add a teacher by "
            "--config.teacher.paths.NAME=MODEL"
        )
    return value


def like_answers(row: Row) -> set[str]:
    """Names of a row, dotted inside objects, that look as if they held its answer."""
    found = {name for name in row if isinstance(name, str) and name.lower() in LIKE_ANSWER}
    for outer, value in row.items():
        if isinstance(value, Mapping):
            found |= {f"{outer}.{name}" for name in value if str(name).lower() in LIKE_ANSWER}
    return {name for name in found if value_of(row, name) not in (None, "", [])}


def text(value: Any, name: str) -> str:
    """Check that a value is a text with something in it.

    Raises:
      ValueError: it is not.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is {kind(value)}: expected a string with text in it; fill it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half a surrogate pair: expected text; mend it") from error
    return value


def ids_of(value: Any, name: str) -> tuple[int, ...]:
    """Check that a value is a list of ids; whether the vocabulary has them is asked later.

    Raises:
      ValueError: it is not.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} is {kind(value)}: expected a list of at least one id; fill it")
    for place, each in enumerate(value):
        if not isinstance(each, int) or isinstance(each, bool) or not 0 <= each < 2**31:
            raise ValueError(
                f"{name[:-1]}[{place}]` is {each!r:.40}: expected a token id, a whole number from "
                "0; mend it"
            )
    return tuple(value)


def _prompt_name(row: Row, columns: Mapping[str, str]) -> str:
    """Which of ``PROMPTS`` a row is read by."""
    mapped = [name for name in PROMPTS if name in columns]
    present = [name for name in mapped or PROMPTS if value_of(row, columns.get(name, name))]
    has_ids = value_of(row, columns.get("prompt_ids", "prompt_ids")) is not None
    is_spelt = present == ["prompt", "prompt_ids"] and isinstance(value_of(row, "prompt"), str)
    if has_ids and (is_spelt or not present):
        return "prompt_ids"
    if len(present) == 1:
        return present[0]
    empty = [n for n in mapped or PROMPTS if value_of(row, columns.get(n, n)) is not None]
    if not present and len(empty) == 1:  # its own check says what is wrong with it
        return empty[0]
    wanted = [f"`{columns.get(name, name)}`" for name in mapped or PROMPTS]
    near = [name for name in _LIKE_PROMPT if row.get(name)]
    change = "keep one" if present else "write one"
    if near:
        change = f"map yours by data.columns, such as --config.data.columns.prompt={near[0]}"
    found = " and ".join(f"`{columns.get(name, name)}`" for name in present) or "neither"
    raise ValueError(
        f"found {found} among keys {sorted(map(str, row))}: expected exactly one of "
        f"{', '.join(wanted)}; {change}"
    )


def messages_of(value: Any, name: str) -> list[dict[str, Any]]:
    """Messages with a role and a text each, also of ``from`` and ``value``, or of parts."""
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"{name} is {kind(value)}: expected a list of at least one "
            '{"role", "content"}; write one'
        )
    return [_message(each, f"{name[:-1]}[{index}]`") for index, each in enumerate(value)]


def _message(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f'{name} is {kind(value)}: expected {{"role", "content"}}; write it')
    if "from" in value and "role" not in value:
        role = text(value["from"], f"{name} from")
        if role not in _FROM:
            raise ValueError(f"{name} is from {role!r}: expected one of {sorted(_FROM)}; rename it")
        return {"role": _FROM[role], "content": _content(value.get("value"), f"{name} value")}
    text(value.get("role"), f"{name} role")
    return {**value, "content": _content(value.get("content"), f"{name} content")}


def _content(value: Any, name: str) -> str:
    """The text of a message, whose parts are joined as they are."""
    if not isinstance(value, list) or not value:
        return text(value, name)
    parts = []
    for index, part in enumerate(value):
        if not isinstance(part, Mapping):
            raise ValueError(
                f'{name}[{index}] is {kind(part)}: expected {{"type": "text", "text": ...}}; write '
                "it, or make the content a string"
            )
        if part.get("type", "text") != "text":
            raise ValueError(
                f"{name}[{index}] is of type {part['type']!r}: expected text only, which is all "
                "that the models here read; drop the row"
            )
        parts.append(text(part.get("text"), f"{name}[{index}] text"))
    return "".join(parts)


def _reply_taken(
    messages: list[dict[str, Any]], completion: str | None, name: str
) -> tuple[list[dict[str, Any]], str]:
    """Messages up to the turn to answer, and the reply behind it."""
    *asked, reply = messages
    if not asked or asked[-1]["role"] == "assistant":
        raise ValueError(
            f"the last of {name} is the assistant's, and no turn to answer stands before it: "
            "expected one of the user's; write it, or drop the row"
        )
    if completion is not None:
        raise ValueError(
            f"the last of {name} is the assistant's, and there is a `completion`: expected one of "
            "them; remove that reply, or the completion"
        )
    return asked, reply["content"]


def _answer(value: Any) -> Answer | None:
    if value is None:
        return None
    if not isinstance(value, list):
        return _one_answer(value, "`answer`")
    if not value:
        raise ValueError("`answer` is an empty list: expected accepted answers; fill or remove it")
    found = [_one_answer(each, f"`answer[{index}]`") for index, each in enumerate(value)]
    return found[0] if len(found) == 1 else tuple(found)


def _one_answer(value: Any, name: str) -> str:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if is_whole or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    return text(value, name)


def _completion(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, list) and value:
        found: Sequence[dict[str, Any]] = messages_of(value, "`completion`")
        if len(found) == 1 and found[0]["role"] == "assistant":
            return found[0]["content"]
        raise ValueError(
            f"`completion` has {len(found)} messages: expected one, the assistant's; keep that"
        )
    return text(value, "`completion`")
