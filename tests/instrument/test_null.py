import numpy as np
import pytest

from opd_jax.instrument import null, scores, shares
from opd_jax.instrument import tally as tallies
from opd_jax.instrument.corpus import Occurrences, TypeStats
from opd_jax.instrument.ranking import Rule
from opd_jax.instrument.scores import SelectError
from opd_jax.instrument.tally import Tally

RNG = np.random.default_rng
OFFSET = 100  # ids start here: the table numbers only the types seen


def corpus(problems=40, length=120, types=30, *, effect=0.0, seed=0):
    """Positions with Zipf frequencies; ``effect`` scales what a type has to do with its KL."""
    rng = RNG(seed)
    size = problems * length
    share = 1 / np.arange(1, types + 1)
    kind = rng.choice(types, size, p=share / share.sum())
    of_type = np.exp(effect * RNG(99).normal(size=types))
    kl = (rng.exponential(size=size) * of_type[kind]).astype(np.float32)
    problem = np.repeat(np.arange(problems), length).astype(np.int32) * 3 + 5
    token_id = (kind + OFFSET).astype(np.int32)
    return Occurrences(problem, problem, problem, token_id, *[kl] * 5, OFFSET + types + 7)


def test_tally_sums_any_choice_of_problems():
    found = corpus()
    tally = Tally.of(found)
    weight = np.zeros(40)
    weight[[3, 7]] = [1, 2]
    one, two = (TypeStats.of_occurrences(found.where(found.problem == p)) for p in (14, 26))
    got = tally.stats(weight)
    for name in ("count", "kl_sum", "kl_sq"):
        wanted = getattr(one, name) + 2 * getattr(two, name)
        np.testing.assert_allclose(getattr(got, name), wanted[tally.token_U], rtol=1e-12)
    whole = TypeStats.of_occurrences(found)
    np.testing.assert_allclose(tally.stats().kl_sum, whole.kl_sum[tally.token_U])
    assert tally.num_problems == 40


def test_shuffling_moves_kl_within_groups_only_and_counts_stay():
    found = corpus(effect=2)
    tally, part_P = Tally.of(found), np.arange(40) // 10
    got = tally.shuffled(part_P, RNG(1))
    for part in range(4):
        inside = part_P[tally.row] == part
        assert sorted(got[inside]) == sorted(tally.kl[inside])
        assert np.mean(got[inside] == tally.kl[inside]) < 0.01
    sums, part = tally.parts_of(got, part_P)[0], found.where(tally.row < 10)
    before = TypeStats.of_occurrences(part)
    assert np.array_equal(sums.count, before.count[tally.token_U])
    assert sums.kl_sum.sum() == pytest.approx(before.kl_sum.sum())
    assert not np.allclose(sums.kl_sum, before.kl_sum[tally.token_U])


def test_parts_add_up_to_the_whole_and_other_values_take_the_place_of_kl():
    tally = Tally.of(corpus())
    part_P = np.arange(40) % 3
    whole, parts = tally.stats(), tally.parts(part_P)
    for name in ("count", "kl_sum", "kl_sq"):
        total = getattr(TypeStats.total(parts), name)
        np.testing.assert_allclose(total, getattr(whole, name), rtol=1e-12)
    for a, b in zip(parts, tally.parts_of(2 * tally.kl, part_P), strict=True):
        np.testing.assert_allclose(2 * a.kl_sum, b.kl_sum)


def covered(found, sizes, **more):
    settings = dict(rule=Rule(), resamples=200, permutations=5, rng=RNG(0)) | more
    return null.coverage(Tally.of(found), sizes, **settings)


def test_coverage_is_measured_where_types_were_not_chosen():
    found = corpus(effect=1)
    rows = covered(found, [1, 5, 30])
    # By hand: the folds are the generator's first draw.
    fold = dict(zip(np.unique(found.problem).tolist(), RNG(0).permutation(40) % 5, strict=True))
    fold_N = np.array([fold[p] for p in found.problem.tolist()])
    stats = TypeStats.of_occurrences(found)
    for row in rows:
        carried = 0.0
        for f in range(5):
            rest, here = found.where(fold_N != f), found.where(fold_N == f)
            ids = Rule().rank(TypeStats.of_occurrences(rest))[: row["k"]]
            carried += here.kl[np.isin(here.token_id, ids)].sum(dtype=float)
        assert row["value"] == pytest.approx(carried / found.kl.sum(dtype=float))
        in_sample = shares.coverage(stats, Rule().rocks(stats, row["k"]))
        assert row["in_sample"] == pytest.approx(in_sample, rel=1e-9)
        assert row["low"] <= row["value"] <= row["high"]
        assert row["excess"] == row["value"] - row["null"]
        assert row["excess_within"] == row["value"] - row["null_within"]
    assert rows[-1]["value"] == pytest.approx(1)
    assert rows[0]["low"] < rows[0]["high"]


def test_a_list_that_only_luck_chose_carries_no_more_than_its_tokens_elsewhere():
    found = corpus(problems=40, length=20, types=400)  # KL has nothing to do with the type
    row = covered(found, [50], rule=Rule(score="mean"), permutations=20)[0]
    assert row["in_sample"] > row["value"] + 0.1
    assert row["null_low"] <= row["value"] <= row["null_high"]


