"""The section of a sweep: its arms beside each other, beside step 0 and beside the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_jax.report import accuracy, curve_figures, markup, style
from opd_jax.report.accuracy import Measured
from opd_jax.report.markup import Absent, Section
from opd_jax.store import run_files
from opd_jax.store import workdir as workdirs

_ABSENT = Absent(
    "arms and seeds side by side",
    "opd-jax sweep --config=FILE --arms=full,rock --workdir=DIR, then opd-jax report --sweep=DIR",
)

_COMPARED = ("accuracy", "kl_nats")


def read(folder: Path) -> dict[str, Any]:
    """``sweep.json`` with the paths of its runs by arm under "runs", wherever it lies now.

    Raises:
      WorkdirError: it is missing or damaged.
    """
    path = folder / "sweep.json"
    if not path.exists():
        raise workdirs.WorkdirError(
            f"{folder} has no sweep.json: expected the workdir of an opd-jax sweep that has ended; "
            "give another --sweep, or run the same sweep command to its end"
        )
    sweep = run_files.load(path, run_files.Sweep)
    arms = sweep["arms"]
    runs = {a["arm"]: [folder.joinpath(*Path(run).parts[-2:]) for run in a["runs"]] for a in arms}
    return {**sweep, "runs": runs}


def section(sweep: Mapping[str, Any] | None) -> Section:
    """Table and figures of what :func:`read` found. Call inside STYLE's context."""
    heading = ("sweep", "Arms and seeds")
    if sweep is None:
        return Section(*heading, absent=(_ABSENT,))
    runs = sweep["runs"]
    arms = {arm: [run_files.read(path) for path in paths] for arm, paths in runs.items()}
    asked = (accuracy.ceiling(path) for paths in runs.values() for path in paths)
    ceiling = next((found for found in asked if found), None)
    with run_files.used(Path("sweep.json")):
        wide, narrow = (
            _plates(sweep, arms, ceiling, layout) for layout in (style.WIDE, style.NARROW)
        )
        body = _table(sweep, ceiling) + markup.text(str(sweep.get("note") or ""))
        body += _budget(sweep) + _predictions(sweep)
        body += markup.plates(style.with_narrow(wide, narrow))
    absent = [] if ceiling else [Absent("the teacher's accuracy", "opd-jax sweep, run anew")]
    return Section(*heading, body, tuple(absent))


def _plates(
    sweep: Mapping[str, Any],
    arms: Mapping[str, Sequence[run_files.RunFiles]],
    ceiling: Measured | None,
    layout: style.Layout,
) -> list[style.Plate]:
    plates = [curve_figures.arms(arms, sweep["baseline"], ceiling, layout)]
    if any(row["delta"] is not None for row in sweep["comparisons"]):
        plates.append(curve_figures.comparisons(sweep, layout))
    return plates


def _table(sweep: Mapping[str, Any], ceiling: Measured | None) -> str:
    metrics = [m for m in curve_figures.METRICS if any(m in a["metrics"] for a in sweep["arms"])]
    compared = {(row["arm"], row["metric"]): row for row in sweep["comparisons"]}
    rows: list[list[Any]] = []
    for arm in sweep["arms"]:
        row: list[Any] = [
            arm["arm"],
            "–" if arm["masked_share"] is None else f"{arm['masked_share']:.1%}",
            arm["normaliser"],
            str(len(arm["seeds"])),
        ]
        for metric in metrics:
            small = ""
            difference = compared.get((arm["arm"], metric))
            if difference and difference["delta"] is not None:
                small = f"Δ {_interval(difference, metric, 'delta')}, {_tested(difference)}"
            row.append((_interval(arm["metrics"].get(metric), metric, "mean"), small))
        rows.append(row)
    if start := sweep.get("start"):
        ends = sweep.get("start_interval") or {}
        told = (ends["low"], ends["high"]) if ends.get("low") is not None else None
        first = accuracy.measured(start, told)
        own = {"accuracy": str(first or "–")} | {
            m: style.measured(start.get(m)) for m in metrics if m not in curve_figures.SHARES
        }
        rows.append(["step 0", "–", "–", "–", *(own[metric] for metric in metrics)])
    if ceiling:
        own = [str(ceiling) if metric == "accuracy" else "–" for metric in metrics]
        rows.append(["the teacher", "–", "–", "–", *own])
    head = ["arm", "masked", "normaliser", "seeds", *(curve_figures.METRICS[m] for m in metrics)]
    caption = (
        f"Mean over seeds [interval]; Δ is the difference from {sweep['baseline']} [interval] with "
        f"its p after correction{_of_problems(sweep)}."
    )
    return markup.table(caption, head, rows)


def _budget(sweep: Mapping[str, Any]) -> str:
    """Every arm against its control of equal budget; nothing where no arm has one."""
    pairs: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in sweep.get("budget") or []:
        pairs.setdefault((row["arm"], row["against"]), {})[row["metric"]] = row
    rows: list[list[Any]] = []
    for (arm, control), found in pairs.items():
        first = next(iter(found.values()))
        shares = (first.get(name) for name in ("masked_share", "masked_share_against"))
        cells: list[Any] = []
        for metric in _COMPARED:
            row = found.get(metric)
            small = "" if row is None else _tested(row)
            cells.append((_interval(row, metric, "delta"), small))
        masked = " / ".join("–" if x is None else f"{x:.1%}" for x in shares)
        rows.append([arm, control, masked, *cells])
    caption = (
        "Is it what was masked, or how much? Each arm against a control of equal budget, the same "
        "weights dealt to positions at random: change from the control [interval] with its p after "
        "correction over this table."
    )
    changes = [f"change of {curve_figures.METRICS[metric]}" for metric in _COMPARED]
    head = ["arm", "its control", "masked, arm / control", *changes]
    return markup.table(caption, head, rows) if rows else ""


def _predictions(sweep: Mapping[str, Any]) -> str:
    rows = [[arm, told] for arm, told in (sweep.get("predictions") or {}).items()]
    head = ["arm", "prediction"]
    return (
        markup.table("What was predicted of the arms before they ran.", head, rows) if rows else ""
    )


def _tested(row: Mapping[str, Any]) -> str:
    """p with its verdict; of one seed KL has neither."""
    if row["p_adjusted"] is None:
        return "not tested"
    verdict = f": {row['verdict']}" if row.get("verdict") else ""
    return style.p_value(row["p_adjusted"]) + verdict


def _of_problems(sweep: Mapping[str, Any]) -> str:
    """What p stands for where every arm has one seed."""
    if max(len(arm["seeds"]) for arm in sweep["arms"]) > 1:
        return ""
    return ", of these runs on further problems and not of the arms, since there is one seed"


def _interval(row: Mapping[str, Any] | None, metric: str, middle: str) -> str:
    if row is None or row.get(middle) is None:
        return "–"
    has_ends = row.get("low") is not None
    if metric in curve_figures.SHARES and middle != "delta":
        return accuracy.told(row[middle], (row["low"], row["high"]) if has_ends else None)
    # A change of a share is in percentage points.
    if metric in curve_figures.SHARES:
        text, low, high = (f"{100 * (row.get(name) or 0):z.1f}" for name in (middle, "low", "high"))
        text += " points"
    else:
        text, low, high = (style.measured(row.get(name)) for name in (middle, "low", "high"))
    return f"{text} [{low}, {high}]" if has_ends else text
