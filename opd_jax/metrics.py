"""Metrics on the host: pooling, files, a progress line, and where the time goes.

A step returns ``dict[str, Mean]``; the host pools and divides once (:func:`reduce`). Values that
were not measured are NaN here, ``null`` in files, ``-`` on the progress line.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

import jax
import numpy as np

from opd_jax import mesh
from opd_jax.pytrees import Mean

log = logging.getLogger(__name__)


def pool(dicts: Iterable[Mapping[str, Mean]]) -> dict[str, Mean]:
    """Add up the means of several steps, in float64 on the host; a name may be absent from some.

    On a mesh of several processes every process must call it.
    """
    totals: dict[str, np.ndarray] = {}
    for means in mesh.to_host([dict(d) for d in dicts]):
        for name, mean in means.items():
            pair = np.array([mean.total, mean.weight], np.float64)
            totals[name] = totals.get(name, np.zeros(2)) + pair
    return {name: Mean(*pair) for name, pair in totals.items()}


def reduce(means: Mapping[str, Mean], *, empty: float = math.nan) -> dict[str, float]:
    """Divide on the host; ``empty`` where the weight is 0, because 0.0 would be a measurement."""
    return {name: mean.value() if mean.weight else empty for name, mean in pool([means]).items()}


class Writer(Protocol):
    """Where the metrics of a step go."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Record ``values`` of a step; a writer ignores what it cannot show."""
        ...

    def close(self) -> None:
        """Flush and release; the writer is unusable afterwards."""
        ...


class JsonlWriter:
    """One JSON object per line with its ``step``, flushed at once; process 0 only.

    Opening cuts the file back to where the run goes on, so it never holds a step twice: lines of
    steps after ``restored`` go, and so does a last line that a kill cut in half. ``step`` counts
    finished updates, as a checkpoint's step does.
    """

    def __init__(self, path: str | os.PathLike, *, restored: int | None = None):
        """Open for appending.

        Args:
          path: file; its folder must exist.
          restored: step of the checkpoint that the run goes on from; None for a start from nothing,
            which empties the file.

        Raises:
          OSError: the file cannot be written.
        """
        self._path = Path(path)
        self._file: TextIO | None = None
        if jax.process_index() == 0:
            _cut(self._path, restored)
            self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line; NaN and infinities become null, arrays become lists.

        Raises:
          ValueError: ``values`` has a ``step`` of its own that differs.
          OSError: the disk is full; names the file.
        """
        if values.get("step", step) != step:
            raise ValueError(
                f"values carry step {values['step']} and are written as step {step}; expected one "
                "step; leave it out of the values"
            )
        if self._file is None:
            return
        line = json.dumps(
            {"step": int(step), **_plain(values)}, allow_nan=False, ensure_ascii=False
        )
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write step {step} ({error.strerror}); expected free space; make room and "
                "run the same command again to go on from the last checkpoint",
                str(self._path),
            ) from error

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class TensorBoardWriter:
    """Scalars as TensorBoard event files (extra ``tensorboard``); process 0 only."""

    def __init__(self, folder: str | os.PathLike, *, restored: int | None = None):
        """Open a folder; events after ``restored`` are hidden.

        Raises:
          ImportError: tensorboardX is not installed.
        """
        self._events = None
        if jax.process_index() == 0:
            module = _extra("tensorboardX", "tensorboard", "--config.log.tensorboard=False")
            self._events = module.SummaryWriter(str(folder), purge_step=(restored or 0) + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add each finite number."""
        if self._events is not None:
            for name, value in _scalars(values).items():
                self._events.add_scalar(name, value, step)
            self._events.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._events is not None:
            self._events.close()


