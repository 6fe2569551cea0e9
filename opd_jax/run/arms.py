"""Arms of a sweep side by side: what each masked, what came of it, how it differs from a baseline.

No difference found is not yet "as good as": that takes a margin, the smallest difference that
counts, and a test that the difference is below it.

The unit is a run's workdir; what is read are its ``summary.json``, ``metrics.jsonl``,
``graded.jsonl`` and, where it was evaluated with further seeds, ``evaluations/``.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opd_jax import changes, stats
from opd_jax.run import repeats
from opd_jax.spec import RunConfig
from opd_jax.store import run_files
from opd_jax.store import workdir as workdirs

# ``step_s`` is the median step and compares speeds. ``seconds`` is the whole run, with loading,
# evaluating and compiling: arms that come later find their programs compiled.
METRICS = (
    "accuracy",
    "unparsed_share",
    "kl_nats",
    "kl_gated",
    "kl_ungated",
    "mean_length",
    "seconds",
    "step_s",
)


@dataclasses.dataclass(frozen=True)
class Margins:
    """The smallest differences that count; below them arms are equivalent.

    Attributes:
      accuracy: a share; 0.02 is two percentage points.
      kl: of KL, as a share of the baseline's.

    Raises:
      ValueError: one that is not between 0 and 1.
    """

    accuracy: float = 0.02
    kl: float = 0.05

    def __post_init__(self):
        for flag, value in (("--margin", self.accuracy), ("--margin-kl", self.kl)):
            if not 0 < value < 1:
                raise ValueError(
                    f"{flag} is {value}: expected a share between 0 and 1, the smallest "
                    f"difference that counts; change {flag}"
                )


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
      arm: its name.
      run: its config.
      folder: its workdir.
      evaluations: evaluation seeds, over which its evaluations are averaged; see ``repeats``.
    """

    arm: str
    run: RunConfig
    folder: Path
    evaluations: tuple[int, ...] = (0,)

    @property
    def name(self) -> str:
        """``ARM/seed-N``, below the sweep's workdir."""
        return f"{self.folder.parent.name}/{self.folder.name}"


MARGINS = Margins()


def summarise(jobs: Sequence[Job], baseline: str, *, margins: Margins = MARGINS) -> dict[str, Any]:
    """Read the finished runs and compare each arm with the baseline.

    Means over seeds carry Student's t intervals, that of accuracy one of problems and seeds.
    Accuracy is compared by a bootstrap over problems with Student's t for the seeds, paired in
    both; KL by a paired t-test over seeds. Each comparison is tested twice: for a difference, and
    for one below the margin (two one-sided tests). The p-values of all comparisons are adjusted
    together (Benjamini-Hochberg), either test by itself.

    With one seed a mean of anything but accuracy has no interval, KL is not tested, and what is
    said of accuracy stands for these two runs on further problems, not for the arms: by McNemar's
    exact test where every problem has one answer. Evaluation seeds are averaged within a run, for
    each problem: they take the luck of the draws out of it, and are no seeds of training.

    Args:
      jobs: finished runs; those of one seed pair up.
      baseline: the arm to compare with.
      margins: the smallest differences that count.

    Raises:
      WorkdirError: runs of different length, learning rates or prompts.
    """
    arms = list(dict.fromkeys(job.arm for job in jobs))
    summaries = {job: run_files.summary(job.folder) for job in jobs}
    lines = {job: _trained(job) for job in jobs}
    results = {job: repeats.results(job.folder, job.evaluations) for job in jobs}
    graded = {job: graded_problems(job) for job in jobs}
    _check_alike(jobs, summaries, lines, graded)
    rows = []
    for arm in arms:
        own = [job for job in jobs if job.arm == arm]
        metrics = {}
        for name in METRICS:
            values = [_value(name, summaries[job], results[job], lines[job]) for job in own]
            ends = {k: v for k, v in over_seeds(values).items() if k != "p"}
            if name == "accuracy":
                ends |= accuracy_interval([graded[job][1] for job in own])
            metrics[name] = ends | {"values": values} | _spread([results[job] for job in own], name)
        rows.append(
            {
                "arm": arm,
                "masked_share": over_seeds([_masked_share(job, lines[job]) for job in own])["mean"],
                "normaliser": own[0].run.train.normaliser,
                "runs": [str(job.folder) for job in own],
                "seeds": [job.run.seed for job in own],
                "evaluation_seeds": list(own[0].evaluations),
                "metrics": metrics,
            }
        )
    first = [job for job in jobs if job.arm == baseline]
    before = [summaries[job]["before"] for job in first]
    # One model, whatever the seed: answers differ, problems are the units.
    graded_before = [graded_problems(job, step=0)[1] for job in first]
    return {
        "baseline": baseline,
        "margins": dataclasses.asdict(margins),
        "arms": rows,
        "start": {name: over_seeds([x.get(name) for x in before])["mean"] for name in METRICS},
        "start_interval": accuracy_interval([_mean_of(graded_before)]),
        "teacher": next((s.get("teacher") for s in summaries.values() if s.get("teacher")), None),
        "comparisons": _comparisons(jobs, rows, graded, baseline, margins),
        "note": _note(
            len({job.run.seed for job in jobs}), len(jobs[0].evaluations), baseline, margins
        ),
    }


