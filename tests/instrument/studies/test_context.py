import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from opd_jax import mesh
from opd_jax.instrument import shares
from opd_jax.instrument.corpus import Corpus, Occurrences, TypeStats
from opd_jax.instrument.ranking import Rule
from opd_jax.instrument.studies import context
from opd_jax.instrument.studies.context import Parameters, Search
from opd_jax.models import params, transformer

CFG = dataclasses.replace(tiny_run.MODEL, vocab_size=40)


def make_pair(fsdp=1, devices=1):
    """What of a pair is used here: a random student on a mesh."""
    grid = mesh.make(fsdp=fsdp, devices=jax.devices()[:devices])
    tree = params.init(transformer.specs(CFG), jax.random.key(3))
    tree["embed"] = tree["embed"] * tiny_run.EMBED_SCALE
    tree = jax.device_put(tree, params.shardings(transformer.specs(CFG), grid))
    return types.SimpleNamespace(
        cfg=types.SimpleNamespace(student=CFG),
        mesh=grid,
        student=tree,
        sampler=types.SimpleNamespace(pad_id=0),
    )


def make_corpus(seed=0, answers=5):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 20, size=answers)
    return Corpus(
        {},
        [rng.integers(1, 40, size=rng.integers(1, 6)).astype(np.int32) for _ in lengths],
        [rng.integers(1, 8, size=n).astype(np.int32) for n in lengths],
        np.arange(answers, dtype=np.int32),
        np.zeros(answers, bool),
    )


def scored(corpus, kl):
    kl = np.asarray(kl, np.float32)
    answer = corpus.answer
    return Occurrences(answer, answer, corpus.position, corpus.token_id, *[kl] * 5, 40)


@pytest.fixture(scope="module")
def hidden():
    """Final hidden states of the answers' tokens, one answer at a time and unpadded."""
    corpus, tree = make_corpus(), jax.tree.map(jnp.asarray, jax.device_get(make_pair().student))
    out, run = [], jax.jit(functools.partial(transformer.hidden, cfg=CFG))
    for prompt, answer in zip(corpus.prompts, corpus.answers, strict=True):
        ids = jnp.asarray(np.concatenate([prompt, answer])[None])
        valid = jnp.ones(ids.shape, bool)
        h, _ = run(tree, ids, transformer.positions(valid), valid)
        out.append(np.asarray(h, np.float64)[0, len(prompt) :])
    return out


def means(hidden, window):
    return np.stack(
        [h[max(0, t - window) : t + window + 1].mean(axis=0) for h in hidden for t in range(len(h))]
    )


@pytest.mark.parametrize("window", [0, 2, 50])
def test_states_are_means_over_the_window_inside_the_answer(hidden, window):
    corpus, pair = make_corpus(), make_pair()
    chosen = np.arange(corpus.num_positions)
    got = context.states(corpus, pair, chosen, window=window, batch=2)
    np.testing.assert_allclose(got, means(hidden, window), atol=2e-5)


def test_states_of_some_positions_on_a_mesh(hidden):
    corpus, pair = make_corpus(), make_pair(fsdp=2, devices=4)
    chosen = np.array([0, 3, 4, corpus.num_positions - 1])
    got = context.states(corpus, pair, chosen, window=3, batch=3)  # rounded up to 4 rows
    np.testing.assert_allclose(got, means(hidden, 3)[chosen], atol=2e-5)


def by_hand(vectors, before, after, token_id, point):
    """CCR of every type by the definition, in loops."""
    is_high = before >= np.quantile(before, point.tau_pre)
    is_high &= after >= np.quantile(after, point.tau_post)
    ccr = {}
    for v in np.unique(token_id):
        own = [o for o in np.flatnonzero(is_high) if token_id[o] == v]
        retained = 0
        for o in own:
            others = [vectors[p] for p in own if p != o]
            agree = [
                x @ vectors[o] / np.linalg.norm(x) / np.linalg.norm(vectors[o]) >= point.gamma
                for x in others
            ]
            retained += bool(agree) and np.mean(agree) >= point.eta
        ccr[int(v)] = retained / np.sum(token_id == v)
    return ccr


