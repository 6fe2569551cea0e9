"""What ranks types, which are the rocks, what they stand for, and their controls."""

import itertools

import numpy as np
import pytest
import scipy.stats

from opd_jax.instrument import controls, scores, shares
from opd_jax.instrument.corpus import Occurrences, TypeStats
from opd_jax.instrument.ranking import Rule
from opd_jax.instrument.scores import SelectError

VOCAB = 12
IDS = np.array([3] * 6 + [1] * 4 + [7] * 4 + [0] * 2 + [5] * 2 + [9] + [2] * 12)
KL = np.concatenate(
    [
        [0.5, 0.25, 1, 0.75, 0.5, 1],  # 3: sum 4
        [1.0, 1, 1, 1],  # 1: sum 4, no spread
        [0.0, 0.5, 0, 0.5],  # 7: sum 1
        [4.0, 1],  # 0: sum 5
        [0.0, 0],  # 5: sum 0
        [3.0],  # 9: once
        np.linspace(0, 0.5, 12),  # 2: the most frequent, sum 3
    ]
)
STATS = TypeStats.of(IDS, KL, VOCAB)
BY_TYPE = {i: KL[np.equal(IDS, i)] for i in set(IDS.tolist())}


def test_rocks_are_the_highest_sums_and_ties_go_to_the_smaller_id():
    assert Rule().rocks(STATS, 7).tolist() == [0, 1, 3, 2, 9, 7, 5]


def test_rule_drops_the_most_frequent_and_the_rare():
    assert Rule(skip_top=1).rocks(STATS, 3).tolist() == [0, 1, 3]
    assert Rule(skip_top=2).rocks(STATS, 2).tolist() == [0, 1]  # 2 and 3 are gone
    # 1 and 7 are equally frequent: the smaller id is dropped first.
    assert 1 not in Rule(skip_top=3).rocks(STATS, 3)
    assert 7 in Rule(skip_top=3).rocks(STATS, 3)
    assert Rule(min_count=4).rocks(STATS, 4).tolist() == [1, 3, 2, 7]
    assert Rule(min_count=4, score="mean").rocks(STATS, 1).tolist() == [1]


def test_rocks_of_equal_scores_do_not_depend_on_the_platforms_sort():
    stats = TypeStats(np.ones(5000), np.ones(5000), np.ones(5000))
    assert Rule().rocks(stats, 4000).tolist() == list(range(4000))


def independent(name):
    """Every metric by a loop over types, from the raw values."""
    out, n_all = np.full(VOCAB, -np.inf), len(KL)
    means = [x.mean() for x in BY_TYPE.values()]
    sizes = [len(x) for x in BY_TYPE.values()]
    sse = sum(((x - x.mean()) ** 2).sum() for x in BY_TYPE.values())
    sigma2 = sse / (n_all - len(BY_TYPE))
    tau2 = max(0, np.var(means, ddof=1) - sigma2 / np.mean(sizes))  # as pandas' var()
    for i, x in BY_TYPE.items():
        n, m = len(x), x.mean()
        if name == "rock":
            out[i] = n * m
        elif name == "mean":
            out[i] = m
        elif name.startswith("mean_min"):
            out[i] = m if n >= int(name.removeprefix("mean_min")) else -np.inf
        elif name in ("mean_lcb", "rock_lcb") and n >= 2:
            low = m - scipy.stats.t.ppf(0.95, n - 1) * x.std(ddof=1) / np.sqrt(n)
            out[i] = low if name == "mean_lcb" else n * max(0, low)
        elif name.startswith("eb"):
            precision = n / sigma2 + 1 / tau2
            w = n / sigma2 / precision
            out[i] = w * m + (1 - w) * KL.mean()
            if name == "eb_lcb":
                out[i] -= scipy.stats.norm.ppf(0.95) / np.sqrt(precision)
    return out


@pytest.mark.parametrize("name", scores.METRICS)
def test_metric_in_closed_form_meets_a_loop_over_positions(name):
    np.testing.assert_allclose(scores.metric(STATS, name), independent(name), rtol=1e-12)


def test_empirical_bayes_pools_all_where_types_do_not_differ():
    stats = TypeStats.of(np.array([0, 0, 1, 1]), np.array([0.0, 2, 2, 0]), 3)
    for name in ("eb_mean", "eb_lcb"):
        assert scores.metric(stats, name).tolist() == [1, 1, -np.inf]
    nothing = TypeStats(np.zeros(3), np.zeros(3), np.zeros(3))
    assert scores.metric(nothing, "eb_mean").tolist() == [-np.inf] * 3


def test_empirical_bayes_of_one_type_is_its_mean():
    for name in ("eb_mean", "eb_lcb"):
        assert scores.metric(TypeStats.of(np.zeros(2, int), np.array([1.0, 3]), 1), name) == [2]


