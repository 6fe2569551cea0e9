import numpy as np
import pytest

from opd_jax.instrument import metrics, null, shares
from opd_jax.instrument.corpus import Occurrences, TypeStats
from opd_jax.instrument.metrics import SelectError
from opd_jax.instrument.rule import Rule

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


def test_table_sums_any_choice_of_problems():
    found = corpus()
    table = null.Table.of(found)
    weight = np.zeros(40)
    weight[[3, 7]] = [1, 2]
    one, two = (TypeStats.of_occurrences(found.where(found.problem == p)) for p in (14, 26))
    got = table.stats(weight)
    for name in ("count", "kl_sum", "kl_sq"):
        wanted = getattr(one, name) + 2 * getattr(two, name)
        np.testing.assert_allclose(getattr(got, name), wanted[table.token_U], rtol=1e-12)
    whole = TypeStats.of_occurrences(found)
    np.testing.assert_allclose(table.stats().kl_sum, whole.kl_sum[table.token_U])
    assert table.num_problems == 40


def test_shuffling_keeps_counts_and_total_and_moves_kl_among_the_chosen_only():
    found = corpus(effect=2)
    table = null.Table.of(found)
    chosen = table.row < 10
    got, part = table.shuffled(chosen, RNG(1)), TypeStats.of_occurrences(found.where(chosen))
    assert np.array_equal(got.count, part.count[table.token_U])
    assert got.kl_sum.sum() == pytest.approx(part.kl_sum.sum())
    assert not np.allclose(got.kl_sum, part.kl_sum[table.token_U])


def test_coverage_meets_the_selection_and_its_interval_holds_it():
    found = corpus(effect=1)
    stats = TypeStats.of_occurrences(found)
    rows = null.coverage(
        null.Table.of(found), [1, 5, 30], rule=Rule(), resamples=200, permutations=5, rng=RNG(0)
    )
    for row in rows:
        assert row["value"] == pytest.approx(
            shares.coverage(stats, Rule().rocks(stats, row["k"])), rel=1e-9
        )
        assert row["low"] <= row["value"] <= row["high"]
        assert row["excess"] == row["value"] - row["null"]
    assert rows[-1]["value"] == pytest.approx(1)
    assert rows[0]["low"] < rows[0]["high"]


def test_null_is_what_remains_where_types_have_nothing_to_do_with_kl():
    flat, planted = (
        null.coverage(
            null.Table.of(corpus(effect=effect)),
            [3],
            rule=Rule(),
            resamples=10,
            permutations=60,
            rng=RNG(0),
        )[0]
        for effect in (0, 2)
    )
    assert flat["null_low"] <= flat["value"] <= flat["null_high"]
    assert planted["value"] > planted["null_high"] + 0.03
    # The null knows the frequencies: the three most frequent of 30 by Zipf.
    share = 1 / np.arange(1, 31)
    assert flat["null"] == pytest.approx(share[:3].sum() / share.sum(), abs=0.02)


def test_split_half_of_flat_types_is_the_null_and_of_planted_ones_more():
    def stability(effect):
        table = null.Table.of(corpus(effect=effect, types=200))
        row = null.split_half(
            table, [20], rule=Rule(score="mean"), splits=40, permutations=40, rng=RNG(0)
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
    table = null.Table.of(found)
    row = null.split_half(table, [3], rule=Rule(), splits=20, permutations=20, rng=RNG(0))[0]
    assert row["value"] == row["null"] == row["high"] == 0
    # Nested subsets share theirs with the whole all the same.
    assert any(r["value"] > 0 for r in null.nested(table, [10], rule=Rule(), rng=RNG(0)))


def test_two_halves_leave_one_of_an_odd_number_of_problems_out():
    table = null.Table.of(corpus(problems=5))
    for a, b in null._halves(table, 20, RNG(0)):
        assert a.sum() == b.sum() == 2
        assert not (a * b).any()


def test_nested_counts_problems_as_published_and_ends_at_the_whole():
    found = corpus(problems=500, length=8)
    rows = null.nested(null.Table.of(found), [5, 30], rule=Rule(), rng=RNG(0))
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
    table, second = (null.Table.of(x, token_U=token_U) for x in (found, other))
    rows = null.by_metric(table, 5, rule=Rule(), splits=10, rng=RNG(0), other=second)
    assert [row["name"] for row in rows] == [*metrics.METRICS, *metrics.JOINT]
    for row in rows:
        assert 0 <= row["split_half"] <= 1
        assert 0 <= row["nested_jaccard"] <= 1
        assert -1 <= row["nested_spearman"] <= 1
    alone = null.by_metric(table, 5, rule=Rule(), splits=10, rng=RNG(0))
    assert alone == rows[: len(metrics.METRICS)]


def test_rank_correlation_gives_a_missing_type_the_rank_after_the_last():
    import scipy.stats

    got = null._rank_correlation(np.array([4, 2, 9]), np.array([2, 7, 4]), 3)
    # Types 2, 4, 7, 9: ranks 2, 1, 4, 3 against 1, 3, 2, 4.
    assert got == pytest.approx(scipy.stats.spearmanr([2, 1, 4, 3], [1, 3, 2, 4]).statistic)
    assert null._rank_correlation(np.array([1]), np.array([1]), 1) is None


def test_one_problem_has_no_halves():
    with pytest.raises(SelectError, match=r"1 problem: expected at least 2.*--limit"):
        null.split_half(
            null.Table.of(corpus(problems=1)),
            [3],
            rule=Rule(),
            splits=1,
            permutations=1,
            rng=RNG(0),
        )
