r"""Rank correlation over types, also with others held equal that are known with noise only.

Partialling out a noisy measurement of z leaves a part of z in: two quantities that have nothing to
do with each other but through z then correlate, and with enough types any test says so. Here z is
measured twice, on disjoint text. The noise of the two is independent, so their covariance is the
variance of z itself, and with :math:`c_{xz}` the covariance of x with the mean of the two

.. math:: s_{xy} = c_{xy} - c_{xz} \Sigma^{-1} c_{zy}, \qquad \Sigma = \mathrm{cov}(z_1, z_2)

estimates the partial covariance without attenuation. Everything is of normal scores: the ranks, as
quantiles of the normal law.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import special
from scipy import stats as distributions

from opd_jax import stats

MIN_RELIABILITY = 0.4  # of a covariate: below, too little of it is signal to hold it equal
_MIN_LEFT = 0.05  # of a side's variance, below which the covariates explain it


@dataclasses.dataclass(frozen=True)
class Correlation:
    """A rank correlation.

    Attributes:
      rho: of -1 to 1; None where it is undefined: a side is constant or explained by the others, or
        those are too noisy.
      p: two-sided, of "there is none"; 1 where rho is None.
      reliability: of the noisiest covariate, the correlation of its two measurements; None without.
    """

    rho: float | None
    p: float
    reliability: float | None = None


def plain(x: np.ndarray, y: np.ndarray, *, permutations: int, seed: int) -> Correlation:
    """Spearman's rank correlation with its permutation p, types being exchangeable."""
    rho = stats.spearman(x, y)
    if rho is None:
        return Correlation(None, 1.0)
    ranks = [distributions.rankdata(values) for values in (x, y)]
    left = [(rank - rank.mean()) / np.linalg.norm(rank - rank.mean()) for rank in ranks]
    rng = np.random.default_rng(seed)
    drawn = np.array([rng.permutation(left[0]) @ left[1] for _ in range(permutations)])
    reached = np.sum(np.abs(drawn) >= abs(rho) * (1 - 1e-12))
    return Correlation(rho, float((1 + reached) / (permutations + 1)))


def ends(rho: float | None, num: int) -> tuple[float, float] | None:
    r"""Interval at ``stats.LEVEL`` of a rank correlation over ``num`` types; None where undefined.

    Fisher's z, whose variance for ranks is :math:`(1 + \rho^2 / 2) / (n - 3)` (Bonett and Wright
    2000).
    """
    if rho is None or num < 4:
        return None
    reach = distributions.norm.ppf((1 + stats.LEVEL) / 2) * np.sqrt((1 + rho**2 / 2) / (num - 3))
    middle = np.arctanh(np.clip(rho, -1 + 1e-12, 1 - 1e-12))
    return float(np.tanh(middle - reach)), float(np.tanh(middle + reach))


def partial(
    x: np.ndarray,
    y: np.ndarray,
    given: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    resamples: int,
    seed: int,
) -> Correlation:
    """Rank correlation of ``x`` and ``y`` at equal values of others, each measured twice.

    p is by resampling types. The noise of a covariate's measurements has to be independent of each
    other and of ``x`` and ``y``.
    """
    columns = [_scores(values) for values in (x, y, *(z for pair in given for z in pair))]
    if any(column is None for column in columns):
        return Correlation(None, 1.0)
    table_NM = np.column_stack([column for column in columns if column is not None])
    rho, reliability = _partial(np.cov(table_NM.T, ddof=0)[None], len(given))
    reliability = float(reliability[0])
    if reliability < MIN_RELIABILITY or not np.isfinite(rho[0]):
        return Correlation(None, 1.0, reliability)
    num = len(x)
    rng = np.random.default_rng(seed)
    weight_RN = rng.multinomial(num, np.full(num, 1 / num), size=resamples) / num
    mean_RM = weight_RN @ table_NM
    product_NMM = table_NM[:, :, None] * table_NM[:, None, :]
    second_RMM = (weight_RN @ product_NMM.reshape(num, -1)).reshape(-1, *product_NMM.shape[1:])
    drawn, _ = _partial(second_RMM - mean_RM[:, :, None] * mean_RM[:, None, :], len(given))
    drawn = np.where(np.isfinite(drawn), drawn, 0.0)  # a draw without a value speaks for none
    found = stats.interval(float(rho[0]), drawn, num)
    return Correlation(float(rho[0]), found.p, reliability)


def _partial(cov_RMM: np.ndarray, given: int) -> tuple[np.ndarray, np.ndarray]:
    """Partial correlation and least reliability under each covariance of (x, y, z1, z1', ...)."""
    first, second = (slice(2 + i, 2 + 2 * given, 2) for i in (0, 1))
    cross_RZZ = cov_RMM[:, first, second]
    signal_RZZ = (cross_RZZ + np.swapaxes(cross_RZZ, 1, 2)) / 2
    own_R2Z = (cov_RMM[:, :2, first] + cov_RMM[:, :2, second]) / 2
    variance_RM = np.diagonal(cov_RMM, axis1=1, axis2=2)
    scale_RZ = np.sqrt(variance_RM[:, first] * variance_RM[:, second])
    reliability_R = np.min(np.diagonal(signal_RZZ, axis1=1, axis2=2) / scale_RZ, axis=1)
    is_sound_R = np.linalg.eigvalsh(signal_RZZ)[:, 0] > 1e-3
    signal_RZZ = np.where(is_sound_R[:, None, None], signal_RZZ, np.eye(given))
    explained_R22 = own_R2Z @ np.linalg.solve(signal_RZZ, np.swapaxes(own_R2Z, 1, 2))
    left_R22 = cov_RMM[:, :2, :2] - explained_R22
    size_R2 = np.diagonal(left_R22, axis1=1, axis2=2)
    is_sound_R &= np.all(size_R2 > _MIN_LEFT * variance_RM[:, :2], axis=1)
    scale_R = np.sqrt(np.where(is_sound_R, np.prod(size_R2, axis=1), 1.0))
    rho_R = np.clip(left_R22[:, 0, 1] / scale_R, -1.0, 1.0)
    return np.where(is_sound_R, rho_R, np.nan), reliability_R


def _scores(values: np.ndarray) -> np.ndarray | None:
    """Normal scores; None of a constant."""
    rank = np.asarray(distributions.rankdata(values))
    if np.ptp(rank) == 0:
        return None
    score = special.ndtri((rank - 0.5) / len(rank))
    return (score - score.mean()) / score.std()
