"""The library in Python: functions named as the commands are, and without config files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_jax import command, config, files
from opd_jax.evaluate.generate import generate as generate
from opd_jax.instrument import stages
from opd_jax.instrument.flags import Flags
from opd_jax.report.build import report as report
from opd_jax.run import train
from opd_jax.store import workdir as workdirs
from opd_jax.store.export import export as export
from opd_jax.store.table import table as table

Prompts = str | os.PathLike[str] | Sequence[str | Mapping[str, Any]]


def distill(
    student: str,
    teacher: str,
    prompts: Prompts,
    workdir: str | os.PathLike[str],
    *,
    heldout: Prompts = "",
    settings: Mapping[str, Any] | None = None,
    on_step: Callable[[int, Mapping[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Distil on-policy, or go on with the run in ``workdir``; what ``opd-jax train`` does.

    Args:
      student, teacher: Hugging Face folders, names on the Hub (``owner/name``), or
        ``embedded:student`` and ``embedded:teacher``.
      prompts: JSON lines, or a list of texts or of objects with ``prompt`` or ``messages`` (and an
        ``answer``), which is kept in the workdir.
      workdir: a new folder, or that of the run.
      heldout: the same, to evaluate on: before and after, where ``eval.every`` is not set.
      settings: config keys and their values, ``{"train.steps": 100, "rock.mode": "ema"}``.
      on_step: called with the number of finished steps and their metrics, on every process.

    Returns:
      What ``summary.json`` holds: ``before`` and ``after``, ``rocks``, seconds.

    Raises:
      ValueError, OSError, RuntimeError: as :func:`opd_jax.run.train.train`.
    """
    command.keep_programs()
    folder = Path(files.path_of(workdir))
    given: Any = config.defaults()
    given.student.path, given.teacher.path = student, teacher
    given.data.prompts = _kept(prompts, folder / workdirs.KEPT_PROMPTS[0])
    given.data.heldout = _kept(heldout, folder / workdirs.KEPT_PROMPTS[1]) if heldout else ""
    with given.unlocked():
        given.update_from_flattened_dict(dict(settings or {}))
    if heldout and "eval.every" not in (settings or {}):
        given.eval.every = max(given.train.steps, 1)
    return train.train(
        config.resolve(given), str(folder), command=["opd_jax.distill"], on_step=on_step
    )


def rocks(out: str, *, say: Callable[[str], None] = print, **flags: Any) -> dict[str, Any]:
    """Find the tokens that carry the KL; ``flags`` are those of ``opd-jax rocks``.

    Returns:
      What ``summary.json`` in ``out`` holds.

    Raises:
      RocksError, ValueError, OSError: as :func:`opd_jax.instrument.stages.run`.
    """
    command.keep_programs()
    return stages.run(Flags(out=files.path_of(out), **flags), say=say)


def _kept(prompts: Prompts, path: Path) -> str:
    """The file of prompts; a list is written to ``path`` first.

    Raises:
      FileExistsError: there are others.
    """
    if isinstance(prompts, str | os.PathLike):
        return os.fspath(prompts)
    rows = [{"prompt": row} if isinstance(row, str) else dict(row) for row in prompts]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise FileExistsError(
            f"{path} holds other prompts: expected those that the run was started on; give another "
            "workdir"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, text)
    return str(path)
