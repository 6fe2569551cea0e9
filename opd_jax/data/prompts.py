"""Prompts, and prompts with completions, from JSON lines: read, checked, tokenised, batched.

One object a line: ``messages`` (a list of ``{"role", "content"}``) or ``prompt`` (a string), and
only one of them; optionally ``answer`` for grading and ``completion`` for off-policy training.
Batches come from grain, whose iterator state is a part of a checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_jax import bounded, rules
from opd_jax.data import tokenizer as tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOO_LONG = ("drop", "left_truncate", "error")


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """The prompts to train on and to evaluate on: group ``data``.

    Raises:
      RuleError: a field is outside its range, or the buckets cannot hold the longest prompt.
    """

    prompts: str = ""  # JSONL with messages or prompt, optional answer
    heldout: str = ""  # the same, for evaluation; may be empty where eval.every is 0
    max_prompt: int = 512  # ids
    too_long: str = "drop"  # drop, left_truncate or error
    buckets: tuple[int, ...] = ()  # padded prompt widths, each compiled once; (): (max_prompt,)
    shuffle: bool = True
    epochs: int = 0  # 0: as many as the steps need
    template: tuple[tuple[str, Any], ...] = ()  # chat template arguments, (name, value) pairs

    def __post_init__(self):
        rules.check(
            self,
            "data",
            ("too_long", self.too_long in TOO_LONG, f"one of {TOO_LONG}"),
            ("max_prompt", self.max_prompt >= 1, "at least 1"),
            ("epochs", self.epochs >= 0, "at least 0 (0: as many as the steps need)"),
            rules.widths("buckets", self.buckets, self.max_prompt),
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """Padded prompt widths in use."""
        return self.buckets or (self.max_prompt,)


@dataclasses.dataclass(frozen=True)
class Record:
    """One checked line of a prompt file."""

    prompt: str | list[dict[str, Any]]  # plain text, or chat messages
    answer: str | None
    completion: str | None
    line: int  # from 1


@dataclasses.dataclass(frozen=True)
class Example:
    """One tokenised prompt."""

    ids: tuple[int, ...]
    answer: str | None
    text: str  # the prompt as the model sees it, decoded
    index: int  # line in the file, from 0: the same whatever was dropped
    completion: tuple[int, ...] = ()  # ids to imitate, EOS last; empty for plain prompts


@dataclasses.dataclass(frozen=True)
class Counts:
    """What became of the lines of a file; for the log."""

    kept: int = 0
    dropped: int = 0
    truncated: int = 0
    dropped_completions: int = 0

    def __str__(self) -> str:
        return (
            f"{self.kept} prompts kept ({self.truncated} of them left-truncated), {self.dropped} "
            f"dropped as too long, {self.dropped_completions} dropped for a too long completion"
        )


def read(path: str | Path) -> list[Record]:
    """Read and check every line of a JSON-lines file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line is not what the module's docstring says (named as file:line), or none is.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"prompt file {path} does not exist: expected a file with one JSON object a line; "
            "set the path of the prompts"
        )
    lines = path.read_bytes().rstrip().split(b"\n")
    if lines == [b""]:
        raise ValueError(
            f"prompt file {path} is empty: expected at least one JSON object a line; fill it"
        )
    records = []
    for number, raw in enumerate(lines, start=1):
        try:
            records.append(_record(raw, number))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    return records


def examples(
    path: str | Path,
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerFast,
    *,
    now: str | None = None,
) -> tuple[list[Example], Counts]:
    """Read and tokenise the prompts, once, and count what the length limit did to them.

    Args:
      path: JSON lines; ``spec.prompts`` or ``spec.heldout`` in a run.
      spec: how long a prompt may be, and how it is rendered.
      tokenizer: renders.
      now: the date that a chat template writes, as ``files.TIME``; None: today.

    Raises:
      FileNotFoundError, ValueError: as :func:`read`; a prompt that cannot be rendered; a prompt
        over the limit where ``spec.too_long`` is "error"; no prompt left.
    """
    return _tokenise(Path(path), spec, tokenizer, now, completion=None)


def completions(
    path: str | Path,
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_new: int,
    eos_id: int | None = None,
    too_long: str = "drop",
    now: str | None = None,
) -> tuple[list[Example], Counts]:
    """Read and tokenise prompts with their ``completion``, EOS appended, for off-policy training.

    Args:
      path, spec, tokenizer, now: as of :func:`examples`.
      max_new: most completion ids, EOS included.
      eos_id: the id that ends a completion; None for the tokenizer's own.
      too_long: "drop" (counted) or "error", for completions over ``max_new``.

    Raises:
      FileNotFoundError, ValueError: as :func:`examples`, and for a line without a completion.
    """
    if too_long not in ("drop", "error") or max_new < 1:
        raise ValueError(
            f"completions got too_long {too_long!r} and max_new {max_new}: expected 'drop' or "
            "'error' and at least 1; change them"
        )
    end = tokenizer.eos_token_id if eos_id is None else eos_id
    if not isinstance(end, int):
        raise ValueError(
            f"the EOS id is {end!r}: expected one id to end completions with; set eos_token in "
            "tokenizer_config.json, or pass eos_id"
        )
    return _tokenise(Path(path), spec, tokenizer, now, completion=(max_new, end, too_long))


