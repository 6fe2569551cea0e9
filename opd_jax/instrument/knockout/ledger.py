"""The folder of a knockout: what it is of, every answer as it comes, and what a kill leaves of it.

=================  ==========================================================================
``knockout.json``  model, tasks, types and settings: what a resumed knockout must share
``answers.jsonl``  one line per answer, in the order of the work, written as they come
``census.csv``     one line per type that was banned alone, with its control types
``summary.json``   all arms, corrections and checks; there once all is done
=================  ==========================================================================
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NotRequired, TypeVar

import pydantic
from typing_extensions import TypedDict

from opd_jax import files, processes, records
from opd_jax.evaluate import growth, results
from opd_jax.instrument.knockout.request import KnockoutError

RECORD, LINES, CENSUS, SUMMARY = "knockout.json", "answers.jsonl", "census.csv", "summary.json"
_CHANGE = "put back a copy, or give another --out"


@pydantic.with_config(records.OPEN)
class Line(TypedDict):
    """A line of ``answers.jsonl``: an answer of the baseline, or of an arm.

    An arm's answer is the baseline's up to ``start`` (without it); ``ids`` are those from there on.
    """

    arm: str
    task: str
    index: int  # of the problem: its line in the task, from 0
    sample: int
    start: int
    ids: list[int]
    correct: bool
    reason: str
    found: str | None
    tokens: int
    truncated: bool
    response: NotRequired[str]  # of the baseline
    gold: NotRequired[str]


T = TypeVar("T")
Key = tuple[str, str, int, int]  # arm, task, index, sample


def key_of(line: Line) -> Key:
    """What names a line."""
    return line["arm"], line["task"], line["index"], line["sample"]


def load_record(folder: Path) -> results.EvalRecord | None:
    """What the knockout in a folder is of; None where there is none.

    Raises:
      KnockoutError: it cannot be read.
    """
    try:
        return records.read(folder / RECORD, results.EvalRecord, change=_CHANGE)
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise KnockoutError(
            f"{folder} is, or lies below, a file: expected a folder; give another --out"
        ) from error
    except records.RecordError as error:
        raise KnockoutError(str(error)) from error


class Ledger:
    """The answers that are there already, in order, and the file that the others go to.

    Use it as a context: it is this process's alone meanwhile, of several process 0's.

    Args:
      folder: new, empty, or of the same knockout.
      record: what is to be done: ``model``, ``files``, ``tasks``, ``settings``, ``time``.

    Raises:
      KnockoutError: it holds something else, or another knockout.
      FileExistsError: another process writes it.
    """

    def __init__(self, folder: Path, record: results.EvalRecord):
        self.folder = folder
        processes.on_first(lambda: self._enter(record))
        self._lines = list(self._read())
        self._taken = 0
        self._is_cut = False  # what a kill left of a batch is gone

    def __enter__(self) -> Ledger:
        self._writing = growth.Writing(self.folder, LINES)
        self._stream = self._writing.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._writing.__exit__(*error)

    @property
    def done(self) -> int:
        """Answers that are there already."""
        return len(self._lines)

    def take(self, keys: Sequence[Key]) -> list[Line] | None:
        """The next answers, if all of them are there; else what is left of them is cut off.

        Raises:
          KnockoutError: others stand in their place.
        """
        found = self._lines[self._taken : self._taken + len(keys)]
        for place, (line, key) in enumerate(zip(found, keys, strict=False), self._taken + 1):
            if key_of(line) != key:
                raise KnockoutError(
                    f"{self.folder / LINES} line {place} is {key_of(line)}: expected {key}; "
                    f"{_CHANGE}"
                )
        if len(found) == len(keys):
            self._taken += len(keys)
            return found
        if not self._is_cut:
            del self._lines[self._taken :]
            if self._stream is not None:
                files.cut(self.folder / LINES, self._taken)
            self._is_cut = True
        return None

    def missing(self, calls: Sequence[Sequence[T]]) -> list[Sequence[T]]:
        """Those calls, of the next ones, that are not there as a whole."""
        left, place = len(self._lines) - self._taken, 0
        while place < len(calls) and len(calls[place]) <= left:
            left -= len(calls[place])
            place += 1
        return list(calls[place:])

    def put(self, lines: Sequence[Line]) -> None:
        """Write further answers."""
        if self._stream is not None:
            files.append(self._stream, lines)
        self._lines += lines
        self._taken += len(lines)

    def write(self, name: str, text: str) -> None:
        """Write another file of the folder, whole or not at all, on process 0."""
        processes.on_first(lambda: files.write_atomic(self.folder / name, text))

    def _enter(self, record: results.EvalRecord) -> None:
        old = load_record(self.folder)
        if old is None:
            with contextlib.suppress(FileNotFoundError):
                there = sorted(set(os.listdir(self.folder)) - {files.LOCK})
                if there:
                    raise KnockoutError(
                        f"{self.folder} holds {there[0]!r} and no {RECORD}: expected a new folder, "
                        "or that of the same knockout; give another --out"
                    )
            with files.only_writer(self.folder):
                files.write_atomic(self.folder / RECORD, json.dumps(record, indent=1) + "\n")
        elif told := results.differences(old, record):
            raise KnockoutError(
                f"{self.folder} holds another knockout: {'; '.join(told[:4])}: expected the same "
                "model, tasks, types and settings; give another --out, or the old ones"
            )

    def _read(self):
        try:
            yield from records.lines(self.folder / LINES, Line, change=_CHANGE)
        except FileNotFoundError:
            return
        except records.RecordError as error:
            raise KnockoutError(str(error)) from error
