"""Arms of a sweep side by side: what each masked, what came of it, how it differs from a baseline.

The unit is a run's workdir; what is read are its ``summary.json``, ``metrics.jsonl`` and
``graded.jsonl``.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats as distributions

from opd_jax import stats
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
_COLUMNS = 100


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a sweep, and its workdir."""

    arm: str
    run: RunConfig
    folder: Path


def summarise(jobs: Sequence[Job], baseline: str) -> dict[str, Any]:
    """Read the finished runs and compare each arm with the baseline.

    Means over seeds carry Student's t intervals. Accuracy is compared by a bootstrap over problems
    with Student's t for the seeds, paired in both; KL by a paired t-test over seeds. The p-values
    of all comparisons are adjusted together (Benjamini-Hochberg). With one seed a mean and a change
    of KL have no interval, and that of a change of accuracy stands for the problems alone.

    Args:
      jobs: finished runs; those of one seed pair up.
      baseline: the arm to compare with.

    Raises:
      WorkdirError: runs of different length, learning rates or prompts.
    """
    arms = list(dict.fromkeys(job.arm for job in jobs))
    summaries = {job: run_files.summary(job.folder) for job in jobs}
    lines = {job: _trained(job) for job in jobs}
    graded = {job: graded_problems(job) for job in jobs}
    _check_alike(jobs, summaries, lines, graded)
    rows = []
    for arm in arms:
        own = [job for job in jobs if job.arm == arm]
        metrics = {}
        for name in METRICS:
            values = [_value(summaries[job], lines[job], name) for job in own]
            ends = {k: v for k, v in over_seeds(values).items() if k != "p"}
            metrics[name] = ends | {"values": values}
        rows.append(
            {
                "arm": arm,
                "masked_share": over_seeds([_masked_share(job, lines[job]) for job in own])["mean"],
                "normaliser": own[0].run.train.normaliser,
                "runs": [str(job.folder) for job in own],
                "seeds": [job.run.seed for job in own],
                "metrics": metrics,
            }
        )
    before = [summaries[job]["before"] for job in jobs if job.arm == baseline]
    return {
        "baseline": baseline,
        "arms": rows,
        "start": {name: over_seeds([x.get(name) for x in before])["mean"] for name in METRICS},
        "comparisons": _comparisons(rows, graded, baseline),
        "note": _note(len({job.run.seed for job in jobs}), baseline),
    }


def _value(
    summary: run_files.Summary, lines: Sequence[Mapping[str, Any]], name: str
) -> float | None:
    if name == "seconds":
        return summary["seconds"]
    if name == "step_s":
        return statistics.median(line["step_s"] for line in lines) if lines else None
    return summary["after"].get(name)


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


def _comparisons(
    rows: Sequence[dict[str, Any]],
    graded: dict[Job, tuple[list[int], np.ndarray]],
    baseline: str,
) -> list[dict[str, Any]]:
    """Each arm against the baseline; rows of one arm stand in the order of the seeds."""
    base = next(row for row in rows if row["arm"] == baseline)
    right = {
        row["arm"]: [x for job, (_, x) in graded.items() if job.arm == row["arm"]] for row in rows
    }
    found = []
    for row in rows:
        if row is base:
            continue
        if right[baseline][0].size:
            change = stats.hierarchical_bootstrap(right[baseline], right[row["arm"]])
            found.append({"arm": row["arm"], "metric": "accuracy", **dataclasses.asdict(change)})
        values = [x["metrics"]["kl_nats"]["values"] for x in (base, row)]
        if None not in values[0] + values[1]:
            change = over_seeds(list(np.subtract(values[1], values[0])))
            found.append(
                {"arm": row["arm"], "metric": "kl_nats", "delta": change.pop("mean"), **change}
            )
    tested = [comparison for comparison in found if comparison["p"] is not None]
    adjusted = iter(stats.bh_adjusted([comparison["p"] for comparison in tested]))
    for comparison in found:
        is_tested = comparison["p"] is not None
        comparison["p_adjusted"] = float(next(adjusted)) if is_tested else None
    return found