def digest(rows: Sequence[Example]) -> str:
    """Fingerprint of the tokenised data, so that a resumed run can tell that it changed."""
    state = hashlib.sha256()
    for row in rows:
        state.update(repr((row.ids, row.answer, row.index, row.completion)).encode())
    return state.hexdigest()[:16]


def _tokenise(
    path: Path, spec: DataSpec, tokenizer, now, *, completion
) -> tuple[list[Example], Counts]:
    """Tokenise all records, each within bounds: a template or a pattern may never end."""
    records = read(path)

    def work(begin: Callable[[str], None]) -> tuple[list[Example], Counts]:
        return _tokenise_all(path, records, spec, tokenizer, now, completion, begin)

    return bounded.run(work, change="mend the chat template or the tokenizer, or drop the line")


def _tokenise_all(
    path, records, spec, tokenizer, now, completion, begin
) -> tuple[list[Example], Counts]:
    kept, tally = [], {"dropped": 0, "truncated": 0, "dropped_completions": 0}
    arguments = dict(spec.template)
    for record in records:
        where = f"{path}:{record.line}"
        begin(f"{where}: rendering and tokenising the prompt")
        try:
            ids = tokenizers.render(tokenizer, record.prompt, now=now, **arguments)
        except MemoryError:
            raise
        except Exception as error:  # a chat template may raise anything
            raise ValueError(f"{where}: {error}") from error
        response = ()
        if completion is not None:
            response = _response(record, where, tokenizer, completion)
            if response is None:
                tally["dropped_completions"] += 1
                continue
        if len(ids) > spec.max_prompt:
            if spec.too_long == "error":
                raise ValueError(
                    f"{where}: the prompt has {len(ids)} ids and max_prompt is {spec.max_prompt}: "
                    "expected no longer one; raise max_prompt, or set too_long to 'drop' or "
                    "'left_truncate'"
                )
            if spec.too_long == "drop":
                tally["dropped"] += 1
                continue
            tally["truncated"] += 1
            ids = ids[-spec.max_prompt :]
        text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        kept.append(Example(tuple(ids), record.answer, text, record.line - 1, response))
    counts = Counts(kept=len(kept), **tally)
    if not kept:
        raise ValueError(
            f"{path}: {counts}: expected at least one to be left; raise max_prompt "
            f"({spec.max_prompt} ids now) or the completion limit, or set too_long to "
            "'left_truncate'"
        )
    return kept, counts


def _response(record, where, tokenizer, completion) -> tuple[int, ...] | None:
    """Completion ids with EOS last; None when it is too long and to be dropped."""
    max_new, eos_id, too_long = completion
    if record.completion is None:
        raise ValueError(f"{where}: no `completion`: expected a string on every line; add it")
    ids = tokenizer.encode(record.completion, add_special_tokens=False)
    if ids[-1:] != [eos_id]:
        ids = [*ids, eos_id]
    if len(ids) <= max_new:
        return tuple(ids)
    if too_long == "error":
        raise ValueError(
            f"{where}: the completion has {len(ids)} ids with EOS and max_new is {max_new}: "
            "expected no longer one; raise max_new, or set too_long to 'drop'"
        )
    return None


def _record(raw: bytes, line: int) -> Record:
    """Check one line; errors say what was found, what was expected and what to change."""
    try:
        text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8: save the file as UTF-8") from error
    if not text.strip():
        raise ValueError("the line is empty: expected a JSON object; remove the line")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error}): expected one object a line; mend it") from error
    if not isinstance(value, Mapping):
        raise ValueError(f"found {_kind(value)}: expected a JSON object; write {{...}}")
    present = [name for name in ("messages", "prompt") if value.get(name) is not None]
    if len(present) != 1:
        raise ValueError(
            f"found {' and '.join(f'`{name}`' for name in present) or 'neither'} among keys "
            f"{sorted(value)}: expected exactly one of `messages` and `prompt`; keep one"
        )
    if present == ["prompt"]:
        prompt: Any = _text(value["prompt"], "`prompt`")
    else:
        prompt = _messages(value["messages"])
    answer = value.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    answer = None if answer is None else _text(answer, "`answer`")
    completion = value.get("completion")
    completion = None if completion is None else _text(completion, "`completion`")
    return Record(prompt, answer, completion, line)


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"`messages` is {_kind(value)}: expected a list of at least one "
            '{"role", "content"}; write one'
        )
    for index, message in enumerate(value):
        name = f"`messages[{index}]`"
        if not isinstance(message, Mapping):
            raise ValueError(
                f'{name} is {_kind(message)}: expected {{"role", "content"}}; write it'
            )
        _text(message.get("role"), f"{name} role")
        _text(message.get("content"), f"{name} content")
    if value[-1]["role"] == "assistant":
        raise ValueError(
            "the last of `messages` is the assistant's: expected the turn to answer; move that "
            "reply to `completion`"
        )
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is {_kind(value)}: expected a string with text in it; fill it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half a surrogate pair: expected text; mend it") from error
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, str):
        return f"the string {value[:40]!r}"
    names = {dict: "an object", list: "a list", bool: "a boolean", int: "a number"}
    kind = names.get(type(value), "a number")
    return f"an empty {kind.split()[-1]}" if value in ([], {}) else kind
