"""The section of a knockout: which tokens matter to the answers, and how sure that is.

From ``summary.json`` in the folder of ``opd-jax knockout``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
from typing_extensions import TypedDict

from opd_jax import records
from opd_jax.report import markup, page_data, style
from opd_jax.report.markup import Absent, Section
from opd_jax.report.style import ACCENT, AMBER, GREEN, INK, MAIN, MUTED, Layout, Plate
from opd_jax.store import run_files
from opd_jax.store import workdir as workdirs

_NAME = "summary.json"
_COMMAND = (
    "opd-jax knockout --model=RUN --tasks=FILE --types=DIR/types.csv --out=OUT, then opd-jax "
    "report RUN --knockout=OUT"
)
_DRAWN = 40  # types in a figure
_LISTED = 100  # in a table
_NAMED = 8  # tokens of an arm
_EFFECT = (
    *("change, points", "where held, points", "worse / better", "no answer found"),
    *("p adjusted", "name"),
)
_TITLES = {
    "single": "one type everywhere",
    "control": "types of like counts",
    "local": "one place only",
    "pair": "two types",
    "group": "named groups",
    "cumulative": "more and more types",
}
_HUES = {"cornerstone": ACCENT, "stumbling block": GREEN, "neutral": MAIN, "undecided": MUTED}


@pydantic.with_config(records.OPEN)
class Summary(TypedDict):
    """What ``summary.json`` of a knockout holds."""

    model: str
    problems: int
    settings: dict[str, Any]
    baseline: dict[str, Any]
    checks: dict[str, dict[str, Any]]
    families: dict[str, dict[str, Any]]


def read(folder: Path) -> Summary:
    """The results of a finished knockout.

    Raises:
      WorkdirError: there are none, or they are damaged.
    """
    if not (folder / _NAME).is_file() or not (folder / "knockout.json").is_file():
        raise workdirs.WorkdirError(
            f"{folder} has no knockout.json and {_NAME}: expected the folder of an opd-jax "
            "knockout that has ended; give another --knockout, or let the same command end"
        )
    return run_files.load(folder / _NAME, Summary)


def section(folder: Path | None) -> Section:
    """Its figures and tables. Call inside STYLE's context.

    Raises:
      WorkdirError: the folder holds no results, or damaged ones.
    """
    heading = ("knockout", "Knockout: do these tokens matter?")
    if folder is None:
        return Section(*heading, absent=(Absent("whether the tokens matter", _COMMAND),))
    found = read(folder)
    with run_files.used(folder / _NAME):
        wide, narrow = (_plates(found, layout) for layout in (style.WIDE, style.NARROW))
        body = markup.text(_lead(found), "lead") + markup.text(_checked(found))
        body += _categories(found) + markup.plates(style.with_narrow(wide, narrow))
        body += _types(found) + _teacher(found) + _sets(found) + _pairs(found)
        body += _correlations(found)
    absent = []
    if not found.get("substitutions"):
        absent.append(Absent("what a teacher says of the substitutes", f"{_COMMAND}, --teacher"))
    if "local" not in found["families"]:
        absent.append(Absent("bans at one place", f"{_COMMAND}, with --arms=single,control,local"))
    return Section(*heading, body, tuple(absent))


def _lead(found: Summary) -> str:
    base, single = found["baseline"], found["families"].get("single")
    start = (
        f"{found['model']} answers {base['accuracy']:.1%} [{base['low']:.1%}, {base['high']:.1%}] "
        f"of {found['problems']:,} problems right."
    )
    if not single:
        return start
    counts = single["category"]
    falls = sum(count for name, count in counts.items() if "cornerstone" in name)
    rises = sum(count for name, count in counts.items() if "stumbling" in name)
    margin = 100 * found["settings"]["margin"]
    unit = f"{margin:g} point{'s' * (margin != 1)}"
    return (
        f"{start} Of {single['arms']} types that it may no longer say, one at a time, {falls} cost "
        f"it right answers and {rises} gain it some; where they are held, {counts['neutral']} "
        f"change accuracy by less than {unit} and {counts['undecided']} are undecided. Over all "
        "problems, of which a rare type cannot change many, "
        f"{single['category_all']['neutral']} change it by less than {unit}."
    )


def _checked(found: Summary) -> str:
    checks = found["checks"]
    return (
        "All arms went through one program with the same random numbers. Token for token, "
        f"{checks['null']['answers']:,} answers under a ban of ids that cannot occur and "
        f"{checks['absent']['answers']:,} under a ban of types that they do not hold are the "
        f"baseline's, and {checks['prefix']['answers']:,} leave it at the first banned token and "
        "not before."
    )


def _plates(found: Summary, layout: Layout) -> list[Plate]:
    families = found["families"]
    plates = []
    if rows := [(f, row) for f in ("single", "control") if f in families for row in
                families[f]["rows"][: _DRAWN if f == "single" else _DRAWN // 4]]:  # fmt: skip
        plates.append(_by_type(rows, found, layout))
    if "local" in families:
        plates.append(_local(families, layout))
    return plates


def _by_type(
    rows: Sequence[tuple[str, Mapping[str, Any]]], found: Summary, layout: Layout
) -> Plate:
    figure, (axes,) = layout.panels(1, 7.5, 1.4 + 0.24 * len(rows))
    for kind, color in _HUES.items():
        some = [(i, row) for i, (_, row) in enumerate(rows) if row["category_all"].endswith(kind)]
        if some:
            scaled = [_points(row) for _, row in some]
            style.intervals(axes, scaled, [i for i, _ in some], color, kind)
    margin = 100 * found["settings"]["margin"]
    for end in (-margin, margin):
        axes.axvline(end, color=AMBER, linewidth=0.9, linestyle=(0, (1, 2)))
    names = [_token(row) + (" (control)" if f == "control" else "") for f, row in rows]
    _name_rows(axes, names)
    axes.set_xlabel("change of accuracy, points; bar: interval")
    layout.legend(axes)
    controls = [row for f, row in rows if f == "control"]
    told = (
        f" Control: {sum('cornerstone' in row['category'] for row in controls)} of {len(controls)} "
        "types that occur about as often, and are no targets, cost right answers as well."
        if controls
        else ""
    )
    return Plate(
        "knockout-types",
        "Which types change the answers?",
        f"Change of accuracy over all {found['problems']:,} problems when a type may not be said, "
        "best rank first. A name other than undecided and neutral was tested exactly and holds "
        f"after Benjamini and Hochberg; neutral needs the whole bar within {margin:g} points "
        f"(dotted).{told}",
        figure,
        "A bar left of the line: without this token the model gets fewer answers right.",
    )


def _local(families: Mapping[str, Any], layout: Layout) -> Plate:
    everywhere = {row["ids"][0]: row for row in families.get("single", {"rows": []})["rows"]}
    rows = families["local"]["rows"]
    figure, (axes,) = layout.panels(1, 7.5, 1.6 + 0.3 * len(rows))
    both = [(i, everywhere[r["ids"][0]]) for i, r in enumerate(rows) if r["ids"][0] in everywhere]
    if both:
        scaled = [_points(row, "_held") for _, row in both]
        style.intervals(axes, scaled, [i - 0.16 for i, _ in both], MUTED, "banned everywhere")
    scaled = [_points(row, "_held") for row in rows]
    style.intervals(axes, scaled, [i + 0.16 for i in range(len(rows))], MAIN, "at one place")
    names = [
        _token(row) + (" (control)" if row["arm"].startswith("local control") else "")
        for row in rows
    ]
    _name_rows(axes, names)
    axes.set_xlabel("change of accuracy where the type is held, points")
    layout.legend(axes)
    same = sum(row["same_answer"] * row["changed"] for row in rows)
    total = sum(row["changed"] for row in rows)
    return Plate(
        "knockout-local",
        "Does one place decide?",
        f"One occurrence of a type, drawn by lot, is banned and the answer goes on freely: "
        f"{same / total:.0%} of {total:,} answers still come to the baseline's result. Control: "
        "types of like counts.",
        figure,
        "Where both bars agree, forbidding the token once does the same as forbidding it always.",
    )


def _name_rows(axes: Any, names: Sequence[str]) -> None:
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _points(row: Mapping[str, Any], end: str = "") -> dict[str, float]:
    return {name: 100 * row[name + end] for name in ("delta", "low", "high")}


def _token(row: Mapping[str, Any]) -> str:
    return style.token_label(row["tokens"][0])


def _categories(found: Summary) -> str:
    if not found["families"]:
        return ""
    names = list(next(iter(found["families"].values()))["category"])
    rows = []
    for name, family in found["families"].items():
        row: list[Any] = [_TITLES.get(name, name), str(family["arms"])]
        for kind in names:
            over_all, published = (
                family[key][kind] for key in ("category_all", "category_published")
            )
            row.append(
                (str(family["category"][kind]), f"overall {over_all}, published {published}")
            )
        rejected = (
            f"{family['rejected']} at p 0.05 ({family['expected_by_chance']:.1f} by chance)",
            f"{family['rejected_bonferroni']} after Bonferroni, "
            f"{family['rejected_benjamini_hochberg']['0.05']} after Benjamini and Hochberg",
        )
        rows.append([*row, rejected])
    caption = (
        "How many arms of each kind, where a type is held; below, what they are over all problems, "
        "and what the published rule would call them: no correction for many tests, and neutral is "
        "whatever is not told from 0."
    )
    return markup.table(caption, ["banned", "arms", *names, "told from 0"], rows)


def _types(found: Summary) -> str:
    rows = []
    for name in ("single", "control", "local"):
        for row in found["families"].get(name, {"rows": []})["rows"][:_LISTED]:
            said = row["said"]["substitutes"][:1]
            instead = ", ".join(f"{page_data.visible(s['token'])} {s['share']:.0%}" for s in said)
            rows.append(
                [
                    page_data.visible(row["tokens"][0]),
                    row["arm"].rpartition(" ")[0],
                    f"{row['held']:,}",
                    *_effect(row),
                    instead or "–",
                ]
            )
    head = ["token", "arm", "problems that hold it", *_EFFECT, "said instead"]
    caption = (
        "Type by type. A fall in which no answer is found any more tells of the form of the "
        "answers and not of the reasoning in them."
    )
    return markup.table(caption, head, rows) if rows else ""


def _sets(found: Summary) -> str:
    """Arms that ban several types together."""
    families = found["families"]
    arms = [
        row
        for name in ("group", "pair", "cumulative")
        for row in families.get(name, {"rows": []})["rows"]
    ]
    rows = [
        [
            row["arm"],
            ", ".join(map(page_data.visible, row["tokens"][:_NAMED]))
            + f" and {len(row['tokens']) - _NAMED} more" * (len(row["tokens"]) > _NAMED),
            f"{row['held']:,}" + " of the second half" * row["second_half"],
            *_effect(row),
        ]
        for row in arms[:_LISTED]
    ]
    caption = (
        "Several types together. What was chosen by its effect on one half of the problems is "
        "measured on the other."
    )
    head = ["arm", "tokens", "problems that hold one", *_EFFECT]
    return markup.table(caption, head, rows) if rows else ""


def _pairs(found: Mapping[str, Any]) -> str:
    tokens = {
        row["ids"][0]: page_data.visible(row["tokens"][0])
        for row in found["families"].get("single", {"rows": []})["rows"]
    }
    rows = [
        [
            " and ".join(tokens.get(i, str(i)) for i in row["ids"]),
            _told(row) if row["low"] is not None else f"{100 * row['delta']:+z.1f}",
            style.p_value(row["p_adjusted"]),
        ]
        for row in found.get("interactions") or []
    ]
    caption = (
        "Are two types more than the sum of both? Change under both bans minus the changes under "
        "each; above 0: they cost less together."
    )
    return (
        markup.table(caption, ["types", "difference, points", "p adjusted"], rows) if rows else ""
    )


def _teacher(found: Mapping[str, Any]) -> str:
    names = {
        row["arm"]: page_data.visible(row["tokens"][0])
        for family in ("single", "local")
        for row in found["families"].get(family, {"rows": []})["rows"]
    }
    rows = []
    for arm, row in list((found.get("substitutions") or {}).items())[:_LISTED]:
        change = "–"
        if "change" in row:
            change = f"{row['change']:+z.3f}"
            change += "" if row["low"] is None else f" [{row['low']:z.3f}, {row['high']:z.3f}]"
        rows.append(
            [
                names.get(arm, arm),
                arm.rpartition(" ")[0],
                str(row["answers"]),
                f"{row['logp_banned']:z.2f}",
                f"{row['logp_substitute']:z.2f}",
                *(f"{row[name]:.3f}" if name in row else "–" for name in ("kl_before", "kl_after")),
                change,
            ]
        )
    caption = (
        f"What the teacher, {found.get('teacher')}, says of what is said instead: its mean "
        "log-probability of the banned and of the substituted token, and the KL per token of the "
        "rest of the answer, in nats, without and under the ban."
    )
    head = ["token", "arm", "answers", "log p, banned", "log p, said instead"]
    head += ["KL before", "KL after", "change"]
    return markup.table(caption, head, rows) if rows else ""


def _effect(row: Mapping[str, Any]) -> list[str]:
    """What a ban does, under the heads ``_EFFECT``."""
    return [
        _told(row),
        _told(row, "_held"),
        f"{row['down']} / {row['up']}",
        f"{row['unparsed']:.0%}",
        style.p_value(row["p_adjusted"]),
        row["category"],
    ]


def _told(row: Mapping[str, Any], end: str = "") -> str:
    delta, low, high = _points(row, end).values()
    return f"{delta:+z.1f} [{low:z.1f}, {high:z.1f}]"


def _correlations(found: Mapping[str, Any]) -> str:
    rows = [
        [
            row["predictor"],
            "–"
            if row["rho"] is None or row["low"] is None
            else f"{row['rho']:+z.2f} [{row['low']:z.2f}, {row['high']:z.2f}]",
            style.p_value(row["p_adjusted"]),
            str(row["types"]),
        ]
        for row in (found.get("correlations") or {}).get("delta_held", [])
    ]
    caption = (
        "What goes with the change of accuracy where a type is held: rank correlations over types "
        "with intervals; p by permutation, after Benjamini and Hochberg."
    )
    head = ["of the type", "correlation", "p adjusted", "types"]
    return markup.table(caption, head, rows) if rows else ""