def _value(
    name: str,
    summary: run_files.Summary,
    results: Sequence[run_files.Evaluation],
    lines: Sequence[Mapping[str, Any]],
) -> float | None:
    if name == "seconds":
        return summary["seconds"]
    if name == "step_s":
        return statistics.median(line["step_s"] for line in lines) if lines else None
    return repeats.mean(results, name)


def evaluated(job: Job, name: str) -> float | None:
    """A field of a run's last evaluation, its mean over evaluation seeds; None: not measured."""
    return repeats.mean(repeats.results(job.folder, job.evaluations), name)


def _spread(runs: Sequence[Sequence[run_files.Evaluation]], name: str) -> dict[str, float]:
    """Standard deviation between evaluation seeds of one run, pooled; {} where it is not known."""
    known = [[x for result in own if (x := result.get(name)) is not None] for own in runs]
    if any(len(values) < 2 for values in known):
        return {}
    return {"evaluation_sd": statistics.fmean(statistics.variance(v) for v in known) ** 0.5}


def _check_alike(
    jobs: Sequence[Job],
    summaries: dict[Job, run_files.Summary],
    lines: dict[Job, list[dict[str, Any]]],
    graded: dict[Job, tuple[list[int], np.ndarray]],
) -> None:
    """Refuse runs of different length, learning rates, training prompts or graded problems."""
    first = jobs[0]
    rates = {job: np.array([line["lr"] for line in lines[job]]) for job in jobs}
    for job in jobs:
        # A run whose prompts are used up ends before its last step.
        is_cut = bool(job.run.data.epochs)
        steps = summaries[first]["steps"] if is_cut else job.run.train.steps
        if summaries[job]["steps"] != steps:
            raise workdirs.WorkdirError(
                f"{job.folder} has {summaries[job]['steps']} steps: expected {steps}, as long as "
                "the others; set --config.train.steps to the most steps any run has, or give "
                "another --workdir"
            )
        if not (
            len(rates[job]) == len(rates[first])
            and np.allclose(rates[job], rates[first], rtol=1e-5, atol=0)
        ):
            raise workdirs.WorkdirError(
                f"{job.folder} was trained at other learning rates than {first.folder}, as a run "
                "is that was first meant to have fewer steps: expected one schedule for all; give "
                "another --workdir"
            )
        digests = [(workdirs.read_run(x.folder) or {}).get("data") for x in (first, job)]
        if digests[0] != digests[1]:
            raise workdirs.WorkdirError(
                f"{job.folder} was trained on other prompts (digest {digests[1]}) than "
                f"{first.folder} ({digests[0]}): expected the same; give another --workdir"
            )
        if graded[job][0] != graded[first][0]:
            raise workdirs.WorkdirError(
                f"{job.folder} was graded on {len(graded[job][0])} prompts and {first.folder} on "
                f"{len(graded[first][0])}, not the same ones: expected the same, to pair them; "
                "give another --workdir"
            )


def accuracy_interval(
    right: Sequence[np.ndarray], *, resamples: int = 10_000
) -> dict[str, float | None]:
    """Ends of the interval of accuracy: of problems and, where there are several, of seeds.

    Args:
      right: seed by seed the shares of right answers to each problem; {} comes of none.
      resamples: of the bootstrap over problems.
    """
    if not len(right) or not right[0].size:
        return {}
    ends = changes.accuracy_interval(right, resamples=resamples)
    return dict(zip(("low", "high"), ends, strict=True))


def _comparisons(
    jobs: Sequence[Job],
    rows: Sequence[dict[str, Any]],
    graded: dict[Job, tuple[list[int], np.ndarray]],
    baseline: str,
    margins: Margins,
) -> list[dict[str, Any]]:
    base = next(row for row in rows if row["arm"] == baseline)
    right = {row["arm"]: [graded[j][1] for j in jobs if j.arm == row["arm"]] for row in rows}
    found = []
    for row in rows:
        if row is base:
            continue
        kl = [x["metrics"]["kl_nats"]["values"] for x in (base, row)]
        pair = [right[x["arm"]] for x in (base, row)]
        found += [{"arm": row["arm"], **change} for change in compare_pair(pair, kl, margins)]
    judge(found)
    return found


def compare_pair(
    right: Sequence[Sequence[np.ndarray]],
    kl: Sequence[Sequence[float | None]],
    margins: Margins,
) -> list[dict[str, Any]]:
    """The changes from one arm to another, by each metric that both have.

    Args:
      right: of both, seed by seed the shares of right answers to each problem.
      kl: of both, one value a seed.
      margins: the smallest differences that count.
    """
    found = []
    if right[0][0].size:
        change = compare_accuracy(right[0], right[1], margins.accuracy)
        found.append({"metric": "accuracy", **change})
    if None not in (*kl[0], *kl[1]):
        base, arm = (np.asarray(values, float) for values in kl)
        change = compare_kl(arm - base, margins.kl * float(base.mean()))
        found.append({"metric": "kl_nats", **change})
    return found


