"""Evaluation seeds: a finished run evaluated again with other draws, to tell a run from its luck.

Evaluation seed 0 is the one that the run drew itself at its end. Others are measured on its last
checkpoint and kept beside it, ``evaluations/seed-N.json``, each as soon as it is there.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from opd_jax import files, processes
from opd_jax.evaluate import heldout
from opd_jax.run import assemble, entry, initial
from opd_jax.spec import RunConfig
from opd_jax.store import checkpoint, hub, run_files
from opd_jax.store import workdir as workdirs

FOLDER = "evaluations"


def path(folder: Path, evaluation_seed: int) -> Path:
    """Where the evaluation of a run is kept."""
    return folder / FOLDER / f"seed-{evaluation_seed}.json"


def missing(folder: Path, seeds: Sequence[int]) -> list[int]:
    """The evaluation seeds that a finished run has not been measured with at its last step.

    Raises:
      WorkdirError: a file is damaged.
    """
    step = run_files.summary(folder)["steps"]
    return [n for n in seeds if n and not _is_of(folder, n, step)]


def measure(
    run: RunConfig,
    folder: Path,
    seeds: Sequence[int],
    *,
    pins: Mapping[str, str] | None = None,
    stop: processes.Stop | None = None,
    say: Callable[[str], None] = print,
) -> bool:
    """Evaluate a finished run with the evaluation seeds that are missing.

    Args:
      run: its resolved config.
      folder: its workdir.
      seeds: evaluation seeds.
      pins: Hub names of models with their commits, see ``hub.pins``.
      stop: the wish to stop, obeyed between two seeds.
      say: receives a line a seed.

    Returns:
      Whether all are there.

    Raises:
      WorkdirError, CheckpointError: the run cannot be read.
    """
    todo = processes.of_first(lambda: missing(folder, seeds))
    if not todo:
        return True
    if stop is not None and stop.everywhere():  # before anything is loaded
        return False
    run = hub.pinned_run(run, pins or {})
    parts = assemble.assemble(run, now=entry.start_time(folder), say=lambda line: None)
    with checkpoint.open(folder) as saves, jax.set_mesh(parts.mesh):
        state, _, step = initial.restored(parts, saves, entry.base_of(folder, run))
        teacher = initial.teacher_params(parts)
        for number in todo:
            if stop is not None and stop.everywhere():
                return False
            result, graded = heldout.evaluate(
                state.params,
                teacher,
                state.rock,
                parts.heldout,
                parts.tokenizer,
                heldout.evaluation_key(run.seed, number),
                parts.mesh,
                cfg=parts.cfg,
                plan=parts.plan,
            )
            value = {"step": step, "result": result, **dataclasses.asdict(graded)}
            text = json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
            target = path(folder, number)
            processes.on_first(functools.partial(files.write_atomic, target, text))
            say(f"evaluation seed {number}: {_told(result)}")
    return True


def results(folder: Path, seeds: Sequence[int]) -> list[run_files.Evaluation]:
    """The evaluations of a finished run, one a seed.

    Raises:
      WorkdirError: one is missing or damaged.
    """
    return [_read(folder, n)["result"] if n else run_files.summary(folder)["after"] for n in seeds]


def mean(found: Sequence[run_files.Evaluation], name: str) -> float | None:
    """Of a field over the evaluations of a run; None where one has not measured it."""
    values = [value for result in found if (value := result.get(name)) is not None]
    return statistics.fmean(values) if values and len(values) == len(found) else None


def problems(folder: Path, seeds: Sequence[int]) -> tuple[list[int], np.ndarray]:
    """Indices of the graded prompts, and the share of right answers to each over all seeds.

    Raises:
      WorkdirError: one is missing or damaged, or they are of other prompts.
    """
    own = run_files.last_graded(folder)
    if own is None:
        return [], np.zeros(0)
    lines = [_read(folder, n) if n else own for n in seeds]
    for number, line in zip(seeds, lines, strict=True):
        if line["index"] != own["index"]:
            raise workdirs.WorkdirError(
                f"{path(folder, number)} is of other prompts than the run's own evaluation: "
                "expected the same; remove it, and the same command measures it again"
            )
    shares = [[np.mean(right) for right in line["correct"]] for line in lines]
    return own["index"], np.mean(np.asarray(shares, float), axis=0)


def _read(folder: Path, number: int) -> run_files.EvaluationFile:
    return run_files.load(path(folder, number), run_files.EvaluationFile)


def _is_of(folder: Path, number: int, step: int) -> bool:
    return path(folder, number).exists() and _read(folder, number)["step"] == step


def _told(result: Mapping[str, float | None]) -> str:
    told = {name: result.get(name) for name in ("accuracy", "kl_nats")}
    return ", ".join(f"{name} {value:.4f}" for name, value in told.items() if value is not None)
