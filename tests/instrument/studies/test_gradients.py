"""Gradient geometry against dense float64 numpy, autodiff, enumeration and its own identities."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import mesh
from opd_jax.instrument.corpus import Corpus, Occurrences
from opd_jax.instrument.studies import gradients, logit_sums, passes
from opd_jax.kl import KLSpec
from opd_jax.models import params, transformer
from opd_jax.models.transformer import ModelConfig
from opd_jax.objective import ObjectiveConfig
from opd_jax.rollout.sampling import Sampler
from opd_jax.store.pair import Pair

V, REAL = 32, 29
GROUPS = {"rock": [1, 2], "high_kl": [5, 6], "control": [3, 4], "random": [7]}


def make_pair(axes=(1, 1, 1), *, tied=False, chunk=5, dtype="float32") -> Pair:
    student, teacher = (
        ModelConfig("qwen3", V, width, 24, 1, 2, 2, 8, qk_norm=True, tied=is_tied, dtype=dtype)
        for width, is_tied in ((16, tied), (8, False))
    )
    on = mesh.make(*axes, devices=jax.devices()[: int(np.prod(axes))])
    trees = []
    for cfg, seed in ((student, 1), (teacher, 2)):
        specs = transformer.specs(cfg)
        tree = params.init(specs, jax.random.key(seed))
        # A fresh model is uniform over the vocabulary; this one has preferences.
        tree = {name: x * 20 if name in ("embed", "head") else x for name, x in tree.items()}
        trees.append(jax.device_put(tree, params.shardings(specs, on)))
    return Pair(
        cfg=ObjectiveConfig(student, teacher, KLSpec(vocab_size=REAL, chunk=chunk)),
        mesh=on,
        tokenizer=None,
        sampler=Sampler(vocab_size=REAL),
        student=trees[0],
        teacher=trees[1],
        student_name="student",
        teacher_name="teacher",
    )


def make_corpus(seed=0, answers=7) -> Corpus:
    """Answers of different lengths over few types, some of them once."""
    rng = np.random.default_rng(seed)
    ids = [rng.choice(9, size=n, p=_zipf(9)).astype(np.int32) for n in rng.integers(3, 14, answers)]
    ids[0] = np.arange(9, dtype=np.int32)  # all of them occur
    ids[1] = np.array([20, 1, 2], np.int32)
    prompts = [rng.integers(0, REAL, n).astype(np.int32) for n in rng.integers(1, 5, answers)]
    info = {"tokenizer_size": REAL}
    return Corpus(info, prompts, ids, np.arange(answers, dtype=np.int32), np.zeros(answers, bool))


def _zipf(n):
    p = 1 / np.arange(1, n + 1)
    return p / p.sum()


def scored(corpus: Corpus) -> Occurrences:
    """Occurrences whose measurements are not looked at."""
    zero = np.zeros(corpus.num_positions, np.float32)
    ints = corpus.answer, corpus.answer, corpus.position, corpus.token_id
    return Occurrences(*ints, zero, zero, zero, zero, zero, V)


def plain(tree):
    """The parameters on one device, without a mesh."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), tree)