@pytest.fixture
def vectors(monkeypatch):
    """Context vectors by window instead of a model's: few directions, so that cosines are plain."""
    made = {}

    def states(corpus, pair, chosen, *, window, batch):
        rng = np.random.default_rng(window)
        made[window] = rng.normal(size=(3, 4))[rng.integers(3, size=corpus.num_positions)]
        return made[window][chosen].astype(np.float32)

    monkeypatch.setattr(context, "states", states)
    return made


def two_scorings(corpus, seed=1):
    rng = np.random.default_rng(seed)
    return [scored(corpus, rng.exponential(size=corpus.num_positions)) for _ in range(2)]


GRID = {"window": (1, 2), "gamma": (0.5, 0.9), "eta": (0.2, 0.6), "tau_pre": (0.1, 0.4)}


def test_grid_meets_the_definition(vectors):
    corpus = make_corpus(answers=30)
    before, after = two_scorings(corpus)
    result = context.run(
        corpus,
        None,
        before,
        after,
        3,
        token_text=str,
        search=Search(GRID, Parameters(tau_post=0.3)),
    )
    assert len(result["grid"]) == 16 + 1
    stats = TypeStats.of_occurrences(after)
    rocks = Rule().rocks(stats, 3)
    assert result["candidates"] == 7  # all types there are: fewer than 4 k
    for row in result["grid"]:
        point = Parameters(**{n: row[n] for n in dataclasses.asdict(Parameters())})
        ccr = by_hand(vectors[point.window], before.kl, after.kl, corpus.token_id, point)
        score = {v: stats.kl_sum[v] * c for v, c in ccr.items()}
        wanted = sorted((v for v in score if score[v] > 0), key=lambda v: -score[v])[:3]
        assert row["median_ccr"] == pytest.approx(np.median([ccr[v] for v in rocks]))
        assert row["types"] == len(wanted)
        assert row["rocks_kept"] == len({*wanted} & {*rocks.tolist()})
        assert row["jaccard_with_rock_score"] == shares.jaccard(wanted, rocks)
        assert row["density"] == np.median(shares.density(after, wanted).token_share)
        retained = sum(ccr[v] * stats.count[v] for v in wanted)
        assert row["retained_share"] == pytest.approx(retained / len(after))
        assert row["is_exact"]
    assert any(0 < row["median_ccr"] < 1 for row in result["grid"])


def test_default_is_told_by_type_and_the_result_is_json(vectors):
    corpus = make_corpus(answers=30)
    before, after = two_scorings(corpus)
    default = Parameters(window=3, gamma=0.4, eta=0.3, tau_pre=0.2, tau_post=0.2)
    result = context.run(corpus, None, before, after, 3, token_text=str, search=Search({}, default))
    assert json.loads(json.dumps(result)) == result
    assert result["default"] == result["grid"][0]
    ccr = by_hand(vectors[3], before.kl, after.kl, corpus.token_id, default)
    told = {row["token_id"]: row for row in result["types"]}
    assert {v: row["ccr"] for v, row in told.items()} == pytest.approx(ccr)
    scores = [row["score"] for row in result["types"]]
    assert scores == sorted(scores, reverse=True)
    for row in result["types"]:
        assert row["score"] == pytest.approx(row["rock_score"] * row["ccr"])
        assert row["token"] == str(row["token_id"])


def test_types_left_out_make_a_row_inexact_only_where_they_could_enter(vectors):
    corpus = make_corpus(answers=30)
    before, after = two_scorings(corpus)

    def is_exact(**keys):
        return context.run(
            corpus,
            None,
            before,
            after,
            3,
            token_text=str,
            search=Search({}, candidates=3, **keys),
        )["default"]["is_exact"]

    all_kept = Parameters(gamma=-1, eta=0, tau_pre=0, tau_post=0)
    assert is_exact(default=all_kept)  # CCR 1: R_ctx is R
    assert not is_exact(default=Parameters(gamma=1, eta=1))  # nothing retained


