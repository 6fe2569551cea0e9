"""Arms x seeds x evaluation seeds: one queue of runs, then the arms compared with one of them.

An arm is a value of the argument ``arm`` of a config file (see ``configs/opd.py``). Each run is an
ordinary workdir, ``WORKDIR/ARM/seed-N``: it resumes, and a finished one is not run again. Several
at once are processes of this command, each on its part of the machine and told which run is its.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from opd_jax import command as commands
from opd_jax import config, files, processes
from opd_jax.processes import say
from opd_jax.run import arms as comparison
from opd_jax.run import budget, comparable, crew, repeats, standings, train
from opd_jax.run.arms import Job, Margins
from opd_jax.spec import ConfigError, RunConfig
from opd_jax.store import hub
from opd_jax.store import workdir as workdirs

_MOST_SEEDS = 10_000
BASELINE = "full"  # plain distillation, where it is among the arms


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
    parser.add_argument(
        "--eval-seeds",
        type=int,
        default=1,
        help="how often each run is evaluated, with other draws each time, at its end; default 1; "
        "more can be asked for afterwards",
    )
    parser.add_argument(
        "--at-once",
        type=int,
        default=1,
        help="runs at once, each a process with its part of the GPUs or CPU cores; default 1",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="ARM/seed-N",
        help="train this run of the sweep alone and compare nothing: to spread a sweep over "
        "machines; the command without it compares",
    )
    parser.add_argument("--pins", default="{}", help=argparse.SUPPRESS)  # of the process that asks
    parser.add_argument("--workdir", required=True, help="a new folder, or that of the sweep")
    parser.add_argument(
        "--baseline",
        default="",
        help="the arm to compare with; default: full; of a finished sweep another, without running "
        "anything again",
    )
    parser.add_argument(
        "--no-controls",
        action="store_true",
        help="add neither plain distillation (full) where it is not among the arms, nor the "
        "controls of arms that weigh positions",
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
    if not 1 <= flags.seeds <= _MOST_SEEDS:
        raise ConfigError(f"seeds {flags.seeds}: expected 1 to {_MOST_SEEDS} of them; set --seeds")
    stop = processes.Stop()
    if flags.at_once > 1:  # this process trains nothing and leaves the devices to its children
        jax.config.update("jax_platforms", "cpu")
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
        eval_seeds=flags.eval_seeds,
        at_once=flags.at_once,
        only=flags.only,
        known_pins=json.loads(flags.pins),
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
    eval_seeds: int = 1,
    at_once: int = 1,
    only: str = "",
    known_pins: Mapping[str, str] | None = None,
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
      baseline: the arm that the others are compared with; empty: plain distillation, else the
        first.
      margin, margin_kl: the smallest differences of accuracy and KL that count, see ``Margins``;
        default: those of the baseline's config.
      has_controls: whether plain distillation (the file's arm ``full``) is run where it is not
        among the arms, and every arm that weighs positions again with the same weights dealt out at
        random.
      eval_seeds: how often each run is evaluated at its end, with other draws each time.
      at_once: runs at once, each a process of ``command``; see ``crew``.
      only: ``ARM/seed-N``, the one run to train.
      known_pins: commits of Hub names that are known already, see ``hub.pins``.
      command: goes into every ``run.json``; what the processes are started with.
      stop: the wish to stop, where the caller wants to know of it.

    Returns:
      The content of ``sweep.json``; None where a signal stopped it (the same call goes on), and
      where one run alone was asked for.

    Raises:
      ConfigError: an arm that cannot be resolved, or runs that cannot be compared; nothing has run.
      CrewError: the machine has no room for so many at once, or one of them failed.
      WorkdirError: a folder holds a run with another config, other problems or another schedule.
      NonFiniteError, CheckpointError: as ``train.train``.
    """
    if eval_seeds < 1 or at_once < 1:
        raise ConfigError(
            f"eval_seeds {eval_seeds}, at_once {at_once}: expected at least 1 of both; set "
            "--eval-seeds / --at-once"
        )
    if isinstance(arms, str) or not isinstance(seeds, Sequence):
        raise ConfigError(
            f"arms {arms!r}, seeds {seeds!r}: expected lists, such as ['full', 'rock'] and range(3)"
        )
    if not seeds or len({*seeds}) < len(seeds):
        raise ConfigError(f"seeds {[*seeds]}: expected different ones, at least one; set --seeds")
    _check_names(arms)
    runs = {arm: _resolve(config_file, arm, overrides) for arm in arms}
    plain = BASELINE if BASELINE in runs else ""
    if has_controls and not plain:
        runs, plain = _with_plain(config_file, runs, overrides)
    baseline = _baseline(list(runs), baseline, plain)
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
    pairs, alone = budget.contrasts(runs, controls)
    if alone and has_controls:
        say(
            f"{', '.join(alone)}: no arm gates as many positions at random (rock.mode random, such "
            "as random_positions of configs/opd.py) on the same schedule, their control of equal "
            "budget; add one to --arms"
        )
    for arm in arms:
        comparable.check_comparable(baseline, runs[baseline], arm, runs[arm])
    if workdirs.read_run(Path(workdir)) is not None:
        raise workdirs.WorkdirError(
            f"{workdir} is the workdir of a run: expected a new folder, or that of a sweep; give "
            "another --workdir"
        )
    folders = [Path(workdir) / folder_name(arm) / f"seed-{seed}" for seed in seeds for arm in arms]
    models = {path for run in runs.values() for path in run.models}
    # Once: all runs are of the same models.
    pins = dict(known_pins or {}) or hub.pins(sorted(models), folders, say=say)
    jobs = [
        Job(
            arm,
            hub.pinned_run(dataclasses.replace(runs[arm], seed=seed), pins),
            Path(workdir) / folder_name(arm) / f"seed-{seed}",
            tuple(range(eval_seeds)),
        )
        for seed in seeds
        for arm in arms
    ]
    todo = [jobs[i] for i in processes.of_first(lambda: _unfinished(jobs))]
    if only:
        todo = [job for job in _named(only, jobs) if job in todo]
    else:
        say(f"{len(jobs)} runs, {len(jobs) - len(todo)} of them finished, in {workdir}")
    if eval_seeds > 1 and not any(run.eval.temperature for run in runs.values()):
        say(
            "graded answers are greedy (eval.temperature is 0): evaluation seeds change what KL is "
            "measured on, and no accuracy"
        )
    # One for all runs: a signal also counts where a run is at its end.
    with stop or processes.Stop() as stop:
        if at_once > 1:
            is_done = _several(todo, jobs, at_once, pins, command, stop)
        else:
            is_done = _one_by_one(todo, jobs, pins, command, stop)
    if only or not is_done:
        return None
    path = Path(workdir) / "sweep.json"

    def conclude() -> dict[str, Any]:
        result = comparison.summarise(jobs, baseline, margins=margins)
        result["predictions"] = budget.predictions(runs)
        masked = {row["arm"]: row["masked_share"] for row in result["arms"]}
        result["budget"] = budget.compare(jobs, pairs, masked, margins)
        text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False)
        files.write_atomic(path, text + "\n")
        return result

    result = processes.of_first(conclude)
    for line in (*standings.table(result), *budget.table(result["budget"])):
        say(line)
    for arm, text in result["predictions"].items():
        say(f"predicted of {arm}: {text}")
    say(f"more in {path}")
    return result


