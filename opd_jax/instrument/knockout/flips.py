r"""What answers that flip between right and wrong can tell: an interval, and what could be seen.

With b of n problems right in the baseline alone and c in the arm alone, the change of accuracy is
:math:`(c - b) / n`. Its interval is Tango's (1998): all differences that the score test does not
refuse. It has a width even where nothing flips, when a bootstrap says [0, 0] of any number of
problems, and "neutral" of a type that three problems hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special
from scipy import stats as distributions

from opd_jax import stats

ALPHA = 1 - stats.LEVEL


def interval(up: float, down: float, num: int) -> tuple[float, float]:
    """Interval at ``stats.LEVEL`` of the change of accuracy over problems.

    Args:
      up, down: problems that the arm gets right and the baseline does not, and the other way
        round. Where a problem has several samples, the sums of what their shares rise and fall by:
        nothing with these means spreads more than whole flips do, so the interval is too wide.
      num: problems.

    Raises:
      ValueError: no problems, or more flips than problems.
    """
    if num < 1 or up < 0 or down < 0 or up + down > num + 1e-9:
        raise ValueError(
            f"{up} problems up and {down} down of {num}: expected at least one problem, and no "
            "more flips than problems; leave out what was not measured"
        )
    z2 = float(distributions.norm.ppf((1 + stats.LEVEL) / 2)) ** 2
    delta = (up - down) / num

    def refused(value: float) -> float:
        """Above 0 where the score test refuses this change."""
        half = (2 * num - up + down) * value - up - down
        root = math.sqrt(max(half**2 + 8 * num * down * value * (1 - value), 0.0))
        fallen = max((root - half) / (4 * num), 0.0)
        spread = max(2 * fallen + value * (1 - value), 0.0)
        return num * (delta - value) ** 2 - z2 * spread

    step = 1e-9  # the estimate itself is a root where nothing flips
    low = high = delta
    if delta - step > -1:
        low = _root(refused, -1.0, delta - step)
    if delta + step < 1:
        high = _root(refused, delta + step, 1.0)
    return low, high


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    return float(optimize.brentq(function, low, high))  # pyright: ignore[reportArgumentType]


def of_changes(change_N: ArrayLike) -> tuple[float, float]:
    """:func:`interval` of the changes of the problems' shares of right samples."""
    change_N = np.asarray(change_N, np.float64)
    up, down = (float(np.clip(sign * change_N, 0, None).sum()) for sign in (1, -1))
    return interval(up, down, len(change_N))


def test(change_N: ArrayLike) -> float:
    """Exact p of "as many problems rise as fall": McNemar's test where there is one sample each."""
    change_N = np.asarray(change_N)
    return stats.sign_test(int(np.sum(change_N > 0)), int(np.sum(change_N != 0)))


def least_flips(alpha: float) -> int:
    """Flips, all of one direction, from which the exact test rejects at ``alpha``."""
    return max(1 + math.ceil(-math.log2(alpha) - 1e-12), 1)


def smallest(num: int, alpha: float, wanted: float) -> float | None:
    """Smallest share of ``num`` problems that flip, all in one direction, to be seen with power.

    None where even all of them would not be: the test needs :func:`least_flips`. It is the best
    that can be had: flips of the other direction hide an effect.
    """
    least = least_flips(alpha)
    if num < least:
        return None
    # P(binomial >= least) is the incomplete beta function.
    return float(special.betaincinv(least, num - least + 1, wanted))
