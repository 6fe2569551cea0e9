"""The prompt that a teacher reads in the place of the student's: self-distillation with context.

Its text is that of the row, written into a frame (``data.teacher_prompt``) as ``str.format`` has
it: ``{prompt}`` is what the student is asked, ``{answer}`` the right answer (the first of several),
and ``{NAME}`` any other column, ``{a.b}`` the field b of the object a; ``{{`` is a brace. It stands
where the question of the student's prompt did: a text in the place of a text, of a chat in the
place of the last message. A frame that is one column, ``{hint}``, may also name messages or ids,
which are the whole prompt. ``data.teacher_system``, a frame too, is the teacher's system prompt.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping
from typing import Any

from opd_jax.data.fields import NAMES, Record, ids_of, messages_of, text, value_of
from opd_jax.data.rows import Row, kind


@dataclasses.dataclass(frozen=True)
class Frames:
    """What the teacher reads, in terms of a row; both empty: what the student does.

    Attributes:
      prompt: what stands where the student's question did; empty: that question.
      system: system prompt, in the place of the student's; empty: that one.

    Raises:
      ValueError: no frame.
    """

    prompt: str = ""
    system: str = ""

    def __post_init__(self):
        for frame in (self.prompt, self.system):
            _parts(frame)

    def __bool__(self) -> bool:
        return bool(self.prompt or self.system)


def prompt_of(
    row: Row, record: Record, frames: Frames, columns: Mapping[str, str], system: str = ""
) -> str | list[dict[str, Any]] | tuple[int, ...]:
    """The teacher's prompt for a row.

    Args:
      row: as :mod:`rows` reads it.
      record: the same, checked.
      frames: what the teacher reads.
      columns: names of ours, and what the file calls them.
      system: the student's system prompt, which a teacher without its own keeps.

    Raises:
      ValueError: the row does not have what a frame names, or its prompt is ids, into which
        nothing can be written.
    """
    own = _filled(frames.system, "data.teacher_system", row, record, columns) or system
    if name := _only(frames.prompt):
        value = value_of(row, columns.get(name, name) if name in NAMES else name)
        if isinstance(value, list) and value:
            if not isinstance(value[0], int):
                chat = messages_of(value, f"`{name}`")
                if chat[-1]["role"] == "assistant":
                    raise ValueError(
                        f"the last of `{name}`, which the teacher reads, is the assistant's: "
                        "expected the turn to answer; drop that reply"
                    )
                return _with_system(chat, own, bool(frames.system))
            if frames.system:
                raise ValueError(
                    f"`{name}` is ids and data.teacher_system is set: expected one of them, as ids "
                    "are whole as they are; set --config.data.teacher_system=''"
                )
            return ids_of(value, f"`{name}`")
    if isinstance(record.prompt, tuple):
        raise ValueError(
            "the prompt is ids, and data.teacher_prompt a text to write it into: expected text or "
            "messages in both, or a column of the teacher's own ids; give prompts without "
            "prompt_ids, or set --config.data.teacher_prompt={COLUMN}"
        )
    asked = _filled(frames.prompt, "data.teacher_prompt", row, record, columns)
    if isinstance(record.prompt, str):
        plain = asked or record.prompt
        return _with_system([{"role": "user", "content": plain}], own, True) if own else plain
    *before, last = record.prompt
    chat = [*before, {**last, "content": asked} if asked else last]
    return _with_system(chat, own, bool(frames.system))


def _with_system(
    chat: list[dict[str, Any]], system: str, is_replaced: bool
) -> list[dict[str, Any]]:
    """A chat that begins with a system prompt, its own unless that is to be replaced."""
    has_own = chat[0]["role"] == "system"
    if not system or (has_own and not is_replaced):
        return chat
    return [{"role": "system", "content": system}, *chat[has_own:]]


def _parts(frame: str) -> list[tuple[str, str | None]]:
    """Literal texts, each with the name of the column behind it.

    Raises:
      ValueError: it is no frame.
    """
    parts = list(string.Formatter().parse(frame))
    for _, name, form, conversion in parts:
        if name is not None and (not name.strip() or form or conversion):
            raise ValueError(f"{{{name}{conversion or ''}{form}}} names no column")
    return [(literal, name) for literal, name, _, _ in parts]


def _only(frame: str) -> str | None:
    """The column that a frame is and nothing else, where it may hold more than a text."""
    parts = _parts(frame)
    if len(parts) != 1 or parts[0][0] or parts[0][1] in ("prompt", "answer"):
        return None
    return parts[0][1]


def _filled(frame: str, key: str, row: Row, record: Record, columns: Mapping[str, str]) -> str:
    """A frame with the values of a row; empty where there is none."""
    if not frame:
        return ""
    filled = "".join(
        literal + ("" if name is None else _value(name, key, row, record, columns))
        for literal, name in _parts(frame)
    )
    return text(filled, f"the teacher's text by {key}")


def _value(name: str, key: str, row: Row, record: Record, columns: Mapping[str, str]) -> str:
    if name == "prompt" and not isinstance(record.prompt, tuple):
        return record.prompt if isinstance(record.prompt, str) else record.prompt[-1]["content"]
    if name == "answer" and record.answer is not None:
        return record.answer if isinstance(record.answer, str) else record.answer[0]
    theirs = columns.get(name, name) if name in NAMES else name
    value = value_of(row, theirs)
    if isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return str(value)
    found = "not there" if value is None else kind(value)
    raise ValueError(
        f"`{theirs}`, which {key} names, is {found}: expected a text or a number; fill it, drop "
        f"the row, or correct --config.{key}"
    )
