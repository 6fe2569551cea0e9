import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.models import attention
from opd_jax.models.rope import Rope, inverse_frequencies, rotate, rotations

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
    mask = np.asarray(attention.causal_mask(jnp.asarray(padded(T)), 0, T))
    out = np.asarray(attention.attend(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), mask))
    assert np.isfinite(out).all()
    sees = mask.any(-1)
    assert not sees[3].any()
    np.testing.assert_allclose(out[sees], reference(q, k, v, mask)[sees], atol=1e-6)


@pytest.mark.parametrize("size", [4, 8, 24], ids=str)
@pytest.mark.parametrize("window", [None, 5], ids=str)
@pytest.mark.parametrize("cursor", [3, 17, (2, 9, 13, 21)], ids=str)
def test_a_cache_read_in_blocks_gives_the_whole_cache(size, window, cursor):
    slots, queries = 24, 2
    q, k, v = draw(0, B, queries, K, G, H), draw(1, B, slots, K, H), draw(2, B, slots, K, H)
    slot, first = np.arange(slots)[None], np.broadcast_to(cursor, B)[:, None]
    valid = (slot >= np.array([0, 1, 2, slots])[:, None]) & (slot < first + queries)
    mask = np.asarray(attention.causal_mask(jnp.asarray(valid), jnp.asarray(cursor), 2, window))
    # What no block in use holds is never read: it may be anything.
    used = mask.any((0, 1)).reshape(-1, size).any(1).nonzero()[0]
    dead = (slot[0] // size < used[0]) | (slot[0] // size > used[-1])
    assert dead.any() or size == slots or cursor != 3
    k[:, dead] = v[:, dead] = np.nan
    layout = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    out = np.asarray(attention.attend_live(q, *layout, jnp.asarray(mask), size, H**-0.5))
    assert np.isfinite(out).all()
    sees = mask.any(-1)
    assert not sees[3].any()
    np.testing.assert_allclose(out[sees], reference(q, k, v, mask)[sees], atol=1e-6)


def test_a_cache_of_which_no_row_may_read_anything_gives_something_finite():
    q, k, v = draw(0, B, T, K, G, H), draw(1, B, K, H, 8), draw(2, B, K, 8, H)
    out = attention.attend_live(q, k, v, jnp.zeros((B, T, 8), bool), 4, H**-0.5)
    np.testing.assert_allclose(
        out, np.broadcast_to(v.mean(2)[:, None, :, None], out.shape), atol=1e-6
    )


def padded(length):
    """Rows with no padding, some, much, and nothing but padding."""
    return np.arange(length)[None] >= np.array([0, 1, length - 2, length])[:, None]


@pytest.mark.parametrize("length", [T, 32, 77])  # one block, a whole one, three of which one short
def test_causal_equals_a_float64_loop(length):
    q, k, v = draw(0, B, length, K, G, H), draw(1, B, length, K, H), draw(2, B, length, K, H)
    valid = jnp.asarray(padded(length))
    mask = np.asarray(attention.causal_mask(valid, 0, length))
    out = np.asarray(jax.jit(attention.causal)(q, k, v, valid))
    assert np.isfinite(out).all()
    sees = mask.any(-1)
    np.testing.assert_allclose(out[sees], reference(q, k, v, mask)[sees], atol=1e-6)


@pytest.mark.parametrize("length", [T, 77])
def test_gradient_of_causal_is_that_of_the_whole_score_matrix(length):
    q, k, v = draw(0, B, length, K, G, H), draw(1, B, length, K, H), draw(2, B, length, K, H)
    valid = jnp.asarray(padded(length))
    mask = attention.causal_mask(valid, 0, length)
    weight = draw(3, B, length, K, G, H) * np.asarray(mask.any(-1))[..., None, None, None]

    def plain(q, k, v):
        score = jnp.einsum("BTKGH,BSKH->BKGTS", q, k) / math.sqrt(H)
        prob = jax.nn.softmax(jnp.where(mask[:, None, None], score, -1e9), axis=-1)
        return jnp.einsum("BKGTS,BSKH->BTKGH", prob, v)

    def grads(f):
        return jax.grad(lambda *a: jnp.sum(f(*a) * weight), argnums=(0, 1, 2))(q, k, v)

    ours = grads(lambda q, k, v: attention.causal(q, k, v, valid))
    for got, expected in zip(ours, grads(plain), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-6)
        assert np.abs(expected).max() > 1e-2


def windowed(window, slides):
    """``causal`` of layers of which some slide, as they are in a scan."""
    span = attention.Span(H**-0.5, window)

    def run(q, k, v, valid):
        if slides is None:
            return attention.causal(q, k, v, valid, span=span)
        one = lambda s: attention.causal(q, k, v, valid, span=span, is_sliding=s)  # noqa: E731
        return jax.lax.map(one, jnp.array([slides]))[0]

    return run


@pytest.mark.parametrize("slides", [None, True, False])
@pytest.mark.parametrize(("length", "window"), [(T, 2), (77, 3), (77, 100), (600, 130)])
def test_a_window_equals_a_mask_and_so_does_its_gradient(length, window, slides):
    """600 tokens in blocks of 160: the last three leave out keys before their window."""
    q, k, v = draw(0, B, length, K, G, H), draw(1, B, length, K, H), draw(2, B, length, K, H)
    valid = jnp.asarray(padded(length))
    mask = attention.causal_mask(valid, 0, length)
    if slides is not False:
        apart = np.arange(length)[:, None] - np.arange(length)
        mask &= (apart < window)[None]
        found = attention.causal_mask(valid, 0, length, window)
        np.testing.assert_array_equal(found, mask)
    sees = np.asarray(mask.any(-1))[..., None, None, None]
    weight = draw(3, B, length, K, G, H) * sees

    def plain(q, k, v):
        score = jnp.einsum("BTKGH,BSKH->BKGTS", q, k) / math.sqrt(H)
        prob = jax.nn.softmax(jnp.where(mask[:, None, None], score, -1e9), axis=-1)
        return jnp.einsum("BKGTS,BSKH->BTKGH", prob, v)

    def both(f):
        def loss(q, k, v):
            out = f(q, k, v)
            return jnp.sum(out * weight), out * sees

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    run = windowed(window, slides)
    found, expected = both(lambda q, k, v: run(q, k, v, valid)), both(plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), found, expected)