def test_empirical_bayes_takes_no_degrees_of_freedom_from_types_of_less_than_one_position():
    sums = TypeStats.of(np.array([0, 0, 0, 1, 1]), np.array([1.0, 2, 3, 6, 8]), 3)
    sums.count[2], sums.kl_sum[2] = 1e-9, 4e-9
    got = scores.metric(sums, "eb_mean")
    sigma2, n = 4 / 3, np.array([3, 2])  # SSE 2 + 2 with 2 + 1 degrees of freedom
    tau2 = np.var([2, 7, 4], ddof=1) - sigma2 / (5 / 3)
    weight = tau2 / (tau2 + sigma2 / n)
    assert got[:2] == pytest.approx(weight * [2, 7] + (1 - weight) * 4)


def test_empirical_bayes_without_spread_within_types_keeps_the_means():
    stats = TypeStats.of(np.array([0, 1, 1]), np.array([1.0, 3, 3]), 2)
    for name in ("eb_mean", "eb_lcb"):
        assert scores.metric(stats, name) == pytest.approx([1, 3])


@pytest.mark.parametrize(("name", "single"), scores.JOINT.items())
def test_joint_metric_is_the_minimum_over_types_of_both(name, single):
    other = TypeStats.of(IDS[:10], KL[:10] * 2, VOCAB)
    joint = scores.metric(STATS, name, other)
    a, b = scores.metric(STATS, single), scores.metric(other, single)
    assert joint.tolist() == [min(x, y) for x, y in zip(a, b, strict=True)]
    assert np.isneginf(joint[7])  # not in the other corpus


def test_metrics_take_decayed_counts():
    half = TypeStats(STATS.count / 2, STATS.kl_sum / 2, STATS.kl_sq / 2)
    for name in scores.METRICS:
        assert not np.isnan(scores.metric(half, name)).any()
    assert scores.metric(half, "mean")[3] == STATS.mean[3]


def test_coverage_shares_and_jaccard():
    assert shares.coverage(STATS, [0, 1]) == pytest.approx(9 / 20)
    assert shares.coverage(STATS, np.arange(VOCAB)) == 1
    assert shares.coverage(STATS, []) == 0
    assert shares.token_share(STATS, [2]) == pytest.approx(12 / 31)
    assert shares.coverage(TypeStats.of(IDS, KL * 0, VOCAB), [0]) == 0
    assert shares.jaccard([1, 2, 3], [3, 4]) == 1 / 4
    assert shares.jaccard([], []) == 1
    assert shares.jaccard([1], []) == 0
    # The published lists: 61 of 100 shared are .439, not the .550 that was reported.
    assert shares.jaccard(np.arange(100), np.arange(39, 139)) == pytest.approx(0.439, abs=5e-4)


def test_next_ranks_follow_the_rocks_in_the_same_ranking():
    assert controls.choose(STATS, [0, 1, 3], "next_ranks").tolist() == [2, 9, 7]
    rule = Rule(skip_top=1, min_count=2)
    assert controls.choose(STATS, [0, 1], "next_ranks", rule=rule).tolist() == [3, 7]
    assert controls.choose(STATS, [0, 1, 3, 2, 9], "next_ranks").tolist() == [7, 5]  # all there are


def test_hungarian_control_is_the_cheapest_of_all_assignments():
    rng = np.random.default_rng(4)
    counts = rng.integers(1, 30, size=9).astype(float)
    stats = TypeStats(counts, rng.random(9), rng.random(9))
    rocks = [4, 0, 7]
    others = [i for i in range(9) if i not in rocks]

    def cost(ids):
        return np.abs(np.log10(counts[rocks]) - np.log10(counts[list(ids)])).sum()

    got = controls.choose(stats, rocks, "hungarian")
    assert len(set(got.tolist())) == 3
    assert not set(got.tolist()) & set(rocks)
    assert cost(got) == pytest.approx(min(cost(p) for p in itertools.permutations(others, 3)))


def test_hungarian_control_loses_nothing_by_leaving_out_types_of_equal_count():
    counts = np.array([5.0, 5, 1, 1, 1, 1, 9, 5, 5])
    stats = TypeStats(counts, counts, counts)
    got = controls.choose(stats, [0, 6, 2], "hungarian")
    assert counts[got].tolist() == [5, 5, 1]
    assert controls.choose(stats, np.arange(8), "hungarian").tolist() == [8]  # the only one left


