"""The section of a run's curves: how training went, run beside run and beside the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from opd_jax.report import accuracy, curve_figures, markup, style
from opd_jax.report.markup import Section
from opd_jax.report.outcome import Outcome
from opd_jax.store import run_files
from opd_jax.store.run_files import RunFiles

_BESIDE = ("kl_nats", "mean_length")  # beside the accuracy


def section(
    runs: Mapping[str, Path], files: Mapping[str, RunFiles], outcomes: Mapping[str, Outcome]
) -> Section:
    """Before, after and the teacher in a table, then the curves. Call inside STYLE's context."""
    if not runs:
        return Section("training", "Training")
    ceiling = next((o.teacher for o in outcomes.values() if o.teacher), None)
    ends = {name: accuracy.intervals(path) for name, path in runs.items()}
    wide, narrow = (
        [curve_figures.runs(files, ceiling, ends, layout)] for layout in (style.WIDE, style.NARROW)
    )
    body = _table(runs, outcomes) + markup.plates(style.with_narrow(wide, narrow))
    return Section("training", "Training", body)


def _table(runs: Mapping[str, Path], outcomes: Mapping[str, Outcome]) -> str:
    summaries = {name: run_files.summary(path) for name, path in runs.items()}
    sides = {
        name: [summary.get("before") or {}, summary.get("after") or {}]
        for name, summary in summaries.items()
    }
    keys = [
        key for key in _BESIDE if any(s.get(key) is not None for p in sides.values() for s in p)
    ]
    has_accuracy = any(o.after for o in outcomes.values())
    has_teacher = any(o.teacher for o in outcomes.values())
    head = ["run", "steps"]
    head += ["accuracy, before → after"] if has_accuracy else []
    head += ["the teacher's", "of the way"] if has_teacher else []
    head += [f"{curve_figures.METRICS[key]}, before → after" for key in keys]
    rows = []
    for name, outcome in outcomes.items():
        row = [name, f"{summaries[name]['steps']:,}"]
        row += [f"{outcome.before or '–'} → {outcome.after or '–'}"] if has_accuracy else []
        if has_teacher:
            way = "–" if outcome.way is None else f"{outcome.way:.0%}"
            row += [str(outcome.teacher or "–"), way]
        row += [" → ".join(style.measured(s.get(key)) for s in sides[name]) for key in keys]
        rows.append(row)
    return markup.table("Before and after, on held-out prompts", head, rows)
