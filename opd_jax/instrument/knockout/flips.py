"""What answers that flip between right and wrong can tell: an exact test, and what could be seen.

The interval of a change is that of ``changes``. It has a width even where nothing flips, when a
bootstrap says [0, 0] of any number of problems, and "neutral" of a type that three problems hold.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from opd_jax import stats

ALPHA = 1 - stats.LEVEL


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