def test_kl_that_is_of_the_problem_is_in_the_null_within_problems_only():
    """Types that occur in a few problems each, whose KL is the problem's: no effect of the type."""
    rng = RNG(5)
    problem = np.repeat(np.arange(30, dtype=np.int32), 60)
    kind = np.where(rng.random(1800) < 0.5, 0, 1 + problem // 3).astype(np.int32)
    kl = (np.exp(rng.normal(0, 1.5, 10))[problem // 3] * rng.exponential(size=1800)).astype("f4")
    row = covered(Occurrences(problem, problem, problem, kind, *[kl] * 5, 11), [4], permutations=60)
    assert row[0]["value"] > row[0]["null_high"]
    assert row[0]["value"] <= row[0]["null_within_high"]


def test_null_is_what_remains_where_types_have_nothing_to_do_with_kl():
    flat, planted = (
        covered(corpus(effect=effect), [3], resamples=10, permutations=60)[0] for effect in (0, 2)
    )
    assert flat["null_low"] <= flat["value"] <= flat["null_high"]
    assert planted["value"] > planted["null_high"] + 0.03
    # The null knows the frequencies: the three most frequent of 30 by Zipf.
    share = 1 / np.arange(1, 31)
    assert flat["null"] == pytest.approx(share[:3].sum() / share.sum(), abs=0.02)


def test_split_half_of_flat_types_is_the_null_and_of_planted_ones_more():
    def stability(effect):
        tally = Tally.of(corpus(effect=effect, types=200))
        row = null.split_half(
            tally, [20], rule=Rule(score="mean"), splits=40, permutations=40, rng=RNG(0)
        )[0]
        return row

    flat, planted = stability(0), stability(3)
    assert abs(flat["excess"]) < 0.05
    assert planted["excess"] > 0.15
    assert planted["low"] <= planted["value"] <= planted["high"]


def test_split_half_uses_disjoint_halves():
    # Every problem has a type of its own: disjoint halves share none.
    problem = np.arange(10, dtype=np.int32)
    kl = np.ones(10, np.float32)
    found = Occurrences(problem, problem, problem, problem, *[kl] * 5, 10)
    tally = Tally.of(found)
    row = null.split_half(tally, [3], rule=Rule(), splits=20, permutations=20, rng=RNG(0))[0]
    assert row["value"] == row["null"] == row["null_within"] == row["high"] == 0
    # Nested subsets share theirs with the whole all the same.
    assert any(r["value"] > 0 for r in null.nested(tally, [10], rule=Rule(), rng=RNG(0)))


def test_two_halves_leave_one_of_an_odd_number_of_problems_out():
    tally = Tally.of(corpus(problems=5))
    for part_P in tallies.halves(tally, 20, RNG(0)):
        assert sorted(part_P) == [-1, 0, 0, 1, 1]


def test_nested_counts_problems_as_published_and_ends_at_the_whole():
    found = corpus(problems=500, length=8)
    rows = null.nested(Tally.of(found), [5, 30], rule=Rule(), rng=RNG(0))
    assert [row["n"] for row in rows if row["k"] == 5] == [50, 100, 200, 300, 400]
    values = [row["value"] for row in rows if row["k"] == 5]
    assert all(0 < value <= 1 for value in values)


@pytest.mark.parametrize("seed", range(5))
def test_overlap_at_many_k_meets_jaccard_at_each(seed):
    rng = RNG(seed)
    a, b = rng.permutation(15)[:12], rng.permutation(15)[:9]
    sizes = [1, 2, 5, 9, 11, 20]
    got = null._overlap(a, b, sizes)
    assert got.tolist() == [shares.jaccard(a[:k], b[:k]) for k in sizes]


def test_k_grid_has_k_and_ends_at_the_types_seen():
    assert null.k_grid(64, 100) == [5, 10, 20, 30, 50, 64, 75, 100]
    assert null.k_grid(100, 99) == [5, 10, 20, 30, 50, 75]
    assert null.k_grid(3, 4) == [3]


def test_metrics_table_has_every_metric_and_joint_ones_with_a_second_corpus():
    found, other = corpus(effect=1, seed=1), corpus(effect=1, seed=2)
    token_U = np.union1d(found.token_id, other.token_id)
    tally, second = (Tally.of(x, token_U=token_U) for x in (found, other))
    rows = null.by_metric(tally, 5, rule=Rule(), splits=10, rng=RNG(0), other=second)
    assert [row["name"] for row in rows] == [*scores.METRICS, *scores.JOINT]
    for row in rows:
        assert 0 <= row["split_half"] <= 1
        assert 0 <= row["nested_jaccard"] <= 1
        assert -1 <= row["nested_spearman"] <= 1
    alone = null.by_metric(tally, 5, rule=Rule(), splits=10, rng=RNG(0))
    assert alone == rows[: len(scores.METRICS)]


def test_rank_correlation_gives_a_missing_type_the_rank_after_the_last():
    import scipy.stats

    got = null._rank_correlation(np.array([4, 2, 9]), np.array([2, 7, 4]), 3)
    # Types 2, 4, 7, 9: ranks 2, 1, 4, 3 against 1, 3, 2, 4.
    assert got == pytest.approx(scipy.stats.spearmanr([2, 1, 4, 3], [1, 3, 2, 4]).statistic)
    assert null._rank_correlation(np.array([1]), np.array([1]), 1) is None


def test_folds_are_even_and_no_more_than_problems():
    sizes = np.bincount(tallies.folds(Tally.of(corpus(problems=11)), 5, RNG(0)))
    assert sizes.tolist() == [3, 2, 2, 2, 2]
    assert sorted(tallies.folds(Tally.of(corpus(problems=3)), 5, RNG(0))) == [0, 1, 2]
    with pytest.raises(SelectError, match=r"1 problem: expected at least 2"):
        tallies.folds(Tally.of(corpus(problems=1)), 5, RNG(0))


def test_one_problem_has_no_halves():
    with pytest.raises(SelectError, match=r"1 problem: expected at least 2.*--limit"):
        null.split_half(
            Tally.of(corpus(problems=1)),
            [3],
            rule=Rule(),
            splits=1,
            permutations=1,
            rng=RNG(0),
        )
