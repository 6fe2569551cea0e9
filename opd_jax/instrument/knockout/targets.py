"""Which tokens are knocked out: a table of types, a file of named lists, or ids.

=================  ===========================================================================
``types.csv``      what ``opd-jax rocks`` writes: the ids of ``token_id`` in the order of the
                   table; ``token`` is compared with the model's tokenizer where it is there, and
                   further columns are taken from what stands beside it (``predictors.py``)
``lists.json``     an object of lists by name, each of ids or of texts of tokens; or what
                   ``opd-jax rocks`` writes, whose ids stand beside it in ``NAME.json``
``ids.json``       a list of ids (or texts)
``19,22,30``       ids
=================  ===========================================================================

A text means every id whose text it is, with and without a space before it.
"""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_jax import records
from opd_jax.data import tokenizer as tokenizers
from opd_jax.files import path_of
from opd_jax.instrument.knockout import predictors
from opd_jax.instrument.knockout.request import PAPER, KnockoutError

_CHANGE = "give --types (or --groups) a types.csv, a file of lists, or ids"
_MAX_BYTES = 1 << 30
# The published sets of words (arXiv 2605.09253, code of its knockout); their other nine groups
# follow from the census itself: arms.py.
WORDS: Mapping[str, tuple[str, ...]] = {
    "code_tech": ("Python", "Algorithm", "Regular", "Initialize", "maps"),
    "domain": (
        *("mathematics", "transportation", "educational", "financial", "local", "physical"),
        "state",
    ),
    "discourse": ("Important", "especially", "just", "allows"),
    "abstract": ("understanding", "issues", "movement", "situation"),
    "modifiers": ("little", "detailed", "direct", "advanced", "outer", "clean"),
}


@dataclasses.dataclass(frozen=True)
class Targets:
    """What is knocked out.

    Attributes:
      ids: types one by one, in their order.
      groups: ids by name.
      missing: words of the published groups that are no token of this tokenizer.
      table: columns of the table of types by name, each with a value (or None) per id; empty where
        types came from no table.
    """

    ids: tuple[int, ...]
    groups: Mapping[str, tuple[int, ...]]
    missing: tuple[str, ...] = ()
    table: Mapping[str, tuple[float | None, ...]] = dataclasses.field(default_factory=dict)


def read(types: str, groups: str, tokenizer: Any, num_ids: int) -> Targets:
    """Read what is to be knocked out.

    Args:
      types: see the module.
      groups: a file of lists, ``paper``, or empty.
      tokenizer: of the model.
      num_ids: its real ids.

    Raises:
      KnockoutError: a file that is none of these, an arm without tokens, ids outside the
        vocabulary, or the table of another tokenizer.
      OSError: a file that cannot be read.
    """
    words = _Words(tokenizer, num_ids)
    table: dict[str, tuple[float | None, ...]] = {}
    lists: dict[str, tuple[int, ...]] = {}
    if re.fullmatch(r"\s*-?\d+\s*(,\s*-?\d+\s*)*", types):
        ids = words.ids("--types", [int(part) for part in types.split(",")])
    else:
        path = _file(types, "--types")
        if path.suffix.lower() == ".csv":
            ids, table = _table(path, words)
            table = predictors.beside(path, ids) | table
        else:
            lists = _lists(path, words)
            ids = tuple(dict.fromkeys(i for some in lists.values() for i in some))
            ids = lists.get("rock", ids)
            if list(lists) == [""]:
                lists = {}
    missing: tuple[str, ...] = ()
    if groups == PAPER:
        lists, missing = _paper(words)
    elif groups:
        lists = _lists(_file(groups, "--groups"), words)
    return Targets(ids, lists, missing, table)


def _file(name: str, flag: str) -> Path:
    path = Path(path_of(name))
    if not path.is_file():
        raise FileNotFoundError(
            f"{flag}={name} is no file and no list of ids: expected one; {_CHANGE}"
        )
    records.regular(path, _MAX_BYTES)
    return path


