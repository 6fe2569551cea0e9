"""The figure of a run: KL and accuracy by step, and the tokens that carry most of the KL.

Everything comes from the run's own files (``metrics.jsonl``, ``summary.json``, ``run.json``), so a
figure can be drawn again without a model. Figures are drawn with matplotlib's objects, not pyplot:
no backend is chosen for the caller and no figure stays open.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
)

from opd_jax import records

FORMATS = (".png", ".svg", ".pdf")

# Two hues of Okabe and Ito's palette, which colour-blind readers tell apart; grey for the rest.
MAIN, ACCENT, MUTED, INK = "#0072B2", "#D55E00", "#9AA5B1", "#2B2F36"

TOKEN_FONT = "DejaVu Sans Mono"  # comes with matplotlib and has the glyphs of visible whitespace
LOG_SPAN = 10.0  # a KL that spans more than this factor is drawn on a log axis
MAX_LABEL = 14  # characters of a token

STYLE: dict[Any, Any] = {
    "text.usetex": False,
    "text.parse_math": False,  # a token may hold dollar signs
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E9ED",
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "svg.hashsalt": "opd-jax",  # the same run gives the same bytes
}

# In the title's row, at the right: there it covers no curve and no bar.
LEGEND: dict[str, Any] = {
    "loc": "lower right",
    "bbox_to_anchor": (1.0, 1.0),
    "borderaxespad": 0.1,
    "ncols": 2,
    "handlelength": 1.2,
    "handletextpad": 0.5,
    "columnspacing": 1.2,
}


@dataclasses.dataclass(frozen=True)
class Series:
    """Measured values by step; what was not measured is left out."""

    steps: list[int]
    values: list[float]


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """What the files of a run say that its figure shows.

    Attributes:
      train_kl: mean KL(student || teacher) of the student's rollouts, nats per token.
      heldout_kl: the same on held-out prompts.
      accuracy: share of held-out prompts answered correctly, 0 to 1; empty if not graded.
      rocks: rows of ``summary.json``, highest share of KL first.
      student: name of the model that was trained.
      teacher: name of the model it was trained towards.
    """

    train_kl: Series
    heldout_kl: Series
    accuracy: Series
    rocks: list[dict[str, Any]]
    student: str
    teacher: str


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
    out = Path(out)
    if out.suffix.lower() not in FORMATS:
        raise ValueError(
            f"cannot draw {out}: its extension is {out.suffix!r}; expected one of "
            f"{', '.join(FORMATS)}; give another --out"
        )
    run = read(workdir)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Without a date, the same run gives the same bytes; PNG has none.
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(out.suffix.lower())
    with matplotlib.rc_context(STYLE):
        draw(run).savefig(out, dpi=180, metadata=metadata)


def read(workdir: str | os.PathLike) -> RunFiles:
    """Read the files of a run.

    Raises:
      WorkdirError: one is missing, cannot be read, or has no measurement.
    """
    folder = Path(workdir)
    lines = _metrics(folder / "metrics.jsonl")
    summary = _json(folder / "summary.json", _text(folder / "summary.json"))
    config = _json(folder / "run.json", _text(folder / "run.json")).get("config", {})
    run = RunFiles(
        train_kl=_series(lines, "kl_nats"),
        heldout_kl=_series(lines, "eval/kl_nats"),
        accuracy=_series(lines, "eval/accuracy"),
        rocks=sorted(summary.get("rocks", []), key=lambda row: -row["share"]),
        student=_model_name(config.get("student.path", "student")),
        teacher=_model_name(config.get("teacher.path", "teacher")),
    )
    if not (run.train_kl.steps or run.heldout_kl.steps or run.accuracy.steps):
        raise records.WorkdirError(
            f"{folder / 'metrics.jsonl'} has {len(lines)} lines and no measured KL or accuracy; "
            "expected at least one step or evaluation; train for a step first"
        )
    return run


def draw(run: RunFiles) -> Figure:
    """Draw a run: KL above accuracy, beside them the rock tokens; what is missing has no panel."""
    # Constrained layout makes room for token labels of any length.
    figure = Figure(figsize=(10.5 if run.rocks else 6.5, 5.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08, wspace=0.03)  # pyright: ignore
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
        _draw_accuracy(bottom, run.accuracy)
    if has_kl:
        top = figure.add_subplot(grid[0, 0], sharex=bottom) if has_accuracy else bottom
        _draw_kl(top, run)
        top.tick_params(labelbottom=top is bottom)
    bottom.set_xlabel("step")
    bottom.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
    if run.rocks:
        _draw_rocks(figure.add_subplot(grid[:, 1]), run.rocks)
    return figure


def token_label(text: str) -> str:
    """A token as its axis label: cut if long, and what the font cannot show as a code point."""
    if len(text) > MAX_LABEL:
        text = text[: MAX_LABEL - 1] + "…"
    return "".join(c if ord(c) in _glyphs() else f"U+{ord(c):04X}" for c in text)


def _draw_kl(axes: Axes, run: RunFiles) -> None:
    train, heldout = run.train_kl, run.heldout_kl
    axes.set_title("KL(student ‖ teacher)")
    axes.set_ylabel("nats per token")
    axes.plot(train.steps, train.values, color=MUTED, linewidth=1.0, label="training")
    _draw_points(axes, heldout, "{:.3g}", line="none", label="held-out")
    axes.margins(x=0.06, y=0.14)
    values = train.values + heldout.values
    if min(values) > 0 and max(values) > LOG_SPAN * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="y", which="minor", length=0)
    else:
        # A rounding error may take a KL of 0 below it.
        axes.set_ylim(bottom=min(0.0, *values), top=max(values) * 1.2 or 1.0)
    axes.legend(**LEGEND)


def _draw_accuracy(axes: Axes, accuracy: Series) -> None:
    axes.set_title("Accuracy on held-out prompts")
    _draw_points(axes, accuracy, "{:.1%}", line="-", label="accuracy")
    axes.margins(x=0.06, y=0.3)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0.0), min(high, 1.2))  # above 1 there is only the label
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(_percent))


def _draw_points(axes: Axes, series: Series, text: str, *, line: str, label: str) -> None:
    """Draw measurements as points, with the first and the last value written above theirs."""
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
    for i in sorted({0, len(series.steps) - 1} if series.steps else ()):
        axes.annotate(
            text.format(series.values[i]),
            (series.steps[i], series.values[i]),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color=MAIN,
            fontweight="bold",
        )


def _draw_rocks(axes: Axes, rocks: Sequence[Mapping[str, Any]]) -> None:
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
    labels = [token_label(row["token"]) for row in rocks]
    axes.set_yticks(list(rows), labels, fontfamily=TOKEN_FONT, fontsize=10)
    for text, row in zip(axes.get_yticklabels(), rocks, strict=True):
        text.set_fontweight("bold" if row["member"] else "normal")
    axes.set_ylim(len(rocks) - 0.4, -0.6)  # the highest share on top
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(_percent))
    is_gated = any(row["member"] for row in rocks)
    axes.set_xlabel("of recent steps" + ("; bold tokens are gated" if is_gated else ""))
    axes.legend(**LEGEND)


def _plain(value: float, _: int) -> str:
    return f"{value:g}"


def _percent(value: float, _: int) -> str:
    return f"{100 * value:g}%" if value < 1.0 + 1e-9 else ""


def _metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without a last one that is still being written."""
    whole = _text(path).rpartition("\n")[0]
    return [_json(path, line) for line in whole.splitlines() if line]


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> Series:
    """The values of one metric where it was measured (null says that it was not)."""
    pairs = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    pairs = [(step, value) for step, value in pairs if math.isfinite(value)]
    return Series([step for step, _ in pairs], [value for _, value in pairs])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise records.WorkdirError(
            f"cannot read {path} ({error.strerror}); expected the folder of a run that has ended "
            "or was stopped, with run.json, metrics.jsonl and summary.json; give its --workdir, "
            "or let the run end first"
        ) from error


def _json(path: Path, text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        raise records.WorkdirError(
            f"{path} is damaged ({error}): {text[:80]!r}; expected JSON objects as a run writes "
            "them; put back a copy, or run the same command again from a good checkpoint"
        ) from error


def _model_name(path: str) -> str:
    """The last part of a folder's path, of a repository's name or of ``embedded:teacher``."""
    return re.split(r"[/\\:]", path.rstrip("/\\"))[-1] or path


@functools.cache
def _glyphs() -> frozenset[int]:
    return frozenset(FT2Font(findfont(TOKEN_FONT)).get_charmap())