def _unfinished(jobs: Sequence[Job]) -> list[int]:
    """Numbers of the runs that are not finished; checks that those begun compare."""
    todo = [i for i, job in enumerate(jobs) if not comparable.is_finished(job)]
    comparable.check_lengths(jobs)
    return todo


def _one_by_one(
    todo: Sequence[Job],
    jobs: Sequence[Job],
    pins: Mapping[str, str],
    command: Sequence[str],
    stop: processes.Stop,
) -> bool:
    """Train and evaluate in this process; False where a signal stopped it."""
    others = [job.folder for job in jobs]
    for number, job in enumerate(todo):
        say(f"== {number + 1}/{len(todo)}: arm {job.arm}, seed {job.run.seed}")
        is_done = (
            processes.of_first(functools.partial(comparable.has_trained, job))
            or train.train(
                job.run, str(job.folder), command=command, stop=stop, pins=pins, others=others
            )["is_finished"]
        )
        if is_done:
            is_done = repeats.measure(
                job.run, job.folder, job.evaluations, pins=pins, stop=stop, say=say
            )
        left = len(todo) - number - is_done
        if left and stop.everywhere():
            say(f"stopped by {stop.signal}, {left} runs left; the same command goes on")
            return False
    return True


def _several(
    todo: Sequence[Job],
    jobs: Sequence[Job],
    at_once: int,
    pins: Mapping[str, str],
    command: Sequence[str],
    stop: processes.Stop,
) -> bool:
    """Train and evaluate in processes of their own; False where a signal stopped them."""
    if list(command[:2]) != ["opd-jax", "sweep"] or jax.process_count() > 1:
        raise ConfigError(
            f"{at_once} runs at once: expected the command opd-jax sweep, in one process; leave "
            "--at-once out"
        )
    by_name = {job.name: job for job in todo}
    places = crew.places(min(at_once, max(len(todo), 1)))
    tasks = [
        crew.Task(
            name,
            crew.command(
                *command[1:], "--at-once=1", f"--only={name}", f"--pins={json.dumps(dict(pins))}"
            ),
            job.folder.with_suffix(".log"),
        )
        for name, job in by_name.items()
    ]

    def ended(task: crew.Task) -> str:
        job = by_name[task.name]
        found = {name: comparison.evaluated(job, name) for name in ("accuracy", "kl_nats")}
        return ", ".join(f"{name} {x:.4f}" for name, x in found.items() if x is not None)

    is_done = crew.run(tasks, places, stop, say=say, ended=ended)
    if not is_done:
        left = sum(not comparable.is_finished(job) for job in jobs)
        say(f"stopped by {stop.signal}, {left} runs left; the same command goes on")
    return is_done