def over_seeds(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean of one value per seed with Student's t interval and the p-value of its being 0.

    A bootstrap of a handful of seeds would be too sure of itself. All are None where a value was
    not measured, and all but the mean with a single one.
    """
    known = [float(value) for value in values if value is not None]
    empty: dict[str, float | None] = {"mean": None, "low": None, "high": None, "p": None}
    if not known or len(known) < len(values):
        return empty
    mean, free = float(np.mean(known)), len(known) - 1
    if not free:
        return empty | {"mean": mean}
    error = float(np.std(known, ddof=1)) / math.sqrt(len(known))
    reach = error * float(distributions.t.ppf((1 + stats.LEVEL) / 2, free))
    p = 2 * float(distributions.t.sf(abs(mean) / error, free)) if error else float(mean == 0)
    return {"mean": mean, "low": mean - reach, "high": mean + reach, "p": p}


def _masked_share(job: Job, lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Share of scored positions whose weight the gate changed, over the steps since its start."""
    shares = [
        line["gated_share"]
        for line in lines
        if line["step"] > job.run.rock.start and line["gated_share"] is not None
    ]
    return float(np.mean(shares)) if shares else None


def graded_problems(job: Job) -> tuple[list[int], np.ndarray]:
    """Indices of the prompts graded last, and the share of right answers to each."""
    path = job.folder / "graded.jsonl"
    lines = run_files.load_lines(path, run_files.GradedLine) if path.exists() else []
    if not lines:
        return [], np.zeros(0)
    return lines[-1]["index"], np.asarray([np.mean(right) for right in lines[-1]["correct"]])


def _trained(job: Job) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` about training steps."""
    return [line for line in run_files.metrics(job.folder) if "loss" in line]


def _note(seeds: int, baseline: str) -> str:
    level = f"{stats.LEVEL:.0%}"
    if seeds == 1:
        return (
            f"one seed: the {level} intervals of changes of accuracy against {baseline} stand for "
            "the problems alone, and other values have none; run more seeds"
        )
    return (
        f"{level} intervals over {seeds} seeds: Student's t for means and for changes of KL, "
        "paired by seed; these and a bootstrap over problems, paired too, for changes of "
        f"accuracy against {baseline}; p-values adjusted over all comparisons (Benjamini-Hochberg)"
    )


def table(result: dict[str, Any]) -> list[str]:
    """The result for a reader: one line per arm, changes against the baseline with intervals.

    Changes of accuracy are in percentage points.
    """
    width = max(len(row["arm"]) for row in result["arms"])
    against = f"against {result['baseline']}"
    lines = [
        f"{'arm':<{width}} {'masked':>7} {'accuracy':>9} {'points ' + against:>24} {'p adj.':>7}"
        f" {'KL nats':>8} {against:>26} {'p adj.':>7}"
    ]
    changes = {(found["arm"], found["metric"]): found for found in result["comparisons"]}
    for row in result["arms"]:
        parts = [f"{row['arm']:<{width}} {_show(row['masked_share'], '.1%'):>7}"]
        for name, spec, unit, moved, columns in (
            ("accuracy", ".1%", 0.01, "+.1f", (9, 24)),
            ("kl_nats", ".4f", 1.0, "+.4f", (8, 26)),
        ):
            change = changes.get((row["arm"], name), {"p_adjusted": None})
            text = ""
            if "delta" in change:
                delta, *ends = (
                    _show(None if change[key] is None else change[key] / unit, moved)
                    for key in ("delta", "low", "high")
                )
                text = f"{delta} [{', '.join(ends)}]"
            parts.append(
                f"{_show(row['metrics'][name]['mean'], spec):>{columns[0]}} {text:>{columns[1]}}"
                f" {_show(change['p_adjusted'], '.2g'):>7}"
            )
        lines.append(" ".join(parts))
    start = result["start"]
    lines.append(
        f"before training: accuracy {_show(start['accuracy'], '.1%')}, "
        f"KL {_show(start['kl_nats'], '.4f')} nats"
    )
    return [*lines, *textwrap.wrap(result["note"], _COLUMNS)]


def _show(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