def test_share_matched_types_are_disjoint_where_there_are_enough_positions():
    counts = np.concatenate([[50.0], np.arange(1, 40)])
    stats = TypeStats(counts, counts, counts)
    for seed in range(20):
        got = controls.choose(stats, [0, 39], "share_matched", seed=seed)
        assert not {0, 39} & set(got.tolist())
        assert abs(counts[got].sum() - 89) <= 1
    again = controls.choose(stats, [0, 39], "share_matched", seed=19)
    assert got.tolist() == again.tolist()
    assert got.tolist() != controls.choose(stats, [0, 39], "share_matched", seed=1).tolist()


def test_share_matched_types_are_drawn_among_all_where_the_rocks_have_most_positions():
    counts = np.array([60.0, 30, 20, 10, 5, 5, 5, 5])
    stats = TypeStats(counts, counts, counts)
    for seed in range(20):
        got = controls.choose(stats, [1, 0], "share_matched", seed=seed)
        assert abs(counts[got].sum() - 90) <= 5
        assert got.tolist() != [0, 1]  # the rocks themselves would match best
    assert controls.residual(stats, [0, 1], [0, 2, 3])["overlap"] == 1


def test_share_matched_takes_one_type_too_many_where_that_is_nearer():
    counts = np.array([10.0, 9, 8])  # 9 leaves 1; 17 would overshoot by 7
    stats = TypeStats(counts, counts, counts)
    for seed in range(5):
        assert controls.choose(stats, [0], "share_matched", seed=seed).size == 1
    counts = np.array([10.0, 6, 6])  # 6 leaves 4; 12 overshoots by 2
    stats = TypeStats(counts, counts, counts)
    assert controls.choose(stats, [0], "share_matched").tolist() == [1, 2]


def test_the_other_controls():
    assert controls.choose(STATS, [0, 1], "complement").tolist() == [2, 3, 5, 7, 9]
    assert controls.choose(STATS, [0, 1, 3], "top_freq").tolist() == [2, 3, 1]
    # By mean: 9 occurs once and 0 is a rock, so 1 comes first.
    assert controls.choose(STATS, [0], "top_mean_kl").tolist() == [1]


def test_residual_says_what_is_left_unmatched():
    got = controls.residual(STATS, [3, 1], [7, 9])  # counts 6, 4 against 4, 1
    assert got["overlap"] == 0
    assert got["count_ratio"] == 0.5
    differences = [np.log10(6 / 4), np.log10(4 / 1)]
    assert got["median_dlog10"] == pytest.approx(np.mean(differences))
    assert got["max_dlog10"] == pytest.approx(np.log10(4))
    assert got["exact_share"] == 0
    assert controls.residual(STATS, [1, 3], [7, 3])["exact_share"] == 1
    unequal = controls.residual(STATS, [1, 3], [1])
    assert unequal == {
        "overlap": 1,
        "count_ratio": 0.4,
        "median_dlog10": None,
        "max_dlog10": None,
        "exact_share": None,
    }


def test_density_is_per_answer():
    ids = np.array([1, 1, 2, 3, 1, 2], np.int32)
    answer = np.array([4, 4, 4, 4, 9, 9], np.int32)
    kl = np.array([1, 2, 3, 4, 0, 0], np.float32)
    found = Occurrences(answer, answer, answer, ids, *[kl] * 5, 5)
    got = shares.density(found, [1, 3])
    assert got.token_share.tolist() == [3 / 4, 1 / 2]
    assert got.kl_share.tolist() == [7 / 10, 0]  # no KL in the second answer: 0
    with pytest.raises(SelectError, match="0 to 4"):
        shares.density(found, [5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Rule().rocks(STATS, 8), r"8 of 7 types.*lower --k"),
        (lambda: Rule().rocks(STATS, 0), "--k"),
        (lambda: Rule(min_count=5).rocks(STATS, 3), "--min-count"),
        (lambda: Rule(min_count=-1).rocks(STATS, 3), "--min-count"),
        (lambda: Rule(skip_top=-1).rocks(STATS, 1), "--skip-top"),
        (lambda: Rule(score="entropy").rocks(STATS, 1), "score 'entropy'.*--score"),
        (lambda: Rule(score="joint_rock").rocks(STATS, 1), "--score"),
        (lambda: scores.metric(STATS, "entropy"), "--score"),
        (lambda: scores.metric(STATS, "joint_rock"), "expected two corpora"),
        (lambda: scores.metric(STATS, "joint_rock", TypeStats.of(IDS, KL, 99)), "vocabular"),
        (lambda: controls.choose(STATS, [0], "random"), "control 'random'"),
        (lambda: controls.choose(STATS, [12], "complement"), r"\[12\].*0 to 11"),
        (lambda: controls.choose(STATS, [0, 0], "complement"), "every id once"),
        (lambda: shares.coverage(STATS, [-1]), "outside the vocabulary"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(SelectError, match=message):
        call()
