"""Mean KL of groups of types over all their positions, with a bootstrap over problems.

A group's mean is a ratio of two sums, KL and positions, both of which vary with the problems that
are drawn; so both are kept by problem, and the ratio is taken of every draw.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from opd_jax import stats
from opd_jax.instrument.corpus import Occurrences

_CHUNK = 1000  # resamples at a time: their weights are [resamples, problems]


def by_problem(found: Occurrences, problems: np.ndarray, member_GV: np.ndarray) -> np.ndarray:
    """KL and positions of each group by problem, [2, problems, groups] f64."""
    place = np.searchsorted(problems, found.problem)
    place = np.minimum(place, len(problems) - 1)
    inside = problems[place] == found.problem
    place, token_id, kl = place[inside], found.token_id[inside], found.kl[inside]
    table = np.zeros((2, len(problems), len(member_GV)))
    for g, member_V in enumerate(member_GV):
        chosen = member_V[token_id]
        for row, weight in enumerate((kl, np.ones_like(kl))):
            table[row, :, g] = np.bincount(
                place[chosen], np.asarray(weight[chosen], np.float64), minlength=len(problems)
            )
    return table


def mean(sums: np.ndarray) -> np.ndarray:
    """KL per position of (KL, positions), NaN where there is no position."""
    kl, count = sums
    return np.divide(kl, count, out=np.full_like(kl, np.nan), where=count > 0)


def bootstrap(
    tables: Mapping[tuple[str, str], np.ndarray], resamples: int, seed: int
) -> dict[tuple[str, str], np.ndarray]:
    """Group means under resampled problems, the same draw for every cell: [resamples, groups]."""
    rng = np.random.default_rng([seed, 1])
    num = next(iter(tables.values())).shape[1]
    parts = {cell: [] for cell in tables}
    for first in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - first)
        times_RP = rng.multinomial(num, np.full(num, 1 / num), size).astype(np.float64)
        for cell, (kl_PG, count_PG) in tables.items():
            parts[cell].append(mean(np.stack([times_RP @ kl_PG, times_RP @ count_PG])))
    return {cell: np.concatenate(part) for cell, part in parts.items()}


def interval(
    delta: float, drawn_R: np.ndarray, problems: int, margin: float | None = None
) -> dict[str, float | None]:
    """The interval of a difference and its p-values by resampled problems, ready for a row.

    Args:
      delta: measured.
      drawn_R: of the resamples.
      problems: that it rests on.
      margin: for ``p_equivalent``, see :func:`stats.equivalence`.
    """
    drawn_R = drawn_R[np.isfinite(drawn_R)]  # a draw can miss a rare group altogether
    units = problems if len(drawn_R) else 1
    found = stats.interval(delta, drawn_R, units, margin)
    row = {"low": found.low, "high": found.high, "p_bootstrap": found.p}
    return row if margin is None else row | {"p_equivalent": found.p_equivalent}
