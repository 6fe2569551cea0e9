"""Tokenizers: loading, prompt rendering, stop ids, and whether two models speak the same ids.

Distillation compares two distributions id by id, so the ids must mean the same tokens to both
models and a prompt must render to the same ids. Both are checked here, before the first step.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# transformers announces on import that torch is missing, which is how this package means it to be.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
# isort: split
from transformers import PreTrainedTokenizerFast

from opd_jax import records
from opd_jax.data import templates

Messages = Sequence[Mapping[str, Any]]  # [{"role": ..., "content": ...}, ...]

MAX_CHARS = 1 << 20  # of a prompt: tokenizers end the process where memory runs out
_MAX_FILE = 1 << 30  # bytes; the largest tokenizers have some 30 MB
_VISIBLE = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"}


def load(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model folder from its ``tokenizer.json``, exactly as written there.

    Raises:
      FileNotFoundError: no such folder, or no ``tokenizer.json`` in it.
      ValueError: the files are there and cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"tokenizer folder {folder} does not exist: expected a Hugging Face model folder; "
            "set the model's path to one"
        )
    if not (folder / "tokenizer.json").is_file():
        found = sorted(p.name for p in folder.iterdir())[:12]
        raise FileNotFoundError(
            f"no tokenizer.json in {folder} (found {', '.join(found) or 'nothing'}): expected a "
            "fast tokenizer; copy the tokenizer files of the original model into the folder"
        )
    for pattern in ("*.json", "*.jinja", "*.model", "*.txt", "*chat_templates/*"):
        for file in folder.glob(pattern):
            records.regular(file, _MAX_FILE)  # a pipe or a device would be read for ever
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust reader raises bare Exception
        raise ValueError(
            f"the tokenizer in {folder} cannot be read ({type(error).__name__}: {error}): expected "
            "tokenizer.json and tokenizer_config.json as transformers saves them; copy them again "
            "from the original model"
        ) from error


def lend_template(tokenizer: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> bool:
    """Give a tokenizer without a chat template that of another; says whether it was given one.

    A base student has none, and is to learn the chat of its teacher.
    """
    if tokenizer.chat_template or not other.chat_template:
        return False
    tokenizer.chat_template = other.chat_template
    return True


def render(
    tokenizer: PreTrainedTokenizerFast,
    messages: Messages | str,
    *,
    now: str | None = None,
    **template_kwargs,
) -> list[int]:
    """Turn chat messages, or a plain prompt, into the ids that the model is to continue.

    Messages go through the tokenizer's chat template, with the generation prompt added. A string is
    encoded as it is, with what the tokenizer itself puts in front (a BOS, unless already written).

    Args:
      tokenizer: of a model.
      messages: chat messages, or a plain prompt.
      now: the date for templates that write one, ``2026-11-26T10:00:00Z``; None: today.
      **template_kwargs: further variables of the template.

    Raises:
      ValueError: messages without a chat template, or nothing left to continue.
    """
    text, is_begun = written(tokenizer, messages, now=now, **template_kwargs)
    ids = [int(i) for i in tokenizer.encode(text, add_special_tokens=not is_begun)]
    if not ids:
        raise ValueError(
            f"the prompt {messages!r} renders to no ids: expected at least one; remove or fill it"
        )
    return ids


def written(
    tokenizer: PreTrainedTokenizerFast,
    messages: Messages | str,
    *,
    now: str | None = None,
    is_asked: bool = True,
    **template_kwargs,
) -> tuple[str, bool]:
    """The text that :func:`render` encodes, and whether what stands in front is in it already.

    ``is_asked`` adds the generation prompt of a chat.

    Raises:
      ValueError: messages without a chat template, or a text that is too long.
    """
    if isinstance(messages, str):
        bos = tokenizer.bos_token
        is_begun = bool(bos) and messages.startswith(str(bos))
        text = messages
    elif not tokenizer.chat_template:
        raise ValueError(
            f"the prompt is {len(messages)} chat messages and the tokenizer in "
            f"{tokenizer.name_or_path or '(memory)'} has no chat template: expected one; add "
            "chat_template.jinja to the folder, or write the data with `prompt` strings"
        )
    else:
        templates.set_clock(tokenizer, now)
        given = [dict(message) for message in messages]
        text = tokenizer.apply_chat_template(
            given, add_generation_prompt=is_asked, tokenize=False, **template_kwargs
        )
        text, is_begun = str(text), True  # the template has written what stands in front
    if len(text) > MAX_CHARS:
        raise ValueError(
            f"the prompt has {len(text)} characters: expected at most {MAX_CHARS}; split it, or "
            "drop the line"
        )
    return text, is_begun


def pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id that fills unused positions: pad, else EOS (harmless, since masks are data).

    Raises:
      ValueError: the tokenizer names neither.
    """
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(value, int):
            return value
    raise ValueError(
        f"the tokenizer in {tokenizer.name_or_path or '(memory)'} names neither a pad nor an EOS "
        "token: expected one of them; set pad_token or eos_token in its tokenizer_config.json"
    )


def stop_ids(
    tokenizer: PreTrainedTokenizerFast, generation_eos: int | Iterable[int] | None
) -> tuple[int, ...]:
    """Ids that end a response: EOS of the tokenizer and of the generation config, sorted.

    Raises:
      ValueError: neither declares one, so no response could ever end.
    """
    ids = set(_as_ids(generation_eos)) | set(_as_ids(tokenizer.eos_token_id))
    if not ids:
        raise ValueError(
            f"no EOS id for {tokenizer.name_or_path or '(memory)'}: expected eos_token in "
            "tokenizer_config.json or eos_token_id in generation_config.json; add one"
        )
    return tuple(sorted(ids))


