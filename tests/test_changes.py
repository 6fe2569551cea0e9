"""Intervals and tests of changes, against likelihoods that are computed another way."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import optimize
from scipy import stats as distributions

from opd_jax import changes, stats

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
    low, high = changes.interval(changes.Flips(up, down, num))
    assert low < (up - down) / num <= high
    assert score(up, down, num, low) == pytest.approx(Z, abs=0.02)
    if high < 1:
        assert score(up, down, num, high) == pytest.approx(-Z, abs=0.02)


def test_without_a_flip_the_interval_is_that_of_the_number_of_problems():
    for num in (1, 3, 40, 500):
        low, high = changes.interval(changes.Flips(0, 0, num))
        assert high == pytest.approx(Z**2 / (num + Z**2), rel=1e-6)
        assert low == pytest.approx(-high)
    assert changes.interval(changes.Flips(0, 4, 4))[0] == -1.0


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
        ends = [changes.interval(changes.Flips(a, b, num)) for a, b in found]
        inside = [low <= up - down <= high for low, high in ends]
        held.append(np.average(inside, weights=counts))
    assert min(held) > 0.9
    assert np.mean(held) == pytest.approx(0.95, abs=0.02)


def test_several_samples_are_wide_enough():
    """A share that moves by a half spreads less than half as many whole flips."""
    halves = np.array([0.5] * 4 + [-0.5] * 8 + [0.0] * 28)
    wholes = np.array([1.0] * 2 + [-1.0] * 4 + [0.0] * 34)
    assert changes.interval(changes.flips(halves)) == pytest.approx(
        changes.interval(changes.flips(wholes))
    )


@pytest.mark.parametrize(("up", "down", "num"), [(3, 9, 444), (0, 6, 40), (1, 0, 120), (0, 0, 9)])
@pytest.mark.parametrize("margin", [0.02, 0.05, 0.2])
def test_equivalence_is_the_worse_of_two_score_tests(up, down, num, margin):
    p = [
        distributions.norm.sf(score(up, down, num, -margin)),
        distributions.norm.cdf(score(up, down, num, margin)),
    ]
    found = changes.equivalence(changes.Flips(up, down, num), margin)
    assert found == pytest.approx(max(p), rel=1e-3, abs=1e-6)


def test_equivalence_of_what_differs_by_the_margin_is_seldom_said():
    rng = np.random.default_rng(1)
    for num, margin in ((60, 0.05), (150, 0.02), (30, 0.1)):
        flipped = rng.binomial(num, margin, size=1000)
        found, counts = np.unique(flipped, return_counts=True)
        said = [changes.equivalence(changes.Flips(n, 0, num), margin) <= 0.05 for n in found]
        assert np.average(said, weights=counts) < 0.07


def among(num, *values):
    return np.array([*values, *[0.0] * (num - len(values))])


def bootstrap(change_N, margin=0.02):
    return stats.bootstrap(change_N, margin=margin), change_N, margin


def test_problems_of_which_none_changes_are_no_proof_unless_they_are_many():
    for num, is_proof in ((4, False), (60, False), (129, False), (140, True), (4000, True)):
        alone, change_N, margin = bootstrap(among(num))
        assert (alone.low, alone.high) == (0, 0)
        assert alone.p_equivalent < 0.001
        found = changes.widened(alone, change_N, margin)
        assert (-found.low, found.high) == pytest.approx([Z**2 / (num + Z**2)] * 2)
        assert (found.p_equivalent <= 0.05) is is_proof


def test_few_changes_of_one_kind_are_told_by_their_signs():
    alone, change_N, margin = bootstrap(among(100, *[1.0] * 5))
    assert alone.p < 0.05
    found = changes.widened(alone, change_N, margin)
    assert found.p == pytest.approx(distributions.binomtest(5, 5).pvalue)
    assert found.low <= alone.low < alone.high < found.high
    assert found.delta == alone.delta


def test_where_many_change_the_bootstrap_stands():
    alone, change_N, margin = bootstrap(among(100, *[0.25] * 6, *[-0.25] * 5))
    assert changes.widened(alone, change_N, margin) is alone
    single = stats.bootstrap([0.0], margin=0.02)
    assert changes.widened(single, [0.0], 0.02) is single


def test_models_that_are_all_wrong_have_an_interval():
    wrong = [np.zeros(50)] * 3
    low, high = changes.accuracy_interval(wrong)
    assert (low, high) == pytest.approx(stats.wilson(0, 50))
    low, high = changes.accuracy_interval([1 - x for x in wrong])
    assert (low, high) == pytest.approx(stats.wilson(1, 50))
    assert changes.accuracy_interval(wrong[:1]) == pytest.approx(stats.wilson(0, 50))
    rng = np.random.default_rng(2)
    mixed = [(rng.random(50) < 0.5).astype(float) for _ in range(3)]
    found = stats.hierarchical_bootstrap([np.zeros(50)] * 3, mixed)
    assert changes.accuracy_interval(mixed) == pytest.approx((found.low, found.high))


@pytest.mark.parametrize("given", [(0, 0, 0), (3, 3, 5), (-1, 0, 4)])
def test_impossible_numbers_are_refused(given):
    with pytest.raises(ValueError, match="expected at least one problem"):
        changes.Flips(*given)
