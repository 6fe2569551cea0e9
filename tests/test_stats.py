import itertools
import math

import numpy as np
import pytest
import scipy.stats

from opd_jax import stats


def test_paired_bootstrap_of_a_constant_shift_is_exact():
    base = np.arange(6.0)
    got = stats.paired_bootstrap(base, base - 0.5, resamples=999)
    assert (got.delta, got.low, got.high) == (-0.5, -0.5, -0.5)
    assert got.p == pytest.approx(2 / 1000)  # no draw on the other side: 2 (1 + 0) / (999 + 1)


def test_paired_bootstrap_without_a_difference_has_p_1_and_not_more():
    assert stats.paired_bootstrap([1.0, 0, 1], [1.0, 0, 1], resamples=50).p == 1


def test_paired_bootstrap_meets_the_enumeration_of_all_resamples():
    difference = np.array([-1.0, 0, 0, 1, 1, 1])
    means = np.array([np.mean(d) for d in itertools.product(difference, repeat=6)])
    # Six problems: Student's tails, and the variance of a mean of five.
    wide = scipy.stats.t.ppf(0.975, 5) / scipy.stats.norm.ppf(0.975) * np.sqrt(6 / 5)
    means = means.mean() + wide * (means - means.mean())
    exact = 2 * min(np.mean(means <= 0), np.mean(means >= 0))
    got = stats.paired_bootstrap(np.zeros(6), difference, resamples=40_000, seed=3)
    assert got.delta == pytest.approx(1 / 3)
    assert got.p == pytest.approx(exact, abs=4 * np.sqrt(exact / 40_000))
    assert (got.low, got.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.02)
    assert got.p_equivalent is None


def test_paired_bootstrap_pairs_the_problems():
    rng = np.random.default_rng(0)
    base = rng.normal(size=200) * 100  # between problems; the arm differs by much less
    got = stats.paired_bootstrap(base, base + 1 + rng.normal(size=200) * 0.1, resamples=500)
    assert 0.9 < got.low < got.high < 1.1


def test_bootstrap_interval_of_a_mean_is_that_of_the_normal_law():
    values = np.random.default_rng(1).normal(2.0, 3.0, size=400)
    got = stats.bootstrap(values, resamples=20_000)
    half = 1.96 * values.std() / np.sqrt(400)
    assert got.low == pytest.approx(values.mean() - half, abs=0.02)
    assert got.high == pytest.approx(values.mean() + half, abs=0.02)


def test_interval_of_few_normal_values_is_students():
    values = np.random.default_rng(2).normal(size=8)
    got = stats.bootstrap(values, resamples=40_000)
    low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval()
    assert (got.low, got.high) == pytest.approx((low, high), abs=0.15 * (high - low))
    assert got == stats.bootstrap(values, resamples=40_000)


def test_one_value_says_nothing_about_others():
    for got in (
        stats.bootstrap([3.0], margin=1.0),
        stats.student([3.0], margin=1.0),
        stats.hierarchical_bootstrap([[0.0]], [[3.0]], margin=1.0),
    ):
        assert got == stats.Interval(3.0, None, None, 1.0, 1.0)


def test_median_has_an_exact_interval_from_six_values_on():
    values = np.random.default_rng(4).permutation(np.arange(1.0, 21))
    got = stats.median(values)
    # Of 20 values 6 to 15: P(B <= 5) = 0.0207 for a fair coin tossed 20 times.
    assert (got.delta, got.low, got.high) == (10.5, 6, 15)
    assert got.p == pytest.approx(2 / 2**20)
    assert stats.median(values[:5]) == stats.Interval(np.median(values[:5]), None, None, 1 / 16)


def test_equivalence_is_where_the_90_percent_interval_lies_within_the_margin():
    rng = np.random.default_rng(6)
    for _ in range(20):
        drawn = rng.normal(rng.normal(0, 0.5), 0.5, 9999)
        low, high = np.quantile(drawn, [0.05, 0.95])
        for margin in (0.8, 1.2):
            is_within = -margin < low and high < margin
            p = stats.equivalence(drawn, margin)
            assert (p < 0.05) == is_within or abs(p - 0.05) < 2e-4
    assert stats.equivalence(np.zeros(99), 1.0) == 1 / 100


def test_no_difference_is_no_equivalence_where_little_is_known():
    few = stats.paired_bootstrap([1.0, 0, 1, 0], [0.0, 1, 1, 0], margin=0.05)
    assert few.p > 0.5
    assert few.p_equivalent > 0.3
    base = np.tile([1.0, 0], 2000)
    many = stats.paired_bootstrap(base, np.roll(base, 2), margin=0.05)
    assert many.p == 1
    assert many.p_equivalent < 0.01
    seeds = stats.hierarchical_bootstrap([base] * 3, [base] * 3, margin=0.05)
    assert seeds.p_equivalent < 0.01


