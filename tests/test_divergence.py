"""The specification, and one chunk of positions over several tiles of the vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import divergence
from opd_jax.divergence import DIRECTIONS, KLSpec, VocabSweep

C, V, D = 5, 23, 4
REAL = 21


def logits(seed=0, scale=3.0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(C, V)) * scale, jnp.float32) for _ in range(2)]


def log_softmax(z, ids=REAL):
    z = np.asarray(z, np.float64)[:, :ids]
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.mark.parametrize("tile", [1, 7, 23, 100])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_tiles_do_not_matter(monkeypatch, direction, tile):
    """A whole sweep in one tile against tiles that do not divide the vocabulary."""
    zs, zt = logits()
    label = jnp.asarray([0, 20, 7, 6, 13], jnp.int32)
    weight = jnp.asarray([1.0, 0.5, 0.0, 2.0, 1.0])
    spec = KLSpec(direction, 1.3, vocab_size=REAL, ce=0.2)
    hs = jnp.asarray(np.random.default_rng(3).normal(size=(C, D)), jnp.float32)

    def run():
        rows = VocabSweep(spec, zs, zt, label)
        return rows.stats_C6, rows.gradient(weight, hs, jnp.zeros((V, D)))

    expected = run()
    monkeypatch.setattr(divergence, "_TILE", tile)
    got = run()
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-6), got, expected)


def test_measurements_and_gradient_of_the_reverse_kl():
    """Every column of the measurements, and p (log p/q - KL), in float64."""
    zs, zt = logits(1)
    label = jnp.asarray([3, 20, 0, 5, 5], jnp.int32)
    rows = VocabSweep(KLSpec(vocab_size=REAL), zs, zt, label)
    logp, logq = log_softmax(zs), log_softmax(zt)
    p, q = np.exp(logp), np.exp(logq)
    kl = (p * (logp - logq)).sum(-1)
    columns = (
        kl,
        kl,
        -(p * logp).sum(-1),
        -(q * logq).sum(-1),
        logp[np.arange(C), label],
        logq[np.arange(C), label],
    )
    np.testing.assert_allclose(rows.stats_C6, np.stack(columns, -1), rtol=1e-5, atol=1e-6)
    dz, none = rows.gradient(jnp.ones(C))
    assert none is None
    np.testing.assert_allclose(dz[:, :REAL], p * (logp - logq - kl[:, None]), atol=1e-6)
    assert np.all(np.asarray(dz)[:, REAL:] == 0)
    np.testing.assert_allclose(np.asarray(dz).sum(-1), 0, atol=5e-6)


@pytest.mark.parametrize("tile", [1024, 50_000])
@pytest.mark.parametrize("offset", [0.0, 200.0])
@pytest.mark.parametrize("change", [1e-3, 0.1, 3.0])
def test_measurements_keep_their_digits(monkeypatch, tile, offset, change):
    """Nearly equal models, logits far from 0, a label far below the rest; flat and peaked rows."""
    monkeypatch.setattr(divergence, "_TILE", tile)
    rng, ids = np.random.default_rng(5), 20_000
    scale = np.array([0.1, 1.0, 5.0, 20.0])[:, None]
    zs = (rng.normal(size=(4, ids)) * scale + offset).astype(np.float32)
    zt = (zs + rng.normal(size=zs.shape) * change - 2 * offset).astype(np.float32)
    zs[:, 7] -= 90
    label = jnp.full(4, 7, jnp.int32)
    rows = jax.jit(lambda s, t, y: VocabSweep(KLSpec(), s, t, y).stats_C6)(zs, zt, label)
    logp, logq = log_softmax(zs, ids), log_softmax(zt, ids)
    p, q = np.exp(logp), np.exp(logq)
    expected = (
        (p * (logp - logq)).sum(-1),
        -(p * logp).sum(-1),
        -(q * logq).sum(-1),
    )
    for column, want in zip((1, 2, 3), expected, strict=True):
        np.testing.assert_allclose(rows[:, column], want, rtol=2e-6, atol=1e-6)


def test_head_gradient_is_added_to():
    zs, zt = logits()
    hs = jnp.asarray(np.random.default_rng(3).normal(size=(C, D)), jnp.float32)
    rows = VocabSweep(KLSpec(), zs, zt)
    dz, dws = rows.gradient(jnp.ones(C), hs, jnp.ones((V, D)))
    np.testing.assert_allclose(dws, 1 + np.asarray(dz).T @ np.asarray(hs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"direction": "backward"}, "expected one of"),
        ({"temperature": 0.0}, "kl.temperature"),
        ({"beta": 1.0}, "kl.beta"),
        ({"skew": 0.0}, "kl.skew"),
        ({"ce": 1.5}, "kl.ce"),
        ({"chunk": -1}, "kl.chunk"),
    ],
)
def test_bad_spec(kwargs, match):
    with pytest.raises(ValueError, match=match):
        KLSpec(**kwargs)
