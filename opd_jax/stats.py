"""Intervals, tests and corrections for many tests, on the host.

No p-value is 0 and none is above 1 (the published analysis of arXiv 2605.09253 allowed both):
those of resampling are ``(1 + count) / (resamples + 1)``. ``scripts/calibrate`` measures how often
each test rejects what is true and each interval holds it.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike

LEVEL = 0.95  # of every interval
_BLOCK = 1 << 22  # resampled indices held at a time
_LEAST_P = sys.float_info.min


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its interval.

    Attributes:
      delta: the statistic of the data; of a comparison, the arm minus the base.
      low, high: interval at ``LEVEL``; None where a single unit says nothing about others.
      p: two-sided p-value of "delta is 0".
      p_equivalent: of "delta is as large as the margin, or larger" (either sign), where a margin
        was given; small: the difference is less than the margin.
    """

    delta: float
    low: float | None
    high: float | None
    p: float
    p_equivalent: float | None = None


def quantiles(values: np.ndarray, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the middle ``LEVEL`` of resampled values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=axis)
    return low, high


def two_sided(drawn: np.ndarray) -> float:
    """p-value of "it is 0" from resampled values, by the rarer side of 0."""
    tail = min(np.sum(drawn <= 0), np.sum(drawn >= 0))
    return min(1.0, 2 * (1 + int(tail)) / (len(drawn) + 1))


def equivalence(drawn: np.ndarray, margin: float) -> float:
    """p-value of "it is at least ``margin`` away from 0", from resampled values.

    Two one-sided tests (Schuirmann 1987): both "at most -margin" and "at least margin" must be
    refused. It rejects at 5% where the 90% interval of the same draws lies within the margin.

    Raises:
      ValueError: a margin that is not above 0.
    """
    _check_margin(margin)
    worst = max(np.sum(drawn <= -margin), np.sum(drawn >= margin))
    return float((1 + int(worst)) / (len(drawn) + 1))


def verdict(p: float, p_equivalent: float | None) -> str:
    """What a comparison says at ``LEVEL``, in one of four words.

    ``different``, ``equivalent`` (by less than the margin, if at all), ``different, within the
    margin``, or ``undecided``: no difference was found, and none was ruled out either.
    """
    is_different = p <= 1 - LEVEL
    is_equivalent = p_equivalent is not None and p_equivalent <= 1 - LEVEL
    if is_different:
        return "different, within the margin" if is_equivalent else "different"
    return "equivalent" if is_equivalent else "undecided"


def widening(units: int) -> float:
    """By how much resampled values have to be spread about the estimate, from 2 units on.

    A bootstrap of n units has the variance of a mean with n in place of n - 1 and normal tails in
    place of Student's: its interval is too short, by 25% at 5 units and 4% at 40 (Hesterberg 2015,
    "expanded percentile interval").
    """
    student, normal = (d.ppf((1 + LEVEL) / 2) for d in (scipy.stats.t(units - 1), scipy.stats.norm))
    return float(student / normal * math.sqrt(units / (units - 1)))