def _named(name: str, jobs: Sequence[Job]) -> list[Job]:
    found = [job for job in jobs if job.name == name]
    if not found:
        known = ", ".join(job.name for job in jobs[:4]) + ", ..." * (len(jobs) > 4)
        raise ConfigError(f"only {name!r}: expected a run of this sweep, {known}; set --only")
    return found


def folder_name(arm: str) -> str:
    """The folder of an arm under the workdir."""
    return arm.replace(":", "-")


def _check_names(arms: Sequence[str]) -> None:
    names = [folder_name(arm) for arm in arms]
    if not arms or len({*names}) < len(names) or any("/" in name for name in names):
        raise ConfigError(
            f"arms {','.join(arms)!r}: expected different names that can be folders, e.g. "
            "full,rock; set --arms"
        )


def _with_plain(
    config_file: str, runs: Mapping[str, RunConfig], overrides: Sequence[str]
) -> tuple[dict[str, RunConfig], str]:
    """The arms with plain distillation, and its name; without, where the file has none.

    It has the further arguments that all of the arms have.
    """
    given = [arm.split(":")[1:] for arm in runs]
    name = ":".join([BASELINE, *(x for x in given[0] if all(x in own for own in given))])
    try:
        plain = runs.get(name) or _resolve(config_file, name, overrides)
    except ConfigError as error:
        say(f"without plain distillation: {config_file} has no arm {name} ({error})")
        return dict(runs), ""
    for arm, run in runs.items():
        if dataclasses.replace(plain, prediction=run.prediction) == run:
            return dict(runs), arm
    say(f"{name}, plain distillation, is run too, to compare with (--no-controls: it is not)")
    return {name: plain, **runs}, name


def _baseline(arms: Sequence[str], baseline: str, plain: str) -> str:
    if baseline and baseline not in arms:
        raise ConfigError(
            f"baseline {baseline!r}: expected one of the arms {', '.join(arms)}; set --baseline"
        )
    return baseline or plain or arms[0]


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
