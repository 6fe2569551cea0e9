r"""Which types are Rock Tokens, by which metric, against which controls, and how dense they are.

A metric is a function of a type's count n, mean KL m and standard deviation s, all in closed form
from the three sums of :class:`TypeStats`. Ties go to the smaller id everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special

from opd_jax.instrument.corpus import Occurrences, TypeStats

# The published name stands behind each (arXiv 2605.09253, test_stability.py of its code).
METRICS = (
    "rock",  # freq*mean: n m, the Rock Score
    "mean",  # raw_mean: m
    "mean_min5",  # mean_freq>=5: m of types with n >= 5
    "mean_min10",  # mean_freq>=10
    "rock_lcb",  # freq*LCB_t: n max(0, lower confidence bound of m), n >= 2
    "mean_lcb",  # LCB_t: that bound, m - t(.95, n - 1) s / sqrt(n)
    "eb_mean",  # EB_post_mean: empirical-Bayes posterior mean
    "eb_lcb",  # EB_lower_CB: its lower bound at 95 %
)
JOINT = {f"joint_{name}": name for name in ("rock", "rock_lcb", "mean_lcb", "eb_lcb")}
CONTROLS = (
    "next_ranks",
    "hungarian",
    "share_matched",
    "complement",
    "top_freq",
    "top_mean_kl",
)
_CONFIDENCE = 0.95  # one-sided, of every lower bound
_DRAWS = 64  # random sets among which the one nearest to a sum is taken
_NO_SPREAD = 1e-12  # variance between types below which empirical Bayes pools them all


class SelectError(ValueError):
    """Types cannot be selected as asked; the message says why and what to change."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """How types are ranked: the flags ``--score``, ``--skip-top`` and ``--min-count``.

    Attributes:
      score: one of ``METRICS``.
      skip_top: the most frequent types that are never selected.
      min_count: positions that a type must have.

    Raises:
      SelectError: an unknown score or a negative number.
    """

    score: str = "rock"
    skip_top: int = 0
    min_count: float = 1

    def __post_init__(self):
        if self.score not in METRICS:
            raise SelectError(f"score {self.score!r}: expected one of {METRICS}; set --score")
        if self.skip_top < 0:
            raise SelectError(f"skip_top {self.skip_top}: expected at least 0; set --skip-top")
        if self.min_count < 0:
            raise SelectError(f"min_count {self.min_count}: expected at least 0; set --min-count")

    def rank(self, stats: TypeStats, score_V: np.ndarray | None = None) -> np.ndarray:
        """All types that may be selected, the highest score first, as ids.

        ``score_V`` stands in for the rule's own metric. Types where it is -inf may not be selected.
        """
        score_V = metric(stats, self.score) if score_V is None else score_V
        is_eligible_V = stats.seen & (stats.count >= self.min_count) & (score_V > -np.inf)
        is_eligible_V[_descending(stats.count)[: self.skip_top]] = False
        order = _descending(score_V)
        return order[is_eligible_V[order]]


def rocks(
    stats: TypeStats, k: int, *, score: str = "rock", skip_top: int = 0, min_count: float = 1
) -> np.ndarray:
    """Ids of the ``k`` types with the highest score, in order.

    Args:
      stats: sums by type.
      k: how many.
      score, skip_top, min_count: see :class:`Rule`.

    Raises:
      SelectError: fewer types than ``k`` can be selected, or a bad rule.
    """
    ranked = Rule(score, skip_top, min_count).rank(stats)
    if not 1 <= k <= len(ranked):
        raise SelectError(
            f"k {k} of {len(ranked)} types that can be selected ({int(stats.seen.sum())} seen, "
            f"skip_top {skip_top}, min_count {min_count:g}): expected 1 to {len(ranked)}; lower "
            "--k, --skip-top or --min-count, or collect more answers"
        )
    return ranked[:k]


def metric(stats: TypeStats, name: str, other: TypeStats | None = None) -> np.ndarray:
    """A selection metric of every type, f64 [V]; -inf where it is undefined.

    Args:
      stats: sums by type.
      name: one of ``METRICS``, or of ``JOINT``: the minimum over two corpora.
      other: the second corpus of a joint metric.

    Raises:
      SelectError: an unknown name, or a joint metric without a second corpus of the same size.
    """
    if name in JOINT:
        if other is None or len(other.count) != len(stats.count):
            raise SelectError(
                f"metric {name!r} got {'one corpus' if other is None else 'two vocabularies'}: "
                "expected two corpora of one vocabulary; give the second one"
            )
        return np.minimum(metric(stats, JOINT[name]), metric(other, JOINT[name]))
    if name not in METRICS:
        raise SelectError(
            f"score {name!r}: expected one of {(*METRICS, *JOINT)}; set --score to one of them"
        )
    n_V, mean_V = stats.count, stats.mean
    if name == "rock":
        return np.where(stats.seen, stats.kl_sum, -np.inf)
    if name in ("mean", "mean_min5", "mean_min10"):
        least = {"mean": 0, "mean_min5": 5, "mean_min10": 10}[name]
        return np.where(stats.seen & (n_V >= least), mean_V, -np.inf)
    if name.startswith("eb"):
        return _empirical_bayes(stats, is_bound=name == "eb_lcb")
    low_V = np.full(len(n_V), -np.inf)
    several_V = n_V >= 2
    n, variance = n_V[several_V], stats.squares[several_V] / (n_V[several_V] - 1)
    low_V[several_V] = mean_V[several_V] - special.stdtrit(n - 1, _CONFIDENCE) * np.sqrt(
        variance / n
    )
    if name == "mean_lcb":
        return low_V
    return np.where(several_V, n_V * np.maximum(low_V, 0), -np.inf)


def _empirical_bayes(stats: TypeStats, *, is_bound: bool) -> np.ndarray:
    r"""Shrink type means to the mean of all positions.

    With :math:`\sigma^2` the pooled variance within types, :math:`\tau^2` that of the type means
    less what sampling explains, the posterior weight of a type's own mean is
    :math:`\tau^2 / (\tau^2 + \sigma^2 / n)`.
    """
    n, mean = stats.count[stats.seen], stats.mean[stats.seen]
    out_V = np.full(len(stats.count), -np.inf)
    if not len(n):
        return out_V
    grand = stats.kl_sum.sum() / n.sum()
    degrees = np.sum(np.maximum(n - 1, 0))  # decayed counts may be below 1
    within = stats.squares.sum() / degrees if degrees > 0 else 0.0
    spread = np.var(mean, ddof=1) if len(mean) > 1 else 0.0
    between = max(0.0, float(spread - within / n.mean()))
    if between < _NO_SPREAD:
        out_V[stats.seen] = grand
        return out_V
    weight = between / (between + within / n)
    deviation = np.sqrt(between * (1 - weight))
    out_V[stats.seen] = weight * mean + (1 - weight) * grand
    if is_bound:
        out_V[stats.seen] -= special.ndtri(_CONFIDENCE) * deviation
    return out_V


def coverage(stats: TypeStats, ids: ArrayLike) -> float:
    """Share of the corpus's KL at positions of these types; 0 where there is no KL.

    Raises:
      SelectError: an id outside the vocabulary.
    """
    return _part(stats.kl_sum, checked(ids, len(stats.count)))


def token_share(stats: TypeStats, ids: ArrayLike) -> float:
    """Share of the corpus's positions that are of these types."""
    return _part(stats.count, checked(ids, len(stats.count)))


