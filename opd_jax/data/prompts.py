"""Prompts, and prompts with completions: read from a file, checked and tokenised.

:mod:`rows` says which files are read, :mod:`fields` what a row may hold: a prompt or messages;
optionally ``answer`` for grading and a completion for off-policy training.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_jax import bounded, rules
from opd_jax.data import completions, privileged
from opd_jax.data import rows as files
from opd_jax.data import tokenizer as tokenizers
from opd_jax.data.fields import (
    COMPLETIONS,
    NAMES,
    PROMPTS,
    TEACHER,
    Answer,
    checked,
    like_answers,
    teacher_of,
    value_of,
)
from opd_jax.data.fields import Record as Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FRAME = "a text in which {NAME} is a column of the row and {{ a brace, or nothing"
TOO_LONG = ("drop", "left_truncate", "error")
# Rows whose ids are compared with the text beside them, and that both models' tokenizers render:
# what differs shows in the first few.
_SPELT = 64
_SHOWN = 100  # characters of a rendered prompt in a line


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """The prompts to train on and to evaluate on: group ``data``.

    A system prompt given here is put in front of messages that do not begin with one: a row's own
    stays as it is. A row of plain text becomes a chat by it, the text being the user's message.
    What the teacher may read in the place of the prompt is told in :mod:`privileged`.

    Raises:
      RuleError: a field is outside its range, or the buckets cannot hold the longest prompt.
    """

    prompts: str = ""  # JSON lines or array (or .gz), parquet, or a saved datasets folder
    heldout: str = ""  # the same, for evaluation; may be empty where eval.every is 0
    columns: tuple[
        tuple[str, str], ...
    ] = ()  # (our name, name in the file): ("prompt", "question")
    system: str = ""  # system prompt for rows without one; makes plain prompts a chat
    teacher_prompt: str = ""  # what the teacher reads: "{prompt} Hint: {answer}", any column in {}
    teacher_system: str = ""  # its system prompt, with columns in {}; empty: the student's
    max_prompt: int = 512  # most ids of a prompt
    max_teacher_prompt: int = 0  # most ids of the teacher's own prompt; 0: max_prompt
    too_long: str = "drop"  # drop, left_truncate or error
    buckets: tuple[int, ...] = ()  # padded prompt widths, each compiled once; (): by the prompts
    shuffle: bool = True  # a new order each epoch, by the seed; False: as in the file
    epochs: int = 0  # 0: as many as the steps need
    template: tuple[tuple[str, Any], ...] = ()  # chat template arguments, (name, value) pairs

    def __post_init__(self):
        rules.check(
            self,
            "data",
            ("too_long", self.too_long in TOO_LONG, f"one of {TOO_LONG}"),
            ("teacher_prompt", _is_frame(self.teacher_prompt), FRAME),
            ("teacher_system", _is_frame(self.teacher_system), FRAME),
            ("max_prompt", self.max_prompt >= 1, "at least 1"),
            ("max_teacher_prompt", self.max_teacher_prompt >= 0, "at least 0 (0: max_prompt)"),
            ("epochs", self.epochs >= 0, "at least 0 (0: as many as the steps need)"),
            ("columns", _are_columns(self.columns), f"pairs of one of {NAMES} and another name"),
            ("system", not self.system or bool(self.system.strip()), "a text, or nothing"),
            rules.widths("buckets", self.buckets, self.max_prompt),
        )

    @property
    def frames(self) -> privileged.Frames:
        """What the teacher reads in the place of the student's prompt; false: the same."""
        return privileged.Frames(self.teacher_prompt, self.teacher_system)

    @property
    def teacher_limit(self) -> int:
        """Most ids of the teacher's own prompt."""
        return self.max_teacher_prompt or self.max_prompt


def _is_frame(text: str) -> bool:
    try:
        return bool(privileged.Frames(text)) or not text
    except ValueError:
        return False


def _are_columns(pairs: Sequence[Sequence[str]]) -> bool:
    """Whether each of our names is mapped once, prompts by one of them."""
    names = [pair[0] for pair in pairs if len(pair) == 2 and isinstance(pair[1], str) and pair[1]]
    is_known = {*names} <= {*NAMES} and len({*names}) == len(pairs)
    return is_known and len({*names} & {*PROMPTS}) <= 1


@dataclasses.dataclass(frozen=True)
class Example:
    """One tokenised prompt."""

    ids: tuple[int, ...]
    answer: Answer | None
    text: str  # the prompt as the model sees it, decoded
    index: int  # line in the file, from 0: the same whatever was dropped
    completion: tuple[int, ...] = ()  # ids to imitate; empty for plain prompts
    is_whole: bool = True  # a stop id is their last
    teacher_ids: tuple[int, ...] = ()  # of the prompt that the teacher reads; (): the same
    taught_by: str = ""  # name of its teacher, where there are several


