"""Sums by problem against a loop; the bootstrap against arithmetic and its own limits."""

import numpy as np
import pytest
import scipy.stats

from opd_jax.instrument.corpus import Occurrences
from opd_jax.instrument.studies import pooled

CELL = ("model", "corpus")


def occurrences(problem, token_id, kl):
    problem, token_id = (np.asarray(x, np.int32) for x in (problem, token_id))
    zero = np.zeros(len(kl), np.float32)
    return Occurrences(
        problem, problem, problem, token_id, np.asarray(kl, np.float32), *[zero] * 4, vocab_size=5
    )


def test_sums_are_by_problem_and_group():
    found = occurrences([7, 7, 3, 9, 9, 4], [0, 1, 1, 0, 2, 1], [1, 2, 4, 8, 16, 32])
    member = np.array([[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0]], bool)
    kl, count = pooled.by_problem(found, np.array([3, 7, 9]), member)  # problem 4: other half
    assert kl.tolist() == [[0, 4, 0], [1, 2, 0], [8, 16, 0]]
    assert count.tolist() == [[0, 1, 0], [1, 1, 0], [1, 1, 0]]
    mean = pooled.mean(np.stack([kl, count]).sum(1))
    assert mean[:2].tolist() == [4.5, 22 / 3]
    assert np.isnan(mean[2])


def test_a_draw_weighs_problems_by_their_positions():
    # Two problems, means 1 (of 9 positions) and 11 (of 1): a draw has both twice, or one of each.
    sums = np.array([[[9.0], [11.0]], [[9.0], [1.0]]])
    drawn = pooled.bootstrap({CELL: sums}, 4000, 0)[CELL][:, 0]
    values, times = np.unique(drawn, return_counts=True)
    np.testing.assert_allclose(values, [1, 2, 11])
    np.testing.assert_allclose(times / 4000, [0.25, 0.5, 0.25], atol=0.03)


def test_all_cells_see_the_same_draw():
    rng = np.random.default_rng(0)
    kl, count = rng.uniform(size=(2, 6, 2)) + 0.1
    cells = {("a", "c"): np.stack([kl, count]), ("b", "c"): np.stack([3 * kl, count])}
    drawn = pooled.bootstrap(cells, 2500, 1)
    assert drawn["a", "c"].shape == (2500, 2)
    np.testing.assert_allclose(drawn["b", "c"], 3 * drawn["a", "c"])
    assert len(np.unique(drawn["a", "c"][:, 0])) > 300  # later draws repeat no earlier ones


@pytest.mark.parametrize(("below", "p"), [(0, 2 / 101), (10, 22 / 101), (60, 82 / 101)])
def test_p_counts_the_rarer_side(below, p):
    values = np.concatenate([-np.ones(below), np.ones(100 - below)])
    assert pooled.interval(0.0, values, 50)["p_bootstrap"] == pytest.approx(p)


def test_draws_without_the_group_are_left_out_and_few_problems_widen_the_rest():
    found = pooled.interval(2.0, np.array([np.nan, 1.0, 2.0, 3.0]), 4)
    wide = scipy.stats.t.ppf(0.975, 3) / scipy.stats.norm.ppf(0.975) * np.sqrt(4 / 3)
    assert found == {
        "low": pytest.approx(2 - 0.95 * wide),
        "high": pytest.approx(2 + 0.95 * wide),
        "p_bootstrap": pytest.approx(0.5),
    }
    nothing = {"low": None, "high": None, "p_bootstrap": 1.0}
    assert pooled.interval(1.0, np.full(3, np.nan), 9) == nothing
    assert pooled.interval(1.0, np.ones(3), 1) == nothing
    one = pooled.interval(0.0, np.linspace(-1, 1, 99), 40, margin=2.0)
    assert one["p_equivalent"] == pytest.approx(1 / 100)