def test_keys_before_all_windows_are_not_read():
    """Of 2,048 tokens a block of 512 reads the 640 that its queries' windows of 100 lie in."""
    q = jax.ShapeDtypeStruct((1, 2048, 1, 1, H), jnp.float32)
    kv = jax.ShapeDtypeStruct((1, 2048, 1, H), jnp.float32)
    valid = jax.ShapeDtypeStruct((1, 2048), bool)
    text = jax.jit(windowed(100, None)).lower(q, kv, kv, valid).compile().as_text()
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"\w\[([\d,]+)\]", text)]
    assert max(sizes) == 512 * 640


def test_causal_keeps_half_precision_and_close_to_f32():
    q, k, v = draw(0, B, T, K, G, H), draw(1, B, T, K, H), draw(2, B, T, K, H)
    valid = jnp.ones((B, T), bool)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    out, back = jax.vjp(lambda *a: attention.causal(*a, valid), *half)
    assert {x.dtype for x in (out, *back(out))} == {jnp.dtype(jnp.bfloat16)}
    exact = attention.causal(q, k, v, valid)
    np.testing.assert_allclose(out.astype(np.float32), exact, atol=0.05)


def test_no_score_matrix_is_whole():
    """Long answers must fit: the largest array has a block of queries, not all of them."""
    length = 2048
    q = jax.ShapeDtypeStruct((1, length, 1, 1, H), jnp.float32)
    kv = jax.ShapeDtypeStruct((1, length, 1, H), jnp.float32)
    valid = jax.ShapeDtypeStruct((1, length), bool)
    loss = lambda q, k, v, valid: attention.causal(q, k, v, valid).sum()  # noqa: E731
    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, kv, kv, valid).compile().as_text()
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"\w\[([\d,]+)\]", text)]
    assert max(sizes) == 512 * length