class _Words:
    """Ids of a tokenizer, checked."""

    def __init__(self, tokenizer: Any, num_ids: int):
        self._tokenizer, self._num_ids = tokenizer, num_ids

    def ids(self, where: str, found: Sequence[Any]) -> tuple[int, ...]:
        """Ids of a list of ids and texts, each once, in their order."""
        ids: list[int] = []
        for value in found:
            if isinstance(value, str):
                own = self.of_text(value)
                if not own:
                    raise KnockoutError(
                        f"{where} has {value!r}, which is not one token of the model: expected "
                        "single tokens; take it out, or give ids"
                    )
                ids += own
            elif isinstance(value, int) and not isinstance(value, bool):
                if not 0 <= value < self._num_ids:
                    raise KnockoutError(
                        f"{where} has id {value}: expected 0 to {self._num_ids - 1}, the "
                        "vocabulary of the model; give types of its tokenizer"
                    )
                ids.append(value)
            else:
                raise KnockoutError(f"{where} has {value!r}: expected ids or texts; {_CHANGE}")
        if not ids:
            raise KnockoutError(f"{where} has no tokens: expected at least one; fill it")
        return tuple(dict.fromkeys(ids))

    def of_text(self, text: str) -> list[int]:
        """Ids of a text that is one token, with and without a space before it."""
        found = []
        for spelt in (text, f" {text}") if text else ():
            ids = self._tokenizer.encode(spelt, add_special_tokens=False)
            if len(ids) == 1 and self._tokenizer.decode(ids) == spelt:
                found += ids
        return found

    def text(self, token_id: int) -> str:
        return tokenizers.token_text(self._tokenizer, token_id)


def _table(
    path: Path, words: _Words
) -> tuple[tuple[int, ...], dict[str, tuple[float | None, ...]]]:
    """Ids of a table of types, and its columns of numbers."""
    try:
        # A spreadsheet puts a mark before the first name.
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            rows, names = list(reader), list(reader.fieldnames or ())
    except (UnicodeDecodeError, csv.Error) as error:
        raise KnockoutError(f"{path} is no table ({error}): expected one; {_CHANGE}") from error
    if "token_id" not in names or not rows:
        raise KnockoutError(
            f"{path} has columns {', '.join(names) or 'none'} and {len(rows)} rows: expected "
            "token_id among them and a row per type; give the types.csv of opd-jax rocks"
        )
    if long := next((n for n, row in enumerate(rows, 2) if None in row), None):
        raise KnockoutError(
            f"{path}, row {long}, has more cells than the {len(names)} columns: expected one a "
            "column; put texts that hold a comma between quotes"
        )
    try:
        given = [int(row["token_id"]) for row in rows]
    except (TypeError, ValueError) as error:
        raise KnockoutError(f"{path}: {error}: expected ids in token_id; mend it") from error
    ids = words.ids(str(path), given)
    if len(ids) < len(given):
        raise KnockoutError(f"{path} has an id twice: expected a row per type; mend it")
    for token_id, row in zip(ids, rows, strict=True):
        told = row.get("token")
        if told is not None and told != words.text(token_id):
            raise KnockoutError(
                f"{path} has token {told!r} at id {token_id}, the model has "
                f"{words.text(token_id)!r} there: expected types of the model's tokenizer; give "
                "those of this model"
            )
    columns = {}
    for name in names:
        values = [_number(row[name]) for row in rows]
        if any(value is not None for value in values):
            columns[name] = tuple(values)
    return ids, columns


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None


def _lists(path: Path, words: _Words) -> dict[str, tuple[int, ...]]:
    """Lists of a file by name; one list alone has the empty name."""
    found = records.read(path, Any, change=_CHANGE)
    if isinstance(found, list):
        return {"": words.ids(str(path), found)}
    if not isinstance(found, dict) or not found:
        raise KnockoutError(
            f"{path} holds {type(found).__name__}: expected lists of ids by name; {_CHANGE}"
        )
    lists = {}
    for name, value in found.items():
        where = f"{path}, list {name!r},"
        if isinstance(value, dict):
            beside = path.with_name(f"{name}.json")
            if Path(name).name != name or not beside.is_file():
                raise KnockoutError(
                    f"{where} is described and not there: expected its ids in {beside}; put that "
                    "file back, or write the ids in its place"
                )
            value = records.read(beside, list[Any], change=_CHANGE)
            if not value:  # the control of all other types may be empty
                continue
        if not isinstance(value, list):
            raise KnockoutError(f"{where} is {value!r}: expected a list; {_CHANGE}")
        lists[name] = words.ids(where, value)
    return lists


def _paper(words: _Words) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
    """The published sets of words as far as they are tokens, and the words that are not."""
    groups, missing = {}, []
    for name, texts in WORDS.items():
        ids = []
        for text in texts:
            own = words.of_text(text)
            ids += own
            missing += [] if own else [text]
        if ids:
            groups[name] = tuple(dict.fromkeys(ids))
    return groups, tuple(missing)
