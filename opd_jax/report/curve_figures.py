"""Training curves beside each other: several runs, and the arms of a sweep with their seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from opd_jax.report import style
from opd_jax.report.accuracy import Ends, Measured
from opd_jax.report.style import INK, LINES, LOG_SPAN, MUTED, PAPER, SERIES, WIDE, Layout, Plate
from opd_jax.store.run_files import RunFiles, Series

METRICS = {
    "accuracy": "accuracy",
    "kl_nats": "KL, nats",
    "kl_gated": "KL of gated, nats",
    "kl_ungated": "KL of ungated, nats",
    "mean_length": "length, tokens",
    "step_s": "seconds a step",
    "seconds": "seconds in all",
}
SHARES = ("accuracy",)  # shown as per cent


def runs(
    named: Mapping[str, RunFiles],
    ceiling: Measured | None = None,
    ends: Mapping[str, Mapping[int, Ends]] | None = None,
    layout: Layout = WIDE,
) -> Plate:
    """Held-out KL and accuracy of several runs by step; their training KL thin behind.

    Args:
      named: runs of one teacher and one held-out file.
      ceiling: the teacher's accuracy.
      ends: of the intervals of accuracy, by run and step.
      layout: of the panels.
    """
    curves = {name: [run] for name, run in named.items()}
    figure = _panels(curves, ceiling, layout, ends or {})
    first, last = (
        [run.heldout_kl.values[i] for run in named.values() if run.heldout_kl.values]
        for i in (0, -1)
    )
    if first:
        note = (
            "Points are measured on held-out prompts with fresh answers (bars: 95% intervals of "
            "accuracy); the thin line is the KL of the answers trained on. Reference: before "
            f"training the held-out KL is {_span(first)} nats, after it is {_span(last)}."
        )
    else:
        note = (
            "The KL of the answers trained on; each step has other prompts. Held-out prompts, the "
            "reference, were not measured (eval.every is 0)."
        )
    see = "A KL that falls and an accuracy that rises say that the student comes to its teacher"
    see += ", whose own accuracy is the dashed line." if ceiling and first else "."
    return Plate("runs", "How did training go?", note, figure, see)


def arms(
    named: Mapping[str, Sequence[RunFiles]],
    baseline: str,
    ceiling: Measured | None = None,
    layout: Layout = WIDE,
) -> Plate:
    """Held-out KL and accuracy by step, arm by arm: the mean over seeds in the seeds' range."""
    seeds = sorted({len(runs) for runs in named.values()})
    counted = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return Plate(
        "arms",
        "How did the arms train?",
        f"Lines are means over {counted} seeds an arm, bands run from the lowest to the highest "
        f"seed. Control: {baseline}, the arm that all others are compared with.",
        _panels(named, ceiling, layout),
        f"An arm whose line lies apart from that of {baseline}, band and all, trained otherwise"
        + ("; the dashed line is what the teacher itself reaches." if ceiling else "."),
    )


def comparisons(sweep: Mapping[str, Any], layout: Layout = WIDE) -> Plate:
    """Differences of every arm from the baseline, with intervals, metric by metric."""
    rows = [row for row in sweep["comparisons"] if row["delta"] is not None]
    metrics = [name for name in METRICS if any(row["metric"] == name for row in rows)]
    height = 1.5 + 0.3 * len(sweep["arms"])
    figure, panels = layout.panels(len(metrics), 4.4, height, sharey=not layout.is_narrow)
    names = [arm["arm"] for arm in sweep["arms"] if arm["arm"] != sweep["baseline"]]
    for axes, metric in zip(panels, metrics, strict=True):
        for row in (row for row in rows if row["metric"] == metric):
            place = names.index(row["arm"])
            is_sure = row["p_adjusted"] is not None and row["p_adjusted"] < 0.05
            color = SERIES[0] if is_sure else MUTED
            style.intervals(axes, [row], [place], color)
        axes.axvline(0, color=INK, linewidth=0.9)
        margin = next((r.get("margin") for r in rows if r["metric"] == metric), None) or 0.0
        for end in {-margin, margin} - {0.0}:
            axes.axvline(end, color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)))
        axes.set_title(METRICS[metric])
        axes.set_xlabel(f"difference from {sweep['baseline']}")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        if metric in SHARES:
            axes.xaxis.set_major_formatter(style.Percent())
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_yticks(range(len(names)), layout.names(names))
        axes.set_ylim(len(names) - 0.4, -0.6)
    sure = sum(row["p_adjusted"] is not None and row["p_adjusted"] < 0.05 for row in rows)
    alike = sum("equivalent" in row.get("verdict", "") for row in rows)
    note = (
        f"{sure} of {len(rows)} differences are told from 0 at 5% after correction for their "
        "number (blue; grey: not told from 0). Bars are intervals; the line at 0 is the control."
    )
    if margins := sweep.get("margins"):
        note += (
            f" {alike} are told to be less than the margin (dotted: {100 * margins['accuracy']:g} "
            f"points of accuracy, {margins['kl']:.0%} of KL), which no difference found does not "
            "say."
        )
    if max(len(arm["seeds"]) for arm in sweep["arms"]) == 1:
        note += " One seed: all this is of these runs on further problems, not of the arms."
    see = "A bar that crosses the line at 0 leaves open whether the arm differs at all."
    return Plate("comparisons", f"Does an arm differ from {sweep['baseline']}?", note, figure, see)


