"""Measures of samples: against enumeration, simulation and hand arithmetic."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats as reference

from opd_jax.evaluate import metrics
from opd_jax.evaluate.metrics import Sample


def sample(correct, found="1", truncated=False, tokens=10):
    vote = metrics.vote(correct, found, f"So {found}", "math")
    return Sample(correct, found, truncated, tokens, vote)


def problems(*rights):
    return [[sample(bool(right), found=str(right)) for right in row] for row in rights]


@pytest.mark.parametrize(
    ("n", "c", "k"), list(itertools.product([1, 4, 6], range(7), [1, 2, 4, 6]))
)
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n, c, k):
    if c > n or k > n:
        with pytest.raises(ValueError, match="expected k from 1"):
            metrics.pass_at_k(n, c, k)
        return
    draws = list(itertools.combinations([i < c for i in range(n)], k))
    assert metrics.pass_at_k(n, c, k) == pytest.approx(np.mean([any(draw) for draw in draws]))


def test_pass_at_k_is_unbiased():
    rng = np.random.default_rng(0)
    n, k, rate = 8, 4, 0.2
    drawn = [metrics.pass_at_k(n, int(c), k) for c in rng.binomial(n, rate, 4000)]
    truth = 1 - (1 - rate) ** k
    assert abs(np.mean(drawn) - truth) < 4 * np.std(drawn) / math.sqrt(len(drawn))


def test_large_numbers_of_samples_do_not_overflow():
    assert 0 < metrics.pass_at_k(20_000, 3, 5_000) < 1


@pytest.mark.parametrize(
    ("answers", "share"),
    [
        ([("5", True), ("5", True), ("6", False)], 1),
        ([("5", True), ("6", False), ("6", False)], 0),
        ([("5", True), ("6", False)], 0.5),
        ([("1/2", True), ("0.5", True), ("2", False), ("2.0", False), ("2", False)], 0),
        ([("x+1", True), ("1+x", True), ("x+2", False)], 1),
        ([("Red", False), ("red", False), ("5", True)], 0),
        ([(None, False), (None, False), ("5", True)], 1),
        ([(None, False)], 0),
    ],
)
def test_majority(answers, share):
    assert metrics.majority([sample(right, found) for found, right in answers]) == share


@pytest.mark.parametrize(
    ("grader", "answers", "share"),
    [
        # Three choose B, however they write it.
        (
            "choice",
            [("A", True), ("(A)", True), ("B", False), ("(B) red", False), ("b.", False)],
            0,
        ),
        ("choice", [("A", True), ("(A)", True), ("B", False), ("(C) red", False)], 1),
        ("exact", [("Red", True), ("blue", False), (" Blue", False)], 0),
    ],
)
def test_votes_meet_as_their_grader_reads_them(grader, answers, share):
    given = [
        Sample(right, found, False, 9, metrics.vote(right, found, f"It is {found}", grader))
        for found, right in answers
    ]
    assert metrics.majority(given) == share


@pytest.mark.parametrize("grader", ["ifeval", "own.py:grade"])
def test_whole_responses_are_nothing_to_vote_on(grader):
    """Of three that are wrong in their own ways, two right ones would be the majority."""
    whole = [
        [Sample(i < 2, f"text {i}", False, 9, metrics.vote(i < 2, f"text {i}", f"text {i}", grader))
         for i in range(5)]
    ] * 3  # fmt: skip
    assert metrics.summarise(whole)["maj@5"] == metrics.Value(None)
    assert metrics.over_seeds([whole, whole])["maj@5"] == metrics.Value(None)
    # A user's own that names its answer has votes.
    assert metrics.vote(False, "7", "It is 7", "own.py:grade") == 7


def test_a_summary_by_hand():
    given = [
        [sample(True), sample(True, tokens=20), sample(False, "2"), sample(False, None, True, 40)],
        [sample(False, None, True, 40)] * 4,
        [sample(True), sample(False, "3"), sample(False, "4"), sample(True, truncated=True)],
        [sample(False, "5"), sample(False, "6"), sample(False, "7"), sample(False, "8")],
    ]
    found = {name: value.value for name, value in metrics.summarise(given, [1, 2, 4]).items()}
    assert found["pass@1"] == pytest.approx(np.mean([0.5, 0, 0.5, 0]))
    assert found["avg@4"] == found["pass@1"]
    assert found["pass@2"] == pytest.approx(np.mean([5 / 6, 0, 5 / 6, 0]))
    assert found["pass@4"] == pytest.approx(0.5)
    assert found["maj@4"] == pytest.approx(0.5)
    assert found["unparsed_share"] == pytest.approx(5 / 16)
    assert found["truncated_share"] == pytest.approx(6 / 16)
    assert found["accuracy_untruncated"] == pytest.approx(3 / 10)
    assert found["mean_length"] == pytest.approx((10 + 20 + 10 + 40 + 160 + 40 + 40) / 16)


def test_one_greedy_sample_has_wilsons_interval():
    found = metrics.summarise(problems(*[[1]] * 7, *[[0]] * 13))
    ends = reference.binomtest(7, 20).proportion_ci(method="wilson")
    assert (found["pass@1"].low, found["pass@1"].high) == pytest.approx((ends.low, ends.high))
    assert not {"maj@1", "avg@1"} & found.keys()
    assert metrics.default_ks(1) == [1]
    assert metrics.default_ks(6) == [1, 2, 4, 6]


def test_nothing_untruncated_has_no_accuracy():
    found = metrics.summarise([[sample(False, None, True)]] * 3)
    assert found["accuracy_untruncated"] == metrics.Value(None)
    assert metrics.show(metrics.Value(None), "x") == "-"


def test_unequal_numbers_of_samples_are_refused():
    with pytest.raises(ValueError, match=r"problems with \[1, 2\] samples"):
        metrics.summarise(problems([1], [0, 1]))


def test_the_interval_of_the_untruncated_covers():
    """Its samples are clustered by problem, and their number is random."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(120):
        rate = rng.beta(2, 2, 40)
        given = [
            [sample(rng.random() < p, truncated=rng.random() < 0.3) for _ in range(4)] for p in rate
        ]
        value = metrics._untruncated(given)
        held += value.low <= 0.5 <= value.high
    assert held / 120 > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 120)


