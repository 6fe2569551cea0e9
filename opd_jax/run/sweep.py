"""Arms x seeds: train them one after another, then compare the arms with one of them.

An arm is a value of the argument ``arm`` of a config file (see ``configs/opd.py``). Each run is an
ordinary workdir, ``WORKDIR/ARM/seed-N``: it resumes, and a finished one is not run again.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from opd_jax import command as commands
from opd_jax import config, files, processes
from opd_jax.processes import say
from opd_jax.run import arms as comparison
from opd_jax.run import budget, train
from opd_jax.run.arms import Job, Margins
from opd_jax.spec import ConfigError, RunConfig
from opd_jax.store import hub, run_files
from opd_jax.store import workdir as workdirs

_MOST_SEEDS = 10_000
BASELINE = "full"  # plain distillation, where it is among the arms
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


def main(argv: Sequence[str]) -> int:
    """The command ``opd-jax sweep``; returns the exit status."""
    parser = commands.Parser(
        "sweep",
        "Train arms x seeds and compare the arms; the same command goes on. Further "
        "--config.group.key=value flags set keys of every run.",
        "--config=configs/opd.py --arms=full,rock --seeds=3 --workdir=runs/sweep",
    )
    parser.add_argument("--config", required=True, metavar="FILE[:args]", help="configs/opd.py")
    parser.add_argument(
        "--arms",
        required=True,
        help="names for the file's argument arm, a,b,c; NAME:key=value sets further arguments",
    )
    parser.add_argument("--seeds", type=int, default=1, help="how many: 0, 1, ...; default 1")
    parser.add_argument("--workdir", required=True, help="a new folder, or that of the sweep")
    parser.add_argument("--baseline", default="", help="the arm to compare with; default: full")
    parser.add_argument(
        "--no-controls",
        action="store_true",
        help="do not add the controls of arms that weigh positions",
    )
    parser.add_argument(
        "--margin",
        type=float,
        help="smallest difference of accuracy that counts; default: eval.margin of the baseline",
    )
    parser.add_argument(
        "--margin-kl",
        type=float,
        help="smallest difference of KL that counts, as a share of the baseline's; default: "
        "eval.margin_kl of the baseline",
    )
    flags, overrides = parser.parse_known_args(list(argv))
    if flags.seeds > _MOST_SEEDS:
        raise ConfigError(f"seeds {flags.seeds}: expected at most {_MOST_SEEDS}; set --seeds")
    stop = processes.Stop()
    sweep(
        flags.config,
        [arm.strip() for arm in flags.arms.split(",") if arm.strip()],
        range(flags.seeds),
        flags.workdir,
        overrides=overrides,
        baseline=flags.baseline,
        margin=flags.margin,
        margin_kl=flags.margin_kl,
        has_controls=not flags.no_controls,
        command=["opd-jax", "sweep", *argv],
        stop=stop,
    )
    return stop.status


def sweep(
    config_file: str,
    arms: Sequence[str],
    seeds: Sequence[int],
    workdir: str,
    *,
    overrides: Sequence[str] = (),
    baseline: str = "",
    margin: float | None = None,
    margin_kl: float | None = None,
    has_controls: bool = True,
    command: Sequence[str] = (),
    stop: processes.Stop | None = None,
) -> dict[str, Any] | None:
    """Train what is not finished, write ``WORKDIR/sweep.json`` and print the comparison.

    All arms of a seed run before the next seed, so that a sweep cut short compares fewer seeds.
    Programs are compiled once for all runs that are alike in what is static.

    Args:
      config_file: ``FILE`` or ``FILE:args`` with an argument ``arm``.
      arms: its values; ``NAME:key=value:...`` gives the file further arguments.
      seeds: values of ``seed``, each once.
      workdir: of the sweep.
      overrides: ``--config.group.key=value`` flags for every run.
      baseline: the arm that the others are compared with; empty: ``full``, else the first.
      margin, margin_kl: the smallest differences of accuracy and KL that count, see ``Margins``;
        default: those of the baseline's config.
      has_controls: whether every arm that weighs positions is run again with the same weights
        dealt out at random.
      command: goes into every ``run.json``.
      stop: the wish to stop, where the caller wants to know of it.

    Returns:
      The content of ``sweep.json``; None where a signal stopped it (the same call goes on).

    Raises:
      ConfigError: an arm that cannot be resolved, or runs that cannot be compared; nothing has run.
      WorkdirError: a folder holds a run with another config, other problems or another schedule.
      NonFiniteError, CheckpointError: as ``train.train``.
    """
    if not seeds or len({*seeds}) < len(seeds):
        raise ConfigError(f"seeds {[*seeds]}: expected different ones, at least one; set --seeds")
    arms, baseline = list(arms), _baseline(arms, baseline)
    runs = {arm: _resolve(config_file, arm, overrides) for arm in arms}
    spec = runs[baseline].eval
    margins = Margins(
        spec.margin if margin is None else margin,
        spec.margin_kl if margin_kl is None else margin_kl,
    )
    controls: dict[str, str] = {}
    if has_controls:
        runs, controls = budget.with_controls(runs)
    arms = list(runs)
    for arm, control in controls.items():
        say(f"arm {arm} weighs positions: {control}, its control of equal budget, is run too")
    for arm in arms:
        check_comparable(baseline, runs[baseline], arm, runs[arm])
    folders = [Path(workdir) / folder_name(arm) / f"seed-{seed}" for seed in seeds for arm in arms]
    models = {model.path for run in runs.values() for model in (run.student, run.teacher)}
    pins = hub.pins(sorted(models), folders, say=say)  # once: all runs are of the same models
    jobs = [
        Job(
            arm,
            hub.pinned_run(dataclasses.replace(runs[arm], seed=seed), pins),
            Path(workdir) / folder_name(arm) / f"seed-{seed}",
        )
        for seed in seeds
        for arm in arms
    ]
    todo = [job for job in jobs if not is_finished(job)]
    check_lengths(jobs)
    say(f"{len(jobs)} runs, {len(jobs) - len(todo)} of them finished, in {workdir}")
    # One for all runs: a signal also counts where a run is at its end.
    with stop or processes.Stop() as stop:
        for number, job in enumerate(todo):
            say(f"== {number + 1}/{len(todo)}: arm {job.arm}, seed {job.run.seed}")
            done = train.train(job.run, str(job.folder), command=command, stop=stop, pins=pins)
            left = len(todo) - number - done["is_finished"]
            if left and stop.everywhere():
                say(f"stopped by {stop.signal}, {left} runs left; the same command goes on")
                return None
    processes.meet("sweep")  # what process 0 has written is there before others read it
    result = comparison.summarise(jobs, baseline, margins=margins)
    result["predictions"] = budget.predictions(runs)
    result["budget"] = budget.compare(jobs, controls, margins)
    path = Path(workdir) / "sweep.json"
    if jax.process_index() == 0:
        text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False)
        files.write_atomic(path, text + "\n")
    for line in (*comparison.table(result), *budget.table(result["budget"])):
        say(line)
    for arm, text in result["predictions"].items():
        say(f"predicted of {arm}: {text}")
    say(f"more in {path}")
    return result


def folder_name(arm: str) -> str:
    """The folder of an arm under the workdir."""
    return arm.replace(":", "-")


def _baseline(arms: Sequence[str], baseline: str) -> str:
    names = [folder_name(arm) for arm in arms]
    if not arms or len({*names}) < len(names) or any("/" in name for name in names):
        raise ConfigError(
            f"arms {','.join(arms)!r}: expected different names that can be folders, e.g. "
            "full,rock; set --arms"
        )
    if baseline and baseline not in arms:
        raise ConfigError(
            f"baseline {baseline!r}: expected one of the arms {', '.join(arms)}; set --baseline"
        )
    return baseline or (BASELINE if BASELINE in arms else arms[0])


def _resolve(config_file: str, arm: str, overrides: Sequence[str]) -> RunConfig:
    file, _, given = config_file.partition(":")
    name, *further = arm.split(":")
    argument = ",".join(filter(None, [given, f"arm={name}", *further]))
    if any(flag.lstrip("-").partition("=")[0] == "config.seed" for flag in overrides):
        raise ConfigError(
            "--config.seed is given: expected the seeds 0, 1, ... of a sweep; set --seeds instead"
        )
    loaded, _ = config.load([f"--config={file}:{argument}", *overrides])
    run = config.resolve(loaded)
    if not run.eval.every:
        raise ConfigError(
            "eval.every is 0: expected evaluations, which are what a sweep compares; "
            "set --config.eval.every"
        )
    return run


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
    """Whether a run is there whose result counts.

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
