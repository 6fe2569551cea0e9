"""Ranks and overlaps against sorting in numpy: padded ids, vocabulary shards, chunks, any scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from opd_jax import agreement, kl, mesh
from opd_jax.divergence import KLSpec

B, T, D, E, V, REAL = 4, 5, 8, 6, 64, 59


def models(scale=1.0):
    rng = np.random.default_rng(0)
    shapes = ((B, T, D), (V, D), (B, T, E), (V, E))
    return [scale * rng.normal(size=shape).astype(np.float32) for shape in shapes]


def by_hand(hs, ws, ht, wt):
    """float64, position by position."""
    rank, overlap = np.zeros((B, T)), np.zeros((B, T))
    for b, t in np.ndindex(B, T):
        zs, zt = (
            (w.astype(np.float64) @ h[b, t].astype(np.float64))[:REAL]
            for h, w in ((hs, ws), (ht, wt))
        )
        q = np.exp(zt - zt.max())
        q /= q.sum()
        order = np.argsort(-zs)
        rank[b, t] = np.sum(q > q[order[0]])
        overlap[b, t] = q[order[: agreement.FAVOURITES]].sum()
    return rank, overlap


def measured(arrays, sizes=None, chunk=0, mask=None):
    spec = KLSpec(vocab_size=REAL, beside=agreement.MEASURES, chunk=chunk)
    if sizes is None:
        return kl.token_kl(*map(jnp.asarray, arrays), spec=spec, mask_BT=mask)
    rows, heads = P(mesh.BATCH, None, None), P("model", None)
    with jax.set_mesh(mesh.make(**sizes)):
        put = [
            jax.device_put(x, place)
            for x, place in zip(arrays, (rows, heads, rows, heads), strict=True)
        ]
        return jax.jit(lambda *a: kl.token_kl(*a, spec=spec))(*put)


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize(
    "sizes", [None, {"data": 2, "fsdp": 2, "model": 2}, {"data": 1, "fsdp": 2, "model": 4}]
)
def test_they_are_those_of_sorted_logits(sizes, chunk):
    arrays = models()
    rank, overlap = by_hand(*arrays)
    found = measured(arrays, sizes, chunk)
    np.testing.assert_array_equal(found.rank_BT, rank)
    np.testing.assert_allclose(found.overlap_BT, overlap, rtol=2e-5)
    assert 0 < rank.mean() < REAL - 1  # the test could fail
    assert 0.05 < overlap.mean() < 0.95


def test_equal_models_agree():
    hs, ws, *_ = models(3.0)
    found = measured([hs, ws, hs, ws])
    assert not np.any(found.rank_BT)
    assert np.all(np.asarray(found.overlap_BT) > agreement.FAVOURITES / REAL)


@pytest.mark.optimized
def test_they_change_no_other_measurement_and_cost_nothing_where_not_asked():
    arrays = [jnp.asarray(x) for x in models()]
    plain = kl.token_kl(*arrays, spec=KLSpec(vocab_size=REAL))
    assert plain.rank_BT is None
    assert plain.overlap_BT is None
    for name in ("kl_BT", "reverse_BT", "entropy_BT", "teacher_entropy_BT"):
        np.testing.assert_array_equal(getattr(measured(models()), name), getattr(plain, name))


def test_positions_that_are_not_projected_read_0():
    mask = jnp.zeros((B, T), bool).at[1, 2].set(True)
    found = measured(models(), mask=mask)
    assert np.count_nonzero(found.overlap_BT) == 1
    assert float(found.overlap_BT[1, 2]) > 0