def test_student_is_scipys_t_test_and_never_0():
    values = [0.1, 0.5, 0.2, 0.9]
    got, wanted = stats.student(values, margin=1.0), scipy.stats.ttest_1samp(values, 0)
    assert got.p == pytest.approx(wanted.pvalue)
    assert (got.low, got.high) == pytest.approx(tuple(wanted.confidence_interval()))
    sides = [
        scipy.stats.ttest_1samp(values, -1.0, alternative="greater").pvalue,
        scipy.stats.ttest_1samp(values, 1.0, alternative="less").pvalue,
    ]
    assert got.p_equivalent == pytest.approx(max(sides))
    assert stats.student([0.5] * 3, margin=0.6).p == 0.25  # three signs
    assert stats.student([0.5] * 3, margin=0.6).p_equivalent == 0.25
    assert stats.student([0.5] * 3, margin=0.4).p_equivalent == 1
    assert stats.student([0.0] * 3).p == 1
    assert stats.student(1e8 + np.random.default_rng(0).normal(size=200)).p > 0
    assert stats.sign_test(5000, 5000) > 0


@pytest.mark.parametrize("outcomes", [(3, 9, 40), (0, 5, 5), (4, 4, 0), (0, 0, 7)])
def test_mcnemar_counts_the_discordant_pairs(outcomes):
    lost, won, alike = outcomes
    base = np.array([1.0] * lost + [0.0] * won + [1.0] * alike)
    arm = np.array([0.0] * lost + [1.0] * won + [1.0] * alike)
    number = min(lost, won)
    tail = sum(math.comb(lost + won, i) for i in range(number + 1)) / 2 ** (lost + won)
    assert stats.mcnemar(base, arm) == pytest.approx(min(1.0, 2 * tail))


def test_share_interval_is_wilsons_and_counts_answers_that_agree_once():
    right = np.array([1.0, 0, 1, 1, 0, 0, 0, 1, 1, 1])
    assert stats.share_interval(right) == pytest.approx(stats.wilson(0.6, 10))
    assert stats.share_interval(np.zeros(9)) == pytest.approx(stats.wilson(0, 9))
    # Two answers to each problem that always agree say no more than one; that do not, more.
    half = np.array([0.5, 0.5, 1, 0, 0.5, 0.5, 1, 0])
    low, high = stats.share_interval(half)
    assert (low, high) == pytest.approx(stats.wilson(0.5, 16))


def test_bootstrap_draws_the_same_in_one_block_and_in_many(monkeypatch):
    whole = stats.bootstrap([1.0, 2, 4], resamples=101)
    monkeypatch.setattr(stats, "_BLOCK", 12)
    assert stats.bootstrap([1.0, 2, 4], resamples=101) == whole


def test_hierarchical_bootstrap_has_the_variance_of_both_levels():
    rng = np.random.default_rng(2)
    seeds, problems = 60, 50  # of 60 seeds, Student's t is nearly normal
    difference = rng.normal(size=(seeds, 1)) + 0.5 * rng.normal(size=(1, problems))
    got = stats.hierarchical_bootstrap(
        np.zeros_like(difference), difference, resamples=20_000, seed=1
    )
    # For additive effects the two levels vary independently.
    spread = np.sqrt(difference.mean(1).var() / seeds + difference.mean(0).var() / problems)
    assert got.delta == pytest.approx(difference.mean())
    assert got.high - got.low == pytest.approx(2 * 1.97 * spread, rel=0.04)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_hierarchical_interval_of_few_seeds_holds_the_truth_as_often_as_it_says(seeds):
    held, rng = 0, np.random.default_rng(seeds)
    for number in range(200):
        difference = rng.normal(size=(seeds, 1)) + 0.3 * rng.normal(size=(1, 20))
        got = stats.hierarchical_bootstrap(
            np.zeros_like(difference), difference, resamples=400, seed=number
        )
        held += got.low <= 0 <= got.high
    assert held >= 180  # 190 +- 3; resampling the seeds gives 100 to 160


def test_hierarchical_bootstrap_draws_one_set_of_problems_for_all_seeds():
    # Every seed has the same differences: seeds add nothing, problems vary as if there were one.
    difference = np.tile(np.random.default_rng(0).normal(size=30), (5, 1))
    got = stats.hierarchical_bootstrap(np.zeros((5, 30)), difference, resamples=20_000)
    one = stats.bootstrap(difference[0], resamples=20_000)
    assert got.high - got.low == pytest.approx(one.high - one.low, rel=0.04)


def test_hierarchical_bootstrap_with_one_problem_is_the_t_test_over_seeds():
    values = np.array([[0.1], [0.5], [0.2], [0.9]])
    got = stats.hierarchical_bootstrap(0 * values, values, resamples=40_000)
    wanted = scipy.stats.ttest_1samp(values[:, 0], 0)
    interval = wanted.confidence_interval()
    assert got.p == pytest.approx(wanted.pvalue, abs=0.005)
    assert (got.low, got.high) == pytest.approx(tuple(interval), abs=0.04)


