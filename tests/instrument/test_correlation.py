"""Rank correlations, beside scipy's and beside what a noisy covariate does."""

import numpy as np
import pytest
import scipy.stats

from opd_jax.instrument import correlation

RNG = np.random.default_rng


def test_plain_is_spearmans_with_its_permutation_p():
    x, y = RNG(0).normal(size=(2, 300))
    found = correlation.plain(np.exp(x), x + y, permutations=200, seed=0)
    assert found.rho == pytest.approx(scipy.stats.spearmanr(x, x + y).statistic, abs=1e-12)
    assert (found.p, found.reliability) == (pytest.approx(1 / 201), None)


def test_permutation_p_is_uniform_without_an_effect():
    rng = RNG(0)
    draws = [
        correlation.plain(*rng.normal(size=(2, 30)), permutations=99, seed=i).p for i in range(200)
    ]
    assert scipy.stats.kstest(draws, "uniform").pvalue > 0.01


def three(rng, num, shared=0.0, noise=0.0):
    """x and y that have z in common and ``shared`` besides, and z measured twice."""
    z, own = rng.normal(size=(2, num))
    x, y = (0.8 * z + shared * own + 0.6 * rng.normal(size=num) for _ in range(2))
    return x, y, [tuple(z + noise * rng.normal(size=num) for _ in range(2))]


def test_partial_of_a_covariate_without_noise_is_in_closed_form():
    x, y, ((z, _),) = three(RNG(1), 400)
    found = correlation.partial(np.exp(x), y**3, [(z, 2 * z + 5)], resamples=50, seed=0)
    r = np.corrcoef([correlation._scores(v) for v in (x, y**3, z)])
    wanted = (r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    assert found.rho == pytest.approx(wanted, abs=1e-9)
    assert found.reliability == pytest.approx(1)


def test_noise_of_the_covariate_does_not_come_back_as_a_correlation():
    """Partialling out the mean of the two measurements would tell this from 0 at any size."""
    x, y, given = three(RNG(2), 5000, noise=1.0)
    found = correlation.partial(x, y, given, resamples=400, seed=0)
    assert found.reliability == pytest.approx(0.5, abs=0.05)
    assert abs(found.rho) < 0.08
    assert found.p > 0.05
    design = np.column_stack([np.ones(5000), np.mean(given, axis=1)[0]])
    left = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (x, y)]
    assert scipy.stats.pearsonr(*left).statistic > 0.2


def test_what_is_there_besides_is_found():
    x, y, given = three(RNG(3), 600, shared=0.6, noise=0.7)
    found = correlation.partial(x, y, given, resamples=400, seed=0)
    assert found.rho == pytest.approx(0.5, abs=0.12)  # of .36 + .36, .36 is shared
    assert found.p < 0.02


def test_several_covariates_and_a_repeated_one():
    rng = RNG(4)
    z, w = rng.normal(size=(2, 3000))
    x, y = (z + w + rng.normal(size=3000) for _ in range(2))
    given = [(v + 0.5 * rng.normal(size=3000), v + 0.5 * rng.normal(size=3000)) for v in (z, w)]
    assert correlation.partial(x, y, given[:1], resamples=200, seed=0).p < 0.02
    assert abs(correlation.partial(x, y, given, resamples=200, seed=0).rho) < 0.1
    # The same twice leaves no covariance to solve with.
    assert correlation.partial(x, y, given[:1] * 2, resamples=20, seed=0).rho is None


def test_a_covariate_that_is_mostly_noise_gives_no_number():
    x, y, given = three(RNG(5), 300, noise=3.0)
    found = correlation.partial(x, y, given, resamples=50, seed=0)
    assert (found.rho, found.p) == (None, 1.0)
    assert found.reliability < correlation.MIN_RELIABILITY


@pytest.mark.parametrize("is_constant", [True, False])
def test_a_constant_or_explained_side_has_no_correlation(is_constant):
    y = RNG(0).normal(size=40)
    x = np.ones(40) if is_constant else np.arange(40.0)
    given = [(np.arange(40.0), np.arange(40.0))]
    assert correlation.partial(x, y, given, resamples=9, seed=0).rho is None
    if is_constant:
        assert correlation.plain(x, y, permutations=9, seed=0).rho is None
