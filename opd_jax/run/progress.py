"""Metrics on the host: pooling, files, a progress line, and where the time goes.

A step returns ``dict[str, Mean]``; the host pools and divides once (:func:`reduce`). Values that
were not measured are NaN here, ``null`` in files, ``-`` on the progress line.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from opd_jax.evaluate import growth

log = logging.getLogger(__name__)

_SURE = 5  # steps from which the time left is no guess


class Timer:
    """Seconds per phase of a step: ``with timer.phase("rollout") as done: done(sample(...))``.

    jax returns before the work is done, so a phase ends when what was handed to ``done`` is ready.
    A phase shows under its name in a :class:`Profile`.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self.running = ""  # the phase that began last

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[Callable[[Any], Any]]:
        """Time a block; gives a function that takes arrays to wait for and returns them."""
        waiting = []
        self.running = name

        def done(values):
            waiting.append(values)
            return values

        start = self._clock()
        try:
            with jax.profiler.TraceAnnotation(name):
                yield done
                jax.block_until_ready(waiting)
        finally:
            waiting.clear()
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start

    def take(self) -> dict[str, float]:
        """Seconds per phase since the last call; starts again from zero."""
        seconds, self._seconds = self._seconds, {}
        return seconds


class Profile:
    """A trace of some training steps: ``with profile.step(n): ...``; a no-op for other steps."""

    def __init__(
        self, folder: str | os.PathLike, steps: tuple[int, int] | None, say: Callable[[str], object]
    ):
        """Trace into ``folder`` (made when tracing starts).

        Args:
          folder: every process writes there, under a name of its own.
          steps: first and last step, both included; None: never trace.
          say: receives one line, once the trace is written.
        """
        self._folder, self._say = Path(folder), say
        self._first, self._last = steps or (1, 0)
        self._traced: list[int] = []

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Trace a block as one step; the last one, or an error, ends the trace."""
        if not self._first <= number <= self._last:
            yield
            return
        if not self._traced:
            jax.profiler.start_trace(str(self._folder))
        self._traced.append(number)
        try:
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                yield
        except BaseException:
            self.close()
            raise
        if number == self._last:
            self.close()

    def close(self) -> None:
        """Write what has been traced, where that is not done yet."""
        if not self._traced:
            return
        jax.profiler.stop_trace()
        first, last = self._traced[0], self._traced[-1]
        self._traced, self._last = [], -1
        self._say(
            f"profile of steps {first} to {last} in {self._folder}: tensorboard --logdir="
            f"{self._folder} (with the xprof package), or open the .trace.json.gz inside in "
            "ui.perfetto.dev"
        )


class Progress:
    """One plain line per ``every`` steps and for the last, the same in a terminal and a log."""

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        every: int = 1,
        shown: Collection[str] = ("loss", "gated"),
        write: Callable[[str], object] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Start the clock.

        Args:
          total: step at which the run ends.
          start: step it goes on from.
          every: steps per line.
          shown: columns that not every run has, see :func:`format_line`.
          write: receives each line; prints by default, on process 0.
          clock: seconds.
        """
        self._total, self._every, self._clock = total, max(1, every), clock
        self._write, self._shown = write or _print_line, shown
        self._last = (start, clock())
        self._step_seconds: collections.deque[float] = collections.deque(maxlen=50)
        self._pauses: dict[str, tuple[int, float]] = {}

    def begin(self, step: int) -> None:
        """Start the clock anew, at a step that a run goes on from."""
        self._last = (step, self._clock())

    def paused(self, what: str, every: int, seconds: float) -> None:
        """Note that something beside the steps took so long and comes again every so many steps.

        The shortest counts: the first of its kind may have compiled.
        """
        before = self._pauses.get(what, (every, math.inf))[1]
        self._pauses[what] = (every, min(seconds, before))
        self._last = (self._last[0], self._clock())  # of no step

    def update(self, step: int, values: Mapping[str, float], seconds: Mapping[str, float]) -> None:
        """Note that ``step`` updates are done and print the line when it is due.

        Args:
          step: finished updates.
          values: ``loss``, ``kl_nats`` (temperature 1), ``gated_share``, ``mean_length``,
            ``truncated_share``, ``tokens_per_s``; a missing one prints as ``-``.
          seconds: ``rollout``, ``teacher``, ``update``.
        """
        now = self._clock()
        last, then = self._last
        self._last = (step, now)
        if step > last:
            self._step_seconds.append((now - then) / (step - last))
        if step % self._every == 0 or step >= self._total:
            about = "~" if len(self._step_seconds) < _SURE and step < self._total else ""
            self._write(
                format_line(step, self._total, values, seconds, self.eta(), about, self._shown)
            )

    def eta(self) -> float:
        """Seconds left: by the median of the last 50 steps, compiling aside, and with pauses."""
        if not self._step_seconds:
            return math.nan
        step = self._last[0]
        left = statistics.median(self._step_seconds) * max(0, self._total - step)
        for every, seconds in self._pauses.values():
            left += seconds * (-(-self._total // every) - step // every)
        return left


def format_line(
    step: int,
    total: int,
    values: Mapping[str, float],
    seconds: Mapping[str, float],
    eta: float,
    about: str = "",
    shown: Collection[str] = ("loss", "gated"),
) -> str:
    """Lay out the progress line: at most 120 columns for runs of up to 9,999 steps.

    Args:
      step, total: finished updates, of so many.
      values, seconds: see :meth:`Progress.update`.
      eta: seconds left; ``about`` stands before it.
      about: a sign for a guess.
      shown: ``loss`` where it is not the KL, ``gated`` where something is gated.
    """
    width = len(str(total))
    took = [("roll", "rollout"), ("teach", "teacher"), ("upd", "update")]
    parts = {
        "step": f"{step:>{width}}/{total}",
        "loss": f"loss {_show(values, 'loss', 'z.4f', 'z.2f'):>6}",
        "kl": f"KL {_show(values, 'kl_nats', 'z.4f', 'z.2f'):>6}",
        "gated": f"gated {_show(values, 'gated_share', '.0%'):>3}",
        "length": f"len {_show(values, 'mean_length', '.0f'):>3}",
        "cut": f"cut {_show(values, 'truncated_share', '.0%'):>3}",
        "took": " ".join(f"{a} {_show(seconds, name, '.2f', '.0f')}s" for a, name in took),
        "speed": f"{_short(values.get('tokens_per_s'))} tok/s ETA {about}{growth.duration(eta)}",
    }
    hidden = {"loss", "gated"} - {*shown}
    return "  ".join(text for name, text in parts.items() if name not in hidden)


@contextlib.contextmanager
def announced(text: str, say: Callable[[str], object], after: float = 3.0) -> Iterator[None]:
    """Say what a block is doing where it takes longer than ``after`` seconds."""
    timer = threading.Timer(after, say, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _show(source: Mapping[str, float], name: str, spec: str, spec_from_10: str = "") -> str:
    """Format a value; ``-`` if it is missing or was not measured."""
    value = source.get(name)
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "inf"
    return format(value, spec_from_10 if spec_from_10 and abs(value) >= 10 else spec)


def _print_line(line: str) -> None:
    if jax.process_index() == 0:
        print(line, file=sys.stdout, flush=True)


def _short(value: float | None) -> str:
    """Three digits with a unit: 940, 2.1k, 1.35M."""
    if value is None or not math.isfinite(value):
        return "-"
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