def paired_bootstrap(
    base: ArrayLike,
    arm: ArrayLike,
    *,
    margin: float | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Mean of ``arm - base``, problems being resampled in both alike.

    Args:
      base, arm: one value per problem, in the same order.
      margin: the smallest difference that counts, for the test of equivalence.
      resamples, seed: of the bootstrap.

    Raises:
      ValueError: the arms do not hold the same problems, or none.
    """
    base, arm = _pair(base, arm)
    return bootstrap(arm - base, margin=margin, resamples=resamples, seed=seed)


def bootstrap(
    values: ArrayLike,
    *,
    margin: float | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Mean of ``values`` with its bootstrap interval and the p-value of its being 0.

    The draws are spread by :func:`widening`; one value alone has no interval and p 1.

    Args:
      values: one value per unit that is resampled (a problem, a type).
      margin: the smallest difference from 0 that counts, for the test of equivalence.
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
        drawn.append(values[rng.integers(len(values), size=size)].mean(axis=1))
    return interval(float(values.mean()), np.concatenate(drawn), len(values), margin)


def interval(delta: float, drawn: np.ndarray, units: int, margin: float | None = None) -> Interval:
    """The interval and tests of an estimate from its draws, of so many resampled units."""
    if margin is not None:
        _check_margin(margin)
    if units < 2:
        return Interval(delta, None, None, 1.0, None if margin is None else 1.0)
    return _interval(delta, delta + widening(units) * (drawn - delta), margin)


def median(values: ArrayLike) -> Interval:
    """Median of ``values`` with its exact interval and the p-value of its being 0.

    The interval lies between two of the values, by the binomial law of how many are below the
    median; it holds it at least as often as ``LEVEL`` says, whatever the law of the values. Of
    fewer than six no two do.

    Raises:
      ValueError: there are no values.
    """
    values = _checked(values)
    found = scipy.stats.quantile_test(values, q=0, p=0.5)
    low, high = (float(x) for x in found.confidence_interval(LEVEL))
    is_known = math.isfinite(low) and math.isfinite(high)
    ends = (low, high) if is_known else (None, None)
    return Interval(float(np.median(values)), *ends, _positive(found.pvalue))


def hierarchical_bootstrap(
    base: Sequence[ArrayLike],
    arm: Sequence[ArrayLike],
    *,
    margin: float | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Mean over training seeds of the mean of ``arm - base`` over problems, with both spreads.

    Problems are resampled jointly: they are the same ones under every seed and arm, so that a hard
    problem is drawn for all of them or for none. Seeds are few, and resampling a few values spreads
    them too little (of 3 seeds that differ, 77 % of such intervals hold the truth instead of 95 %);
    so each draw adds a Student's t variable, scaled by the standard error of the mean over seeds.
    What is of one seed and one problem alone counts in both spreads: the interval errs on the wide
    side. With one seed it stands for the problems alone. Draws of problems are spread by
    :func:`widening`.

    Args:
      base, arm: per seed, one value per problem; seed i of the arm is paired with seed i of base.
      margin: the smallest difference that counts, for the test of equivalence.
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
    delta = float(difference_SP.mean())
    if problems > 1:
        drawn = delta + widening(problems) * (drawn - delta)
    elif seeds == 1:
        return interval(delta, drawn, 1, margin)
    if seeds > 1:
        error = np.std(difference_SP.mean(axis=1), ddof=1) / np.sqrt(seeds)
        drawn += error * rng.standard_t(seeds - 1, size=resamples)
    return _interval(delta, drawn, margin)


def student(values: ArrayLike, margin: float | None = None) -> Interval:
    """Mean of a few values (one per training seed) with Student's t interval and tests.

    A bootstrap of a handful of values would be too sure of itself. One value alone has no interval
    and p 1; of equal values, which leave no spread to compare with, p is that of their signs.

    Raises:
      ValueError: there are no values.
    """
    values = _checked(values)
    if margin is not None:
        _check_margin(margin)
    delta, free = float(np.mean(values)), len(values) - 1
    if not free:
        return Interval(delta, None, None, 1.0, None if margin is None else 1.0)
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    law = scipy.stats.t(free)
    reach = error * float(law.ppf((1 + LEVEL) / 2))
    signs = sign_test(len(values), len(values))
    p = _positive(2 * law.sf(abs(delta) / error)) if error else signs if delta else 1.0
    away = None
    if margin is not None:
        room = margin - abs(delta)
        away = _positive(law.sf(room / error)) if error else signs if room > 0 else 1.0
    return Interval(delta, delta - reach, delta + reach, p, away)


def share_interval(right: ArrayLike) -> tuple[float, float]:
    """Interval at ``LEVEL`` of the mean of one share per problem (of its answers that are right).

    Wilson's, at the number of independent answers that would spread as much: with one answer per
    problem that is the number of problems, with answers that agree within a problem not more.

    Raises:
      ValueError: there are no values, or something that is no share.
    """
    right = _checked(right)
    if right.min() < 0 or right.max() > 1:
        raise ValueError(
            f"shares from {right.min()} to {right.max()}: expected 0 to 1, the share of right "
            "answers to each problem; check the grades"
        )
    share, spread = float(np.mean(right)), float(np.var(right))
    return wilson(share, len(right) * (share * (1 - share) / spread if spread else 1.0))


def wilson(share: float, num: float) -> tuple[float, float]:
    """Wilson's interval at ``LEVEL`` of a share over ``num`` independent units, or as good as that.

    Raises:
      ValueError: no units, or something that is no share.
    """
    if num < 1 or not 0 <= share <= 1:
        raise ValueError(
            f"share {share} of {num} units: expected 0 to 1, of at least one; leave out what was "
            "not measured"
        )
    z2 = float(scipy.stats.norm.ppf((1 + LEVEL) / 2)) ** 2
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
    return scipy.stats.false_discovery_control(p, method="bh") if len(p) else p


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
    return _positive(scipy.stats.binomtest(k, n).pvalue) if n else 1.0


def mcnemar(base: ArrayLike, arm: ArrayLike) -> float:
    """McNemar's exact two-sided p-value of "base and arm are right equally often".

    Only the problems that one of them solves and the other does not say anything: as many either
    way, each as likely as the other.

    Args:
      base, arm: right (1) or wrong (0), one per problem in the same order.

    Raises:
      ValueError: something else than 0 and 1, or other problems.
    """
    base, arm = _pair(base, arm)
    if not np.isin([base, arm], (0, 1)).all():
        raise ValueError(
            "outcomes that are neither 0 nor 1: expected right or wrong, one answer per problem; "
            "compare shares by paired_bootstrap"
        )
    return sign_test(int(np.sum(arm > base)), int(np.sum(arm != base)))


def spearman(a: ArrayLike, b: ArrayLike) -> float | None:
    """Rank correlation, ties at their mean rank; None where it is undefined.

    It is for fewer than two pairs or where one side is constant.
    """
    rank_a, rank_b = (np.asarray(scipy.stats.rankdata(values)) for values in (a, b))
    if len(rank_a) < 2 or np.ptp(rank_a) == 0 or np.ptp(rank_b) == 0:
        return None
    return float(np.corrcoef(rank_a, rank_b)[0, 1])


def _interval(delta: float, drawn: np.ndarray, margin: float | None) -> Interval:
    low, high = quantiles(drawn)
    away = None if margin is None else equivalence(drawn, margin)
    return Interval(delta, float(low), float(high), two_sided(drawn), away)


def _positive(p: Any) -> float:
    """A p-value that rounding made 0 as the smallest float."""
    return min(1.0, max(float(p), _LEAST_P))


def _check_margin(margin: float) -> None:
    if not (math.isfinite(margin) and margin > 0):
        raise ValueError(
            f"margin {margin}: expected the smallest difference that counts, above 0; give another"
        )


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