def test_the_intervals_of_pass_at_k_and_majority_cover(monkeypatch):
    """Where nearly all problems are solved, at whose end resampling is too sure of itself."""
    monkeypatch.setattr(metrics, "_mean_value", lambda values: metrics.Value(0.0))  # slow
    rng = np.random.default_rng(4)
    names = ("pass@1", "pass@4", "maj@8")
    found = []
    for _ in range(250):
        rate = rng.beta(6, 2, 60)
        drawn = problems(*(rng.random((60, 8)) < rate[:, None]).astype(int))
        found.append(metrics.summarise(drawn))
    for name in names:
        truth = np.mean([x[name].value for x in found])  # unbiased over the task files
        held = np.mean([x[name].low <= truth <= x[name].high for x in found])
        assert held > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 250), name


def test_greedy_comparison_is_mcnemars_exact_test():
    base, arm = problems(*[[1]] * 10, *[[0]] * 10), problems(*[[1]] * 9, *[[0]] * 4, *[[1]] * 7)
    found = metrics.compare([base], [arm], margin=0.05)
    assert found.test == "McNemar, exact"
    assert found.p == pytest.approx(reference.binomtest(1, 8).pvalue)
    assert found.delta == pytest.approx(0.3)
    assert found.verdict == "undecided"


def test_verdicts_of_comparisons():
    same = problems(*[[1, 0]] * 200)
    assert metrics.compare([same], [same], margin=0.02).verdict == "equivalent"
    # Nothing differs, of so few that much might: the interval has a width, also over seeds.
    for seeds in (1, 3):
        found = metrics.compare([same[:20]] * seeds, [same[:20]] * seeds, margin=0.02)
        assert found.verdict == "undecided"
        assert found.high == -found.low > 0.1
    rng = np.random.default_rng(0)
    noisy, other = (problems(*rng.integers(0, 2, (30, 2))) for _ in "ab")
    assert metrics.compare([noisy], [other], margin=0.02).verdict == "undecided"
    better = problems(*[[1, 1]] * 200)
    found = metrics.compare([same], [better], margin=0.02)
    assert (found.verdict, found.test) == ("different", "paired bootstrap")
    assert found.delta == pytest.approx(0.5)


def test_the_paired_comparison_keeps_its_level():
    rng = np.random.default_rng(2)
    rejected = wrongly = 0
    for _ in range(200):
        rate = rng.beta(1, 1, 50)
        base, arm = (problems(*(rng.random((50, 4)) < rate[:, None]).astype(int)) for _ in "ab")
        found = metrics.compare([base], [arm], margin=0.1)
        rejected += found.p <= 0.05
        wrongly += found.p_equivalent <= 0.05
    assert rejected / 200 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)
    assert wrongly > 100  # equal models are mostly told to be equivalent at ten points


def test_seeds_widen_the_interval():
    rng = np.random.default_rng(3)
    seeds = [problems(*(rng.random((60, 1)) < rate).astype(int)) for rate in (0.3, 0.5, 0.7)]
    alone, together = (metrics.over_seeds(x)["pass@1"] for x in (seeds[1:2], seeds))
    assert together.value == pytest.approx(np.mean([metrics.shares(x).mean() for x in seeds]))
    assert together.high - together.low > alone.high - alone.low
    many = [problems(*(rng.random((60, 4)) < rate).astype(int)) for rate in (0.3, 0.5, 0.7)]
    means = metrics.over_seeds(many)
    for name in ("pass@1", "avg@4", "pass@2", "pass@4", "maj@4", "unparsed_share"):
        each = [metrics.summarise(x)[name].value for x in many]
        assert means[name].value == pytest.approx(np.mean(each))
    assert means["pass@4"].low < min(means["pass@4"].value, 0.99)
    found = metrics.compare(seeds, seeds[::-1], margin=0.02)
    assert found.test == "paired bootstrap over seeds and problems"
    with pytest.raises(ValueError, match="2 seeds of the base and 3 of the arm"):
        metrics.compare(seeds[:2], seeds, margin=0.02)
