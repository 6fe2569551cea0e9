"""Controls of equal budget in a sweep: as much weight as an arm gives, dealt out at random.

An arm that keeps a quarter of the positions is not explained by *which* ones it keeps before it is
better than any quarter. The control of weights by position is the same run with
``position.shuffled``; that of a gate on types, an arm that gates positions at random (``rock.mode``
``random``), whose share is that of the gated types as far as it was known before.
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
_NATS = (1.0, "+.4f", "nats")
_SCHEDULE = ("inside", "start", "ramp", "until")  # of a gate: how much weight, and when


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


def contrasts(
    runs: Mapping[str, RunConfig], controls: Mapping[str, str]
) -> tuple[list[tuple[str, str]], list[str]]:
    """Pairs of an arm and a control of its budget, and the arms with a gate on types that lack one.

    Args:
      runs: the arms, those of the controls among them.
      controls: what :func:`with_controls` found.
    """
    pairs, alone = [*controls.items()], []
    for arm, run in runs.items():
        if run.rock.has_members and run.position.mode == "off":
            own = [(arm, other) for other, control in runs.items() if _is_dealt(control, run)]
            pairs += own
            alone += [] if own else [arm]
    return pairs, alone


def _is_dealt(control: RunConfig, run: RunConfig) -> bool:
    """Whether a run gates as another does, but positions at random in place of types."""
    alike = dataclasses.replace(control, rock=run.rock, prediction=run.prediction)
    schedules = [[getattr(x.rock, name) for name in _SCHEDULE] for x in (control, run)]
    return control.rock.mode == "random" and alike == run and schedules[0] == schedules[1]


def compare(
    jobs: Sequence[Job],
    pairs: Sequence[tuple[str, str]],
    masked: Mapping[str, float | None],
    margins: Margins,
) -> list[dict[str, Any]]:
    """Each arm against its control: accuracy and KL as in ``sweep.json``'s comparisons, and costs.

    ``masked_share`` and ``masked_share_against`` say how equal the budgets were in truth.
    ``kept_share`` is the share of scored positions with weight, ``head_products`` what was
    multiplied by the heads, of what training on all positions would take, ``step_s`` the median
    step; all are means over steps and seeds.

    Args:
      jobs: finished runs, those of the controls among them.
      pairs: of an arm and its control.
      masked: share of positions whose weight each arm changed.
      margins: the smallest differences that count.
    """
    found = []
    for arm, control in pairs:
        pair = [[job for job in jobs if job.arm == name] for name in (control, arm)]
        right = [[arms.graded_problems(job)[1] for job in own] for own in pair]
        kl = [[arms.evaluated(job, "kl_nats") for job in own] for own in pair]
        known = {"arm": arm, "against": control, "masked_share": masked[arm]}
        known |= {"masked_share_against": masked[control], **_costs(pair[1])}
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
    width, other = (max(len(row[name]) for row in rows) for name in ("arm", "against"))
    lines = [
        "controls of equal budget: against the same weights dealt to positions at random",
        f"{'arm':<{width}} {'against':<{other}} {'masked':>13} {'head':>6} {'step':>7}  change",
    ]
    told: tuple[str, str] | None = None
    for row in rows:
        unit, form, what = (0.01, "+.1f", "points") if row["metric"] == "accuracy" else _NATS
        ends = [row["delta"], row["low"], row["high"]]
        delta, low, high = ("-" if x is None else format(x / unit, form) for x in ends)
        costs = "".ljust(28)
        if told != (told := (row["arm"], row["against"])):
            shares = f"{_share(row['masked_share'])} / {_share(row['masked_share_against'])}"
            costs = f"{shares:>13} {_share(row['head_products']):>6} {_seconds(row['step_s']):>7}"
        lines.append(
            f"{row['arm']:<{width}} {row['against']:<{other}} {costs}  {row['metric']} {delta} "
            f"{what} [{low}, {high}]  {row['verdict']}"
        )
    return lines


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}s"


def predictions(runs: Mapping[str, RunConfig]) -> dict[str, str]:
    """What was written down of each arm before it was run."""
    return {arm: run.prediction for arm, run in runs.items() if run.prediction}
