r"""The selection metrics: what ranks a type, in closed form from the three sums of its KL.

A metric is a function of a type's count n, mean KL m and standard deviation s, which follow from
the sums of :class:`TypeStats`. It is -inf where it is undefined.
"""

from __future__ import annotations

import numpy as np
from scipy import special

from opd_jax.instrument.corpus import TypeStats

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
_CONFIDENCE = 0.95  # one-sided, of every lower bound
_NO_SPREAD = 1e-12  # variance between types below which empirical Bayes pools them all


class SelectError(ValueError):
    """Types cannot be selected as asked; the message says why and what to change."""


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
