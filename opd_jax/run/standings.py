"""The arms of a sweep as a table for the console: what ``arms.summarise`` found, in lines."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

_COLUMNS = 100
_MANY_UNPARSED = 0.01  # share of answers without a recognisable one that is worth a line


def table(result: dict[str, Any]) -> list[str]:
    """The result for a reader: accuracy of the arms, then KL, with intervals and verdicts.

    Changes of accuracy are in percentage points.
    """
    width = max(len(row["arm"]) for row in result["arms"])
    against, margins = f"against {result['baseline']}", result["margins"]
    of = "p, problems" if max(len(row["seeds"]) for row in result["arms"]) == 1 else "p adj."
    changes = {(found["arm"], found["metric"]): found for found in result["comparisons"]}
    lines = []
    for name, head, spec, unit, form, margin in (
        ("accuracy", "accuracy", ".1%", 0.01, "+.1f", f"{100 * margins['accuracy']:g} points"),
        ("kl_nats", "KL, nats", ".4f", 1.0, "+.4f", f"{margins['kl']:.0%}"),
    ):
        within = f"p >= {margin}"
        lines.append(
            f"{'arm':<{width}} {'masked':>7} {head:>24} {against:>26} {of:>11} {within:>12}"
        )
        for row in result["arms"]:
            change = changes.get((row["arm"], name), {})
            shown = _interval(row["metrics"][name], "mean", spec, 1.0)
            moved = _interval(change, "delta", form, unit) if change else ""
            tested = (_show(change.get(f"{p}_adjusted"), ".2g") for p in ("p", "p_equivalent"))
            p, away = tested if change else ("", "")
            lines.append(
                f"{row['arm']:<{width}} {_show(row['masked_share'], '.1%'):>7} {shown:>24} "
                f"{moved:>26} {p:>11} {away:>12}  {change.get('verdict', '')}".rstrip()
            )
    start = {"mean": result["start"]["accuracy"], **result["start_interval"]}
    lines.append(
        f"before training: accuracy {_interval(start, 'mean', '.1%', 1.0)}, "
        f"KL {_show(result['start']['kl_nats'], '.4f')} nats"
    )
    if result.get("teacher"):
        ends = {end: result["teacher"].get(f"accuracy_{end}") for end in ("low", "high")}
        told = _interval({"mean": result["teacher"]["accuracy"], **ends}, "mean", ".1%", 1.0)
        lines.append(f"the teacher: accuracy {told}")
    for row in result["arms"]:
        unparsed = (row["metrics"].get("unparsed_share") or {}).get("mean")
        if unparsed is not None and unparsed >= _MANY_UNPARSED:
            lines.append(f"{row['arm']}: {unparsed:.1%} of the answers hold none that can be read")
    return [*lines, *textwrap.wrap(result["note"], _COLUMNS)]


def _interval(row: Mapping[str, Any], middle: str, spec: str, unit: float) -> str:
    """A value and its interval in a unit: ``59.4% [53.3%, 65.2%]``."""
    values = (row.get(name) for name in (middle, "low", "high"))
    value, low, high = (None if x is None else x / unit for x in values)
    text = _show(value, spec)
    return text if low is None or high is None else f"{text} [{low:{spec}}, {high:{spec}}]"


def _show(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
