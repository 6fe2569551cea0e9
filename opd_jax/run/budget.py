"""Weights by position in a sweep: every such arm beside as much weight, dealt out at random.

An arm that keeps a quarter of the positions is not explained by *which* ones it keeps before it is
better than any quarter. The control is the same run with ``position.shuffled``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opd_jax.run import arms
from opd_jax.run.arms import Job, Margins
from opd_jax.spec import RunConfig
from opd_jax.store import run_files

_RANDOM = ("off", "random", "random_window")  # need no control, for they are one
SUFFIX = "_shuffled"


def with_controls(runs: Mapping[str, RunConfig]) -> tuple[dict[str, RunConfig], dict[str, str]]:
    """The arms with the controls that they lack, and the control of each arm that has one."""
    every: dict[str, RunConfig] = {}
    controls: dict[str, str] = {}
    for arm, run in runs.items():
        every[arm] = run
        if run.position.mode in _RANDOM or run.position.shuffled:
            continue
        spec = dataclasses.replace(run.position, shuffled=True)
        controls[arm] = f"{arm}{SUFFIX}"
        every[controls[arm]] = dataclasses.replace(run, position=spec, prediction="")
    return every, controls


def compare(
    jobs: Sequence[Job], controls: Mapping[str, str], margins: Margins
) -> list[dict[str, Any]]:
    """Each arm against its control: accuracy and KL as in ``sweep.json``'s comparisons, and costs.

    ``kept_share`` is the share of scored positions with weight, ``head_products`` what was
    multiplied by the heads, of what training on all positions would take, ``step_s`` the median
    step; all are means over steps and seeds.

    Args:
      jobs: finished runs, those of the controls among them.
      controls: the control of each arm.
      margins: the smallest differences that count.
    """
    found = []
    for arm, control in controls.items():
        pair = [[job for job in jobs if job.arm == name] for name in (control, arm)]
        right = [[arms.graded_problems(job)[1] for job in own] for own in pair]
        kl = [[arms.evaluated(job, "kl_nats") for job in own] for own in pair]
        known = {"arm": arm, "against": control, **_costs(pair[1])}
        found += [known | change for change in arms.compare_pair(right, kl, margins)]
    arms.judge(found)
    return found


def _costs(jobs: Sequence[Job]) -> dict[str, float | None]:
    lines = [line for job in jobs for line in run_files.metrics(job.folder) if "loss" in line]

    def mean(name: str) -> float | None:
        values = [float(x) for line in lines if (x := line.get(name)) is not None]
        return float(np.mean(values)) if values else None

    seconds = [float(x) for line in lines if (x := line.get("step_s")) is not None]
    return {
        "kept_share": mean("kept_share"),
        "head_products": mean("head_products"),
        "step_s": float(np.median(seconds)) if seconds else None,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The comparisons for a reader; empty where there are none."""
    if not rows:
        return []
    width = max(len(row["arm"]) for row in rows)
    lines = [
        "against the same weights dealt to positions at random:",
        f"{'arm':<{width}} {'kept':>6} {'head':>6} {'step':>7}  change",
    ]
    for row in rows:
        is_accuracy = row["metric"] == "accuracy"
        unit, form, what = (0.01, "+.1f", "points") if is_accuracy else (1.0, "+.4f", "nats")
        ends = [row["delta"], row["low"], row["high"]]
        delta, low, high = ("-" if x is None else format(x / unit, form) for x in ends)
        costs = "".ljust(22)
        if is_accuracy or row["arm"] not in {r["arm"] for r in rows if r["metric"] == "accuracy"}:
            kept, head, seconds = (row[n] for n in ("kept_share", "head_products", "step_s"))
            costs = f"{_share(kept):>6} {_share(head):>6} {_seconds(seconds):>7} "
        lines.append(
            f"{row['arm']:<{width}} {costs} {row['metric']} {delta} {what} [{low}, {high}]  "
            f"{row['verdict']}"
        )
    return lines


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}s"


def predictions(runs: Mapping[str, RunConfig]) -> dict[str, str]:
    """What was written down of each arm before it was run."""
    return {arm: run.prediction for arm, run in runs.items() if run.prediction}
