import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import attention, mesh
from opd_jax.attention import Rope

B, T, K, G, H = 4, 5, 2, 3, 4


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def reference(q_BTKGH, k_BSKH, v_BSKH, mask_BTS):
    """Attention head by head in float64, only over what may be read."""
    out = np.zeros(q_BTKGH.shape)
    for b, t, k, g in np.ndindex(q_BTKGH.shape[:4]):
        keep = mask_BTS[b, t]
        if not keep.any():
            continue
        score = k_BSKH[b, keep, k].astype(np.float64) @ q_BTKGH[b, t, k, g] / math.sqrt(H)
        prob = np.exp(score - score.max())
        out[b, t, k, g] = prob / prob.sum() @ v_BSKH[b, keep, k]
    return out


def test_attend_equals_a_float64_loop_and_survives_rows_that_see_nothing():
    q, k, v = draw(0, B, T, K, G, H), draw(1, B, T, K, H), draw(2, B, T, K, H)
    valid = np.arange(T)[None] >= np.array([0, 1, 3, 5])[:, None]
    mask = np.asarray(attention.causal_mask(jnp.asarray(valid), 0, T))
    out = np.asarray(attention.attend(q, k, v, mask))
    assert np.isfinite(out).all()
    sees = mask.any(-1)
    assert not sees[3].any()
    np.testing.assert_allclose(out[sees], reference(q, k, v, mask)[sees], atol=1e-6)


def test_scores_far_apart_stay_finite_with_finite_gradients():
    q, k, v = 1e3 * draw(0, 1, T, K, G, H), 1e3 * draw(1, 1, T, K, H), draw(2, 1, T, K, H)
    mask = attention.causal_mask(jnp.zeros((1, T), bool).at[:, 2:].set(True), 0, T)
    grads = jax.grad(lambda *a: attention.attend(*a, mask).sum(), argnums=(0, 1, 2))(q, k, v)
    assert all(np.isfinite(g).all() for g in grads)


def test_causal_mask_counts_slots_from_the_cursor():
    valid = jnp.array([[False, True, True, True, False, False]])
    mask = np.asarray(attention.causal_mask(valid, 2, 2))
    np.testing.assert_array_equal(mask[0], [[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0]])


def test_rotation_keeps_norms_and_depends_on_distance_only():
    rope = Rope(theta=100.0)
    q, k = draw(0, 1, 1, 1, 1, 8), draw(1, 1, 1, 1, 8)

    def product(i, j):
        turned_q = attention.rotate(q, attention.rotations(jnp.array([[i]]), rope, 8))
        turned_k = attention.rotate(k, attention.rotations(jnp.array([[j]]), rope, 8))
        assert np.linalg.norm(turned_q) == pytest.approx(np.linalg.norm(q), rel=1e-5)
        return float(np.vdot(turned_q, turned_k))

    assert product(3, 1) == pytest.approx(product(12, 10), abs=1e-4)
    assert product(3, 1) != pytest.approx(product(3, 2), abs=1e-2)


def test_rotation_is_done_in_f32_and_keeps_the_dtype():
    far = attention.rotations(jnp.array([[4001]]), Rope(), 8)
    x = jnp.asarray(draw(0, 1, 1, 2, 8), jnp.bfloat16)
    turned = attention.rotate(x, far)
    assert turned.dtype == jnp.bfloat16
    exact = attention.rotate(x.astype(jnp.float32), far)
    np.testing.assert_allclose(turned.astype(np.float32), exact, rtol=1e-2, atol=1e-6)


def test_llama3_keeps_short_wavelengths_and_stretches_long_ones():
    rope = Rope(theta=1e4, kind="llama3", factor=8.0, original_positions=64, low_freq_factor=1.0)
    plain, _ = attention.inverse_frequencies(Rope(theta=1e4), 16)
    freq, scale = attention.inverse_frequencies(rope, 16)
    turns = 64 * plain / (2 * math.pi)
    assert scale == 1.0
    np.testing.assert_allclose(freq[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(freq[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert ((freq < plain) & (freq > plain / 8))[between].all()


def test_yarn_scales_cosine_and_sine():
    rope = Rope(theta=1e4, kind="yarn", factor=4.0, original_positions=64)
    plain, _ = attention.inverse_frequencies(Rope(theta=1e4), 16)
    freq, scale = attention.inverse_frequencies(rope, 16)
    assert scale == pytest.approx(0.1 * math.log(4) + 1)
    assert freq[0] == plain[0]
    assert freq[-1] == pytest.approx(plain[-1] / 4, rel=1e-6)
    cos, _ = attention.rotations(jnp.zeros((1, 1), jnp.int32), rope, 16)
    np.testing.assert_allclose(cos, scale, rtol=1e-6)


def test_unknown_rope_is_refused():
    with pytest.raises(ValueError, match="'ntk' is not known"):
        Rope(kind="ntk")
    with pytest.raises(ValueError, match="original_max_position_embeddings"):
        Rope(kind="yarn", factor=2.0)


def fill(rows):
    """A cache of six slots after a prefill of three and one decoded token."""
    cache = attention.init_cache(2, rows, 6, K, H)
    news = []
    for num, seed in ((3, 10), (1, 20)):
        valid = jnp.asarray(np.arange(num)[None] >= (np.arange(rows)[:, None] % num))
        cache = attention.extend(cache, mesh.constrain(valid, mesh.BATCH, None))
        for layer in range(2):
            k, v = draw(seed + layer, rows, num, K, H), draw(seed + 5 + layer, rows, num, K, H)
            k, v = (mesh.constrain(jnp.asarray(x), mesh.BATCH, None, "model", None) for x in (k, v))
            cache = attention.write(cache, layer, k, v)
            news.append((k, v))
    return cache, news


def test_cache_writes_at_the_cursor():
    cache, news = fill(B)
    assert int(cache.length) == 4
    for layer in range(2):
        k, v = attention.read(cache, layer)
        np.testing.assert_array_equal(k[:, :3], news[layer][0])
        np.testing.assert_array_equal(v[:, 3:4], news[2 + layer][1])
        np.testing.assert_array_equal(k[:, 4:], 0)
    np.testing.assert_array_equal(cache.valid_BS[2], [0, 0, 1, 1, 0, 0])


def test_repeat_puts_copies_side_by_side_and_on_the_same_device():
    cache, _ = fill(B)
    thrice = attention.repeat(cache, 3)
    np.testing.assert_array_equal(thrice.k_LBSKH, np.repeat(cache.k_LBSKH, 3, axis=1))
    np.testing.assert_array_equal(thrice.valid_BS, np.repeat(cache.valid_BS, 3, axis=0))
    assert int(thrice.length) == int(cache.length)
    with jax.set_mesh(mesh.make(data=2, fsdp=2, model=2)):
        spread = jax.jit(lambda: attention.repeat(fill(B)[0], 3))
        text = spread.lower().compile().as_text()
        jax.tree.map(np.testing.assert_array_equal, spread(), thrice)
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
