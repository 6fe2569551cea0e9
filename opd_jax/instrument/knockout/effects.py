r"""What the arms did to accuracy, with intervals, tests, corrections and names.

The unit is the problem; samples of one problem are averaged. An answer that holds none of an arm's
ids is the same in both, so that the change of accuracy over all problems is the one over the
problems that hold the type, times their share.

Names: with a test that rejects after Benjamini and Hochberg, a type whose ban lowers accuracy is a
*cornerstone* and one whose ban raises it a *stumbling block*, ``strong`` from the margin on (the
published eps, 0.01), else ``weak``. A type is ``neutral`` only if the whole interval lies inside
the margin; else it is ``undecided``. A name is of what happens where a type is held; that of
accuracy over all problems, of which a rare type cannot change much, stands beside it. (Published:
over all problems, and neutral is whatever an uncorrected test does not reject.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opd_jax import changes, stats
from opd_jax.instrument import correlation
from opd_jax.instrument.knockout import flips
from opd_jax.instrument.knockout.flips import ALPHA

RATES = (0.05, 0.1, 0.2)  # false discovery rates, as published
CATEGORIES = (
    *("strong cornerstone", "weak cornerstone", "neutral"),
    *("weak stumbling block", "strong stumbling block", "undecided"),
)
# The published nine, and the column of a table of types that holds each, if any does.
PREDICTORS = {
    "frequency": ("count",),
    "rock count": ("rock_count",),
    "rock rate": ("rock_rate",),
    "KL before": ("kl_mean_before", "loss_before"),
    "KL after": ("kl_mean", "loss_after"),
    "improvement": ("improvement", "avg_improvement"),
    "teacher entropy": ("teacher_entropy_mean",),
    "student entropy before": ("entropy_mean_before",),
    "student entropy after": ("entropy_mean",),
}
_PERMUTATIONS = 10_000


@dataclasses.dataclass(frozen=True)
class Effect:
    """What one arm did.

    Attributes:
      problems, held: measured on, and those of them that hold one of its ids in the baseline.
      base: accuracy of the baseline on ``problems``; ``base_held``: on ``held``.
      delta, low, high: change of accuracy over ``problems``.
      delta_held, low_held, high_held: over ``held``.
      down, up: problems that got worse, and better.
      p, test: exact, of "as many get worse as better".
      p_bootstrap: of the paired bootstrap over ``problems``.
    """

    problems: int
    held: int
    base: float
    base_held: float
    delta: float
    low: float
    high: float
    delta_held: float
    low_held: float
    high_held: float
    down: int
    up: int
    p: float
    test: str
    p_bootstrap: float


def effect(base_NK: np.ndarray, arm_NK: np.ndarray, held_N: np.ndarray, seed: int) -> Effect:
    """Compare an arm with the baseline.

    Args:
      base_NK, arm_NK: right (1) or wrong (0), sample by sample of the same problems.
      held_N: problems that can differ, at least one.
      seed: of the bootstrap.
    """
    base_N, arm_N = base_NK.mean(axis=1), arm_NK.mean(axis=1)
    change_N = arm_N - base_N
    low, high = changes.interval(changes.flips(change_N))
    low_held, high_held = changes.interval(changes.flips(change_N[held_N]))
    single = base_NK.shape[1] == 1
    return Effect(
        problems=len(base_N),
        held=int(held_N.sum()),
        base=float(base_N.mean()),
        base_held=float(base_N[held_N].mean()),
        delta=float(change_N.mean()),
        low=low,
        high=high,
        delta_held=float(change_N[held_N].mean()),
        low_held=low_held,
        high_held=high_held,
        down=int(np.sum(change_N < 0)),
        up=int(np.sum(change_N > 0)),
        p=flips.test(change_N),
        test="McNemar, exact" if single else "sign test over problems, exact",
        p_bootstrap=stats.paired_bootstrap(base_N, arm_N, seed=seed).p,
    )


def category(delta: float, low: float, high: float, p: float, margin: float) -> str:
    """The name of a change of accuracy: one of ``CATEGORIES``; p is after correction."""
    if p <= ALPHA and delta:
        strength = "strong" if abs(delta) >= margin else "weak"
        return f"{strength} {'cornerstone' if delta < 0 else 'stumbling block'}"
    return "neutral" if -margin < low and high < margin else "undecided"


def published(delta: float, p: float, margin: float) -> str:
    """What the published rule says, by a bootstrap's p without correction."""
    if p >= ALPHA:
        return "neutral"
    return category(delta, 0.0, 0.0, p, margin)