def test_blocks_cover_all_queries_once():
    for length in (1, 31, 32, 33, 127, 512, 3000):
        parts = attention.blocks(length)
        assert [i for begin, end in parts for i in range(begin, end)] == list(range(length))


def test_scores_far_apart_stay_finite_with_finite_gradients():
    q, k, v = 1e3 * draw(0, 1, T, K, G, H), 1e3 * draw(1, 1, T, K, H), draw(2, 1, T, K, H)
    valid = jnp.zeros((1, T), bool).at[:, 2:].set(True)
    grads = jax.grad(lambda *a: attention.causal(*a, valid).sum(), argnums=(0, 1, 2))(q, k, v)
    assert all(np.isfinite(g).all() for g in grads)


def test_causal_mask_counts_slots_from_the_cursor():
    valid = jnp.array([[False, True, True, True, False, False]])
    mask = np.asarray(attention.causal_mask(valid, 2, 2))
    np.testing.assert_array_equal(mask[0], [[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0]])


def test_rotation_keeps_norms_and_depends_on_distance_only():
    rope = Rope(theta=100.0)
    q, k = draw(0, 1, 1, 1, 1, 8), draw(1, 1, 1, 1, 8)

    def product(i, j):
        turned_q = rotate(q, rotations(jnp.array([[i]]), rope, 8))
        turned_k = rotate(k, rotations(jnp.array([[j]]), rope, 8))
        assert np.linalg.norm(turned_q) == pytest.approx(np.linalg.norm(q), rel=1e-5)
        return float(np.vdot(turned_q, turned_k))

    assert product(3, 1) == pytest.approx(product(12, 10), abs=1e-4)
    assert product(3, 1) != pytest.approx(product(3, 2), abs=1e-2)


def test_rotation_is_done_in_f32_and_keeps_the_dtype():
    far = rotations(jnp.array([[4001]]), Rope(), 8)
    x = jnp.asarray(draw(0, 1, 1, 2, 8), jnp.bfloat16)
    turned = rotate(x, far)
    assert turned.dtype == jnp.bfloat16
    exact = rotate(x.astype(jnp.float32), far)
    np.testing.assert_allclose(turned.astype(np.float32), exact, rtol=1e-2, atol=1e-6)


def test_llama3_keeps_short_wavelengths_and_stretches_long_ones():
    rope = Rope(theta=1e4, kind="llama3", factor=8.0, original_positions=64, low_freq_factor=1.0)
    plain, _ = inverse_frequencies(Rope(theta=1e4), 16)
    freq, scale = inverse_frequencies(rope, 16)
    turns = 64 * plain / (2 * math.pi)
    assert scale == 1.0
    np.testing.assert_allclose(freq[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(freq[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert ((freq < plain) & (freq > plain / 8))[between].all()


def test_yarn_scales_cosine_and_sine():
    rope = Rope(theta=1e4, kind="yarn", factor=4.0, original_positions=64)
    plain, _ = inverse_frequencies(Rope(theta=1e4), 16)
    freq, scale = inverse_frequencies(rope, 16)
    assert scale == pytest.approx(0.1 * math.log(4) + 1)
    assert freq[0] == plain[0]
    assert freq[-1] == pytest.approx(plain[-1] / 4, rel=1e-6)
    cos, _ = rotations(jnp.zeros((1, 1), jnp.int32), rope, 16)
    np.testing.assert_allclose(cos, scale, rtol=1e-6)


def test_unknown_rope_is_refused():
    with pytest.raises(ValueError, match="'ntk' is not known"):
        Rope(kind="ntk")
    with pytest.raises(ValueError, match="original_max_position_embeddings"):
        Rope(kind="yarn", factor=2.0)