def test_hierarchical_bootstrap_with_one_seed_is_that_of_the_problems():
    difference = np.random.default_rng(0).normal(size=30)
    got = stats.hierarchical_bootstrap([np.zeros(30)], [difference], resamples=20_000)
    one = stats.bootstrap(difference, resamples=20_000)
    assert (got.low, got.high) == pytest.approx((one.low, one.high), abs=0.02)


def by_hand(p):
    """Benjamini and Hochberg's adjusted values, by their definition."""
    m, ranked = len(p), sorted(p)
    return [min(min(1.0, ranked[j] * m / (j + 1)) for j in range(ranked.index(x), m)) for x in p]


def test_corrections_meet_their_definitions():
    p = np.random.default_rng(0).permutation([0.001, 0.008, 0.039, 0.041, 0.042, 0.06, 0.9])
    assert stats.bh_adjusted(p) == pytest.approx(by_hand(p.tolist()))
    assert p[stats.benjamini_hochberg(p, 0.05)].tolist() == pytest.approx(
        [x for x in p if x in (0.001, 0.008)]
    )
    assert stats.benjamini_hochberg(p, 0.06).sum() == 5
    assert p[stats.bonferroni(p, 0.05)].tolist() == [0.001]
    assert stats.bh_adjusted([]).size == stats.bonferroni([], 0.05).size == 0


def test_published_knockout_p_values_survive_no_correction():
    # The ten types that arXiv 2605.09253 calls pillars, of 200 on two benchmarks.
    maths = [0.0038, 0.0074, 0.0154, 0.041, 0.0478, 0.0358, 0.0466] + [0.5] * 193
    other = [0.0016, 0.0284, 0.0226] + [0.5] * 197
    for p in (maths, other, maths + other):
        assert not stats.bonferroni(p, 0.05).any()
        assert not stats.benjamini_hochberg(p, 0.2).any()


@pytest.mark.parametrize(
    ("k", "n", "p"),
    [(10, 10, 1.953e-3), (7, 7, 0.0156), (3, 3, 0.25), (6, 6, 0.03125), (0, 10, 1.953e-3)],
)
def test_sign_test_of_the_published_census(k, n, p):
    assert stats.sign_test(k, n) == pytest.approx(p, rel=3e-3)


def test_sign_test_is_exact_and_has_a_plain_end():
    assert stats.sign_test(8, 10) == pytest.approx(2 * (45 + 10 + 1) / 1024)
    assert stats.sign_test(5, 10) == 1
    assert stats.sign_test(0, 0) == 1


@pytest.mark.parametrize(("k", "n"), [(0, 12), (1, 4), (95, 300), (7, 7)])
def test_wilson_meets_scipy(k, n):
    expected = scipy.stats.binomtest(k, n).proportion_ci(stats.LEVEL, method="wilson")
    np.testing.assert_allclose(stats.wilson(k / n, n), expected, atol=1e-12)


def test_spearman_meets_scipy_and_is_none_where_undefined():
    a, b = [1.0, 2, 2, 5, 0, 7], [3.0, 3, 1, 8, -1, 2]
    assert stats.spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert stats.spearman([1.0, 1, 1], [1.0, 2, 3]) is None
    assert stats.spearman([1.0], [2.0]) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.paired_bootstrap([1.0], [1.0, 2]), "1 problems of the base and 2"),
        (lambda: stats.bootstrap([]), "at least one"),
        (lambda: stats.bootstrap([1.0, np.nan]), "finite"),
        (lambda: stats.bootstrap([1.0], resamples=0), "resamples"),
        (lambda: stats.hierarchical_bootstrap([], []), "0 seeds"),
        (
            lambda: stats.hierarchical_bootstrap([[1.0]], [[1.0], [2.0]]),
            "1 seeds of the base and 2",
        ),
        (
            lambda: stats.hierarchical_bootstrap([[1.0], [1.0, 2]], [[1.0], [1.0, 2]]),
            r"seeds with \[1, 2\] problems",
        ),
        (lambda: stats.bh_adjusted([0.5, 1.5]), "1.5"),
        (lambda: stats.bonferroni([-0.1], 0.05), "0 to 1"),
        (lambda: stats.sign_test(4, 3), "4 signs of 3"),
        (lambda: stats.wilson(0.5, 0), "of 0 units"),
        (lambda: stats.wilson(1.5, 3), "share 1.5"),
        (lambda: stats.share_interval([0.5, 1.5, 0.0]), "shares from 0.0 to 1.5"),
        (lambda: stats.mcnemar([0.5], [1.0]), "neither 0 nor 1"),
        (lambda: stats.equivalence(np.zeros(3), 0.0), "margin 0"),
        (lambda: stats.bootstrap([1.0], margin=-1.0), "margin -1"),
        (lambda: stats.student([1.0], margin=np.nan), "margin nan"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