def stop_set(
    student: PreTrainedTokenizerFast,
    student_eos: int | Iterable[int] | None,
    teacher: PreTrainedTokenizerFast,
    teacher_eos: int | Iterable[int] | None,
) -> tuple[tuple[int, ...], str | None]:
    """Union of both models' stop ids, and a message that says how they differ (None if they agree).

    A base student and an instruct teacher often end on different ids; sampling past the student's
    own EOS then inflates lengths, so the caller shows the message before the first step.

    Raises:
      ValueError: one of the models has no stop id at all.
    """
    ours, theirs = stop_ids(student, student_eos), stop_ids(teacher, teacher_eos)
    union = tuple(sorted({*ours, *theirs}))
    if ours == theirs:
        return union, None

    def show(tokenizer, ids):
        return ", ".join(f"{i} {token_text(tokenizer, i)!r}" for i in ids)

    return union, (
        f"student and teacher stop on different ids: student {show(student, ours)}; teacher "
        f"{show(teacher, theirs)}. A response ends at any of {show(teacher, union)}"
    )


def num_ids(tokenizer: PreTrainedTokenizerFast, rows: int, who: str) -> int:
    """Ids from 0 to the highest that the tokenizer has; rows past them are padding.

    Args:
      tokenizer: of a model.
      rows: of the model's embedding and head.
      who: the model, for the message.

    Raises:
      ValueError: the model has fewer rows than that.
    """
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if rows < size:
        raise ValueError(
            f"the {who} has {rows} output rows and its tokenizer {size} ids: expected at least "
            "one row per id; use the tokenizer that belongs to the model, or resize the model"
        )
    return size


def compare(
    student: PreTrainedTokenizerFast,
    teacher: PreTrainedTokenizerFast,
    student_rows: int,
    teacher_rows: int,
) -> int:
    """Number of real ids that both models share; rows past it are padding, to be masked.

    Vocabularies are compared id by id, added tokens included. ``*_rows`` are the rows of the output
    matrices: 151,936 and 152,064 rows over one tokenizer of 151,669 ids are fine.

    Raises:
      ValueError: a token differs, or a model has fewer rows than its tokenizer has ids.
    """
    names = []
    for who, tokenizer, rows in (
        ("student", student, student_rows),
        ("teacher", teacher, teacher_rows),
    ):
        by_id = {index: token for token, index in tokenizer.get_vocab().items()}
        size = num_ids(tokenizer, rows, who)
        names.append([by_id.get(i) for i in range(size)])
    ours, theirs = names
    if ours == theirs:
        return len(ours)
    shared = min(len(ours), len(theirs))
    first = next((i for i in range(shared) if ours[i] != theirs[i]), shared)

    def at(tokens):
        return repr(tokens[first]) if first < len(tokens) else "nothing"

    raise ValueError(
        f"student and teacher tokenizers differ: {len(ours)} and {len(theirs)} ids, first at id "
        f"{first}: student {at(ours)}, teacher {at(theirs)}. Expected the same token at every id; "
        "choose a student and a teacher of one family, or give both the same tokenizer files"
    )


def check_render(
    student: PreTrainedTokenizerFast,
    teacher: PreTrainedTokenizerFast,
    messages: Messages | str,
    *,
    now: str | None = None,
    **template_kwargs,
) -> None:
    """Check that both tokenizers render a prompt to the same ids.

    Raises:
      ValueError: they do not (both prompts and the first difference are shown), or one cannot.
    """
    both = []
    for who, tokenizer in (("student", student), ("teacher", teacher)):
        try:
            both.append(render(tokenizer, messages, now=now, **template_kwargs))
        except MemoryError:
            raise
        except Exception as error:  # a template may raise anything
            raise ValueError(f"the {who}'s tokenizer cannot render the prompt: {error}") from error
    ours, theirs = both
    if ours == theirs:
        return
    shared = min(len(ours), len(theirs))
    first = next((i for i in range(shared) if ours[i] != theirs[i]), shared)

    def at(tokenizer, ids):
        return (
            f"{ids[first]} {token_text(tokenizer, ids[first])!r}" if first < len(ids) else "the end"
        )

    raise ValueError(
        f"student and teacher render the same prompt to different ids ({len(ours)} and "
        f"{len(theirs)}), first at position {first}: student {at(student, ours)}, teacher "
        f"{at(teacher, theirs)}.\n--- student\n{student.decode(ours)}\n--- teacher\n"
        f"{teacher.decode(theirs)}\n---\nExpected equal ids; give both the same "
        "chat_template.jinja (usually the teacher's), or template arguments that make them agree"
    )


def token_text(tokenizer: PreTrainedTokenizerFast, token_id: int) -> str:
    """Printable text of one id for tables: whitespace visible, stray bytes as ``<0xE2>``."""
    token_id = int(token_id)
    token = tokenizer.convert_ids_to_tokens(token_id) if token_id >= 0 else None
    if not isinstance(token, str):
        return f"<unused {token_id}>"
    text = str(tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
    if "\ufffd" in text and "\ufffd" not in token:
        values = [_BYTE_OF.get(char) for char in token]
        return "".join(f"<0x{value:02X}>" for value in values if value is not None) or token
    if token.startswith("▁") and not text.startswith(" "):
        text = " " + text  # sentencepiece decoders drop the space in front of a text's first token
    return "".join(_VISIBLE.get(c) or (c if c.isprintable() else f"<U+{ord(c):04X}>") for c in text)


def _as_ids(eos) -> tuple[int, ...]:
    if eos is None:
        return ()
    return (int(eos),) if isinstance(eos, int) else tuple(int(i) for i in eos)


def _byte_table() -> dict[str, int]:
    """Character -> byte of GPT-2's byte-level BPE: unprintable ones are numbered from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(rest)}


_BYTE_OF = _byte_table()
