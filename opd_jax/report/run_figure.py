"""The figure of a run: KL and accuracy by step, and the tokens that carry most of the KL.

Everything comes from the run's own files (``metrics.jsonl``, ``summary.json``, ``run.json``), so a
figure can be drawn again without a model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from opd_jax.report import accuracy, curve_figures, style
from opd_jax.report.accuracy import Ends, Measured
from opd_jax.report.style import ACCENT, LEGEND, LOG_SPAN, MAIN, MUTED
from opd_jax.store import run_files
from opd_jax.store.run_files import RunFiles, Series


def training(workdir: str | os.PathLike, out: str | os.PathLike) -> None:
    """Draw a run into a file whose type follows from its extension; makes its folder.

    Args:
      workdir: folder of the run.
      out: a .png, .svg or .pdf file; an older one is replaced.

    Raises:
      ValueError: the extension is another one.
      WorkdirError: the folder lacks a file of the run, or one cannot be read.
      OSError: the file cannot be written.
    """
    style.check_format(out)
    run, ends = run_files.read(workdir), accuracy.intervals(workdir)
    with matplotlib.rc_context(style.STYLE):
        span = run_files.summary(Path(workdir)).get("rocks_steps")
        with run_files.used(Path(workdir) / "summary.json"):
            figure = draw(run, ends, accuracy.ceiling(workdir), span)
        style.save(figure, out)


def draw(
    run: RunFiles,
    ends: Mapping[int, Ends] | None = None,
    ceiling: Measured | None = None,
    span: float | None = None,
) -> Figure:
    """Draw a run: KL above accuracy, beside them the rock tokens; what is missing has no panel.

    Args:
      run: what its files say.
      ends: of the interval of accuracy, by step.
      ceiling: the teacher's accuracy.
      span: steps that the shares of the rock tokens are of; None: not known, or of all.
    """
    figure = style.figure(10.5 if run.rocks else 6.5, 5.4)
    figure.suptitle(
        f"Distilling {run.teacher} into {run.student}",
        x=0.012,
        ha="left",
        fontsize=13,
        fontweight="bold",
    )
    has_kl = bool(run.train_kl.steps or run.heldout_kl.steps)
    has_accuracy = bool(run.accuracy.steps)
    grid = figure.add_gridspec(
        2 if has_kl and has_accuracy else 1,
        2 if run.rocks else 1,
        width_ratios=[1.25, 1] if run.rocks else None,
        height_ratios=[1.35, 1] if has_kl and has_accuracy else None,
    )
    bottom = figure.add_subplot(grid[-1, 0])
    if has_accuracy:
        _draw_accuracy(bottom, run.accuracy, ends or {}, ceiling)
    if has_kl:
        top = figure.add_subplot(grid[0, 0], sharex=bottom) if has_accuracy else bottom
        _draw_kl(top, run)
        top.tick_params(labelbottom=top is bottom)
    bottom.set_xlabel("step")
    style.step_ticks(bottom, run.heldout_kl.steps + run.accuracy.steps)
    if run.rocks:
        _draw_rocks(figure.add_subplot(grid[:, 1]), run.rocks, span)
    return figure


def _draw_kl(axes: Axes, run: RunFiles) -> None:
    train, heldout = run.train_kl, run.heldout_kl
    axes.set_title("KL(student ‖ teacher)")
    axes.set_ylabel("nats per token")
    axes.plot(train.steps, train.values, color=MUTED, linewidth=1.0, label="training")
    texts = [style.measured(value) for value in heldout.values]
    _draw_points(axes, heldout, texts, line="none", label="held-out")
    axes.margins(x=0.06, y=0.14)
    values = train.values + heldout.values
    if min(values) > 0 and max(values) > LOG_SPAN * min(values):
        style.log_ticks(axes, "y")
    else:
        # A rounding error may take a KL of 0 below it.
        axes.set_ylim(bottom=min(0.0, *values), top=max(values) * 1.2 or 1.0)
    axes.legend(**LEGEND)


def _draw_accuracy(
    axes: Axes, series: Series, ends: Mapping[int, Ends], ceiling: Measured | None
) -> None:
    axes.set_title("Accuracy on held-out prompts" + ("; bars: intervals" if ends else ""))
    steps = [step for step in series.steps if step in ends]
    low, high = ([ends[step][i] for step in steps] for i in (0, 1))
    axes.vlines(steps, low, high, color=MAIN, linewidth=1.4, alpha=0.5, label="interval")
    tops = {step: ends[step][1] for step in steps}
    texts = [
        accuracy.told(value, ends.get(step)).replace(" ", "\n", 1)
        for step, value in zip(series.steps, series.values, strict=True)
    ]
    _draw_points(axes, series, texts, line="-", label="accuracy", tops=tops)
    if ceiling:
        curve_figures.draw_ceiling(axes, ceiling)
    axes.margins(x=0.06, y=0.3)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0.0), min(high, 1.2))  # above 1 there is only the label
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(style.Percent())


def _draw_points(
    axes: Axes,
    series: Series,
    texts: Sequence[str],
    *,
    line: str,
    label: str,
    tops: Mapping[int, float] | None = None,
) -> None:
    """Draw measurements as points, with the first and the last value above them (or ``tops``)."""
    axes.plot(
        series.steps,
        series.values,
        color=MAIN,
        linestyle=line,
        linewidth=1.4,
        marker="o",
        markersize=6.5,
        markeredgecolor="white",
        clip_on=False,  # a value at the end of the scale is a whole point too
        zorder=4,  # and lies above the axis line
        label=label,
    )
    last = len(series.steps) - 1
    for i in sorted({0, last} if series.steps else ()):
        side = "center" if not last else "right" if i else "left"  # into the panel
        axes.annotate(
            texts[i],
            (series.steps[i], (tops or {}).get(series.steps[i], series.values[i])),
            xytext=({"left": -6, "right": 6}.get(side, 0), 6),
            textcoords="offset points",
            ha=side,
            va="bottom",
            color=MAIN,
            fontweight="bold",
        )


def _draw_rocks(axes: Axes, rocks: Sequence[Mapping[str, Any]], span: float | None = None) -> None:
    axes.set_title("Rock tokens")
    rows = range(len(rocks))
    half = 0.36
    for key, offset, color, label in (
        ("share", -half / 2, ACCENT, "share of KL"),
        ("token_share", half / 2, MUTED, "share of tokens"),
    ):
        axes.barh(
            [row + offset for row in rows],
            [row[key] for row in rocks],
            height=half,
            color=color,
            label=label,
        )
    labels = [style.token_label(row["token"]) for row in rocks]
    axes.set_yticks(list(rows), labels, fontfamily=style.TOKEN_FONT, fontsize=10)
    for text, row in zip(axes.get_yticklabels(), rocks, strict=True):
        text.set_fontweight("bold" if row["member"] else "normal")
    axes.set_ylim(len(rocks) - 0.4, -0.6)  # the highest share on top
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(style.Percent())
    is_gated = any(row["member"] for row in rocks)
    when = f"of about the last {span:g} steps" if span else "of recent steps"
    axes.set_xlabel(when + ("; bold tokens are gated" if is_gated else ""))
    axes.legend(**LEGEND)
