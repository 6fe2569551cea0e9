"""Files of answers that grow batch by batch: who writes them, and how fast they grow."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from opd_jax import files

_EVERY_S = 10.0  # between lines of progress


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
    """Says now and then how far it is, how good, how fast, and how long it will take.

    Args:
      what: that is answered, in the plural.
      total: of them, in all.
      done: of them, by an earlier process.
      say: receives the lines.
    """

    def __init__(self, what: str, total: int, done: int, say: Callable[[str], None]):
        self.what, self.total, self.done, self.say = what, total, done, say
        self.fresh = self.tokens = self.right = self.graded = 0
        self.began = self.said = time.monotonic()

    def add(self, number: int, lines: Sequence[Mapping[str, Any]], where: str = "") -> None:
        """Note that ``number`` more are done, by answers with ``tokens`` and ``correct``."""
        self.done += number
        self.fresh += number
        self.tokens += sum(line["tokens"] for line in lines)
        verdicts = [line["correct"] for line in lines if "correct" in line]
        self.right += sum(verdicts)
        self.graded += len(verdicts)
        if time.monotonic() - self.said > _EVERY_S:
            self.tell(where)

    def tell(self, where: str = "") -> None:
        """Say how it stands."""
        now = time.monotonic()
        self.said = now
        took = max(now - self.began, 1e-9)
        left = (self.total - self.done) * took / max(self.fresh, 1)
        right = ""
        if self.graded:
            right = f"right {self.right / self.graded:.1%} of {self.graded} new responses, "
        self.say(
            f"{self.done} of {self.total} {self.what}{f' ({where})' if where else ''}: {right}"
            f"{self.tokens / took:.0f} tokens/s, {duration(left)} left"
        )


def duration(seconds: float) -> str:
    """Seconds in words: 4m05s, 2h10m."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
