"""Planted effects must come out as what they are, and only as that."""

import json

import numpy as np
import pytest
import scipy.stats

from opd_jax.instrument.corpus import Occurrences, TypeStats
from opd_jax.instrument.ranking import Rule
from opd_jax.instrument.scores import SelectError
from opd_jax.instrument.studies import persistence
from opd_jax.instrument.studies.matrix import Matrix
from opd_jax.instrument.studies.persistence import PersistenceError

V, PROBLEMS, LENGTH = 60, 40, 100
NAMES = ("step-0", "step-4")
SETTINGS = dict(k=10, rule=Rule(min_count=2), seed=3, resamples=2000)


def text(seed):
    """(problem, token_id) of a corpus: Zipf-like counts, types mixed in every answer."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, V + 1)
    token_id = rng.choice(V, PROBLEMS * LENGTH, p=share / share.sum()).astype(np.int32)
    return np.repeat(np.arange(PROBLEMS), LENGTH).astype(np.int32), token_id


def occurrences(problem, token_id, kl):
    zero = np.zeros(len(kl), np.float32)
    return Occurrences(
        problem, problem, np.zeros_like(problem), token_id, np.asarray(kl, np.float32),
        *[zero] * 4, vocab_size=V,
    )  # fmt: skip


def planted(kl_of):
    """A matrix of two models and their corpora, with KL from (model, corpus, token_id, rng)."""
    cells = {}
    for j in range(2):
        problem, token_id = text(seed=10 + j)
        for i in range(2):
            kl = kl_of(i, j, token_id, np.random.default_rng([20, j]))  # noise is of the text
            cells[i, j] = occurrences(problem, token_id, kl)
    return Matrix(NAMES, NAMES, cells)


def noisy(mean, rng):
    return mean * rng.uniform(0.5, 1.5, len(mean))


BY_TYPE = np.random.default_rng(0).permutation(np.linspace(0.2, 4.0, V))
# The ids that selection should find; counts fall with the id, so they are spread.
ROCKS = np.argsort(-BY_TYPE / np.arange(1, V + 1))[:10]


def found(result, group, effect, start="step-0", end="step-4"):
    (row,) = (
        row
        for row in result["tests"]
        if (row["group"], row["effect"], row["from"], row["to"]) == (group, effect, start, end)
    )
    return row


def test_alignment_alone_is_alignment_of_the_rocks_alone():
    def kl(model, corpus, token_id, rng):
        gain = np.where(np.isin(token_id, ROCKS), 0.5, 1.0) if model else 1.0
        return noisy(BY_TYPE[token_id], rng) * gain

    result = persistence.analyse(planted(kl), **SETTINGS)
    rocks = {row["token_id"] for row in result["groups"][0]["members"]}
    assert len(rocks & set(ROCKS)) >= 9
    row = found(result, "rock", "alignment")
    assert row["relative"] == pytest.approx(-0.5, abs=0.06)
    assert row["low"] < row["delta"] < row["high"] < 0
    assert row["p_bootstrap_adjusted"] < 0.01
    assert row["p_types"] < 0.05
    drift = found(result, "rock", "context_drift")
    assert drift["low"] < 0 < drift["high"]
    assert drift["p_bootstrap_adjusted"] > 0.05
    assert abs(found(result, "control", "alignment")["relative"]) < 0.1
    (contrast,) = (
        row
        for row in result["contrasts"]
        if row["groups"] == ["rock", "control"] and row["effect"] == "alignment"
    )
    assert contrast["log_ratio"] == pytest.approx(np.log(0.5), abs=0.15)
    assert contrast["high"] < 0


def test_drift_alone_is_drift():
    def kl(model, corpus, token_id, rng):
        return noisy(BY_TYPE[token_id], rng) * (0.6 if corpus else 1.0)

    result = persistence.analyse(planted(kl), **SETTINGS)
    for group in ("rock", "all"):
        row = found(result, group, "alignment")
        assert (row["delta"], row["low"], row["high"]) == (0, 0, 0)
        assert (row["p_types"], row["p_bootstrap"]) == (1, 1)
        drift = found(result, group, "context_drift")
        assert drift["relative"] == pytest.approx(-0.4, abs=0.06)
        assert drift["high"] < 0
        assert drift["p_bootstrap_adjusted"] < 0.05
        # What the published comparison reports is all of it drift.
        assert found(result, group, "both")["delta"] == drift["delta"]


def test_regression_to_the_mean_shows_only_where_it_was_selected():
    fresh = iter(range(100))

    def kl(model, corpus, token_id, rng):  # no type differs from another, no model, no corpus
        return np.random.default_rng([7, next(fresh)]).exponential(1.0, len(token_id))

    result = persistence.analyse(planted(kl), **SETTINGS)
    row = found(result, "high_kl", "both")
    assert row["naive_delta"] < -0.2  # the group was chosen for its luck
    assert row["low"] < 0 < row["high"]
    assert min(r["p_bootstrap_adjusted"] for r in result["tests"]) > 0.05


def test_the_matrix_against_a_loop_over_positions():
    def kl(model, corpus, token_id, rng):
        return noisy(BY_TYPE[token_id], rng) / (1 + model + 2 * corpus)

    scores = planted(kl)
    result = persistence.analyse(scores, **SETTINGS)
    half_a, half_b = persistence.split(scores.cell(*NAMES[:1] * 2).problem, 3)
    assert sorted([*half_a, *half_b]) == list(range(PROBLEMS))
    assert len(half_a) == PROBLEMS // 2
    first, totals = scores.cells[0, 0], {}
    for problem, token, value in zip(first.problem, first.token_id, first.kl, strict=True):
        if problem in half_a:
            totals[token] = totals.get(token, 0.0) + float(value)
    rocks = sorted(totals, key=lambda t: (-totals[t], t))[:10]
    for half, name in ((half_b, "matrix"), (half_a, "naive_matrix")):
        for group, ids in ((0, rocks), (3, range(V))):
            grid = result["groups"][group][name]
            for (i, j), cell in scores.cells.items():
                mean = np.mean(
                    [
                        value
                        for problem, token, value in zip(
                            cell.problem, cell.token_id, cell.kl.astype(float), strict=True
                        )
                        if problem in half and token in ids
                    ]
                )
                assert grid[i][j] == pytest.approx(mean, rel=1e-9)
    row, grid = found(result, "rock", "both"), result["groups"][0]["matrix"]
    parts = [found(result, "rock", effect)["delta"] for effect in ("alignment", "context_drift")]
    assert row["delta"] == pytest.approx(grid[1][1] - grid[0][0])
    assert row["delta"] == pytest.approx(sum(parts))
    assert parts[0] == pytest.approx(grid[1][0] - grid[0][0])


def test_wilcoxon_is_over_the_means_of_types():
    scores = planted(lambda i, j, ids, rng: noisy(BY_TYPE[ids], rng) + 0.01 * i * (ids % 3 - 0.5))
    result = persistence.analyse(scores, **SETTINGS)
    _, half_b = persistence.split(scores.cells[0, 0].problem, 3)
    means = []
    for i in range(2):
        cell = scores.cells[i, 0]
        inside = np.isin(cell.problem, half_b)
        means.append(
            [
                cell.kl[inside & (cell.token_id == t)].astype(float).mean()
                for t in range(V)
                if np.any(inside & (cell.token_id == t))
            ]
        )
    row = found(result, "all", "alignment")
    assert row["types"] == len(means[0])
    assert row["p_types"] == pytest.approx(scipy.stats.wilcoxon(*means).pvalue, rel=1e-6)


def test_all_p_values_are_adjusted_together():
    result = persistence.analyse(planted(lambda i, j, t, rng: noisy(BY_TYPE[t], rng)), **SETTINGS)
    for rows, name in (
        (result["tests"], "p_bootstrap"),
        (result["contrasts"], "p_bootstrap"),
        (result["contrasts"], "p_equivalent"),
    ):
        raw = [row[name] for row in rows]
        adjusted = [row[f"{name}_adjusted"] for row in rows]
        np.testing.assert_allclose(adjusted, scipy.stats.false_discovery_control(raw))
    # Wilcoxon's takes types as independent, which they are not: it is in no family.
    assert not any("p_types_adjusted" in row for row in result["tests"])


def test_problems_that_move_all_types_alike_are_told_by_problems_only():
    """Wilcoxon over types takes what one problem does to 60 types for 60 witnesses."""
    rejected = np.zeros(2)
    for number in range(20):

        def kl(model, corpus, token_id, rng, number=number):
            luck = np.exp(np.random.default_rng([number, model]).normal(0, 0.4, PROBLEMS))
            return noisy(BY_TYPE[token_id], rng) * np.repeat(luck, LENGTH)

        result = persistence.analyse(planted(kl), **SETTINGS | {"resamples": 400})
        row = found(result, "all", "alignment")
        rejected += row["p_types"] < 0.05, row["p_bootstrap"] < 0.05
    assert rejected[0] > 8
    assert rejected[1] < 5  # of 20 at 5%: 5 or more in 3 of 1000


def test_groups_that_keep_as_much_are_told_to():
    def kl(model, corpus, token_id, rng):
        return noisy(BY_TYPE[token_id], rng) * (0.7 if model else 1.0)

    result = persistence.analyse(planted(kl), **SETTINGS)
    assert result["margin"] == persistence.MARGIN
    alignment = [r for r in result["contrasts"] if r["effect"] == "alignment"]
    assert len(alignment) == 2
    assert all(row["p_equivalent_adjusted"] < 0.05 < row["p_bootstrap"] for row in alignment)
    strict = persistence.analyse(planted(kl), **SETTINGS | {"margin": 1e-9})
    assert all(row["p_equivalent"] > 0.05 for row in strict["contrasts"])


def test_the_interval_is_that_of_a_mean_over_problems():
    scores = planted(lambda i, j, t, rng: rng.normal(1 + i, 0.5, len(t)).clip(0) * (1 + 0.2 * i))
    result = persistence.analyse(scores, **SETTINGS | {"resamples": 20_000})
    _, half_b = persistence.split(scores.cells[0, 0].problem, 3)
    # All answers are of one length, so the group "all" has the mean of the problems' means.
    a, b = (scores.cells[i, 0].kl.reshape(PROBLEMS, LENGTH)[half_b].mean(1) for i in range(2))
    error = np.std(b - a, ddof=1) / np.sqrt(len(half_b))
    row = found(result, "all", "alignment")
    reach = scipy.stats.t.ppf(0.975, len(half_b) - 1)
    assert row["high"] - row["low"] == pytest.approx(2 * reach * error, rel=0.06)
    assert (row["high"] + row["low"]) / 2 == pytest.approx(row["delta"], abs=0.1 * error)


def test_high_kl_leaves_out_the_rocks_and_what_was_seen_once():
    ids = np.array([0] * 50 + [1] * 20 + [2, 2, 3, 3, 4])
    kl = np.array([1.0] * 50 + [0.1] * 20 + [9, 9, 2, 2, 99])
    groups = persistence.select_groups(TypeStats.of(ids, kl, 6), 1, Rule(min_count=1))
    assert groups["rock"].tolist() == [4]  # 99 nats at once
    assert groups["high_kl"].tolist() == [2]
    groups = persistence.select_groups(TypeStats.of(ids, kl, 6), 1, Rule(min_count=2))
    assert groups["rock"].tolist() == [0]
    assert not set(groups["control"]) & {0}
    ids, kl = np.array([0] * 10 + [1] * 3 + [2] * 3), np.array([5.0] * 10 + [2.0] * 3 + [1.0] * 3)
    groups = persistence.select_groups(
        TypeStats.of(ids, kl, 6), 1, Rule(min_count=2)
    )  # the rock is highest in both
    assert (groups["rock"].tolist(), groups["high_kl"].tolist()) == ([0], [1])


def test_k_beyond_the_types_selects_those_there_are():
    sums = TypeStats.of(np.array([0, 0, 3, 3, 4]), np.ones(5), 6)
    groups = persistence.select_groups(sums, 9, Rule(min_count=2))
    assert {name: ids.tolist() for name, ids in groups.items()} == {
        "rock": [0, 3],
        "control": [4],
        "high_kl": [],
    }
    with pytest.raises(SelectError, match="--min-count"):
        persistence.select_groups(sums, 9, Rule(min_count=3))


def test_a_group_without_types_is_left_out():
    def kl(model, corpus, token_id, rng):
        return BY_TYPE[token_id]

    result = persistence.analyse(planted(kl), **SETTINGS | {"k": V, "rule": Rule()})
    assert [row["group"] for row in result["groups"]] == ["rock", "all"]
    assert result["contrasts"] == []
    json.dumps(result, allow_nan=False)


def test_selection_can_be_on_any_cell():
    def kl(model, corpus, token_id, rng):  # the rocks of the second model are other types
        return noisy(BY_TYPE[V - 1 - token_id if model else token_id], rng)

    scores = planted(kl)
    first = persistence.analyse(scores, **SETTINGS)
    last = persistence.analyse(scores, **SETTINGS, select_on=("step-4", "step-0"))
    assert first["select_on"] == ["step-0", "step-0"]
    assert last["select_on"] == ["step-4", "step-0"]
    assert first["groups"][0]["members"] != last["groups"][0]["members"]


def test_three_models_compare_neighbours_and_ends():
    cells = {}
    for j in range(4):
        problem, token_id = text(seed=j)
        for i in range(3):
            kl = BY_TYPE[token_id] * 0.8**i
            cells[i, j] = occurrences(problem, token_id, kl)
    names = ("step-0", "step-2", "step-4")
    result = persistence.analyse(Matrix(names, (*names, "teacher"), cells), **SETTINGS)
    pairs = {(row["from"], row["to"]) for row in result["tests"]}
    assert pairs == {("step-0", "step-2"), ("step-2", "step-4"), ("step-0", "step-4")}
    assert found(result, "rock", "alignment")["relative"] == pytest.approx(0.64 - 1)
    assert len(result["groups"][0]["matrix"][0]) == 4
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (dict(corpora=("step-0", "other")), ("['step-4']", "step-0", "score those")),
        (dict(select_on=("step-1", "step-0")), ("'step-1'", "step-4", "change select_on")),
    ],
)
def test_what_cannot_be_analysed_is_named(change, parts):
    scores = planted(lambda i, j, t, rng: BY_TYPE[t])
    scores = Matrix(NAMES, change.get("corpora", NAMES), scores.cells)
    with pytest.raises(PersistenceError) as error:
        persistence.analyse(scores, **SETTINGS, select_on=change.get("select_on"))
    assert all(part in str(error.value) for part in parts)


def test_one_problem_cannot_be_split():
    with pytest.raises(PersistenceError, match=r"answers 1 problem.*at least 2.*--limit"):
        persistence.split(np.zeros(5, int), 0)
