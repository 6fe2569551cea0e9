"""Figures of a corpus: where its KL sits, how stable that is, and what chance alone would give.

Everything is drawn from the files that ``opd-jax rocks`` leaves in OUT, so it can be drawn again
without a model. Each figure carries its null or its control (arXiv 2605.09253, section 2, shows
the funnel, the coverage and the density without one).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Bbox

from opd_jax.report import study_figures, style
from opd_jax.report.style import (
    ACCENT,
    AMBER,
    INK,
    MAIN,
    MUTED,
    PAPER,
    TOKEN_FONT,
    WIDE,
    Layout,
    Plate,
)
from opd_jax.store import run_files
from opd_jax.store import workdir as workdirs

_LABELLED = 12  # rocks of the funnel that are named, where there is room
# Where a name may stand beside its point (offset in points, the corner at the point), best first.
_PLACES = (
    ((5, 3), ("left", "bottom")),
    ((-5, 3), ("right", "bottom")),
    ((5, -3), ("left", "top")),
    ((-5, -3), ("right", "top")),
)
_SYMLOG = 200.0  # a funnel whose largest mean KL is this many times its median needs a log axis
_SYMLOG_FROM = 0.1  # nats; below, the axis is linear (a mean KL may be 0)

NAMES = {
    "rock": "rocks",
    "next_ranks": "next ranks",
    "hungarian": "matched by count, type by type",
    "share_matched": "random, equal token share",
    "complement": "all that are no rocks",
    "top_freq": "most frequent",
    "top_mean_kl": "highest mean KL",
    "top_gradient_norm": "largest gradient",
    "top_gradient_alignment": "best aligned gradient",
}


def draw_all(out_dir: str | os.PathLike, *, format: str = "png") -> list[Path]:
    """Draw every figure whose data is there into ``OUT/figures``.

    Args:
      out_dir: OUT of ``opd-jax rocks``.
      format: "png", "svg" or "pdf".

    Raises:
      ValueError: another format.
      WorkdirError: a file of OUT is damaged.
    """
    folder = Path(out_dir)
    style.check_format(folder / f"figure.{format}")
    drawn = []
    with matplotlib.rc_context(style.STYLE):
        for plate in plates(folder):
            path = folder / "figures" / f"{plate.name}.{format}"
            style.save(plate.figure, path)
            drawn.append(path)
    return drawn


def plates(out_dir: str | os.PathLike, layout: Layout = WIDE) -> list[Plate]:
    """The figures whose data is in OUT, in reading order. Call inside STYLE's context."""
    folder = Path(out_dir)
    made: list[Plate] = []
    if selection := read(folder, "selection.json"):
        steps: list[tuple[str, Callable[[], Plate]]] = [
            ("funnel", lambda: funnel(selection["funnel"], layout)),
            ("coverage", lambda: stability(selection, layout)),
            ("density", lambda: density(selection["density"], answer_shares(folder), layout)),
            ("controls", lambda: controls(selection["controls"], layout)),
            ("groups", lambda: groups(selection["groups"], layout)),
        ]
        with run_files.used(folder / "selection.json"):
            made += [draw() for key, draw in steps if selection.get(key)]
    for name in studies(folder) or study_figures.PLATES:
        if told := read(folder, f"{name}.json"):
            with run_files.used(folder / f"{name}.json"):
                drawn = _plate(folder / f"{name}.json", told.get("plate", name))(told, layout)
                made += drawn if isinstance(drawn, list) else [drawn]
    return made


def studies(folder: Path) -> dict[str, str]:
    """What can be asked on request, by name; empty where an older folder does not say."""
    with run_files.used(folder / "rocks.json"):
        return dict((read(folder, "rocks.json") or {}).get("studies", {}))


def _plate(path: Path, name: str) -> study_figures.Drawing:
    if name not in study_figures.PLATES:
        raise workdirs.WorkdirError(
            f"{path} asks for the plate {name!r}: expected one of "
            f"{', '.join(study_figures.PLATES)}; draw it with the version that wrote it"
        )
    return study_figures.PLATES[name]


def read(folder: Path, name: str) -> dict[str, Any] | None:
    """A result of OUT, or None if it was not computed.

    Raises:
      WorkdirError: the file is damaged.
    """
    path = folder / name
    return run_files.load(path, dict[str, Any]) if path.exists() else None


def answer_shares(folder: Path) -> np.ndarray | None:
    """The share of rock tokens in every answer, or None where an older folder does not say."""
    shares = (read(folder, "selection.json") or {}).get("answer_shares")
    return np.array(shares) if shares else None


