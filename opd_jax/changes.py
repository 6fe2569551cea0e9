r"""Accuracy on the same problems: intervals and tests that hold where next to nothing differs.

A bootstrap knows only what it has seen. Of problems none of which changes it says [0, 0] and
"equivalent", be there four of them or four thousand; of models that are all wrong, [0, 0] again.
So where fewer than ``FEW`` problems tell anything, what it says is widened to what the score test
and the exact test of signs say.

With b of n problems right in the base alone and c in the arm alone, the change of accuracy is
:math:`(c - b) / n`. Its interval is Tango's (1998): all differences that the score test does not
refuse.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy
from numpy.typing import ArrayLike

from opd_jax import stats
from opd_jax.stats import Interval

FEW = 10  # problems, below which a bootstrap knows too little


@dataclasses.dataclass(frozen=True)
class Flips:
    """What changes between two arms on the same problems.

    Attributes:
      up, down: problems that the arm gets right and the base does not, and the other way round.
        Where a problem has several samples, the sums of what their shares rise and fall by:
        nothing with these means spreads more than whole flips do, so that intervals are too wide.
      num: problems.

    Raises:
      ValueError: no problems, or more flips than problems.
    """

    up: float
    down: float
    num: int

    def __post_init__(self):
        if self.num < 1 or min(self.up, self.down) < 0 or self.up + self.down > self.num + 1e-9:
            raise ValueError(
                f"{self.up} problems up and {self.down} down of {self.num}: expected at least one "
                "problem, and no more flips than problems; leave out what was not measured"
            )

    @property
    def delta(self) -> float:
        """The change of accuracy."""
        return (self.up - self.down) / self.num

    def spread(self, value: float) -> float:
        """Variance of one problem's change where the change of accuracy is ``value``."""
        half = (2 * self.num - self.up + self.down) * value - self.up - self.down
        root = math.sqrt(max(half**2 + 8 * self.num * self.down * value * (1 - value), 0.0))
        fallen = max((root - half) / (4 * self.num), 0.0)
        return max(2 * fallen + value * (1 - value), 0.0)


def flips(change_N: ArrayLike) -> Flips:
    """What the changes of problems' shares of right samples come to."""
    change_N = np.asarray(change_N, np.float64)
    up, down = (float(np.clip(sign * change_N, 0, None).sum()) for sign in (1, -1))
    return Flips(up, down, len(change_N))


def interval(found: Flips) -> tuple[float, float]:
    """Tango's interval at ``stats.LEVEL`` of the change of accuracy."""
    z2 = float(scipy.stats.norm.ppf((1 + stats.LEVEL) / 2)) ** 2
    delta = found.delta

    def refused(value: float) -> float:
        """Above 0 where the score test refuses this change."""
        return found.num * (delta - value) ** 2 - z2 * found.spread(value)

    step = 1e-9  # the estimate itself is a root where nothing flips
    low = high = delta
    if delta - step > -1:
        low = _root(refused, -1.0, delta - step)
    if delta + step < 1:
        high = _root(refused, delta + step, 1.0)
    return low, high


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    return float(scipy.optimize.brentq(function, low, high))  # pyright: ignore[reportArgumentType]


def equivalence(found: Flips, margin: float) -> float:
    """p-value of "the change is at least ``margin``, or at most ``-margin``", by the score test."""
    p = []
    for sign in (1, -1):
        spread = found.spread(sign * margin)
        away = sign * (sign * margin - found.delta)  # how far inside the margin it lies
        z = away * math.sqrt(found.num / spread) if spread else math.copysign(math.inf, away)
        p.append(float(scipy.stats.norm.sf(z)))
    return max(p)


def widened(found: Interval, change_N: ArrayLike, margin: float | None = None) -> Interval:
    """A bootstrap's interval and tests, widened where too few problems changed for it.

    Args:
      found: of the bootstrap.
      change_N: by how much each problem's share of right answers changed, the mean over seeds.
      margin: as the bootstrap was given it.
    """
    change_N = np.asarray(change_N, np.float64)
    changed = change_N[np.abs(change_N) > 1e-12]
    if len(changed) >= FEW or found.low is None or found.high is None:
        return found
    seen = flips(change_N)
    low, high = interval(seen)
    away = found.p_equivalent
    if away is not None and margin is not None:
        away = max(away, equivalence(seen, margin))
    return Interval(
        found.delta,
        min(low, found.low),
        max(high, found.high),
        max(found.p, stats.sign_test(int(np.sum(changed > 0)), len(changed))),
        away,
    )


def accuracy_interval(
    right: Sequence[ArrayLike], *, resamples: int = 10_000
) -> tuple[float | None, float | None]:
    """Interval of the accuracy of one method: of problems and, where there are several, of seeds.

    Args:
      right: seed by seed the shares of right answers to each problem.
      resamples: of the bootstrap over problems.
    """
    shares = [np.asarray(each, np.float64) for each in right]
    if len(shares) == 1:
        return stats.share_interval(shares[0])
    nothing = [np.zeros_like(each) for each in shares]
    found = stats.hierarchical_bootstrap(nothing, shares, resamples=resamples)
    if found.low is None or found.high is None:
        return None, None
    mean_N = np.mean(shares, axis=0)
    low, high = found.low, found.high
    if min(np.sum(mean_N > 0), np.sum(mean_N < 1)) < FEW:
        least, most = stats.share_interval(np.clip(mean_N, 0, 1))
        low, high = min(low, least), max(high, most)
    return max(low, 0.0), min(high, 1.0)