class WandbWriter:
    """Scalars to Weights & Biases (extra ``wandb``); process 0 only."""

    def __init__(self, project: str, *, name: str, folder: str | os.PathLike, config: Mapping):
        """Start the run called ``name``, or go on with it.

        Raises:
          ImportError: wandb is not installed.
        """
        self._run = None
        if jax.process_index() == 0:
            module = _extra("wandb", "wandb", "--config.log.wandb=''")
            self._run = module.init(
                project=project,
                name=name,
                id=name,
                resume="allow",
                dir=str(folder),
                config=dict(config),
            )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the finite numbers."""
        if self._run is not None:
            self._run.log(_scalars(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()


class Timer:
    """Seconds per phase of a step: ``with timer.phase("rollout") as done: done(sample(...))``.

    jax returns before the work is done, so a phase ends when what was handed to ``done`` is ready.
    A phase shows under its name in a :class:`Profile`.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[Callable[[Any], Any]]:
        """Time a block; gives a function that takes arrays to wait for and returns them."""
        waiting = []

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
        write: Callable[[str], object] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Start the clock.

        Args:
          total: step at which the run ends.
          start: step it goes on from.
          every: steps per line.
          write: receives each line; prints by default, on process 0.
          clock: seconds.
        """
        self._total, self._every, self._clock = total, max(1, every), clock
        self._write = write or _print_line
        self._last = (start, clock())
        self._step_seconds: collections.deque[float] = collections.deque(maxlen=50)

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
            self._write(format_line(step, self._total, values, seconds, self.eta()))

    def eta(self) -> float:
        """Seconds left, by the median of the last 50 steps: compiling and saving hardly count."""
        if not self._step_seconds:
            return math.nan
        return statistics.median(self._step_seconds) * max(0, self._total - self._last[0])


def format_line(
    step: int, total: int, values: Mapping[str, float], seconds: Mapping[str, float], eta: float
) -> str:
    """Lay out the progress line: at most 120 columns for runs of up to 9,999 steps."""
    width = len(str(total))
    took = [("roll", "rollout"), ("teach", "teacher"), ("upd", "update")]
    return "  ".join(
        [
            f"{step:>{width}}/{total}",
            f"loss {_show(values, 'loss', '.4f', '.2f')}",
            f"KL {_show(values, 'kl_nats', '.4f', '.2f')}",
            f"gated {_show(values, 'gated_share', '.0%')}",
            f"len {_show(values, 'mean_length', '.0f')}",
            f"cut {_show(values, 'truncated_share', '.0%')}",
            " ".join(f"{short} {_show(seconds, name, '.2f', '.0f')}s" for short, name in took),
            f"{_short(values.get('tokens_per_s'))} tok/s",
            f"ETA {_duration(eta)}",
        ]
    )


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


def _duration(seconds: float) -> str:
    """42s, 3m05s, 1h42m, 2d03h."""
    if not math.isfinite(seconds):
        return "-"
    whole = round(seconds)
    for big, small, size in (("d", "h", 86400), ("h", "m", 3600), ("m", "s", 60)):
        if whole >= size:
            part = size // (24 if big == "d" else 60)
            return f"{whole // size}{big}{whole % size // part:02d}{small}"
    return f"{whole}s"


def _cut(path: Path, restored: int | None) -> None:
    """Rewrite a JSONL file without the lines that a run going on from ``restored`` writes again."""
    if not path.exists():
        return
    part = path.with_name(f".{path.name}.part")
    with path.open("rb") as old, part.open("wb") as new:
        for number, line in enumerate(old, 1):
            try:
                step = json.loads(line)["step"] if line.endswith(b"\n") else None
            except (ValueError, KeyError, TypeError):
                step = None
            if step is None:
                log.warning("%s line %d is damaged and dropped: %.60r", path, number, line)
            elif restored is not None and step <= restored:
                new.write(line)
    part.replace(path)


def _plain(value: Any) -> Any:
    """Make a value JSON-able: numpy and jax to numbers and lists, non-finite to None."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _scalars(values: Mapping[str, Any]) -> dict[str, float]:
    plain = _plain(values)
    return {k: v for k, v in plain.items() if isinstance(v, (int, float)) and k != "step"}


def _extra(module: str, extra: str, off: str) -> Any:
    """Import what an extra installs, or say how to install it."""
    try:
        return __import__(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is not installed ({error}); expected it because the config asks for it; "
            f"pip install 'opd-jax[{extra}]', or set {off}"
        ) from error
