"""Which runs belong into one sweep: equal but for what the arms are about, and of one schedule."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Sequence

from opd_jax import config
from opd_jax.run import repeats
from opd_jax.run.arms import Job
from opd_jax.spec import ConfigError, RunConfig
from opd_jax.store import run_files
from opd_jax.store import workdir as workdirs

# What the arms are about; everything else must be equal between them.
_OF_AN_ARM = ("rock.*", "position.*", "rollout.max_new", "train.normaliser", "prediction")
_OF_AN_ARM += ("kl.direction", "kl.ce", "train.stage", "train.on_policy_share")
# What a run that is there already may differ in from what is asked for now: nothing of the result,
# except that runs of fewer steps are gone on with (all of them: see ``check_lengths``).
_OF_NO_RESULT = (
    "eval.margin",
    "eval.margin_kl",
    "log.*",
    "checkpoint.*",
    "mesh.*",
    "profile",
    "train.steps",
    "optim.steps",
)


def check_comparable(base_arm: str, base: RunConfig, arm: str, run: RunConfig) -> None:
    """Check that two arms differ in what is weighed, and how, alone.

    Raises:
      ConfigError: they do not; names each differing key with both values.
    """
    old, new = config.describe(base), config.describe(run)
    for found in (old, new):  # what it comes to
        found["eval.max_new"] = found["eval.max_new"] or found["rollout.max_new"]
    keys = [key for key in old if old[key] != new[key]]
    keys = [k for k in keys if not any(fnmatch.fnmatchcase(k, name) for name in _OF_AN_ARM)]
    if keys:
        lines = [f"  {k}: {old[k]!r} in {base_arm}, {new[k]!r} in {arm}" for k in keys]
        raise ConfigError(
            "\n".join([f"arms {base_arm} and {arm} cannot be compared:", *lines])
            + "\nexpected equal values of everything but "
            + ", ".join(_OF_AN_ARM)
            + "; give the "
            "arms the same, or sweep them apart"
        )


def check_lengths(jobs: Sequence[Job]) -> None:
    """Check that all runs were meant to have the same numbers of steps, one after another.

    A run that is gone on with had the learning rates of a shorter one: others do not compare.

    Raises:
      WorkdirError: they were not.
    """
    first, *others = ((job, _lengths(job)) for job in jobs)
    for job, lengths in others:
        if lengths != first[1]:
            raise workdirs.WorkdirError(
                f"train.steps was {_then(first[1])} for {first[0].folder} and {_then(lengths)} for "
                f"{job.folder}: expected the same for all runs of a sweep, since learning rates "
                "follow from it; set --config.train.steps back, or give another --workdir"
            )


def _lengths(job: Job) -> list[int]:
    """Every number of steps that a run was meant to have, the one asked for now last."""
    record = workdirs.read_run(job.folder) or {}
    asked = [again["changed"] for again in record.get("resumed", [])]
    started = record.get("config", {}).get("train.steps", job.run.train.steps)
    lengths = [started, *(changed.get("train.steps", started) for changed in asked)]
    lengths.append(job.run.train.steps)
    return [new for old, new in itertools.pairwise([0, *lengths]) if new != old]


def _then(lengths: Sequence[int]) -> str:
    return ", then ".join(map(str, lengths))


def is_finished(job: Job) -> bool:
    """Whether a run is there whose result counts, with all its evaluations.

    Raises:
      WorkdirError: the folder holds a run of another config.
    """
    return has_trained(job) and not repeats.missing(job.folder, job.evaluations)


def has_trained(job: Job) -> bool:
    """Whether a run has done all its steps.

    Raises:
      WorkdirError: the folder holds a run of another config.
    """
    record = workdirs.read_run(job.folder)
    if record is None:
        return False
    given = record["config"]
    for again in record.get("resumed", []):
        given = record["config"] | again["changed"]
    workdirs.check_same_run(given, config.describe(job.run), _OF_NO_RESULT)
    if not (job.folder / "summary.json").exists():
        return False
    done = run_files.summary(job.folder)
    return done["is_finished"] and done["steps"] == job.run.train.steps
