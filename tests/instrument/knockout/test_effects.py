"""Names, corrections and correlations of effects, against arithmetic by hand and by scipy."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from scipy import stats as distributions

from opd_jax.instrument import correlation
from opd_jax.instrument.knockout import effects


def planted(num, held, falls, rises, right=0.7, seed=0):
    """One answer each; of the problems that hold the type some right fall and some wrong rise."""
    rng = np.random.default_rng(seed)
    base = (rng.random((num, 1)) < right).astype(float)
    arm, held_N = base.copy(), np.arange(num) < held
    arm[rng.permutation(np.flatnonzero(held_N & (base[:, 0] == 1)))[:falls]] = 0
    arm[rng.permutation(np.flatnonzero(held_N & (base[:, 0] == 0)))[:rises]] = 1
    return effects.effect(base, arm, held_N, seed=0)


def test_an_effect_is_the_arithmetic_of_its_flips():
    found = planted(500, 200, 14, 4)
    assert (found.down, found.up, found.held, found.problems) == (14, 4, 200, 500)
    assert found.delta == pytest.approx(-10 / 500)
    assert found.delta_held == pytest.approx(-10 / 200)
    assert found.p == pytest.approx(distributions.binomtest(4, 18).pvalue)
    assert found.test == "McNemar, exact"
    assert found.low < found.delta < found.high < 0
    assert found.p_bootstrap == pytest.approx(found.p, abs=0.03)


def test_names_of_a_planted_effect_and_of_planted_nulls():
    some = [
        planted(500, 200, 60, 2),  # falls by 11.6 points
        planted(500, 200, 2, 40, right=0.5),
        planted(2000, 900, 0, 0),  # so many without a flip
        planted(100, 50, 0, 0),  # too few to say so
        planted(500, 200, 13, 9),
    ]
    rows = effects.judged(some, 0.01)
    assert [row["category"] for row in rows] == [
        "strong cornerstone",
        "strong stumbling block",
        "neutral",
        "undecided",
        "undecided",
    ]
    assert rows[2]["category_all"] == "neutral"
    assert rows[3]["category_published"] == "neutral"  # whatever is not rejected
    p = [each.p for each in some]
    np.testing.assert_allclose(
        [row["p_adjusted"] for row in rows], distributions.false_discovery_control(p)
    )
    told = effects.family(rows)
    assert told["rejected"] == told["rejected_bonferroni"] == 2
    assert told["rejected_benjamini_hochberg"] == {"0.05": 2, "0.1": 2, "0.2": 2}
    assert told["signs"]["all"] == {"down": 2, "up": 1, "p": 1.0}
    assert told["category"]["undecided"] == 2


def test_benjamini_hochberg_names_what_one_test_alone_would_not():
    """Worked by hand: of 5 tests p 0.02 is bounded by 5/2 x 0.02 = 0.05, by Bonferroni by 0.1."""
    base = planted(50, 50, 9, 1)
    some = [dataclasses.replace(base, p=p) for p in (0.001, 0.02, 0.3, 0.5, 0.9)]
    rows = effects.judged(some, 0.01)
    assert [round(row["p_adjusted"], 6) for row in rows[:2]] == [0.005, 0.05]
    assert [row["bonferroni"] for row in rows] == [True, False, False, False, False]
    assert [row["category"] for row in rows[:3]] == ["strong cornerstone"] * 2 + ["undecided"]


def test_several_samples_are_judged_by_problem():
    base = np.array([[1, 1], [1, 0], [0, 0], [1, 1]], float)
    arm = np.array([[0, 1], [0, 0], [0, 1], [1, 1]], float)
    found = effects.effect(base, arm, np.array([True, True, True, False]), seed=0)
    assert (found.down, found.up) == (2, 1)
    assert found.delta == pytest.approx(-0.125)
    assert found.test == "sign test over problems, exact"
    assert found.p == 1.0


def test_pairs_are_compared_with_the_sum_of_their_types():
    a, b = np.array([-1.0, 0, 0, 0] * 20), np.array([0.0, -1, 0, 0] * 20)
    (row,) = effects.interactions({(1,): a, (2,): b, (1, 2): np.minimum(a, b)}, seed=0)
    assert (row["ids"], row["delta"], row["p"]) == ([1, 2], 0.0, 1.0)
    (row,) = effects.interactions({(1,): a, (2,): a, (1, 2): a}, seed=0)
    assert row["delta"] == pytest.approx(0.25)  # the same problems fall
    assert row["p"] < 0.01


def test_predictors_are_correlated_where_the_table_has_them():
    rng = np.random.default_rng(0)
    delta = rng.normal(size=40)
    table = {
        "count": tuple(np.exp(delta + 0.3 * rng.normal(size=40))),
        "kl_mean": tuple(rng.normal(size=40)),
        "entropy_mean": (None, *rng.normal(size=39)),
        "token_id": tuple(range(40)),
    }
    rows = effects.correlations(table, delta.tolist(), seed=0)
    assert [row["predictor"] for row in rows] == ["frequency", "KL after", "student entropy after"]
    expected: Any = distributions.spearmanr(table["count"], delta)
    assert rows[0]["rho"] == pytest.approx(expected.statistic)
    assert rows[0]["p"] < 0.001
    assert rows[0]["low"] < rows[0]["rho"] < rows[0]["high"]
    assert rows[2]["types"] == 39
    other: Any = distributions.spearmanr(table["kl_mean"], delta)
    assert rows[1]["p"] == pytest.approx(other.pvalue, abs=0.03)


def test_the_interval_of_a_rank_correlation_holds_it_as_often_as_it_says():
    rng = np.random.default_rng(0)
    truth = 6 / np.pi * np.arcsin(0.6 / 2)  # Spearman's of a normal pair with Pearson's 0.6
    held = 0
    for _ in range(400):
        x = rng.normal(size=30)
        y = 0.6 * x + 0.8 * rng.normal(size=30)
        ranks: Any = distributions.spearmanr(x, y)
        ends = correlation.ends(float(ranks.statistic), 30)
        assert ends is not None
        held += ends[0] <= truth <= ends[1]
    assert 0.92 <= held / 400 <= 0.98
    assert correlation.ends(0.5, 3) is None
    assert correlation.ends(None, 30) is None