def judged(found: Sequence[Effect], margin: float) -> list[dict[str, Any]]:
    """Effects of one family of arms with their corrections over it, and their names."""
    p = [each.p for each in found]
    adjusted, bonferroni = stats.bh_adjusted(p), stats.bonferroni(p, ALPHA)
    rows = []
    for each, q, is_rejected in zip(found, adjusted.tolist(), bonferroni.tolist(), strict=True):
        held = (each.delta_held, each.low_held, each.high_held)
        rows.append(
            dataclasses.asdict(each)
            | {
                "p_adjusted": q,
                "bonferroni": bool(is_rejected),
                "category": category(*held, q, margin),
                "category_all": category(each.delta, each.low, each.high, q, margin),
                "category_published": published(each.delta, each.p_bootstrap, margin),
            }
        )
    return rows


def family(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A family as a whole: how many of each name, how many are rejected, and the signs."""
    p = [row["p"] for row in rows]
    q = [row["p_adjusted"] for row in rows]
    signs = {}
    for name, some in (
        ("all", rows),
        ("rejected", [row for row in rows if row["p"] <= ALPHA]),
    ):
        down, up = (sum(sign * row["delta"] > 0 for row in some) for sign in (-1, 1))
        signs[name] = {"down": down, "up": up, "p": stats.sign_test(down, down + up)}
    counts = {
        key: {name: sum(row[key] == name for row in rows) for name in CATEGORIES}
        for key in ("category", "category_all", "category_published")
    }
    return {
        "arms": len(rows),
        "expected_by_chance": ALPHA * len(rows),
        "rejected": sum(x <= ALPHA for x in p),
        "rejected_bonferroni": sum(row["bonferroni"] for row in rows),
        "rejected_benjamini_hochberg": {str(r): sum(x <= r for x in q) for r in RATES},
        "signs": signs,
        **counts,
    }


def interactions(change: Mapping[tuple[int, ...], np.ndarray], seed: int) -> list[dict[str, Any]]:
    """How far the change of a pair is from the sum of its types' changes, by problem.

    Args:
      change: of accuracy, problem by problem, by the ids that were banned.
      seed: of the bootstrap.
    """
    found = []
    for ids, both_N in change.items():
        if len(ids) == 2 and all((i,) in change for i in ids):
            alone_N = change[(ids[0],)] + change[(ids[1],)]
            told = stats.bootstrap(both_N - alone_N, seed=seed)
            row = {"ids": list(ids), "delta": told.delta, "low": told.low, "high": told.high}
            found.append(row | {"p": told.p})
    adjusted = stats.bh_adjusted([row["p"] for row in found]).tolist()
    return [row | {"p_adjusted": q} for row, q in zip(found, adjusted, strict=True)]


def correlations(
    table: Mapping[str, Sequence[float | None]], delta: Sequence[float], seed: int
) -> list[dict[str, Any]]:
    """Rank correlation of the published predictors with the change of accuracy, over types.

    Args:
      table: columns by name, with a value (or None) per type.
      delta: change per type.
      seed: of the permutations.

    Returns:
      One entry per predictor that the table has: rho with its interval, p by permutation of types,
      and p after correction over the predictors.
    """
    found = []
    for name, columns in PREDICTORS.items():
        column = next((table[c] for c in columns if c in table), None)
        if column is None:
            continue
        pairs = [(x, y) for x, y in zip(column, delta, strict=True) if x is not None]
        x, y = (np.array(side, float) for side in zip(*pairs, strict=True)) if pairs else ([], [])
        told = correlation.plain(x, y, permutations=_PERMUTATIONS, seed=seed)  # type: ignore
        low, high = correlation.ends(told.rho, len(pairs)) or (None, None)
        row = {"predictor": name, "types": len(pairs), "rho": told.rho, "low": low, "high": high}
        found.append(row | {"p": told.p})
    adjusted = stats.bh_adjusted([row["p"] for row in found]).tolist()
    return [row | {"p_adjusted": q} for row, q in zip(found, adjusted, strict=True)]
