"""The library in Python: functions named as the commands are, and without config files."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from opd_jax import command, config, files, processes
from opd_jax.evaluate import benchmark, tasks
from opd_jax.evaluate.generate import generate as generate
from opd_jax.instrument import stages
from opd_jax.instrument.flags import Flags
from opd_jax.instrument.knockout import census
from opd_jax.instrument.knockout.request import Request, families
from opd_jax.report.build import report as report
from opd_jax.run import sweep as sweeps
from opd_jax.run import train
from opd_jax.store import workdir as workdirs
from opd_jax.store.export import export as export
from opd_jax.store.table import table as table

# What says how answers are sampled and how tasks are asked, among the keywords below.
_SETTINGS = {field.name for field in dataclasses.fields(benchmark.Settings)}
_FORM = {field.name for field in dataclasses.fields(tasks.Form)}
Prompts = str | os.PathLike[str] | Sequence[str | Mapping[str, Any]]


def distill(
    student: str,
    teacher: str | Mapping[str, str],
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
        ``embedded:student`` and ``embedded:teacher``. Several teachers by name, which the column
        ``teacher`` of each prompt gives: ``{"math": ..., "code": ...}``.
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
    given.student.path = student
    if isinstance(teacher, str):
        given.teacher.path = teacher
    else:
        given.teacher.paths = tuple(teacher.items())
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


def eval(
    model: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    task_files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    grader: str = "math",
    limit: int = 0,
    say: Callable[[str], None] = print,
    **flags: Any,
) -> dict[str, Any]:
    """Answer tasks and grade the answers, or go on; what ``opd-jax eval`` does.

    Args:
      model: a folder, a name on the Hub, ``embedded:NAME``, or RUN[@STEP]; several are training
        seeds of one method.
      task_files: JSON lines with questions and answers; several with commas between, or as a list.
      out: folder of the evaluation.
      grader, limit: how tasks are read, see ``tasks.read_all``.
      say: receives progress.
      flags: fields of ``benchmark.Settings`` (``samples``, ``max_new``, ``temperature``, ...) and
        of ``tasks.Form`` (``format``, ``instruction``, ...), and ``batch``, ``slots``, ``mesh``,
        ``dtype``.

    Returns:
      ``metrics.summarise`` of every task, by name; of several models ``{"models": {model: that},
      "mean": ...}`` with ``metrics.over_seeds`` of every task.

    Raises:
      ValueError, OSError: as :func:`opd_jax.evaluate.benchmark.evaluate`.
    """
    command.keep_programs()
    settings, form, rest = _sorted(flags)
    refs = _paths(model)
    told: Any = {"settings": settings, "form": form, "say": say, **rest}
    given = tasks.read_all(
        task_files if isinstance(task_files, str) else _paths(task_files),
        grader=grader,
        limit=limit,
    )
    folder = Path(files.path_of(out))
    if len(refs) == 1:
        return benchmark.evaluate(refs[0], given, folder, **told)
    found, means = benchmark.evaluate_seeds(refs, given, folder, **told)
    return {"models": found, "mean": means}


def _paths(given: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """One or several, as texts."""
    one = isinstance(given, str | os.PathLike)
    return [os.fspath(given)] if one else [os.fspath(each) for each in given]


def knockout(
    model: str | os.PathLike[str],
    task_files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    types: str | os.PathLike[str] | Sequence[int],
    out: str | os.PathLike[str],
    *,
    plan: bool = False,
    mesh: Mesh | None = None,
    say: Callable[[str], None] = print,
    **flags: Any,
) -> dict[str, Any] | None:
    """Forbid a model certain tokens and see which answers flip; what ``opd-jax knockout`` does.

    Args:
      model, task_files, types, out: as fields of ``knockout.request.Request`` of that name
        (``tasks`` is ``task_files``); several files, and ids, also as a list.
      plan: answer without a ban, say what the rest costs, stop.
      mesh: default: all devices along ``data``.
      say: receives lines.
      flags: further fields of it, of ``benchmark.Settings`` and of ``tasks.Form``; ``families``
        also as the command's ``--arms``, a text.

    Returns:
      What ``summary.json`` in ``out`` holds; None of a plan.

    Raises:
      ValueError, OSError: as :func:`opd_jax.instrument.knockout.census.run`.
    """
    command.keep_programs()
    settings, form, rest = _sorted(flags)
    if (asked := rest.get("families")) is not None:
        rest["families"] = families(asked if isinstance(asked, str) else ",".join(asked))
    is_one = isinstance(types, str | os.PathLike)
    request = Request(
        model=os.fspath(model),
        tasks=",".join(_paths(task_files)),
        types=os.fspath(types) if is_one else ",".join(map(str, types)),
        out=files.path_of(out),
        settings=settings,
        form=form,
        **rest,
    )
    return census.run(request, mesh=mesh, plan=plan, say=say)


def sweep(
    config_file: str,
    arms: Sequence[str],
    seeds: Sequence[int],
    workdir: str | os.PathLike[str],
    **flags: Any,
) -> dict[str, Any] | None:
    """Train arms x seeds and compare them; what ``opd-jax sweep`` does, one run at a time.

    Args:
      config_file, arms, seeds, workdir, flags: those of :func:`opd_jax.run.sweep.sweep`.

    Returns:
      What ``sweep.json`` holds; None where a signal stopped it.

    Raises:
      ValueError, OSError, RuntimeError: as there.
    """
    command.keep_programs()
    return sweeps.sweep(
        config_file, arms, seeds, files.path_of(workdir), command=["opd_jax.sweep"], **flags
    )


def _sorted(flags: Mapping[str, Any]) -> tuple[benchmark.Settings, tasks.Form, dict[str, Any]]:
    """Keywords of an evaluation: how it samples, how it asks, and the rest."""
    settings = benchmark.Settings(**{k: v for k, v in flags.items() if k in _SETTINGS})
    form = tasks.Form(**{k: v for k, v in flags.items() if k in _FORM})
    return settings, form, {k: v for k, v in flags.items() if k not in _SETTINGS | _FORM}


def _kept(prompts: Prompts, path: Path) -> str:
    """The file of prompts; a list is written to ``path`` first.

    Raises:
      FileExistsError: there are others.
    """
    if isinstance(prompts, str | os.PathLike):
        return os.fspath(prompts)
    rows = [{"prompt": row} if isinstance(row, str) else dict(row) for row in prompts]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    processes.on_first(lambda: _keep(path, text))
    return str(path)


def _keep(path: Path, text: str) -> None:
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise FileExistsError(
            f"{path} holds other prompts: expected those that the run was started on; give another "
            "workdir"
        )
    files.write_atomic(path, text)