@dataclasses.dataclass(frozen=True)
class Counts:
    """What became of the lines of a file; for the log."""

    kept: int = 0
    dropped: int = 0
    truncated: int = 0
    cut: int = 0

    def __str__(self) -> str:
        told = {
            "left-truncated": self.truncated,
            "dropped as too long": self.dropped,
            "with a completion that its length cuts": self.cut,
        }
        rest = "".join(f", {number} {what}" for what, number in told.items() if number)
        return f"{self.kept} prompts kept{rest}"


def read(
    path: str | Path,
    spec: DataSpec | None = None,
    *,
    has_completions: bool = False,
    teachers: Sequence[str] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Record]:
    """Read and check every row of a file of prompts.

    Args:
      path: of a format that :mod:`rows` reads.
      spec: how its columns are named, and the system prompt; default: as they are, none.
      has_completions: whether columns that are named for completions must be there.
      teachers: names of several teachers, of which each row has one; (): one, and no row names any;
        None: nobody asks.
      say: receives what was read, and which columns look like answers and are not used.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a row is not what :mod:`fields` says (named as file:line), or none is.
      ImportError: the library that reads the format is missing.
    """
    spec = spec or DataSpec()
    path, columns = Path(path), dict(spec.columns)
    table = files.read(path)
    found, used, unused = [], set(), set()
    names = [name for name in NAMES if name != TEACHER or teachers]
    for number, row in table.rows:
        try:
            record = checked(row, number, columns, spec.system)
            if spec.frames:
                own = privileged.prompt_of(row, record, spec.frames, columns, spec.system)
                record = dataclasses.replace(record, teacher=own)
            if teachers is not None and (name := teacher_of(row, columns, teachers)):
                record = dataclasses.replace(record, taught_by=name)
            found.append(record)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        used |= {n for n in names if value_of(row, columns.get(n, n)) is not None}
        unused |= like_answers(row)
    if not found:
        raise ValueError(f"{path} has no rows: expected at least one; give another file")
    optional = {TEACHER} if has_completions else {TEACHER, *COMPLETIONS}
    if isinstance(found[0].prompt, tuple):  # of opd-jax generate, beside a file with other names
        optional |= {*PROMPTS, "answer"}
    if missing := {*columns} - used - optional:
        name = min(missing)
        raise ValueError(
            f"{path}: no row has {columns[name]!r}, which data.columns names as {name}: expected "
            f"it in some; correct --config.data.columns.{name}"
        )
    if say:
        told = " and ".join(f"`{columns.get(n, n)}`" for n in names if n in used)
        say(f"read {path}: {table.kind}, {len(found)} rows with {told}")
        left = sorted(unused - {columns.get(name, name) for name in used})
        if left:
            say(
                f"{path}: {', '.join(left)} may hold answers and {_are(left)} not used; to grade "
                f"by one: --config.data.columns.answer={left[0]}"
            )
    return found


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def examples(
    path: str | Path,
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerFast,
    *,
    limits: completions.Limits | None = None,
    others: Sequence[PreTrainedTokenizerFast] = (),
    teachers: Sequence[str] | None = None,
    now: str | None = None,
    say: Callable[[str], None] | None = None,
) -> tuple[list[Example], Counts]:
    """Read and tokenise the prompts, once, and count what the length limit did to them.

    Args:
      path: file of prompts; ``spec.prompts`` or ``spec.heldout`` in a run.
      spec: how long a prompt may be, and how it is rendered.
      tokenizer: renders.
      limits: of the completions; None: there need not be any, and they are not read.
      others: those of the teachers, which must render the first prompts to the same ids.
      teachers: as in :func:`read`.
      now: the date that a chat template writes, as ``files.TIME``; None: today.
      say: receives what was read, and the first prompt as each model sees it.

    Raises:
      FileNotFoundError, ValueError: as :func:`read`; a prompt that cannot be rendered; a prompt
        over the limit where ``spec.too_long`` is "error"; no prompt left; ids that the tokenizer
        does not have, or of another text than beside them; no completion where there must be one.
    """
    told: list[str] = []
    records = read(
        path, spec, has_completions=limits is not None, teachers=teachers, say=told.append
    )
    found, counts = _tokenise(Path(path), records, spec, (tokenizer, others), now, limits)
    if say:
        first = found[0]
        say(f"{told[0]}; the first as the model sees it, {len(first.ids)} ids: {_cut(first.text)}")
        if first.teacher_ids:
            own = str(tokenizer.decode(first.teacher_ids, clean_up_tokenization_spaces=False))
            say(f"and as the teacher sees it, {len(first.teacher_ids)} ids: {_cut(own)}")
        for line in told[1:]:
            say(line)
    return found, counts


def _cut(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}...")


