import dataclasses
import json

import numpy as np
import pytest
import scipy.stats

from opd_jax.instrument import controls, null, scores, selection, shares
from opd_jax.instrument.corpus import Occurrences, TypeStats
from opd_jax.instrument.ranking import Rule
from opd_jax.instrument.scores import SelectError
from opd_jax.instrument.tally import Tally

VOCAB = 60
WORDS = ["$", " the", ".", "1", "\n", " apples", "So", "="]


def text(token_id: int) -> str:
    return WORDS[token_id % len(WORDS)]


def make(seed=0, problems=12, length=60):
    rng = np.random.default_rng(seed)
    size = problems * length
    share = 1 / np.arange(1, VOCAB + 1)
    token_id = rng.choice(VOCAB, size, p=share / share.sum()).astype(np.int32)
    kl = rng.exponential(size=size).astype(np.float32) * (1 + token_id % 5)
    ratio = kl + rng.normal(size=size).astype(np.float32)
    answer = np.repeat(np.arange(2 * problems), length // 2).astype(np.int32)
    position = np.tile(np.arange(length // 2), 2 * problems).astype(np.int32)
    return Occurrences(answer, answer // 2, position, token_id, kl, ratio, -kl, kl, kl, VOCAB)


@pytest.fixture(scope="module")
def found():
    return make()


@pytest.fixture(scope="module")
def result(found):
    return selection.selection(found, 7, token_text=text, resamples=50, permutations=6)


def test_result_has_the_parts_that_pages_and_figures_read(result):
    assert set(result) == {
        "k",
        "corpus",
        "coverage_note",
        "k_grid",
        "resamples",
        "permutations",
        "coverage",
        "split_half",
        "nested",
        "nested_mean",
        "metrics",
        "density",
        "funnel",
        "controls",
        "groups",
        "estimators",
        "null_note",
        "answer_shares",
    }
    assert json.loads(json.dumps(result)) == result
    assert result["k_grid"] == [5, 7, 10, 20, 30, 50]
    for name in ("coverage", "split_half", "nested_mean"):
        assert [row["k"] for row in result[name]] == result["k_grid"]
    assert result["null_note"] == null.NOTE
    assert result["corpus"] == {"problems": 12, "answers": 24, "tokens": 720, "types": 59}
    assert "chosen on 4 of 5 parts of the 12 problems" in result["coverage_note"]


def test_same_seed_same_result(found, result):
    again = selection.selection(found, 7, token_text=text, resamples=50, permutations=6)
    assert again == result


def test_nested_mean_is_over_the_subsets(result):
    values = [row["value"] for row in result["nested"] if row["k"] == 7]
    assert len(values) == 5
    assert result["nested_mean"][1] == {"k": 7, "value": pytest.approx(np.mean(values))}


def test_densities_of_both_published_rules_and_of_the_asked_one(found):
    result = selection.selection(
        found, 7, token_text=text, resamples=5, permutations=2, rule=Rule(skip_top=2)
    )
    assert [row["skip_top"] for row in result["density"]] == [0, 2, 5]
    row, stats = result["density"][2], TypeStats.of_occurrences(found)
    ids = Rule(skip_top=5).rocks(stats, 7)
    shares, events = [], []
    for answer in range(24):
        part = found.where(found.answer == answer)
        inside = np.isin(part.token_id, ids)
        shares.append(inside.mean())
        events.append(np.sum((part.kl >= np.quantile(found.kl, 0.95)) & ~inside))
    assert row["median"] == pytest.approx(np.median(shares))
    assert row["p25"] == pytest.approx(np.quantile(shares, 0.25))
    assert row["corpus"] == pytest.approx(np.isin(found.token_id, ids).mean())
    assert row["high_kl_outside"] == np.median(events)


def test_density_takes_as_many_types_as_there_are(found):
    few = found.where(found.token_id < 8)
    row = selection.density_row(few, TypeStats.of_occurrences(few), 7, Rule(skip_top=5))
    assert row["k"] == 3


def test_funnel_bins_hold_every_type_of_a_bin_with_two(found, result):
    stats = TypeStats.of_occurrences(found)
    bins = result["funnel"]["bins"]
    assert all(b["types"] >= 2 and b["p10"] <= b["mean"] <= b["p90"] for b in bins)
    # Independent: numpy's own histogram of the same 40 bins.
    numbers, edges = np.histogram(np.log10(stats.count[stats.seen]), bins=40)
    assert [b["types"] for b in bins] == [int(n) for n in numbers if n >= 2]
    centres = (edges[1:] + edges[:-1]) / 2
    assert [b["log10_count"] for b in bins] == pytest.approx(centres[numbers >= 2])
    assert result["funnel"]["kl_mean"] == pytest.approx(found.kl.mean(), rel=1e-6)
    rocks = Rule().rocks(stats, 7)
    assert [r["token_id"] for r in result["funnel"]["rocks"]] == rocks.tolist()


def test_funnel_of_types_of_one_count():
    stats = TypeStats(np.full(4, 3.0), np.arange(4.0), np.arange(4.0))
    got = selection.funnel(stats, np.array([3]), text)
    assert [b["types"] for b in got["bins"]] == [4]


def test_controls_name_every_control_with_shares_and_what_is_unmatched(found, result):
    stats = TypeStats.of_occurrences(found)
    rows = {row["name"]: row for row in result["controls"]}
    assert list(rows) == ["rock", *controls.CONTROLS]
    rocks = Rule().rocks(stats, 7)
    assert rows["rock"]["overlap_with_rocks"] == 7
    assert rows["rock"]["residual"] is None
    # Of types that no other fold has seen, neither list knows.
    both = rows["complement"]["token_share"] + rows["rock"]["token_share"]
    assert 0.99 < both <= 1 + 1e-12
    assert rows["rock"]["in_sample_kl_share"] == pytest.approx(shares.coverage(stats, rocks))
    assert rows["rock"]["kl_share"] <= rows["rock"]["in_sample_kl_share"]
    assert rows["hungarian"]["residual"] == controls.residual(
        stats, rocks, controls.choose(stats, rocks, "hungarian")
    )
    assert rows["share_matched"]["residual"]["count_ratio"] == pytest.approx(1, abs=0.01)


def test_groups_are_of_all_types_and_rocks(result):
    assert sum(row["rocks"] for row in result["groups"]) == 7
    assert sum(row["kl_share"] for row in result["groups"]) == pytest.approx(1)


def test_estimators_compare_exact_and_sampled_scores(found, result):
    got = result["estimators"]
    counts = np.bincount(found.token_id, minlength=VOCAB)
    exact, sampled = (
        np.array([x[found.token_id == i].sum(dtype=float) for i in range(VOCAB)])
        for x in (found.kl, found.log_ratio)
    )
    several = counts >= 2
    assert got["spearman"] == pytest.approx(
        scipy.stats.spearmanr(exact[several], sampled[several]).statistic
    )
    top = [set(np.argsort(-x)[:7].tolist()) for x in (exact, sampled)]
    assert got["jaccard"][1]["value"] == len(top[0] & top[1]) / len(top[0] | top[1])
    same = selection.estimators(dataclasses.replace(found, log_ratio=found.kl), [5], rule=Rule())
    assert same["spearman"] == pytest.approx(1)
    assert same["jaccard"] == [{"k": 5, "value": 1}]


def test_joint_metrics_take_the_lesser_of_two_corpora(found):
    rows = selection.joint_metrics(found, found, 7, rule=Rule(), permutations=6)
    assert [row["name"] for row in rows] == list(scores.JOINT)
    tally = Tally.of(found)
    whole = null.by_metric(tally, 7, rule=Rule(), splits=6, rng=np.random.default_rng(0))
    single = {row["name"]: row for row in whole}
    for row in rows:  # the lesser of equals
        assert row == single[scores.JOINT[row["name"]]] | {"name": row["name"]}
    other = make(seed=1)
    other = other.where(other.problem < 11)  # and it may lack some
    changed = selection.joint_metrics(found, other, 7, rule=Rule(), permutations=6)
    assert changed != rows
    assert all(0 <= row["split_half"] <= 1 for row in changed)


def test_bad_input_is_refused(found):
    with pytest.raises(SelectError, match="--k"):
        selection.selection(found, 61, token_text=text)
    with pytest.raises(SelectError, match="--score"):
        selection.selection(found, 7, token_text=text, rule=Rule("none"))
    with pytest.raises(SelectError, match="--limit"):
        selection.selection(found.where(found.problem == 0), 7, token_text=text)