def judge(found: Sequence[dict[str, Any]]) -> None:
    """Adjust the p-values of comparisons together, either test by itself, and add verdicts."""
    for name in ("p", "p_equivalent"):
        tested = [comparison for comparison in found if comparison[name] is not None]
        adjusted = iter(stats.bh_adjusted([comparison[name] for comparison in tested]))
        for comparison in found:
            is_tested = comparison[name] is not None
            comparison[f"{name}_adjusted"] = float(next(adjusted)) if is_tested else None
    for comparison in found:
        p, away = comparison["p_adjusted"], comparison["p_equivalent_adjusted"]
        comparison["verdict"] = "not tested" if p is None else stats.verdict(p, away)


def compare_accuracy(
    base: Sequence[np.ndarray],
    arm: Sequence[np.ndarray],
    margin: float,
    *,
    resamples: int = 10_000,
) -> dict[str, Any]:
    """The change of accuracy from base to arm, as a row of ``sweep.json`` has it.

    Args:
      base, arm: seed by seed the shares of right answers to each problem.
      margin: the smallest difference that counts.
      resamples: of the bootstrap over problems.
    """
    change = stats.hierarchical_bootstrap(base, arm, margin=margin, resamples=resamples)
    change = changes.widened(change, np.mean(arm, axis=0) - np.mean(base, axis=0), margin)
    test = "paired bootstrap over seeds and problems"
    if len(base) == 1:
        test = "paired bootstrap over problems"
        if np.isin([base[0], arm[0]], (0, 1)).all():  # one answer to each problem, or as good as
            test = "McNemar, exact, over problems"
            change = dataclasses.replace(change, p=stats.mcnemar(base[0], arm[0]))
    return {**dataclasses.asdict(change), "margin": margin, "test": test}


def compare_kl(change_S: np.ndarray, margin: float) -> dict[str, Any]:
    """The change of KL, one value a seed, as a row of ``sweep.json`` has it."""
    known = {"margin": margin, "test": "paired t over seeds"}
    if len(change_S) == 1 or not margin > 0:
        found = over_seeds(change_S.tolist())
        return {"delta": found.pop("mean"), **found, "p_equivalent": None, **known}
    return {**dataclasses.asdict(stats.student(change_S, margin)), **known}


def over_seeds(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean of one value per seed with Student's t interval and the p-value of its being 0.

    All are None where a value was not measured, and all but the mean with a single one.
    """
    known = [float(value) for value in values if value is not None]
    empty: dict[str, float | None] = {"mean": None, "low": None, "high": None, "p": None}
    if not known or len(known) < len(values):
        return empty
    found = stats.student(known)
    if len(known) == 1:
        return empty | {"mean": found.delta}
    return {"mean": found.delta, "low": found.low, "high": found.high, "p": found.p}


def _masked_share(job: Job, lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Share of scored positions whose weight the gate changed, over the steps since its start."""
    shares = [
        line["gated_share"]
        for line in lines
        if line["step"] > job.run.rock.start and line["gated_share"] is not None
    ]
    return float(np.mean(shares)) if shares else None


def graded_problems(job: Job, *, step: int | None = None) -> tuple[list[int], np.ndarray]:
    """Indices of the prompts graded at the end (or at a step), and shares of right answers."""
    if step is None:
        return repeats.problems(job.folder, job.evaluations)
    line = run_files.last_graded(job.folder, step=step)
    if line is None:
        return [], np.zeros(0)
    return line["index"], np.asarray([np.mean(right) for right in line["correct"]])


def _mean_of(right: Sequence[np.ndarray]) -> np.ndarray:
    """Share of right answers to each problem over several gradings of the same ones."""
    alike = len({len(shares) for shares in right}) == 1
    return np.mean(right, axis=0) if alike else np.zeros(0)


def _trained(job: Job) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` about training steps."""
    return [line for line in run_files.metrics(job.folder) if "loss" in line]


def _note(seeds: int, evaluations: int, baseline: str, margins: Margins) -> str:
    level = f"{stats.LEVEL:.0%}"
    each = f"; each run evaluated {evaluations} times, averaged" * (evaluations > 1)
    counts = (
        f"equivalent: a difference below {100 * margins.accuracy:g} points of accuracy, or "
        f"{margins.kl:.0%} of the KL of {baseline}, by two one-sided tests; p-values adjusted over "
        "all comparisons, of either kind (Benjamini-Hochberg)"
    )
    if seeds == 1:
        return (
            f"one seed: {level} intervals and p-values of accuracy stand for these runs on further "
            "problems, not for the arms, which other seeds would train otherwise; other values "
            f"have none; run more seeds{each}. {counts}"
        )
    return (
        f"{level} intervals over {seeds} seeds: Student's t for means and for changes of KL, "
        "paired by seed; these and a bootstrap over problems, paired too, for accuracy and its "
        f"changes against {baseline}{each}. {counts}"
    )