def _panels(
    named: Mapping[str, Sequence[RunFiles]],
    ceiling: Measured | None,
    layout: Layout,
    ends: Mapping[str, Mapping[int, Ends]] | None = None,
) -> Figure:
    """KL left, accuracy right; a name is one colour (and dash) in both.

    Curves may lie on one another: each later one is thinner and of other dashes, and the earlier
    ones show beside it and through it.
    """
    everything = [run for runs in named.values() for run in runs]
    shown = [
        (attribute, title)
        for attribute, title in (
            ("heldout_kl", "KL(student ‖ teacher), nats per token"),
            ("accuracy", "Accuracy on held-out prompts"),
        )
        if any(getattr(run, attribute).steps for run in everything)
        or (attribute == "heldout_kl" and any(run.train_kl.steps for run in everything))
    ]
    figure, panels = layout.panels(
        len(shown), 5.2, (3.1 if layout.is_narrow else 3.9) + 0.2 * (-(-len(named) // 4))
    )
    for axes, (attribute, title) in zip(panels, shown, strict=True):
        values: list[float] = []
        for place, (name, runs) in enumerate(named.items()):
            color = SERIES[place % len(SERIES)]
            line = LINES[(place + place // len(SERIES)) % len(LINES)]
            if attribute == "heldout_kl" and len(named) <= 4:
                for run in runs:
                    train, is_alone = run.train_kl, not run.heldout_kl.steps
                    width, alpha = (1.7, 1.0) if is_alone else (0.8, 0.55)
                    axes.plot(train.steps, train.values, color=color, linewidth=width, alpha=alpha)
                    values += train.values
            parts = [getattr(run, attribute) for run in runs]
            # 0: drawn first, widest; a curve that is alone needs no room for others.
            rank = place / (len(named) - 1) if len(named) > 1 else 1.0
            own = (ends or {}).get(name) if attribute in SHARES else None
            if own:
                low, high = zip(*own.values(), strict=True)
                axes.vlines(list(own), low, high, color=color, linewidth=3 - 1.6 * rank, alpha=0.5)
                values += high
            values += _draw_mean(axes, parts, name, color, line, rank)
        if ceiling and attribute in SHARES:
            draw_ceiling(axes, ceiling)
            values += [ceiling.value, *(ceiling.ends or ())]
        axes.set_title(title)
        axes.set_xlabel("step")
        evaluated = {s for run in everything for s in getattr(run, attribute).steps}
        style.step_ticks(axes, sorted(evaluated), 6 if layout.is_narrow else 9)
        _scale(axes, values, is_share=attribute in SHARES)
    if len(named) > 1:
        layout.shared_legend(figure, panels[-1], min(len(named), 4))
    return figure


def draw_ceiling(axes: Axes, ceiling: Measured) -> None:
    """Draw the teacher's accuracy: a labelled line over all steps, in the band of its interval."""
    if ceiling.ends:
        axes.axhspan(*ceiling.ends, color=INK, alpha=0.1, linewidth=0, zorder=0.5)
    axes.axhline(ceiling.value, color=INK, linewidth=1.1, linestyle=(0, (5, 3)), zorder=1.5)
    bottom, _ = ceiling.ends or (ceiling.value, None)
    axes.annotate(
        f"teacher {ceiling}",
        (0.02, bottom),
        xycoords=("axes fraction", "data"),
        xytext=(0, -4),
        textcoords="offset points",
        ha="left",
        va="top",
        color=INK,
        fontsize=8.5,
        zorder=5,
    )


def _draw_mean(
    axes: Axes, parts: Sequence[Series], name: str, color: str, line: Any, rank: float
) -> list[float]:
    """Draw the mean over runs at the steps that all have, within their range.

    ``rank`` is 0 for the curve that is drawn first, 1 for the last, which is the thinnest.
    """
    steps = sorted(set.intersection(*(set(part.steps) for part in parts)))
    table = np.array(
        [[dict(zip(p.steps, p.values, strict=True))[s] for s in steps] for p in parts]
    ).reshape(len(parts), len(steps))
    if len(parts) > 1 and steps:
        axes.fill_between(steps, table.min(0), table.max(0), color=color, alpha=0.18, linewidth=0)
    axes.plot(
        steps,
        table.mean(0),
        color=color,
        linestyle=line,
        linewidth=3.6 - 2.0 * rank,
        marker="o",
        markersize=7.5 - 2.5 * rank,
        markeredgecolor=PAPER,
        label=name,
    )
    return table.ravel().tolist()


def _scale(axes: Axes, values: Sequence[float], *, is_share: bool) -> None:
    if is_share:
        axes.set_ylim(0, max(1.05 * max(values, default=1.0), 0.05))
        axes.yaxis.set_major_formatter(style.Percent())
    elif values and min(values) > 0 and max(values) > LOG_SPAN * min(values):
        style.log_ticks(axes, "y")
    else:
        axes.set_ylim(bottom=min(0.0, *values, 0.0))


def _span(values: Sequence[float]) -> str:
    low, high = style.measured(min(values)), style.measured(max(values))
    return low if low == high else f"{low} to {high}"
