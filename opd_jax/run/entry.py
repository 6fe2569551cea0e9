"""How a run takes its workdir: what it was started on, whether it may go on, and from where.

Nothing is written before everything here has been checked, and only process 0 looks: a second one
would see what the first has written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from opd_jax import config, processes
from opd_jax.data import prompts as prompt_files
from opd_jax.evaluate import grading
from opd_jax.run import initial
from opd_jax.run.assemble import Assembly
from opd_jax.spec import RunConfig, teacher_title
from opd_jax.store import fingerprint, hub
from opd_jax.store import pair as pairs
from opd_jax.store import workdir as workdirs
from opd_jax.store.checkpoint import CheckpointError, Checkpoints
from opd_jax.store.pair import Reference

# The schedule's horizon follows from train.steps, which may change.
MAY_CHANGE = (*workdirs.MAY_CHANGE, "optim.steps", "profile")


@dataclasses.dataclass(frozen=True)
class Beside:
    """What a checkpoint holds beside the train state.

    Attributes:
      data: state of the iterator over batches, how far the run has read.
      before, latest: evaluations at step 0 and last, ``heldout.FIELDS``.
      evaluated: step of ``latest``.
      seconds: that the run has taken so far.
      schedule: steps of the learning-rate schedule; None in older checkpoints.
    """

    data: dict[str, Any]
    before: dict[str, float | None]
    latest: dict[str, float | None]
    evaluated: int | None
    seconds: float
    schedule: int | None = None

    @classmethod
    def read(cls, saved: dict[str, Any], step: int) -> Beside:
        """From what a checkpoint of ``step`` gave back."""
        return pydantic.TypeAdapter(cls).validate_python({"evaluated": step} | saved)


def start_time(workdir: Path) -> str:
    """When the run in a folder started, on every process; now, where there is none."""

    def look() -> str:
        return (workdirs.read_run(workdir) or {}).get("time") or workdirs.timestamp()

    return processes.of_first(look)


def enter(
    workdir: Path,
    parts: Assembly,
    saves: Checkpoints,
    *,
    command: Sequence[str] = (),
    now: str,
    pins: Mapping[str, str] | None = None,
    say: Callable[[str], None],
) -> None:
    """Take ``workdir`` for the run: start in it, or go on with the same run.

    ``pins`` are the Hub names that its models were asked for by, see :func:`hub.pins`.

    Raises:
      WorkdirError: it holds another run, was started on other files, or cannot be used.
      CheckpointError: it is being written by another process, or its checkpoints were lost.
      ProcessesError: the processes were started with different configs.
    """
    described = config.describe(parts.run)
    processes.check_same(described, "start the same command on all of them")
    record = workdirs.describe(described, seed=parts.run.seed, command=command, now=now)
    record |= {"data": prompt_files.digest(parts.rows, has_completions=False)}
    record |= {"stop_ids": list(parts.stop_ids)} | ({"pinned": dict(pins)} if pins else {})
    processes.on_first(lambda: _enter(workdir, parts, saves, record, say))


def _enter(
    workdir: Path,
    parts: Assembly,
    saves: Checkpoints,
    record: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    try:
        old = workdirs.read_run(workdir)
        if old is None:
            workdirs.check_free(workdir)
        told, lost = workdirs.begun(workdir), saves.lost()
        if told and lost:
            raise CheckpointError(
                f"{workdir / 'metrics.jsonl'} tells of {told} steps and {lost}: expected the "
                "checkpoints of that run; put them back, or give another --workdir"
            )
        if old and (told or saves.steps()):
            base_of(workdir, parts.run)  # raises
        saves.claim()  # from here on nobody else writes
        has_begun = bool(told or saves.steps())
        record["inputs"] = inputs(parts)
        if not has_begun and (origin := initial.origin_of(parts.run)):
            record["init_from"] = {"name": origin.name, "files": pairs.identity(origin)}
        workdirs.enter_workdir(workdir, record, MAY_CHANGE, has_begun=has_begun)
    except OSError as error:  # a file in its place, no right to read
        raise workdirs.WorkdirError(
            f"{workdir} cannot be the workdir ({error}): expected a folder that can be read and "
            "written; make it one or give another --workdir"
        ) from error
    if old and not has_begun:
        say(f"{workdir} holds a run that ended before its first step: this one takes its place")
    elif told and not saves.steps():
        say(f"{workdir} ended after step {told} and before its first checkpoint: it starts over")


def base_of(workdir: Path, run: RunConfig) -> Reference | None:
    """What the adapters of a begun run belong to, see ``pair.base_of``; None without adapters."""
    return pairs.base_of(workdir, workdirs.require_run(workdir)) if run.lora.rank else None


def inputs(parts: Assembly) -> dict[str, Any]:
    """Fingerprints of all that a run is started on, for ``run.json``."""
    run = parts.run
    found: dict[str, Any] = {}
    teachers = {teacher_title(name): spec for name, spec in run.teachers.items()}
    for name, spec in ({"student": run.student} | teachers).items():
        files = fingerprint.of_model(Path(hub.folder(spec.path)))
        found[name] = {"path": spec.path, "files": files}
    for name, path, rows in (
        ("prompts", run.data.prompts, parts.rows),
        ("heldout", run.data.heldout, parts.heldout),
    ):
        if rows:
            files = {Path(path).name: prompt_files.digest(rows)}
            found[name] = {"path": path, "files": files}
    if run.eval.every and (source := grading.source(run.eval.grader)):
        files = {source.name: fingerprint.of_file(source)}
        found["grader"] = {"path": run.eval.grader, "files": files}
    return found
