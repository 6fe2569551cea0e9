"""Intervals, tests and corrections for many tests, on the host.

Resampling p-values are ``(1 + count) / (resamples + 1)``, so none is ever 0, and two-sided ones are
at most 1 (the published analysis of arXiv 2605.09253 allowed both).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

LEVEL = 0.95  # of every interval
_BLOCK = 1 << 22  # resampled indices held at a time


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its bootstrap interval.

    Attributes:
      delta: the statistic of the data; of a comparison, the arm minus the base.
      low, high: percentile interval at ``LEVEL``.
      p: two-sided p-value of "delta is 0".
    """

    delta: float
    low: float
    high: float
    p: float


def quantiles(values: np.ndarray, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the middle ``LEVEL`` of resampled values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=axis)
    return low, high


def two_sided(drawn: np.ndarray) -> float:
    """p-value of "it is 0" from resampled values, by the rarer side of 0."""
    tail = min(np.sum(drawn <= 0), np.sum(drawn >= 0))
    return min(1.0, 2 * (1 + int(tail)) / (len(drawn) + 1))


def paired_bootstrap(
    base: ArrayLike, arm: ArrayLike, *, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of ``arm - base``, problems being resampled in both alike.

    Args:
      base, arm: one value per problem, in the same order.
      resamples, seed: of the bootstrap.

    Raises:
      ValueError: the arms do not hold the same problems, or none.
    """
    base, arm = _pair(base, arm)
    return bootstrap(arm - base, resamples=resamples, seed=seed)


def bootstrap(
    values: ArrayLike,
    statistic: Callable[..., np.ndarray] = np.mean,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """A statistic of ``values`` with its bootstrap interval and the p-value of its being 0.

    Args:
      values: one value per unit that is resampled (a problem, a type).
      statistic: takes an array and ``axis=``, as ``np.mean`` and ``np.median`` do.
      resamples, seed: of the bootstrap.

    Raises:
      ValueError: there are no values.
    """
    values = _checked(values)
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // len(values))
    drawn = []
    for first in range(0, _resamples(resamples), block):
        size = (min(block, resamples - first), len(values))
        drawn.append(statistic(values[rng.integers(len(values), size=size)], axis=1))
    return _interval(float(statistic(values, axis=0)), np.concatenate(drawn))


def hierarchical_bootstrap(
    base: Sequence[ArrayLike],
    arm: Sequence[ArrayLike],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Mean over training seeds of the mean of ``arm - base`` over problems, with both spreads.

    Problems are resampled jointly: they are the same ones under every seed and arm, so that a hard
    problem is drawn for all of them or for none. Seeds are few, and resampling a few values spreads
    them too little (of 3 seeds that differ, 77 % of such intervals hold the truth instead of 95 %);
    so each draw adds a Student's t variable, scaled by the standard error of the mean over seeds.
    What is of one seed and one problem alone counts in both spreads: the interval errs on the wide
    side. With one seed it stands for the problems alone.

    Args:
      base, arm: per seed, one value per problem; seed i of the arm is paired with seed i of base.
      resamples, seed: of the bootstrap.

    Raises:
      ValueError: the arms differ in seeds, or the seeds in problems.
    """
    if len(base) != len(arm) or not len(base):
        raise ValueError(
            f"{len(base)} seeds of the base and {len(arm)} of the arm: expected the same number, "
            "at least one; run the missing seeds"
        )
    pairs = [_pair(b, a) for b, a in zip(base, arm, strict=True)]
    lengths = sorted({len(b) for b, _ in pairs})
    if len(lengths) > 1:
        raise ValueError(
            f"seeds with {lengths} problems: expected the same problems under every seed; grade "
            "all seeds on one file"
        )
    difference_SP = np.stack([a - b for b, a in pairs])
    seeds, problems = difference_SP.shape
    rng = np.random.default_rng(seed)
    drawn = np.empty(_resamples(resamples))
    block = max(1, _BLOCK // problems)
    for first in range(0, resamples, block):
        size = min(block, resamples - first)
        # How often each was drawn says the same as which: the mean is then a small product.
        problem_RP = rng.multinomial(problems, np.full(problems, 1 / problems), size=size)
        drawn[first : first + size] = problem_RP @ difference_SP.mean(axis=0) / problems
    if seeds > 1:
        error = np.std(difference_SP.mean(axis=1), ddof=1) / np.sqrt(seeds)
        drawn += error * rng.standard_t(seeds - 1, size=resamples)
    return _interval(float(difference_SP.mean()), drawn)


def wilson(share: float, num: int) -> tuple[float, float]:
    """Wilson's interval at ``LEVEL`` of a share that was counted over ``num`` independent units.

    Raises:
      ValueError: no units, or something that is no share.
    """
    if num < 1 or not 0 <= share <= 1:
        raise ValueError(
            f"share {share} of {num} units: expected 0 to 1, of at least one; leave out what was "
            "not measured"
        )
    z2 = float(stats.norm.ppf((1 + LEVEL) / 2)) ** 2
    middle = (share + z2 / (2 * num)) / (1 + z2 / num)
    half = np.sqrt(z2 * (share * (1 - share) / num + z2 / (4 * num**2))) / (1 + z2 / num)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def benjamini_hochberg(p: ArrayLike, q: float) -> np.ndarray:
    """Which hypotheses are rejected at false discovery rate ``q``, bool."""
    return bh_adjusted(p) <= q


def bh_adjusted(p: ArrayLike) -> np.ndarray:
    """The smallest false discovery rate at which each hypothesis is rejected.

    Raises:
      ValueError: something that is no p-value.
    """
    p = np.asarray(p, np.float64).ravel()
    _check_p(p)
    return stats.false_discovery_control(p, method="bh") if len(p) else p


def bonferroni(p: ArrayLike, alpha: float) -> np.ndarray:
    """Which hypotheses are rejected at family-wise error rate ``alpha``, bool."""
    p = np.asarray(p, np.float64).ravel()
    _check_p(p)
    return p <= alpha / max(len(p), 1)


def sign_test(k: int, n: int) -> float:
    """Exact two-sided p-value of ``k`` signs of one kind among ``n``, each as likely as the other.

    Raises:
      ValueError: ``k`` is not between 0 and ``n``.
    """
    if not 0 <= k <= n:
        raise ValueError(f"{k} signs of {n}: expected a number from 0 to {n}; count ties out")
    return float(stats.binomtest(k, n).pvalue) if n else 1.0


def spearman(a: ArrayLike, b: ArrayLike) -> float | None:
    """Rank correlation, ties at their mean rank; None where it is undefined.

    It is for fewer than two pairs or where one side is constant.
    """
    rank_a, rank_b = (np.asarray(stats.rankdata(values)) for values in (a, b))
    if len(rank_a) < 2 or np.ptp(rank_a) == 0 or np.ptp(rank_b) == 0:
        return None
    return float(np.corrcoef(rank_a, rank_b)[0, 1])


def _interval(delta: float, drawn: np.ndarray) -> Interval:
    low, high = quantiles(drawn)
    return Interval(delta, float(low), float(high), two_sided(drawn))


def _pair(base: ArrayLike, arm: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    base, arm = _checked(base), _checked(arm)
    if len(base) != len(arm):
        raise ValueError(
            f"{len(base)} problems of the base and {len(arm)} of the arm: expected the same "
            "problems in the same order; compare runs that were graded on one file"
        )
    return base, arm


def _checked(values: ArrayLike) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values) or not np.all(np.isfinite(values)):
        raise ValueError(
            f"values of shape {values.shape}: expected one finite number per unit, at least one; "
            "leave out what was not measured"
        )
    return values


def _resamples(number: int) -> int:
    if number < 1:
        raise ValueError(f"{number} resamples: expected at least 1; raise resamples")
    return number


def _check_p(p: np.ndarray) -> None:
    if not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"p-values from {p.min()} to {p.max()}: expected 0 to 1; check the test")