def _part(sum_V: np.ndarray, ids: np.ndarray) -> float:
    total = sum_V.sum()
    return float(sum_V[ids].sum() / total) if total else 0.0


def jaccard(a: ArrayLike, b: ArrayLike) -> float:
    """Size of the intersection over that of the union; 1 for two empty sets."""
    a, b = np.unique(np.asarray(a)), np.unique(np.asarray(b))
    both = len(np.intersect1d(a, b))
    union = len(a) + len(b) - both
    return both / union if union else 1.0


def checked(ids: ArrayLike, vocab_size: int) -> np.ndarray:
    """Distinct ids as an integer array, in their order.

    Raises:
      SelectError: one is outside the vocabulary or stands twice.
    """
    ids = np.asarray(ids, np.int64).ravel()
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise SelectError(
            f"ids {outside[:5].tolist()} are outside the vocabulary: expected 0 to "
            f"{vocab_size - 1}; give ids of this tokenizer"
        )
    if len(np.unique(ids)) < len(ids):
        raise SelectError(
            f"{len(ids)} ids of which {len(np.unique(ids))} differ: expected every id once; drop "
            "the repeated ones"
        )
    return ids


def controls(
    stats: TypeStats, rocks_k: ArrayLike, how: str, *, rule: Rule = Rule(), seed: int = 0
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
    rocks_k = checked(rocks_k, len(stats.count))
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
        order = _descending(stats.count)
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
    rocks_k, ids = (checked(x, len(stats.count)) for x in (rocks_k, ids))
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


@dataclasses.dataclass(frozen=True)
class Density:
    """Per answer with scored positions, f64: shares at positions of some types."""

    token_share: np.ndarray
    kl_share: np.ndarray  # 0 where the answer has no KL


def density(found: Occurrences, ids: Sequence[int] | np.ndarray) -> Density:
    """Share of each answer's tokens, and of its KL, at positions of these types.

    Raises:
      SelectError: an id outside the vocabulary.
    """
    is_in_V = np.zeros(found.vocab_size, bool)
    is_in_V[checked(ids, found.vocab_size)] = True
    inside = is_in_V[found.token_id]
    answers, number = np.unique(found.answer, return_inverse=True)
    kl = found.kl.astype(np.float64)
    tokens, tokens_in, kl_all, kl_in = (
        np.bincount(number, weights, minlength=len(answers))
        for weights in (np.ones_like(kl), inside, kl, kl * inside)
    )
    kl_share = np.divide(kl_in, kl_all, out=np.zeros_like(kl_all), where=kl_all > 0)
    return Density(tokens_in / tokens, kl_share)


def _descending(score_V: np.ndarray) -> np.ndarray:
    return np.argsort(-score_V, kind="stable")