def funnel(data: Mapping[str, Any], layout: Layout = WIDE) -> Plate:
    """Mean KL of types by how often they occur: rare types scatter, frequent ones do not."""
    figure, (axes,) = layout.panels(1, 7.5, 4.4)
    bins, rocks = data["bins"], data["rocks"]
    counts = [10.0 ** b["log10_count"] for b in bins]
    axes.fill_between(
        counts,
        [b["p10"] for b in bins],
        [b["p90"] for b in bins],
        color=MAIN,
        alpha=0.16,
        linewidth=0,
        label="10 to 90% of types",
    )
    axes.plot(counts, [b["mean"] for b in bins], color=MAIN, linewidth=1.6, label="mean of types")
    axes.scatter(
        [r["count"] for r in rocks],
        [r["kl_mean"] for r in rocks],
        s=22,
        color=ACCENT,
        edgecolor=PAPER,
        linewidth=0.6,
        zorder=3,
        label="rocks",
    )
    axes.axhline(data["kl_mean"], color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    style.log_ticks(axes, "x")
    means = [b["mean"] for b in bins] + [r["kl_mean"] for r in rocks]
    if means and max(means) > _SYMLOG * max(float(np.median(means)), 1e-12):
        axes.set_yscale("symlog", linthresh=_SYMLOG_FROM)
    elif means and min([*means, *(b["p10"] for b in bins)]) > 0:
        style.log_ticks(axes, "y")
    axes.set_xlabel("occurrences of the type in the corpus")
    axes.set_ylabel("mean KL, nats")
    axes.set_title("Mean KL by frequency")
    layout.legend(axes, ncols=3)
    axes.margins(x=0.04, y=0.08)
    mean = axes.annotate(
        f"corpus mean {style.measured(data['kl_mean'])}",
        (0.005, data["kl_mean"]),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="left",
        color=INK,
        fontsize=8.5,
    )
    _name_points(axes, rocks, mean)
    middle = float(np.median([r["count"] for r in rocks])) if rocks else 0.0
    above = sum(r["kl_mean"] > data["kl_mean"] for r in rocks)
    return Plate(
        "funnel",
        "Are the rocks hard, or frequent?",
        f"{sum(b['types'] for b in bins):,} types in {len(bins)} bins. The dashed line is what "
        "every type would have if KL did not depend on the token: "
        f"{style.measured(data['kl_mean'])} nats. "
        f"The median rock occurs {middle:,.0f} times; {above} of {len(rocks)} rocks lie above the "
        "line.",
        figure,
        "Points to the right are frequent, points far up are hard: look which the orange ones are.",
    )


def _name_points(axes: Axes, rocks: Sequence[Mapping[str, Any]], mean: Annotation) -> None:
    """Name the rocks that carry most KL, where a name meets no other name and no rock."""
    canvas = FigureCanvasAgg(axes.figure.figure)  # pyright: ignore[reportArgumentType]
    canvas.draw()  # settles the layout: only then are the places of points known
    renderer = canvas.get_renderer()
    places = [axes.transData.transform((r["count"], r["kl_mean"])) for r in rocks]
    taken = [mean.get_window_extent(renderer)]
    taken += [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in places]
    panel = axes.get_window_extent(renderer)
    for rock in sorted(rocks, key=lambda r: -r["count"] * r["kl_mean"])[:_LABELLED]:
        name = axes.annotate(
            style.token_label(rock["token"]),
            (rock["count"], rock["kl_mean"]),
            xytext=(0, 0),
            textcoords="offset points",
            fontfamily=TOKEN_FONT,
            fontsize=8.5,
            color=INK,
        )
        for shift, (side, edge) in _PLACES:
            name.xyann = shift
            name.set(ha=side, va=edge)
            box = name.get_window_extent(renderer)
            is_inside = panel.x0 <= box.x0 and box.x1 <= panel.x1 and box.y1 <= panel.y1
            if is_inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
        else:
            name.remove()


def stability(selection: Mapping[str, Any], layout: Layout = WIDE) -> Plate:
    """Coverage and split-half stability by K, each beside its permutation null."""
    figure, (left, right) = layout.panels(2, 5.0, 3.9)
    _against_null(left, selection["coverage"], "Share of all KL in the top K types", "measured")
    _against_null(right, selection["split_half"], "Jaccard of two halves' top K", "two halves")
    if nested := selection.get("nested_mean"):
        right.plot(
            [row["k"] for row in nested],
            [row["value"] for row in nested],
            color=ACCENT,
            linewidth=1.2,
            linestyle=(0, (4, 2)),
            label="nested, as published",
        )
    for axes in (left, right):
        axes.axvline(selection["k"], color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(style.Percent())
        style.log_ticks(axes, "x")
        axes.set_xlabel(f"K (dotted: {selection['k']})")
        axes.legend(loc="best", fontsize=8.5)
    right.yaxis.set_major_formatter(FuncFormatter(style.plain))
    cover, halves = (_at(selection[name], selection["k"]) for name in ("coverage", "split_half"))
    return Plate(
        "stability",
        "How much do the top K carry, and would they be found again?",
        f"At K = {selection['k']} the types carry {cover['value']:.1%} of the KL (null "
        f"{cover['null']:.1%}{_within(cover, '.1%')}){_size(selection)} and two disjoint halves of "
        f"the problems agree by a Jaccard of {halves['value']:.2f} (null {halves['null']:.2f}"
        f"{_within(halves, '.2f')}). Bands hold 95%: left of resampled problems, right of random "
        "halvings, grey of shuffles. "
        f"{_sentence(selection.get('coverage_note', ''))}"
        f"{_sentence(selection.get('null_note', 'null: KL shuffled among positions'))}".rstrip(),
        figure,
        "Only what blue has above grey is more than token frequencies alone would give.",
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + ". " if text else ""


def _within(row: Mapping[str, Any], spec: str) -> str:
    return f", within problems {row['null_within']:{spec}}" if "null_within" in row else ""


def _size(selection: Mapping[str, Any]) -> str:
    """How much text it is of; a share of a corpus of another size does not compare."""
    size = selection.get("corpus")
    if not size:
        return ""
    return f" of {size['problems']:,} problems ({size['tokens']:,} tokens, {size['types']:,} types)"


def _against_null(axes: Axes, rows: Sequence[Mapping[str, Any]], title: str, label: str) -> None:
    ks = [row["k"] for row in rows]
    if all("null_within" in row for row in rows):
        within = [row["null_within"] for row in rows]
        axes.plot(ks, within, color=AMBER, linestyle=(0, (1, 1.2)), label="null within problems")
    if all("in_sample" in row for row in rows):
        same = [row["in_sample"] for row in rows]
        axes.plot(ks, same, color=ACCENT, linewidth=1.2, linestyle=(0, (4, 2)), label="in sample")
    for keys, color, line, name in (
        (("null", "null_low", "null_high"), MUTED, (0, (4, 2)), "null"),
        (("value", "low", "high"), MAIN, "-", label),
    ):
        value, low, high = ([row[key] for row in rows] for key in keys)
        axes.fill_between(ks, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(ks, value, color=color, linestyle=line, linewidth=1.6, marker=".", label=name)
    axes.set_title(title)


def _at(rows: Sequence[Mapping[str, Any]], k: int) -> Mapping[str, Any]:
    return min(rows, key=lambda row: abs(row["k"] - k))


def density(
    rows: Sequence[Mapping[str, Any]], shares: np.ndarray | None, layout: Layout = WIDE
) -> Plate:
    """The share of an answer's tokens that are rocks: its spread, and what one choice changes."""
    figure, panels = layout.panels(1 + (shares is not None), 5.0, 3.4)
    ranges = panels[-1]
    if shares is not None:
        panels[0].hist(shares, bins=np.linspace(0, 1, 41).tolist(), color=MAIN, edgecolor=PAPER)
        median = float(np.median(shares))  # of these rocks: the first row may be of another rule
        panels[0].axvline(median, color=ACCENT, linewidth=1.6)
        panels[0].set_title("Rock tokens in an answer")
        panels[0].set_xlabel(f"share of tokens; line: median {median:.1%}")
        panels[0].set_ylabel("answers")
        panels[0].xaxis.set_major_formatter(style.Percent())
        panels[0].yaxis.set_major_locator(MaxNLocator(integer=True))
    for place, row in enumerate(rows):
        ranges.plot([row["p25"], row["p75"]], [place, place], color=MAIN, linewidth=5, alpha=0.35)
        ranges.plot(row["median"], place, "o", color=MAIN, markersize=7, label="median answer")
        ranges.plot(row["corpus"], place, "D", color=ACCENT, markersize=5, label="whole corpus")
    names = [
        "all types" if not r["skip_top"] else f"{r['skip_top']} most frequent\nleft out"
        for r in rows
    ]
    ranges.set_yticks(range(len(rows)), names)
    ranges.set_ylim(len(rows) - 0.4, -0.6)
    ranges.grid(visible=False, axis="y")
    ranges.xaxis.set_major_formatter(style.Percent())
    ranges.set_xlabel("share of tokens; bar: middle half of answers")
    handles, labels = ranges.get_legend_handles_labels()
    layout.legend(ranges, handles=handles[:2], labels=labels[:2])
    first, last = rows[0], rows[-1]
    note = (
        f"In the median answer {first['median']:.1%} of the tokens are among the top {first['k']} "
        f"types ({first['p25']:.1%} to {first['p75']:.1%} in the middle half; "
        f"{first['corpus']:.1%} of the corpus)."
    )
    if len(rows) > 1:
        note += (
            f" Control: leaving out the {last['skip_top']} most frequent types before choosing "
            f"gives {last['median']:.1%}."
        )
    see = (
        "The further right the bars, the more of an answer a gate on the rocks would leave without "
        "training."
    )
    return Plate("density", "How many tokens of an answer are rocks?", note, figure, see)


def controls(rows: Sequence[Mapping[str, Any]], layout: Layout = WIDE) -> Plate:
    """What each list of types holds of the tokens and of the KL."""
    named = [dict(row) | {"label": NAMES.get(row["name"], row["name"])} for row in rows]
    worst = max((r for r in rows if r["name"] != "rock"), key=lambda r: r["kl_share"], default=None)
    note = (
        "A list whose tokens carry the mean KL has both points in one place. Every list but the "
        "rocks is a control."
    )
    if any("in_sample_kl_share" in row for row in rows):
        note += " Lists are chosen on some problems and measured on others, by turns."
    if worst:
        note += (
            f" The control with most KL, {NAMES.get(worst['name'], worst['name'])}, holds "
            f"{worst['kl_share']:.1%} of it with {worst['token_share']:.1%} of the tokens."
        )
    return Plate(
        "controls",
        "Do other lists of types carry as much?",
        note,
        _pairs(named, "Tokens and KL by list", lambda row: f"{row['types']:,} types", layout),
        "A list whose orange point lies right of its grey one has more of the KL than its number "
        "of tokens explains.",
    )


def groups(rows: Sequence[Mapping[str, Any]], layout: Layout = WIDE) -> Plate:
    """Which kinds of token the KL is in."""
    most = max(rows, key=lambda row: row["kl_share"])
    named = [dict(row) | {"label": row["group"].replace("_", " ")} for row in rows]
    return Plate(
        "groups",
        "What kind of token is it?",
        f"Most KL is in {most['group'].replace('_', ' ')} tokens: {most['kl_share']:.1%} of it, "
        f"with {most['token_share']:.1%} of the tokens. Reference: where KL does not depend on the "
        "kind, both points lie in one place.",
        _pairs(
            named,
            "Tokens and KL by kind",
            lambda row: f"{row['rocks']} of {row['types']:,} types",
            layout,
        ),
        "Where orange lies right of grey the student is further from its teacher in tokens of this "
        "kind than on average.",
    )


def _pairs(
    rows: Sequence[Mapping[str, Any]], title: str, label: Callable[[Any], str], layout: Layout
) -> Any:
    """Rows of two points, share of tokens and share of KL; most KL on top."""
    rows = sorted(rows, key=lambda row: -row["kl_share"])
    figure, (axes,) = layout.panels(1, 7.5, 1.3 + 0.34 * len(rows))
    places = list(range(len(rows)))
    tokens, kl = ([row[key] for row in rows] for key in ("token_share", "kl_share"))
    axes.hlines(places, tokens, kl, color=MUTED, linewidth=1.4, zorder=1)
    axes.scatter(tokens, places, s=38, color=MUTED, zorder=2, label="share of tokens")
    axes.scatter(kl, places, s=38, color=ACCENT, zorder=3, label="share of KL")
    axes.set_yticks(places, layout.names([row["label"] for row in rows]))
    for place, row in zip(places, rows, strict=True):
        axes.annotate(
            label(row),
            (max(row["token_share"], row["kl_share"]), place),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=INK,
        )
    axes.set_ylim(len(rows) - 0.4, -0.6)
    room = 1.9 if layout.is_narrow else 1.25  # for the words beside the points
    axes.set_xlim(0, max([*tokens, *kl]) * room or 1.0)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(style.Percent())
    axes.set_title(title)
    layout.legend(axes)
    return figure
