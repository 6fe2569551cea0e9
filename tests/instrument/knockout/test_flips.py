"""Test and power of flips, against sums that are computed another way."""

import functools

import numpy as np
import pytest
from scipy import stats as distributions

from opd_jax.instrument.knockout import flips


def test_the_exact_test_is_the_binomial_one():
    change = np.array([1, -1, -1, -1, -1, -1, -1, 0, 0, 0.0])
    expected = distributions.binomtest(1, 7).pvalue
    assert flips.test(change) == pytest.approx(expected)
    assert flips.test(np.zeros(5)) == 1.0


def test_the_least_flips_are_where_the_test_rejects():
    for alpha in (0.05, 0.05 / 40, 0.05 / 200, 0.0625):
        least = flips.least_flips(alpha)
        assert distributions.binomtest(0, least).pvalue <= alpha
        assert distributions.binomtest(0, least - 1).pvalue > alpha


@functools.cache
def rejects(down: int, up: int, alpha: float) -> bool:
    return distributions.binomtest(up, down + up).pvalue <= alpha if down + up else False


@pytest.mark.parametrize(("num", "alpha"), [(50, 0.05), (300, 0.001)])
def test_the_smallest_effect_is_found_as_often_as_asked_for(num, alpha):
    share = flips.smallest(num, alpha, 0.8)
    assert share is not None
    drawn = np.random.default_rng(1).binomial(num, share, size=6000)
    found = [rejects(int(down), 0, alpha) for down in drawn]
    assert sum(found) / len(found) == pytest.approx(0.8, abs=0.02)
    # Flips of the other direction hide it: what is told is the best that can be had.
    hidden = np.random.default_rng(2).binomial(num, share / 4, size=6000)
    found = [rejects(int(b), int(c), alpha) for b, c in zip(drawn, hidden, strict=True)]
    assert sum(found) / len(found) < 0.8


def test_too_few_problems_show_nothing():
    assert flips.smallest(5, 0.05, 0.8) is None  # six flips are the least
    assert flips.smallest(6, 0.05, 0.8) == pytest.approx(0.8 ** (1 / 6))