def planted(seed=0):
    """One type whose high-loss occurrences share a context that its others do not have."""
    rng = np.random.default_rng(seed)
    corpus = Corpus(
        {},
        [np.array([9], np.int32)] * 20,
        [np.array([1] * 40, np.int32)] * 20,
        np.arange(20, dtype=np.int32),
        np.zeros(20, bool),
    )
    is_high = rng.permutation(corpus.num_positions) < 0.2 * corpus.num_positions
    kl = np.where(is_high, 5.0, 0.1) + 0.01 * rng.random(corpus.num_positions)
    return corpus, is_high, scored(corpus, kl)


@pytest.mark.parametrize("is_planted", [True, False])
def test_control_tells_a_shared_context_from_one_that_every_occurrence_has(monkeypatch, is_planted):
    corpus, is_high, found = planted()
    rng = np.random.default_rng(5)
    noise = rng.normal(size=(corpus.num_positions, 50))
    shared = np.where(is_high, 100.0, 0.0) if is_planted else np.full(len(is_high), 100.0)
    noise[:, 0] += shared
    monkeypatch.setattr(
        context, "states", lambda c, p, chosen, **keys: noise[chosen].astype(np.float32)
    )
    default = Parameters(gamma=0.9, eta=0.5, tau_pre=0.8, tau_post=0.8)
    row = context.run(
        corpus, None, found, found, 1, token_text=str, search=Search({}, default, cap=64)
    )["default"]
    share = np.mean(found.kl >= np.quantile(found.kl, 0.8))
    assert row["median_ccr"] == pytest.approx(share)  # all 160, though 64 were compared
    assert row["control"]["median_ccr"] == pytest.approx(0 if is_planted else share)


def test_a_single_occurrence_has_no_other_to_agree_with(vectors):
    corpus = Corpus(
        {},
        [np.array([9], np.int32)] * 2,
        [np.array([1, 2, 2], np.int32), np.array([2], np.int32)],
        np.arange(2, dtype=np.int32),
        np.zeros(2, bool),
    )
    found = scored(corpus, [1, 1, 1, 1])
    all_kept = Parameters(gamma=-1, eta=0, tau_pre=0, tau_post=0)
    result = context.run(corpus, None, found, found, 2, token_text=str, search=Search({}, all_kept))
    assert {row["token_id"]: row["ccr"] for row in result["types"]} == {1: 0, 2: 1}


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"width": (1,)}, r"\['width'\]"),
        ({"gamma": (1.5,)}, "gamma 1.5"),
        ({"tau_pre": (-0.1,)}, "tau_pre"),
        ({"window": (-1,)}, "window -1"),
        ({"window": (1.5,)}, "window 1.5"),
    ],
)
def test_parameters_without_meaning_are_refused(grid, message):
    corpus = make_corpus()
    found = scored(corpus, np.ones(corpus.num_positions))
    with pytest.raises(ValueError, match=message):
        context.run(corpus, None, found, found, 2, token_text=str, search=Search(grid))


def test_more_rocks_than_types_and_another_score_are_refused():
    corpus = make_corpus()
    found = scored(corpus, np.ones(corpus.num_positions))
    with pytest.raises(ValueError, match="--k"):
        context.run(corpus, None, found, found, 41, token_text=str)
    with pytest.raises(ValueError, match=r"rule\.score is 'mean'"):
        context.run(corpus, None, found, found, 2, rule=Rule("mean"), token_text=str)


def test_scorings_of_other_text_are_refused():
    corpus, other = make_corpus(0), make_corpus(1)
    found, strange = (scored(c, np.ones(c.num_positions)) for c in (corpus, other))
    with pytest.raises(ValueError, match=r"before has .* positions"):
        context.run(corpus, None, strange, found, 2, token_text=str)
