"""Files of answers that grow batch by batch: who writes them, and how fast they grow."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from opd_jax import files, processes

_QUIET_S, _QUICK_S = 600.0, 2.0  # at most and at least between lines of progress


class Writing:
    """A file in a folder, open to append on process 0, its only writer; None on the others."""

    def __init__(self, folder: Path, name: str):
        self._folder, self._name = folder, name

    def __enter__(self):
        self._stream = None
        if jax.process_index() == 0:
            self._lock = files.only_writer(self._folder)
            self._lock.__enter__()
            self._stream = (self._folder / self._name).open("a", encoding="utf-8")
        return self._stream

    def __exit__(self, *error) -> None:
        if self._stream is not None:
            self._stream.close()
            self._lock.__exit__(*error)


class Progress:
    """Says how far a job is, how good, how fast, and how long it will take.

    On a terminal one line keeps up; elsewhere there is a line per tenth of the job, unless tenths
    pass within seconds, and one after ten minutes without.

    Args:
      what: that is done, in the plural.
      total: of them, in all.
      done: of them, by an earlier process.
      say: receives the lines.
      clock: seconds.
    """

    def __init__(
        self,
        what: str,
        total: int,
        done: int,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.what, self.total, self.done, self.say, self._clock = what, total, done, say, clock
        self.fresh = self.tokens = self.right = self.graded = 0
        self._began = self._said = clock()
        self._tenth = self._tenths()
        self._first: tuple[float, int] | None = None  # end of the first part, which compiles

    def add(self, number: int, lines: Sequence[Mapping[str, Any]], where: str = "") -> None:
        """Note that ``number`` more are done, by answers with ``tokens`` and ``correct``."""
        self.done += number
        self.fresh += number
        self.tokens += sum(line["tokens"] for line in lines)
        verdicts = [line["correct"] for line in lines if "correct" in line]
        self.right += sum(verdicts)
        self.graded += len(verdicts)
        if isinstance(self.say, processes.Printer) and self.say.is_live:
            self.say.passing(self._line(where))
        # The last line of all is left to tell().
        elif self.done < self.total and (
            (self._tenths() > self._tenth and self._clock() - self._said >= _QUICK_S)
            or self._clock() - self._said > _QUIET_S
        ):
            self.tell(where)
        self._first = self._first or (self._clock(), self.fresh)

    def tell(self, where: str = "") -> None:
        """Say how it stands, to stay."""
        self._said, self._tenth = self._clock(), self._tenths()
        self.say(self._line(where))

    def _tenths(self) -> int:
        return 10 * self.done // max(self.total, 1)

    def _line(self, where: str) -> str:
        now = self._clock()
        took = max(now - self._began, 1e-9)
        then, before = self._first or (self._began, 0)
        about = "~" if self._first is None else ""
        pace = (now - then) / max(self.fresh - before, 1)
        parts = []
        if self.graded:
            parts.append(f"right {self.right / self.graded:.1%} of {self.graded} new responses")
        if self.tokens:
            parts.append(f"{self.tokens / took:,.0f} tokens/s")
        if self.done < self.total:
            parts.append(f"{about}{duration((self.total - self.done) * pace)} left")
        else:
            parts.append(f"took {duration(took)}")
        return (
            f"{self.done:,} of {self.total:,} {self.what}{f' ({where})' if where else ''}: "
            f"{', '.join(parts)}"
        )


def duration(seconds: float) -> str:
    """Seconds in words: 42s, 4m05s, 2h10m, 3d04h; ``-`` where they are not finite."""
    if not math.isfinite(seconds):
        return "-"
    whole = round(seconds)
    for big, small, size in (("d", "h", 86400), ("h", "m", 3600), ("m", "s", 60)):
        if whole >= size:
            part = size // (24 if big == "d" else 60)
            return f"{whole // size}{big}{whole % size // part:02d}{small}"
    return f"{whole}s"