def dense(corpus: Corpus, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Gradient [N, V] and hidden state [N, D] of every position, in float64, whole."""
    models = [
        (plain(tree), cfg)
        for tree, cfg in ((pair.student, pair.cfg.student), (pair.teacher, pair.cfg.teacher))
    ]
    heads = [np.asarray(transformer.head(tree, cfg), np.float64) for tree, cfg in models]
    g, h = [], []
    for prompt, answer in zip(corpus.prompts, corpus.answers, strict=True):
        ids = jnp.asarray(np.concatenate([prompt, answer])[None, :-1])
        valid = jnp.ones_like(ids, bool)
        states = [
            np.asarray(
                transformer.hidden(tree, ids, transformer.positions(valid), valid, cfg=cfg)[0],
                np.float64,
            )[0, len(prompt) - 1 :]
            for tree, cfg in models
        ]
        p, q = (_softmax(x @ w[:REAL].T) for x, w in zip(states, heads, strict=True))
        ratio = np.log(p / q)
        g.append(np.pad(p * (ratio - (p * ratio).sum(-1, keepdims=True)), ((0, 0), (0, V - REAL))))
        h.append(states[0])
    return np.concatenate(g), np.concatenate(h)


def _softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def expected_types(corpus: Corpus, pair: Pair) -> dict[int, dict]:
    """The definitions, vector by vector."""
    g, h = dense(corpus, pair)
    outer = np.einsum("nv,nd->nvd", g, h)
    cos = lambda a, b: (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    token = corpus.token_id
    seen = np.unique(token)
    mean = {t: g[token == t].mean(0) for t in seen.tolist()}
    balanced, whole = sum(mean.values()), g.sum(0)
    found = {}
    for t in seen.tolist():
        here = token == t
        n = int(here.sum())
        mean_outer = outer[here].mean(0)
        found[t] = {
            "count": n,
            "mean_norm": np.linalg.norm(g[here], axis=1).mean(),
            "norm_of_mean": np.linalg.norm(mean[t]),
            "cos_balanced": cos(mean[t], balanced),
            "cos_global": cos(mean[t], whole),
            "cos_balanced_loo": cos(mean[t], balanced - mean[t]),
            "cos_global_loo": cos(mean[t], whole - g[here].sum(0)),
            "contribution_balanced": n * mean[t] @ balanced / np.linalg.norm(balanced),
            "contribution_global": n * mean[t] @ whole / np.linalg.norm(whole),
            "param_norm_of_mean": np.linalg.norm(mean_outer),
            "param_cos_global": cos(mean_outer, outer.sum(0)),
        }
    return found


def report(corpus, pair, groups=None, **kwargs):
    return gradients.geometry(
        corpus, pair, scored(corpus), groups or GROUPS, token_text=str, **kwargs
    )


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_types_match_float64(axes, tied):
    corpus, pair = make_corpus(), make_pair(axes, tied=tied)
    got = report(corpus, pair, batch=4)
    expected = expected_types(corpus, make_pair(tied=tied))
    assert [row["token_id"] for row in got["types"]] == [1, 2, 5, 6, 3, 4, 7]
    for row in got["types"]:
        for name, value in expected[row["token_id"]].items():
            np.testing.assert_allclose(row[name], value, rtol=2e-4, atol=2e-6, err_msg=name)
        assert row["token"] == str(row["token_id"])


def test_a_mesh_of_eight_is_one_device():
    corpus = make_corpus()
    one, eight = (report(corpus, make_pair(axes), batch=8) for axes in ((1, 1, 1), (4, 1, 2)))
    for got, want in zip(eight["types"], one["types"], strict=True):
        for name, value in want.items():
            if isinstance(value, float):
                np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_bf16_models_are_summed_in_f32():
    """Only the states are rounded, by either order of the same forward pass."""
    corpus, pair = make_corpus(), make_pair(dtype="bfloat16")
    expected = expected_types(corpus, pair)
    found = report(corpus, pair)
    for row in found["types"]:
        for name in ("mean_norm", "norm_of_mean", "cos_balanced", "param_norm_of_mean"):
            value = expected[row["token_id"]][name]
            np.testing.assert_allclose(row[name], value, rtol=3e-2, atol=1e-3, err_msg=name)
    np.testing.assert_allclose(
        found["identities"]["contributions_global"], found["norm_global"], rtol=1e-5
    )


def test_types_share_a_pass_until_the_budget_is_full():
    count = np.array([2, 9, 1, 3, 1, 2])
    groups = passes._groups(np.arange(6), count, 5)
    assert list(groups) == [[0], [1], [2, 3, 4], [5]]


def test_budgets_do_not_matter(monkeypatch):
    """One type a pass, and states of one type in several pieces."""
    corpus, pair = make_corpus(), make_pair()
    expected = report(corpus, pair)
    monkeypatch.setattr(passes, "_TYPES_BYTES", 1)
    monkeypatch.setattr(passes, "_STATES_BYTES", 300)  # about three positions
    monkeypatch.setattr(passes, "_ROWS", 2)
    monkeypatch.setattr(passes, "_FEW_ROWS", 1)
    got = report(corpus, pair, batch=2)
    for a, b in zip(got["types"], expected["types"], strict=True):
        for name, value in b.items():
            if isinstance(value, float):
                np.testing.assert_allclose(a[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(
        got["identities"]["contributions_global"], got["norm_global"], rtol=1e-5
    )


@pytest.mark.parametrize("groups", [GROUPS, {"rock": [*range(9), 20]}])
def test_contributions_add_up_to_the_norm_of_the_whole(groups):
    """Of some types and the rest, and of all types."""
    found = report(make_corpus(), make_pair(), groups)
    parts = [row["contribution_global"] for row in found["types"]]
    checked = found["identities"]
    np.testing.assert_allclose(checked["contributions_global"], found["norm_global"], rtol=1e-5)
    np.testing.assert_allclose(checked["sum_of_global"], 0, atol=1e-5)
    is_all = len(parts) == 10
    assert np.isclose(sum(parts), found["norm_global"], rtol=1e-5) == is_all


def sums_of(pair, corpus, names):
    host, _ = next(corpus.batches(len(corpus.answers)))
    mask_BT = host.mask_BT[:, 1:]
    slot_BT = np.where(mask_BT, 0, logit_sums.DROPPED).astype(np.int32)
    with jax.set_mesh(pair.mesh):
        sums = logit_sums.zeros(names, cfg=pair.cfg, slots=1)
        placed = mesh.to_global((host, slot_BT, np.ones(slot_BT.shape, np.float32)), pair.mesh)
        return logit_sums.add_rollout(sums, pair.student, pair.teacher, *placed, cfg=pair.cfg)


@pytest.mark.parametrize("tied", [False, True])
def test_sums_match_autodiff_of_an_unchunked_kl(tied):
    """Of the summed KL, to the logits of every position and to the head alone."""
    corpus, pair = make_corpus(), make_pair(tied=tied)
    sums, square_BT = sums_of(pair, corpus, ("global_V", "head_VD", "types_KV"))
    host, index_B = next(corpus.batches(len(corpus.answers)))
    student, teacher = (plain(tree) for tree in (pair.student, pair.teacher))
    hs, ht = logit_sums.states(student, teacher, host, cfg=pair.cfg)
    wt = transformer.head(teacher, pair.cfg.teacher)

    def total(ws, shift_BTV):
        logp = jax.nn.log_softmax((hs @ ws.T + shift_BTV)[..., :REAL])
        logq = jax.nn.log_softmax((ht @ wt.T)[..., :REAL])
        return jnp.sum(jnp.exp(logp) * (logp - logq) * host.mask_BT[:, 1:, None])

    ws = transformer.head(student, pair.cfg.student)
    head, logits = jax.grad(total, (0, 1))(ws, jnp.zeros((*hs.shape[:2], V)))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)  # noqa: E731
    close(sums["head_VD"], head)
    close(sums["global_V"], logits.sum((0, 1)))
    close(sums["types_KV"][0], logits.sum((0, 1)))
    close(square_BT, jnp.sum(logits**2, axis=-1))
    assert np.all(np.asarray(sums["head_VD"])[REAL:] == 0), "padded ids have no gradient"
    flat = np.zeros(corpus.num_positions, np.float32)
    corpus.place(flat, np.asarray(square_BT), host, index_B)
    close(flat, (dense(corpus, pair)[0] ** 2).sum(-1))


def test_every_gradient_adds_up_to_zero():
    g, _ = dense(make_corpus(), make_pair())
    np.testing.assert_allclose(g.sum(-1), 0, atol=1e-12)
    sums, _ = sums_of(make_pair(), make_corpus(), ("global_V",))
    np.testing.assert_allclose(np.asarray(sums["global_V"]).sum(), 0, atol=1e-5)


@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_matched_norm_is_that_of_all_draws(m):
    """Closed form against the enumeration of all subsets."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 4)) + 0.3
    draws = [x[list(chosen)].mean(0) for chosen in itertools.combinations(range(6), m)]
    expected = np.sqrt(np.mean([d @ d for d in draws]))
    total = x.sum(0)
    np.testing.assert_allclose(gradients.norm_at(m, 6, (x**2).sum(), total @ total), expected)


def test_matched_norm_needs_enough_occurrences():
    assert gradients.norm_at(2, 1, 1.0, 1.0) is None
    assert gradients.norm_at(1, 1, 4.0, 4.0) == 2.0
    assert gradients.norm_at(2, 2, 1.0, -1e-9) == pytest.approx(0.0)  # rounding below zero


def test_rare_types_have_no_matched_norm():
    corpus = make_corpus()
    row = report(corpus, make_pair(), {"rock": [20]})["types"][0]
    assert row["count"] == 1
    assert row["norm_at"] == {"2": None, "8": None}
    assert row["mean_norm"] == pytest.approx(row["norm_of_mean"], rel=1e-5)


def test_groups_are_medians_with_intervals():
    groups = {"rock": [1, 2, 3, 4, 5, 6, 7], "random": [20]}
    found = report(make_corpus(), make_pair(), groups)
    rows = [row for row in found["types"] if row["group"] == "rock"]
    rock, random = found["groups"]
    assert (rock["types"], rock["positions"]) == (7, sum(row["count"] for row in rows))
    for name in ("mean_norm", "cos_balanced_loo", "param_cos_global"):
        values = sorted(row[name] for row in rows)
        assert rock[name] == pytest.approx(np.median(values))
        # Of seven values the median lies beyond all 2 / 2^7 of the time, beyond five 16 / 2^7.
        assert (rock[f"{name}_low"], rock[f"{name}_high"]) == (values[0], values[-1])
        assert random[f"{name}_low"] is None  # of one type
    at = [row["norm_at"]["2"] for row in rows if row["norm_at"]["2"] is not None]
    assert rock["norm_at"]["2"] == pytest.approx(np.median(at))
    assert random["norm_at_low"] == {"2": None, "8": None}
    assert found["k"] == 7


def test_equal_models_have_no_direction():
    """Nothing pulls anywhere: norms are 0 up to rounding and no number is NaN."""
    pair = make_pair()
    cfg = pair.cfg.student
    pair = Pair(
        ObjectiveConfig(cfg, cfg, pair.cfg.kl),
        *(pair.mesh, None, pair.sampler, pair.student, pair.student, "a", "a"),
    )
    found = report(make_corpus(), pair)
    assert found["norm_global"] < 1e-5
    for row in found["types"]:
        assert all(np.isfinite(x) for x in row.values() if isinstance(x, float))


def test_the_only_type_has_no_rest():
    corpus = make_corpus()
    one = Corpus(
        corpus.info,
        corpus.prompts,
        [np.full(3, 4, np.int32) for _ in corpus.answers],
        corpus.problem_A,
        corpus.truncated_A,
    )
    row = report(one, make_pair(), {"rock": [4]})["types"][0]
    assert row["cos_global"] == pytest.approx(1, abs=1e-5)
    assert row["cos_global_loo"] is None
    assert row["cos_balanced_loo"] is None


@pytest.mark.parametrize("budget", [2**29, 1])
def test_ranking_is_that_of_the_mean_gradients(monkeypatch, budget):
    monkeypatch.setattr(passes, "_TYPES_BYTES", budget)
    corpus, pair = make_corpus(), make_pair((2, 1, 2))
    expected = expected_types(corpus, make_pair())
    ranked = gradients.rank_types(corpus, pair, scored(corpus), min_count=2, batch=4)
    for token in range(V):
        if token not in expected or expected[token]["count"] < 2:
            assert ranked["norm"][token] == ranked["alignment"][token] == -np.inf
            continue
        want = expected[token]
        np.testing.assert_allclose(ranked["norm"][token], want["norm_of_mean"], rtol=1e-4)
        np.testing.assert_allclose(ranked["alignment"][token], want["cos_balanced"], rtol=1e-3)


def test_no_type_to_rank():
    corpus = make_corpus()
    ranked = gradients.rank_types(corpus, make_pair(), scored(corpus), min_count=1000)
    assert np.all(ranked["norm"] == -np.inf)


@pytest.mark.parametrize(
    ("groups", "match"),
    [
        ({"rock": [V - 1]}, "do not occur"),
        ({"rock": [-1]}, "do not occur"),
        ({"rock": []}, "0 ids"),
    ],
)
def test_types_that_do_not_occur(groups, match):
    with pytest.raises(ValueError, match=match):
        report(make_corpus(), make_pair(), groups)


def test_bad_input():
    corpus, pair = make_corpus(), make_pair()
    with pytest.raises(ValueError, match="no groups"):
        gradients.geometry(corpus, pair, scored(corpus), {}, token_text=str)
    other = scored(make_corpus(seed=5))
    with pytest.raises(ValueError, match="expected the scores of this corpus"):
        gradients.rank_types(corpus, pair, other)
    host, _ = next(corpus.batches(2))
    cfg = ObjectiveConfig(pair.cfg.student, pair.cfg.teacher, KLSpec("forward"))
    slot_BT = np.zeros((2, host.ids_BT.shape[1] - 1), np.int32)
    student, teacher = (plain(tree) for tree in (pair.student, pair.teacher))
    with pytest.raises(ValueError, match="expected 'reverse' at 1"):
        logit_sums.add_rollout({}, student, teacher, host, slot_BT, slot_BT, cfg=cfg)
