"""Figures of what is computed on request: a *plate* for every study of ``opd-jax rocks --with``.

A study's file names the plate that draws it (``"plate"``, a key of ``PLATES``), so a page is made
from files alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from opd_jax.report import style
from opd_jax.report.style import ACCENT, AMBER, GREEN, INK, MAIN, MUTED, PURPLE, WIDE, Layout, Plate

COLORS = {"rock": ACCENT, "high_kl": MAIN, "control": GREEN, "random": MUTED, "all": INK}
COLORS |= {"rest": AMBER, "unseen": PURPLE}
NAMES = {"rock": "rocks", "high_kl": "high mean KL", "control": "matched by count"}
EFFECTS = {
    "alignment": "same text, other model",
    "context_drift": "same model, other text",
    "both": "both (as published)",
}
_NORMS = (
    ("mean_norm", "one occurrence"),
    ("norm_at.2", "mean of 2 (r.m.s.)"),
    ("norm_at.8", "mean of 8 (r.m.s.)"),
    ("norm_of_mean", "mean of all n"),
)
_COSINES = (
    ("cos_balanced", "types weigh alike"),
    ("cos_balanced_loo", "  own part left out"),
    ("cos_global", "positions weigh alike"),
    ("cos_global_loo", "  own part left out"),
)
# Draws what a study's file holds.
Drawing = Callable[[Mapping[str, Any], Layout], Plate | list[Plate]]
_MAX_TESTS = 30  # rows that can be read in one figure


def geometry(data: Mapping[str, Any], layout: Layout = WIDE) -> Plate:
    """Norms and cosines of the types' logit gradients by group, n-matched beside raw."""
    groups = data["groups"]
    figure, (left, right) = layout.panels(2, 5.0, 3.9)
    for axes, rows, title in (
        (left, _NORMS, "Gradient norm of the type"),
        (right, _COSINES, "Cosine with the whole gradient"),
    ):
        for place, group in enumerate(groups):
            shift = 0.16 * (place - (len(groups) - 1) / 2)
            _ranges(axes, rows, group, shift)
        axes.set_yticks(range(len(rows)), layout.names([label for _, label in rows]))
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_title(title)
    left.set_xlabel("norm in logit space; like n is compared with like")
    right.set_xlabel("cosine; left out: without the type's own part")
    right.axvline(0, color=MUTED, linewidth=0.8)
    layout.shared_legend(figure, left, len(groups))
    rock = next((g for g in groups if g["group"] == "rock"), groups[0])
    one, all_n, matched = (
        style.measured(value(rock, name)) for name in ("mean_norm", "norm_of_mean", "norm_at.8")
    )
    return Plate(
        "gradients",
        "Are their gradients small, or averaged away?",
        "Medians over types with their intervals. The mean over all occurrences shrinks with n: "
        f"for rocks {all_n} against {one} of one occurrence. At equal n, as a mean of 8 where a "
        f"type occurs that often, it is {matched} (root mean square, which rare large gradients "
        f"raise above the mean). Control: types matched by count.",
        figure,
        "Points further right pull harder (left panel) or more in the common direction (right); "
        "compare colours within a row.",
    )


def value(group: Mapping[str, Any], name: str, end: str = "") -> float:
    """A number of a group (``norm_at.8`` is in a dict of its own), nan where there is none."""
    outer, _, inner = name.partition(".")
    found = group.get(f"{outer}_{inner}{end}" if inner else f"{outer}{end}")
    if found is None and inner:
        found = (group.get(f"{outer}{end}") or {}).get(inner)
    return float("nan") if found is None else float(found)


def _ranges(axes: Axes, rows: Sequence[tuple[str, str]], group: Mapping[str, Any], shift: float):
    color = COLORS.get(group["group"], PURPLE)
    places = np.arange(len(rows)) + shift
    middle = np.array([value(group, name) for name, _ in rows])
    low, high = (np.array([value(group, name, e) for name, _ in rows]) for e in ("_low", "_high"))
    has_ends = np.isfinite(low) & np.isfinite(high)
    axes.hlines(places[has_ends], low[has_ends], high[has_ends], color=color, linewidth=1.6)
    label = NAMES.get(group["group"], group["group"].replace("_", " "))
    axes.plot(middle, places, "o", color=color, markersize=5.5, label=label)


def persistence(data: Mapping[str, Any], layout: Layout = WIDE) -> list[Plate]:
    """Mean KL of every model on every corpus by group, and the changes with intervals."""
    # A group none of whose types occurs in the half that is measured has no numbers.
    seen = [g for g in data["groups"] if np.isfinite(np.array(g["matrix"], float)).any()]
    plates = [_matrix({**data, "groups": seen}, layout)] if seen else []
    return plates + ([_changes(data, layout)] if data["tests"] else [])


