"""Intervals and power of flips, against likelihoods and sums that are computed another way."""

import functools
import math
from typing import Any

import numpy as np
import pytest
from scipy import optimize
from scipy import stats as distributions

from opd_jax.instrument.knockout import flips

Z = distributions.norm.ppf(0.975)


def score(up: int, down: int, num: int, delta: float) -> float:
    """Tango's score statistic, its nuisance by maximising the trinomial likelihood."""

    def loss(fallen):
        p = np.array([fallen + delta, fallen, 1 - 2 * fallen - delta])
        counts = np.array([up, down, num - up - down])
        used = counts > 0
        return -np.sum(counts[used] * np.log(np.maximum(p[used], 1e-300)))

    least, most = max(0.0, -delta), (1 - delta) / 2
    found: Any = optimize.minimize_scalar(
        loss, bounds=(least, most), method="bounded", options={"xatol": 1e-12}
    )
    fallen = found.x
    spread = num * (2 * fallen + delta - delta**2)
    return (up - down - num * delta) / math.sqrt(max(spread, 1e-300))


@pytest.mark.parametrize(
    ("up", "down", "num"), [(3, 9, 44), (0, 6, 40), (1, 0, 12), (20, 22, 300), (5, 0, 5)]
)
def test_the_ends_are_where_the_score_test_turns(up, down, num):
    low, high = flips.interval(up, down, num)
    assert low < (up - down) / num <= high
    assert score(up, down, num, low) == pytest.approx(Z, abs=0.02)
    if high < 1:
        assert score(up, down, num, high) == pytest.approx(-Z, abs=0.02)


def test_without_a_flip_the_interval_is_that_of_the_number_of_problems():
    for num in (1, 3, 40, 500):
        low, high = flips.interval(0, 0, num)
        assert high == pytest.approx(Z**2 / (num + Z**2), rel=1e-6)
        assert low == pytest.approx(-high)
    assert flips.interval(0, 4, 4)[0] == -1.0


def test_it_holds_the_truth_about_as_often_as_it_says():
    """Few flips of one kind are its worst case; a test of the mean would do no better there."""
    rng = np.random.default_rng(0)
    held = []
    for down, up, num in ((0.05, 0.05, 60), (0.2, 0.02, 40), (0.02, 0.01, 200), (0.1, 0.1, 100)):
        found, counts = np.unique(
            rng.multinomial(num, [up, down, 1 - up - down], size=1500)[:, :2],
            axis=0,
            return_counts=True,
        )
        ends = [flips.interval(a, b, num) for a, b in found]
        inside = [low <= up - down <= high for low, high in ends]
        held.append(np.average(inside, weights=counts))
    assert min(held) > 0.9
    assert np.mean(held) == pytest.approx(0.95, abs=0.02)


def test_several_samples_are_wide_enough():
    """A share that moves by a half spreads less than half as many whole flips."""
    halves = np.array([0.5] * 4 + [-0.5] * 8 + [0.0] * 28)
    wholes = np.array([1.0] * 2 + [-1.0] * 4 + [0.0] * 34)
    assert flips.of_changes(halves) == pytest.approx(flips.of_changes(wholes))
    assert flips.test(halves) < flips.test(wholes)  # there are more problems that say so


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


@pytest.mark.parametrize("given", [(0, 0, 0), (3, 3, 5), (-1, 0, 4)])
def test_impossible_numbers_are_refused(given):
    with pytest.raises(ValueError, match="expected at least one problem"):
        flips.interval(*given)
