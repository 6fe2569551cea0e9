"""Bans of a decode: they hold, they keep the law of a bias, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from scipy import stats

from opd_jax import mesh as meshlib
from opd_jax.data import batches
from opd_jax.models import kv_cache, params, transformer
from opd_jax.rollout import decode, sampling
from opd_jax.rollout.sampling import Sampler

V, NEVER = 12, np.iinfo(np.int32).max


@pytest.fixture(scope="module")
def logits():
    return jnp.asarray(np.random.default_rng(0).normal(size=V) * 2, jnp.float32)


def drawn(logits, banned, temperature=1.0, num=20_000):
    keys = jax.random.split(jax.random.key(1), num)
    sampler = Sampler(vocab_size=V - 1, temperature=temperature)  # the last id is padding
    banned_BK = None if banned is None else jnp.tile(jnp.asarray(banned, jnp.int32), (num, 1))
    return sampling.sample(jnp.tile(logits, (num, 1)), keys, sampler=sampler, banned_BK=banned_BK)


def test_what_is_drawn_has_the_law_of_a_bias_and_moves_only_where_it_was_banned(logits):
    free, _ = drawn(logits, None)
    ids, logp = drawn(logits, [3, 7, NEVER])
    assert not np.isin(ids, [3, 7]).any()
    kept = ~np.isin(free, [3, 7])
    np.testing.assert_array_equal(ids[kept], free[kept])
    expected = np.array(jax.nn.softmax(logits.at[jnp.array([3, 7, V - 1])].set(-jnp.inf)))
    counts = np.bincount(ids, minlength=V)
    seen = expected > 0
    assert counts[~seen].sum() == 0
    assert stats.chisquare(counts[seen], expected[seen] * len(ids)).pvalue > 1e-3
    assert np.isfinite(logp).all()


@pytest.mark.optimized
def test_a_ban_of_nothing_changes_nothing(logits):
    for a, b in zip(drawn(logits, None), drawn(logits, [NEVER, V - 1]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_greedy_takes_the_best_that_is_left_and_tells_where_nothing_is(logits):
    order = np.argsort(-np.array(logits[: V - 1]))
    ids, logp = drawn(logits, order[:2], temperature=0.0, num=2)
    assert ids.tolist() == [order[2]] * 2
    assert logp.tolist() == [0.0, 0.0]
    _, logp = drawn(logits, np.arange(V - 1), temperature=0.0, num=2)
    assert np.isnan(logp).all()


@pytest.fixture(scope="module")
def model():
    tree = params.init(transformer.specs(tiny_run.MODEL), jax.random.key(1))
    return tree | {"embed": tree["embed"] * tiny_run.EMBED_SCALE}


def answers(model, ids_BK, first, end, temperature, pick=(0, 0, 1, 1)):
    """Answers to two prompts, twice each; the ban is on the second of each."""
    cfg = tiny_run.MODEL
    prompt = batches.pad([[5, 6, 7], [8, 9]], 4, 0)
    h_BD, cache = decode.prefill(model, prompt, cfg=cfg, size=4)
    rows = jnp.asarray(pick)
    key = jax.random.key(3)
    new = decode.decode(
        model,
        h_BD[rows],
        kv_cache.pick(cache, rows, 4 + 10),
        (4 - prompt.start_B)[rows],
        jax.vmap(jax.random.fold_in, (None, 0))(key, rows),
        cfg=cfg,
        sampler=Sampler(vocab_size=600, temperature=temperature),
        max_new=10,
        ban=decode.Ban(jnp.asarray(ids_BK, jnp.int32), jnp.asarray(first), jnp.asarray(end)),
    )
    return np.array(new.ids_BN)


@pytest.mark.optimized
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_window_bans_there_and_the_answer_before_it_is_the_same(model, temperature):
    none = [[NEVER, NEVER]] * 4
    free = answers(model, none, [0] * 4, [10] * 4, temperature)
    np.testing.assert_array_equal(free[0], free[1])
    banned = [*none[:1], [free[0, 4], NEVER], *none[:1], [free[2, 4], free[2, 5]]]
    found = answers(model, banned, [0, 4, 0, 4], [10, 5, 10, 6], temperature)
    np.testing.assert_array_equal(found[[0, 2]], free[[0, 2]])
    np.testing.assert_array_equal(found[:, :4], free[:, :4])
    assert found[1, 4] != free[0, 4]
    assert not np.isin(found[3, 4:6], free[2, 4:6]).any()


def test_picked_rows_have_their_own_keys_and_values(model):
    prompt = batches.pad([[5, 6, 7], [8, 9]], 4, 0)
    _, cache = decode.prefill(model, prompt, cfg=tiny_run.MODEL, size=4)
    picked = kv_cache.pick(cache, jnp.array([1, 0, 1]), 7)
    for old, new in zip(cache.keys, picked.keys, strict=True):
        np.testing.assert_array_equal(new[..., :4], old[np.array([1, 0, 1])])
        assert not new[..., 4:].any()
    np.testing.assert_array_equal(picked.values[0][:, :, :4], cache.values[0][np.array([1, 0, 1])])
    assert picked.valid_BS.tolist() == [
        [False, False, True, True] + [False] * 3,
        [False, True, True, True] + [False] * 3,
        [False, False, True, True] + [False] * 3,
    ]
    assert int(picked.length) == 4
    with pytest.raises(ValueError, match="3 slots for 4"):
        kv_cache.pick(cache, jnp.array([0]), 3)


def test_on_a_mesh_the_same_rows_are_picked(model):
    mesh = meshlib.make(fsdp=2, model=2)
    prompt = batches.pad([[5, 6, 7], [8, 9], [4], [3, 3]], 4, 0)
    pick = np.array([3, 0, 2, 2, 1, 3, 0, 1], np.int32)

    @jax.jit
    def pick_rows(prompt, rows):
        _, cache = decode.prefill(model, prompt, cfg=tiny_run.MODEL, size=4)
        return kv_cache.pick(cache, rows, 6)

    alone = pick_rows(prompt, pick)
    with jax.set_mesh(mesh):
        spread = meshlib.to_host(pick_rows(*meshlib.to_global((prompt, pick), mesh)))
    np.testing.assert_allclose(spread.keys[1], alone.keys[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(spread.valid_BS, alone.valid_BS)