def _matrix(data: Mapping[str, Any], layout: Layout) -> Plate:
    groups, models, corpora = data["groups"], data["models"], data["corpora"]
    figure, panels = layout.panels(len(groups), 1.5 + 0.72 * len(corpora), 1.8 + 0.42 * len(models))
    for axes, group in zip(panels, groups, strict=True):
        _cells(axes, group["matrix"], models, corpora)
        axes.set_title(str(NAMES.get(group["group"], group["group"].replace("_", " "))))
        axes.set_xlabel("text written by")
        axes.set_ylabel("scored by")
    return Plate(
        "persistence",
        "Does their KL stay?",
        f"Mean KL, nats, of {len(models)} models on {len(corpora)} texts. Down a column only the "
        "model changes, along a row only the text; the diagonal changes both. Each panel has its "
        "own colour scale.",
        figure,
        "Numbers that fall down a column are what the model has learned, on one and the same text.",
    )


def _cells(
    axes: Axes,
    table: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    top: float | None = None,
) -> None:
    """Draw a table as shaded cells with their numbers, the first row on top."""
    cells = np.ma.masked_invalid(np.array(table, float))
    is_share = top == 1.0  # all with two decimals
    top = top or float(cells.max() or 1.0)
    axes.pcolormesh(cells, cmap="Blues", vmin=0, vmax=top, edgecolor="#F7FBFE", linewidth=1.5)
    for (i, j), cell in np.ndenumerate(cells.filled(np.nan)):
        color = "#FDFDFD" if cell > 0.55 * top else "#101418"  # of the cell, not of the theme
        color = INK if np.isnan(cell) else color
        place = (j + 0.5, i + 0.5)
        shown = f"{cell:.2f}" if is_share and math.isfinite(cell) else style.measured(cell, 2)
        axes.text(*place, shown, ha="center", va="center", color=color)
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=30, ha="right")
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.set_ylim(len(rows), 0)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _changes(data: Mapping[str, Any], layout: Layout) -> Plate:
    tests = [t for t in data["tests"] if t["effect"] in EFFECTS]
    if len(tests) > _MAX_TESTS:  # the whole way only: from the first model to the last
        ends = (data["models"][0], data["models"][-1])
        tests = [t for t in tests if (str(t["from"]), str(t["to"])) == ends] or tests[:_MAX_TESTS]
    each = 0.55 if layout.is_narrow else 0.3  # names take more lines there
    figure, (axes,) = layout.panels(1, 8.0, 1.5 + each * len(tests))
    colors = dict(zip(EFFECTS, (MAIN, GREEN, ACCENT), strict=True))
    for effect, color in colors.items():
        rows = [(i, t) for i, t in enumerate(tests) if t["effect"] == effect]
        if not rows:
            continue
        style.intervals(axes, [t for _, t in rows], [i for i, _ in rows], color, EFFECTS[effect])
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.set_yticks(range(len(tests)), layout.names([_test_name(test) for test in tests]))
    axes.set_ylim(len(tests) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("change of mean KL, nats; bar: interval")
    layout.shared_legend(figure, axes, 3)
    adjusted = [test.get("p_bootstrap_adjusted") for test in tests]
    sure = sum(p is not None and p < 0.05 for p in adjusted)
    note = (
        f"{sure} of {len(tests)} changes differ from 0 at 5% by resampling problems, as the bars "
        "do, after Benjamini and Hochberg. Control: types matched by count, chosen and measured on "
        "the same halves of the problems."
    )
    contrasts = [c for c in data.get("contrasts", []) if "p_equivalent_adjusted" in c]
    if contrasts:
        apart, alike = (
            sum(c[p] < 0.05 for c in contrasts)
            for p in ("p_bootstrap_adjusted", "p_equivalent_adjusted")
        )
        note += (
            f" Of {len(contrasts)} contrasts of how much of their KL rocks and other types keep, "
            f"{apart} differ from 0 and {alike} are told to differ by less than "
            f"{math.expm1(data['margin']):.0%}."
        )
    see = "A bar left of 0 is KL that went away; one that crosses 0 may be chance."
    return Plate("changes", "What moved, the model or the text?", note, figure, see)


def _test_name(test: Mapping[str, Any]) -> str:
    group = NAMES.get(test["group"], test["group"].replace("_", " "))
    return f"{group}, {test['from']} → {test['to']}"


def references(data: Mapping[str, Any], layout: Layout = WIDE) -> Plate:
    """Rocks of other writers' texts: how much they carry, and whether they are the same types."""
    rows = data["corpora"]
    names = [row["name"] for row in rows]
    figure, (left, right) = layout.panels(2, 4.5, 1.9 + 0.5 * len(rows))
    places = list(range(len(rows)))
    for row, place in zip(rows, places, strict=True):
        if row.get("coverage_low") is not None:
            left.hlines(place, row["coverage_low"], row["coverage_high"], color=MAIN, linewidth=2)
    left.plot([row["coverage"] for row in rows], places, "o", color=MAIN, label="measured")
    left.plot([row["coverage_null"] for row in rows], places, "D", color=MUTED, label="null")
    if within := [row.get("coverage_null_within") for row in rows if "coverage_null_within" in row]:
        left.plot(within, places, "s", color=AMBER, markersize=4, label="null within problems")
    left.set_yticks(places, layout.names(names))
    left.set_ylim(len(rows) - 0.4, -0.6)
    left.set_xlim(0, 1)
    left.xaxis.set_major_formatter(style.Percent())
    left.set_xlabel("share of the text's KL in its own rocks")
    left.grid(visible=False, axis="y")
    layout.legend(left, ncols=3 if within else 2, fontsize=8.5)
    _cells(right, data["jaccard"], names, names, 1.0)
    right.set_title("Jaccard of their rocks")
    first, *others = rows
    note = (
        f"Rocks of the text written by {first['name']} carry {first['coverage']:.1%} of its KL "
        f"(null {first['coverage_null']:.1%}; {first['tokens']:,} tokens)."
    )
    overlaps = data["jaccard"][0][1:]
    by_chance = data.get("jaccard_null", [[None] * len(rows)])[0][1:]
    controls = [
        f"{other['name']} {other['coverage']:.1%} (null {other['coverage_null']:.1%}; "
        f"{other['tokens']:,} tokens), Jaccard "
        f"{style.measured(overlap, 2)} (null {style.measured(chance, 2)})"
        for other, overlap, chance in zip(others, overlaps, by_chance, strict=True)
    ]
    note += f" Control: {'; '.join(controls)}." if controls else ""
    see = (
        "Near 1 in the right panel: the same types are rocks in both texts; near what chance gives "
        "(null): they are not."
    )
    return Plate("references", "Do other writers' texts have the same rocks?", note, figure, see)


def optimizer(data: Mapping[str, Any], layout: Layout = WIDE) -> Plate:
    """Adam's second moment and effective step of the rows of each group, by checkpoint."""
    figure, panels = layout.panels(2, 5.0, 3.9)
    for axes, (key, title) in zip(
        panels,
        (("second_moment", "Second moment of the rows"), ("effective_step", "Effective step")),
        strict=True,
    ):
        everything: list[float] = []
        for group in data["groups"]:
            points = [(s, v) for s, v in zip(data["steps"], group[key], strict=True) if v]
            values = [value for _, value in points]
            everything += values
            axes.plot(
                [step for step, _ in points],
                values,
                color=COLORS.get(group["group"], PURPLE),
                marker="o",
                markersize=5,
                label=NAMES.get(group["group"], group["group"].replace("_", " ")),
            )
        if everything and max(everything) > style.LOG_SPAN * min(everything):
            style.log_ticks(axes, "y")
        axes.set_title(title)
        axes.set_xlabel("step")
        style.step_ticks(axes, data["steps"], 6 if layout.is_narrow else 9)
    layout.shared_legend(figure, panels[0], len(data["groups"]))
    sure = sum(test["p_adjusted"] < 0.05 for test in data["tests"])
    return Plate(
        "optimizer",
        "Does Adam hold them back?",
        f"Medians over the types of a group. {sure} of {len(data['tests'])} rank correlations are "
        "told from 0 at 5% after Benjamini and Hochberg. Control: types matched by count.",
        figure,
        "A higher second moment means smaller steps of the optimizer for these types.",
    )


def context(data: Mapping[str, Any], layout: Layout = WIDE) -> Plate:
    """Rocks that stay in like contexts at every setting tried, beside occurrences drawn blindly."""
    default, k = data["default"], data["k"]
    kept, by_chance = (
        [row["rocks_kept"] for row in rows]
        for rows in (data["grid"], [row["control"] for row in data["grid"]])
    )
    figure, (axes,) = layout.panels(1, 5.2, 3.8 if layout.is_narrow else 4.2)
    axes.plot([0, k], [0, k], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    axes.plot(by_chance, kept, "o", color=MAIN, alpha=0.45, markersize=6, label="settings tried")
    at = (default["control"]["rocks_kept"], default["rocks_kept"])
    axes.plot(*at, "D", color=ACCENT, markersize=8, label="default")
    axes.set_xlim(-0.03 * k, 1.03 * k)
    axes.set_ylim(-0.03 * k, 1.03 * k)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlabel("rocks kept, occurrences drawn without regard to loss")
    axes.set_ylabel("rocks kept, high-loss occurrences")
    axes.set_title(f"Of {k} rocks; dashed: as many")
    axes.legend(loc="lower right", fontsize=8.5)
    return Plate(
        "context",
        "Which rocks stay in like contexts?",
        f"{default['rocks_kept']} of {k} rocks are among the top {k} when a type counts by its "
        "high-loss occurrences in contexts like one another's (window "
        f"{default['window']}, similarity {default['gamma']}). Control, as many occurrences drawn "
        f"without regard to loss: {default['control']['rocks_kept']}. Over all {len(kept)} "
        f"settings tried, {min(kept)} to {max(kept)} stay, of the control {min(by_chance)} to "
        f"{max(by_chance)}.",
        figure,
        "Points on the dashed line say that choosing occurrences by their loss changes nothing.",
    )


PLATES: dict[str, Drawing] = {
    "references": references,
    "gradients": geometry,
    "context": context,
    "persistence": persistence,
    "optimizer": optimizer,
}
