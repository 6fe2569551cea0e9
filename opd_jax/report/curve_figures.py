"""Training curves beside each other: several runs, and the arms of a sweep with their seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from opd_jax.report import style
from opd_jax.report.style import INK, LINES, LOG_SPAN, MUTED, PAPER, SERIES, Plate
from opd_jax.store.run_files import RunFiles, Series

METRICS = {
    "accuracy": "accuracy",
    "kl_nats": "KL, nats",
    "kl_gated": "KL of gated, nats",
    "kl_ungated": "KL of ungated, nats",
    "mean_length": "length, tokens",
    "step_s": "seconds a step",
}
SHARES = ("accuracy",)  # shown as per cent


def runs(named: Mapping[str, RunFiles]) -> Plate:
    """Held-out KL and accuracy of several runs by step; their training KL thin behind."""
    curves = {name: [run] for name, run in named.items()}
    figure = _panels(curves)
    first, last = (
        [run.heldout_kl.values[i] for run in named.values() if run.heldout_kl.values]
        for i in (0, -1)
    )
    if first:
        note = (
            "Points are measured on held-out prompts with fresh answers; the thin line is the KL "
            "of the answers trained on. Reference: before training the held-out KL is "
            f"{_span(first)} nats, after it is {_span(last)}."
        )
    else:
        note = (
            "The KL of the answers trained on; each step has other prompts. Held-out prompts, the "
            "reference, were not measured (eval.every is 0)."
        )
    return Plate("runs", "How did training go?", note, figure)


def arms(named: Mapping[str, Sequence[RunFiles]], baseline: str) -> Plate:
    """Held-out KL and accuracy by step, arm by arm: the mean over seeds in the seeds' range."""
    seeds = sorted({len(runs) for runs in named.values()})
    counted = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return Plate(
        "arms",
        "How did the arms train?",
        f"Lines are means over {counted} seeds an arm, bands run from the lowest to the highest "
        f"seed. Control: {baseline}, the arm that all others are compared with.",
        _panels(named),
    )


def comparisons(sweep: Mapping[str, Any]) -> Plate:
    """Differences of every arm from the baseline, with intervals, metric by metric."""
    rows = [row for row in sweep["comparisons"] if row["delta"] is not None]
    metrics = [name for name in METRICS if any(row["metric"] == name for row in rows)]
    figure = style.figure(1.6 + 3.6 * len(metrics), 1.5 + 0.3 * len(sweep["arms"]))
    panels = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
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
            axes.xaxis.set_major_formatter(FuncFormatter(style.percent))
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
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
    return Plate("comparisons", f"Does an arm differ from {sweep['baseline']}?", note, figure)


def _panels(named: Mapping[str, Sequence[RunFiles]]) -> Figure:
    """KL left, accuracy right; a name is one colour (and dash) in both."""
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
    figure = style.figure(5.2 * len(shown), 3.9 + 0.2 * (-(-len(named) // 4)))
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (attribute, title) in zip(panels, shown, strict=True):
        values: list[float] = []
        for place, (name, runs) in enumerate(named.items()):
            color = SERIES[place % len(SERIES)]
            line = LINES[place // len(SERIES) % len(LINES)]
            if attribute == "heldout_kl" and len(named) <= 4:
                for run in runs:
                    train, is_alone = run.train_kl, not run.heldout_kl.steps
                    width, alpha = (1.7, 1.0) if is_alone else (0.8, 0.55)
                    axes.plot(train.steps, train.values, color=color, linewidth=width, alpha=alpha)
                    values += train.values
            values += _draw_mean(axes, [getattr(run, attribute) for run in runs], name, color, line)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        _scale(axes, values, is_share=attribute in SHARES)
    handles, labels = panels[-1].get_legend_handles_labels()
    if len(named) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(named), 4))
    return figure


def _draw_mean(
    axes: Axes, parts: Sequence[Series], name: str, color: str, line: Any
) -> list[float]:
    """Draw the mean over runs at the steps that all have, within their range."""
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
        linewidth=1.7,
        marker="o",
        markersize=5.5,
        markeredgecolor=PAPER,
        label=name,
    )
    return table.ravel().tolist()


def _scale(axes: Axes, values: Sequence[float], *, is_share: bool) -> None:
    if is_share:
        axes.set_ylim(0, max(1.05 * max(values, default=1.0), 0.05))
        axes.yaxis.set_major_formatter(FuncFormatter(style.percent))
    elif values and min(values) > 0 and max(values) > LOG_SPAN * min(values):
        style.log_ticks(axes, "y")
    else:
        axes.set_ylim(bottom=min(0.0, *values, 0.0))


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"
