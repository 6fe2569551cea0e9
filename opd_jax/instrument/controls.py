"""Controls for the rocks: types that are like them in one respect, and what is left unmatched."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize

from opd_jax.instrument import shares
from opd_jax.instrument.corpus import TypeStats
from opd_jax.instrument.ranking import PLAIN, Rule, descending
from opd_jax.instrument.scores import SelectError

CONTROLS = (
    "next_ranks",
    "hungarian",
    "share_matched",
    "complement",
    "top_freq",
    "top_mean_kl",
)
_DRAWS = 64  # random sets among which the one nearest to a sum is taken


def choose(
    stats: TypeStats, rocks_k: ArrayLike, how: str, *, rule: Rule = PLAIN, seed: int = 0
) -> np.ndarray:
    """Ids of a control for the rocks; :func:`residual` says how well it matches them.

    ``next_ranks``: the next k types of the ranking (the first published control; it is matched in
      nothing).
    ``hungarian``: k non-rocks, one per rock and in its order, with the least sum of differences of
      log10 count (the second published control). Where rocks are the most frequent types, no
      assignment matches.
    ``share_matched``: random types whose positions add up to those of the rocks, the nearest of
      several draws; disjoint from the rocks if the others have that many positions, else drawn
      among all types, and never the rocks themselves.
    ``complement``: all seen types that are no rocks.
    ``top_freq``: the k most frequent types.
    ``top_mean_kl``: the k non-rocks with the highest mean KL that occur at least twice.

    There are fewer where fewer types were seen.

    Args:
      stats: sums by type.
      rocks_k: ids of the rocks.
      how: one of ``CONTROLS``.
      rule: how the rocks were ranked, for ``next_ranks``.
      seed: of ``share_matched``.

    Raises:
      SelectError: an unknown control, or ids outside the vocabulary.
    """
    rocks_k = shares.checked(rocks_k, len(stats.count))
    others_V = stats.seen.copy()
    others_V[rocks_k] = False
    if how == "next_ranks":
        ranked = rule.rank(stats)
        return ranked[others_V[ranked]][: len(rocks_k)]
    if how == "hungarian":
        return _hungarian(stats.count, rocks_k, np.flatnonzero(others_V))
    if how == "share_matched":
        target = stats.count[rocks_k].sum()
        is_enough = stats.count[others_V].sum() >= target
        pool = np.flatnonzero(others_V if is_enough else stats.seen)
        return _with_sum(stats.count, pool, target, np.sort(rocks_k), seed)
    if how == "complement":
        return np.flatnonzero(others_V)
    if how == "top_freq":
        order = descending(stats.count)
        return order[stats.seen[order]][: len(rocks_k)]
    if how == "top_mean_kl":
        order = Rule("mean", min_count=2).rank(stats)
        return order[others_V[order]][: len(rocks_k)]
    raise SelectError(f"control {how!r}: expected one of {CONTROLS}; give one of them")


def _hungarian(count_V: np.ndarray, rocks_k: np.ndarray, pool: np.ndarray) -> np.ndarray:
    # Types of one count are interchangeable and at most k of them can be used: without the rest the
    # cost matrix stays small whatever the vocabulary.
    _, number = np.unique(count_V[pool], return_inverse=True)
    by_count = np.argsort(number, kind="stable")
    first = np.searchsorted(number[by_count], number[by_count])
    pool = pool[np.sort(by_count[np.arange(len(pool)) - first < len(rocks_k)])]
    cost = np.abs(np.log10(count_V[rocks_k])[:, None] - np.log10(count_V[pool])[None, :])
    _, column = optimize.linear_sum_assignment(cost)
    return pool[column]


def _with_sum(
    count_V: np.ndarray, pool: np.ndarray, target: float, other_than: np.ndarray, seed: int
) -> np.ndarray:
    """Random ids whose counts add up to about ``target``: the nearest of some random draws."""
    rng = np.random.default_rng(seed)
    best, distance = pool[:0], np.inf
    for _ in range(_DRAWS):
        ids = rng.permutation(pool)
        ids = np.sort(ids[_fitting(count_V[ids], target)])
        off = abs(count_V[ids].sum() - target)
        if off < distance and not np.array_equal(ids, other_than):
            best, distance = ids, off
        if distance == 0:
            break
    return best


def _fitting(counts: np.ndarray, target: float) -> np.ndarray:
    """Which counts are taken, in their order, while they fit; and one more if that is nearer."""
    taken, left = np.zeros(len(counts), bool), target
    for place, count in enumerate(counts):
        if count <= left:
            taken[place] = True
            left -= count
    if not taken.all():
        smallest = np.flatnonzero(~taken)[np.argmin(counts[~taken])]
        taken[smallest] = counts[smallest] - left < left
    return taken


def residual(stats: TypeStats, rocks_k: ArrayLike, ids: ArrayLike) -> dict[str, Any]:
    """How far a control is from the rocks in frequency.

    Returns:
      ``overlap``: types in both; ``count_ratio``: positions of the control over those of the rocks;
      and of the two lists paired in order of count, the cheapest pairing there is:
      ``median_dlog10``, ``max_dlog10`` (absolute differences of log10 count) and ``exact_share``
      (pairs of equal count), None where the lists differ in length.
    """
    rocks_k, ids = (shares.checked(x, len(stats.count)) for x in (rocks_k, ids))
    a, b = np.sort(stats.count[rocks_k]), np.sort(stats.count[ids])
    result: dict[str, Any] = {
        "overlap": len(np.intersect1d(rocks_k, ids)),
        "count_ratio": float(b.sum() / a.sum()) if a.sum() else None,
        "median_dlog10": None,
        "max_dlog10": None,
        "exact_share": None,
    }
    if len(a) == len(b) and len(a) and min(a[0], b[0]) > 0:
        difference = np.abs(np.log10(a) - np.log10(b))
        result["median_dlog10"] = float(np.median(difference))
        result["max_dlog10"] = float(difference.max())
        result["exact_share"] = float(np.mean(a == b))
    return result
