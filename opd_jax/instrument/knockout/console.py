"""The results of a knockout for a reader of the console."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opd_jax import stats
from opd_jax.instrument.knockout.effects import CATEGORIES

_COLUMNS = 100
_MOST = 60  # rows of a family
_SCORED = 20  # arms with what a teacher thinks of them


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """All families, what was checked, and what to make of it."""
    checks = result["checks"]
    base = result["baseline"]
    yield (
        f"checked token for token: {checks['null']['answers']:,} answers under the null ban and "
        f"{checks['absent']['answers']:,} without the banned type equal the baseline's, "
        f"{checks['prefix']['answers']:,} leave it at the first banned id and not before"
    )
    yield (
        f"baseline: {base['accuracy']:.1%} [{base['low']:.1%}, {base['high']:.1%}] of "
        f"{result['problems']:,} problems, {base['tokens']:,} tokens of {base['types']:,} types"
    )
    for name, family in result["families"].items():
        yield ""
        yield from _family(name, family)
    yield from _correlations(result.get("correlations") or {})
    yield from _interactions(result["interactions"])
    yield from _teacher(result)
    yield from textwrap.wrap(
        f"points: change of accuracy with {stats.LEVEL:.0%} intervals, over all problems and over "
        "those whose baseline holds the type; none: share of the answers under the ban in which no "
        "answer is recognised, which tells of format; p: exact, of as many problems down as up, "
        "adjusted over the family (Benjamini-Hochberg); neutral: the interval lies within "
        f"{100 * result['settings']['margin']:g} points, else undecided",
        _COLUMNS,
    )


def points(row: Mapping[str, Any], held: bool = False) -> str:
    """A change of accuracy with its interval, in points."""
    end = "_held" if held else ""
    delta, low, high = (100 * row[name + end] for name in ("delta", "low", "high"))
    return f"{delta:+.1f} [{low:+.1f}, {high:+.1f}]"


def _family(name: str, family: Mapping[str, Any]) -> Iterator[str]:
    rows = family["rows"]
    labels = [_label(name, row) for row in rows]
    wide = min(max([len(name), *map(len, labels)]), 32)
    is_local = "same_answer" in rows[0]
    more = f" {'same':>5} {'later':>5} {'rejoin':>6}" if is_local else ""
    yield (
        f"{name:<{wide}} {'held':>5} {'points':>20} {'where held':>21} {'down':>4} {'up':>4} "
        f"{'none':>5} {'p adj.':>8}{more}  category, said instead"
    )
    for label, row in zip(labels[:_MOST], rows, strict=False):
        said = row["said"]["substitutes"]
        instead = f"{said[0]['token']!r} {said[0]['share']:.0%}" if said else "-"
        if is_local:
            rejoined = "-" if row["rejoined"] is None else f"{row['rejoined']:.0%}"
            more = f" {row['same_answer']:>5.0%} {row['said_later']:>5.0%} {rejoined:>6}"
        yield (
            f"{label[:wide]:<{wide}} {row['held']:>5} {points(row):>20} "
            f"{points(row, held=True):>21} {row['down']:>4} {row['up']:>4} "
            f"{row['unparsed']:>5.0%} {row['p_adjusted']:>8.2g}{more}  {row['category']}, {instead}"
        )
    if len(rows) > _MOST:
        yield f"... and {len(rows) - _MOST} more in summary.json"
    counts, over_all, published = (
        ", ".join(f"{family[key][c]} {c}" for c in CATEGORIES if family[key][c])
        for key in ("category", "category_all", "category_published")
    )
    signs, rates = family["signs"], family["rejected_benjamini_hochberg"]
    yield from textwrap.wrap(
        f"{name}: {counts}, where held; over all problems {over_all} (the published rule: "
        f"{published}); {family['rejected']} of "
        f"{family['arms']} at p 0.05 where {family['expected_by_chance']:.1f} are expected by "
        f"chance, {family['rejected_bonferroni']} after Bonferroni, "
        f"{', '.join(f'{n} at false discovery rate {r}' for r, n in rates.items())}; signs "
        f"{signs['all']['down']} down, {signs['all']['up']} up, p {signs['all']['p']:.2g}",
        _COLUMNS,
    )


def _label(family: str, row: Mapping[str, Any]) -> str:
    if family in ("single", "control"):
        return f"{row['ids'][0]} {row['tokens'][0]!r}"
    return f"{row['arm']} {row['tokens'][0]!r}" if family == "local" else row["arm"]


def _correlations(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    for key, rows in found.items():
        if rows:
            yield ""
            where = "over all problems" if key == "delta" else "where held"
            yield f"rank correlation over types with the change of accuracy {where}"
        for row in rows:
            if row["rho"] is None:
                yield f"  {row['predictor']:<24} undefined"
                continue
            yield (
                f"  {row['predictor']:<24} {row['rho']:+.2f} [{row['low']:+.2f}, "
                f"{row['high']:+.2f}], p {row['p']:.2g}, adjusted {row['p_adjusted']:.2g}, "
                f"{row['types']} types"
            )


def _interactions(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if rows:
        yield ""
        yield "pairs: change of both minus the sum of the changes of each, points"
    for row in rows:
        yield (
            f"  {row['ids'][0]:>7} {row['ids'][1]:>7} {points(row)}, p {row['p']:.2g}, adjusted "
            f"{row['p_adjusted']:.2g}"
        )


def _teacher(result: Mapping[str, Any]) -> Iterator[str]:
    rows = result.get("substitutions") or {}
    if not rows:
        return
    yield ""
    yield (
        f"{result['teacher']} on the banned and the substituted id (mean log-probability, nats), "
        "and KL per token of the rest"
    )
    for name, row in list(rows.items())[:_SCORED]:
        rest = ""
        if "change" in row:
            ends = "" if row["low"] is None else f" [{row['low']:+.3f}, {row['high']:+.3f}]"
            rest = f", KL {row['kl_before']:.3f} then {row['kl_after']:.3f}: {row['change']:+.3f}"
            rest += ends
        yield (
            f"  {name:<24} {row['logp_banned']:>7.2f} {row['logp_substitute']:>7.2f} "
            f"({row['answers']} answers){rest}"
        )
