"""Where the metrics of a step go: JSON lines, TensorBoard, Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

import jax
import numpy as np

from opd_jax import files, records
from opd_jax.store.workdir import MetricsLine

log = logging.getLogger(__name__)


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

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        restored: int | None = None,
        say: Callable[[str], None] = log.warning,
    ):
        """Open for appending.

        Args:
          path: file; its folder must exist.
          restored: step of the checkpoint that the run goes on from; None for a start from nothing,
            which empties the file.
          say: receives a line for every line that is damaged and dropped.

        Raises:
          OSError: the file cannot be written.
        """
        self._path = Path(path)
        self._file: TextIO | None = None
        if jax.process_index() == 0:
            _cut(self._path, restored, say)
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


def _cut(path: Path, restored: int | None, say: Callable[[str], None]) -> None:
    """Rewrite a JSONL file without the lines that a run going on from ``restored`` writes again."""
    if not path.exists():
        return
    with path.open("rb") as old, files.replacing(path, "wb") as new:
        for number, line in enumerate(old, 1):
            step = None
            if line.endswith(b"\n"):
                with contextlib.suppress(records.RecordError):
                    step = records.parse(line, MetricsLine, where="", change="")["step"]
            if step is None:
                say(f"{path} line {number} is damaged and dropped: {line[:60]!r}")
            elif restored is not None and step <= restored:
                new.write(line)


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