def digest(rows: Sequence[Example], *, has_completions: bool = True) -> str:
    """Fingerprint of the tokenised data, so that a resumed run can tell that it changed.

    Without completions it is that of the student's prompts, the same whether they are answered or
    not, and whatever a teacher reads.
    """
    state = hashlib.sha256()
    for row in rows:
        completion = row.completion if has_completions else ()
        state.update(repr((row.ids, row.answer, row.index, completion)).encode())
        if has_completions and row.teacher_ids:
            state.update(repr(row.teacher_ids).encode())
        if has_completions and row.taught_by:
            state.update(repr(row.taught_by).encode())
    return state.hexdigest()[:16]


def _tokenise(
    path: Path, records: Sequence[Record], spec: DataSpec, both, now, limits
) -> tuple[list[Example], Counts]:
    """Tokenise all records, each within bounds: a template or a pattern may never end."""

    def work(begin: Callable[[str], None]) -> tuple[list[Example], Counts]:
        return _tokenise_all(path, records, spec, both, now, limits, begin)

    return bounded.run(work, change="mend the chat template or the tokenizer, or drop the line")


def _tokenise_all(
    path, records: Sequence[Record], spec, both, now, limits, begin
) -> tuple[list[Example], Counts]:
    tokenizer, others = both
    kept, tally = [], {"dropped": 0, "truncated": 0, "cut": 0}
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    for number, record in enumerate(records):
        where = f"{path}:{record.line}"
        begin(f"{where}: rendering and tokenising the prompt")
        try:
            _check_ids(record, size)
            if number < _SPELT:
                completions.check_spelling(record, tokenizer)
            for other in others if number < _SPELT else ():
                _check_rendering(record, spec, (tokenizer, other), now)
            ids = prompt_ids(record.prompt, spec, tokenizer, now)
            own: list[int] = []
            if record.teacher is not None:
                begin(f"{where}: rendering and tokenising the teacher's prompt")
                own = prompt_ids(record.teacher, spec, tokenizer, now)
            response, is_whole = (), True
            if limits is not None:
                begin(f"{where}: tokenising the completion")
                end_id = completions.end_id(record, tokenizer, limits.stop_ids, now, spec.template)
                response, is_whole = completions.ids_of(
                    record, ids, tokenizer, limits, end_id, now=now, template=spec.template
                )
        except MemoryError:
            raise
        except Exception as error:  # a chat template may raise anything
            raise ValueError(f"{where}: {error}") from error
        is_long = len(ids) > spec.max_prompt
        if is_long or len(own) > spec.teacher_limit:
            if spec.too_long == "error":
                whose, length, key, limit = "the", len(ids), "max_prompt", spec.max_prompt
                if not is_long:
                    whose, length, limit = "the teacher's", len(own), spec.teacher_limit
                    key = "max_teacher_prompt" if spec.max_teacher_prompt else key
                raise ValueError(
                    f"{where}: {whose} prompt has {length} ids and {key} is {limit}: expected no "
                    f"longer one; raise {key}, or set too_long to 'drop' or 'left_truncate'"
                )
            if spec.too_long == "drop":
                tally["dropped"] += 1
                continue
            tally["truncated"] += 1
            ids, own = ids[-spec.max_prompt :], own[-spec.teacher_limit :]
        tally["cut"] += not is_whole
        text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        row = Example(tuple(ids), record.answer, text, record.line - 1, response, is_whole)
        more = {"teacher_ids": tuple(own), "taught_by": record.taught_by}
        kept.append(dataclasses.replace(row, **more) if any(more.values()) else row)
    counts = Counts(kept=len(kept), **tally)
    if not kept:
        raise ValueError(
            f"{path}: {counts}: expected at least one to be left; raise max_prompt "
            f"({spec.max_prompt} ids now), or set too_long to 'left_truncate'"
        )
    return kept, counts


def prompt_ids(prompt: Any, spec: DataSpec, tokenizer, now: str | None) -> list[int]:
    """A prompt of a row as ids, rendered where it is not ids already.

    Raises:
      ValueError: it cannot be rendered.
    """
    if isinstance(prompt, tuple):
        return list(prompt)
    return tokenizers.render(tokenizer, prompt, now=now, **dict(spec.template))


def _check_rendering(record: Record, spec: DataSpec, both, now: str | None) -> None:
    for prompt in (record.prompt, record.teacher):
        if prompt is not None and not isinstance(prompt, tuple):  # ids both take as they are
            tokenizers.check_render(both[0], both[1], prompt, now=now, **dict(spec.template))


def _check_ids(record: Record, size: int) -> None:
    given = {"prompt_ids": record.prompt, "completion_ids": record.completion_ids}
    given |= {"the teacher's prompt": record.teacher}
    for name, ids in given.items():
        largest = max(ids, default=0) if isinstance(ids, tuple) else 0
        if largest >= size:
            raise ValueError(
                f"{name} has the id {largest}: expected ids below {size}, which is all that the "
                "tokenizer has; give ids of its vocabulary"
            )
