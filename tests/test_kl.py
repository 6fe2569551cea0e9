"""Divergences against float64 numpy: values, gradients, chunks, shards, masks and extremes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from opd_jax import kl, mesh
from opd_jax.divergence import DIRECTIONS
from opd_jax.kl import KLSpec

B, T, D, E, V = 4, 6, 8, 12, 40


def inputs(seed=0, dtype=np.float32, scale=1.0):
    rng = np.random.default_rng(seed)
    hs, ht = rng.normal(size=(B, T, D)), rng.normal(size=(B, T, E))
    ws, wt = rng.normal(size=(V, D)) * scale, rng.normal(size=(V, E)) * scale
    weight = rng.uniform(size=(B, T)) * (rng.uniform(size=(B, T)) < 0.6)
    models = (jnp.asarray(x, dtype) for x in (hs, ws, ht, wt))
    return (*models, jnp.asarray(weight, jnp.float32))


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def reference(hs, ws, ht, wt, spec, labels):
    """The definition, dense, in float64."""
    hs, ws, ht, wt = (np.asarray(x, np.float64) for x in (hs, ws, ht, wt))
    zs, zt = hs @ ws.T, ht @ wt.T
    if spec.vocab_size is not None:
        zs, zt = zs[..., : spec.vocab_size], zt[..., : spec.vocab_size]
    logp, logq = log_softmax(zs / spec.temperature), log_softmax(zt / spec.temperature)
    p, q = np.exp(logp), np.exp(logq)
    kl_of = lambda a, b: (a * (np.log(a) - np.log(b))).sum(-1)  # noqa: E731
    a, b = spec.skew, spec.beta
    value = {
        "reverse": lambda: kl_of(p, q),
        "forward": lambda: kl_of(q, p),
        "jsd": lambda: b * kl_of(p, b * p + (1 - b) * q) + (1 - b) * kl_of(q, b * p + (1 - b) * q),
        "skew_reverse": lambda: kl_of(p, a * p + (1 - a) * q),
        "skew_forward": lambda: kl_of(q, a * q + (1 - a) * p),
    }[spec.direction]()
    logp1, logq1 = log_softmax(zs), log_softmax(zt)
    p1, q1 = np.exp(logp1), np.exp(logq1)
    labels = np.asarray(labels)[..., None]
    return (
        value,
        kl_of(p1, q1),
        -(p1 * logp1).sum(-1),
        -(q1 * logq1).sum(-1),
        np.take_along_axis(logp1, labels, -1)[..., 0],
        np.take_along_axis(logq1, labels, -1)[..., 0],
    )


def labels_of(shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 37, shape), jnp.int32)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_values_match_float64(direction, temperature):
    spec = KLSpec(direction, temperature, chunk=5, vocab_size=37, beta=0.3, skew=0.2)
    hs, ws, ht, wt, _ = inputs()
    labels = labels_of((B, T))
    got = kl.token_kl(hs, ws, ht, wt, spec=spec, labels_BT=labels)
    expected = kl.TokenKL(*reference(hs, ws, ht, wt, spec, labels))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6), got, expected)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_match_autodiff_of_the_dense_definition(direction, temperature):
    spec = KLSpec(direction, temperature, chunk=5, vocab_size=37, beta=0.3, skew=0.2)
    hs, ws, ht, wt, weight = inputs()

    def dense(hs, ws):
        zs, zt = (hs @ ws.T)[..., :37], (ht @ wt.T)[..., :37]
        logp, logq = (jax.nn.log_softmax(z / temperature) for z in (zs, zt))
        p, q = jnp.exp(logp), jnp.exp(logq)
        kl_of = lambda a, b: (a * (jnp.log(a) - jnp.log(b))).sum(-1)  # noqa: E731
        m, r, f = 0.3 * p + 0.7 * q, 0.2 * p + 0.8 * q, 0.2 * q + 0.8 * p
        value = {
            "reverse": lambda: kl_of(p, q),
            "forward": lambda: kl_of(q, p),
            "jsd": lambda: 0.3 * kl_of(p, m) + 0.7 * kl_of(q, m),
            "skew_reverse": lambda: kl_of(p, r),
            "skew_forward": lambda: kl_of(q, f),
        }[direction]()
        return (weight * value).sum()

    ours = lambda hs, ws: kl.weighted_kl(hs, ws, ht, wt, weight, spec=spec)[0]  # noqa: E731
    loss, grads = jax.value_and_grad(ours, (0, 1))(hs, ws)
    expected, expected_grads = jax.value_and_grad(dense, (0, 1))(hs, ws)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for got, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    check_grads(ours, (hs, ws), order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)


def test_cross_entropy_mix_and_no_teacher():
    hs, ws, ht, wt, weight = inputs()
    labels = labels_of((B, T))

    def dense(hs, ws, ce):
        logp = jax.nn.log_softmax((hs @ ws.T)[..., :37])
        logq = jax.nn.log_softmax((ht @ wt.T)[..., :37])
        forward = (jnp.exp(logq) * (logq - logp)).sum(-1)
        label = -jnp.take_along_axis(logp, labels[..., None], -1)[..., 0]
        return (weight * ((1 - ce) * forward + ce * label)).sum()

    for ce, teacher in ((0.5, (ht, wt)), (1.0, (ht, wt)), (1.0, (None, None))):
        spec = KLSpec("forward", chunk=7, vocab_size=37, ce=ce)
        ours = functools.partial(
            lambda hs, ws, spec, teacher: kl.weighted_kl(
                hs, ws, *teacher, weight, spec=spec, labels_BT=labels
            )[0],
            spec=spec,
            teacher=teacher,
        )
        got = jax.value_and_grad(ours, (0, 1))(hs, ws)
        want = jax.value_and_grad(functools.partial(dense, ce=ce), (0, 1))(hs, ws)
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_mix_with_cross_entropy_is_that_of_float64(direction, temperature):
    """Value, and slope along random directions by central differences, in float64 numpy."""
    ce, step = 0.3, 1e-4
    spec = KLSpec(direction, temperature, chunk=5, vocab_size=37, beta=0.3, skew=0.2, ce=ce)
    hs, ws, ht, wt, weight = inputs()
    labels = labels_of((B, T))

    def dense(hs, ws):
        found = reference(hs, ws, ht, wt, spec, labels)
        return (np.asarray(weight, np.float64) * ((1 - ce) * found[0] - ce * found[4])).sum()

    def ours(hs, ws):
        return kl.weighted_kl(hs, ws, ht, wt, weight, spec=spec, labels_BT=labels)

    (loss, tokens), grads = jax.value_and_grad(ours, (0, 1), has_aux=True)(hs, ws)
    np.testing.assert_allclose(loss, dense(hs, ws), rtol=1e-5)
    kept = np.asarray(weight) != 0
    pure = reference(hs, ws, ht, wt, spec, labels)
    np.testing.assert_allclose(tokens.kl_BT[kept], pure[0][kept], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(tokens.logp_BT[kept], pure[4][kept], rtol=1e-5)
    rng = np.random.default_rng(9)
    whole = [np.asarray(x, np.float64) for x in (hs, ws)]
    for _ in range(3):
        along = [rng.normal(size=x.shape) for x in whole]
        ends = (
            dense(*(x + sign * step * d for x, d in zip(whole, along, strict=True)))
            for sign in (1, -1)
        )
        slope = (next(ends) - next(ends)) / (2 * step)
        got = sum((np.asarray(g, np.float64) * d).sum() for g, d in zip(grads, along, strict=True))
        np.testing.assert_allclose(got, slope, rtol=1e-4, atol=1e-4)


def test_chunk_size_does_not_matter():
    hs, ws, ht, wt, weight = inputs()
    results = [
        jax.value_and_grad(
            lambda hs, ws, c=chunk: kl.weighted_kl(hs, ws, ht, wt, weight, spec=KLSpec(chunk=c))[0],
            (0, 1),
        )(hs, ws)
        for chunk in (1, 7, 24, 1000, 0)
    ]
    for other in results[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), results[0], other
        )


def test_skipped_rows_are_never_projected_and_agree_with_multiplied_ones():
    hs, ws, ht, wt, weight = inputs()
    weight = weight.at[-1, -1].set(0.0)  # the row that the tail of the last chunk would read
    poisoned = jnp.where((weight == 0)[..., None], jnp.nan, hs)

    def run(hs, measure):
        return jax.value_and_grad(
            lambda hs, ws: kl.weighted_kl(
                hs, ws, ht, wt, weight, spec=KLSpec(chunk=4), measure_BT=measure
            ),
            (0, 1),
            has_aux=True,
        )(hs, ws)

    (skipped, tokens), grads = run(poisoned, None)
    (multiplied, all_tokens), all_grads = run(hs, jnp.ones((B, T), bool))
    np.testing.assert_allclose(skipped, multiplied, rtol=1e-5)
    for got, want in zip(grads, all_grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert np.all(np.asarray(tokens.kl_BT)[np.asarray(weight) == 0] == 0)
    assert np.all(np.asarray(all_tokens.kl_BT) > 0)


def test_trip_count_follows_the_kept_rows():
    """Nothing kept: the loop does not run at all, and nothing is NaN."""
    hs, ws, ht, wt, weight = inputs()
    loss, grads = jax.value_and_grad(
        lambda hs: kl.weighted_kl(hs, ws, ht, wt, weight * 0, spec=KLSpec())[0]
    )(hs * jnp.nan)
    assert float(loss) == 0
    assert np.all(np.asarray(grads) == 0)


def test_log_probs_of_padded_ids_and_without_labels():
    hs, ws, ht, wt, _ = inputs()
    spec = KLSpec(chunk=5, vocab_size=37)
    padded = kl.token_kl(hs, ws, ht, wt, spec=spec, labels_BT=jnp.full((B, T), 37, jnp.int32))
    assert np.all(np.asarray(padded.logp_BT) < -1e29), "a padded id has probability 0"
    assert np.all(np.isfinite(padded.teacher_logp_BT))
    assert np.all(np.asarray(kl.token_kl(hs, ws, ht, wt, spec=spec).logp_BT) == 0)


def test_log_probs_read_zero_where_nothing_is_measured():
    hs, ws, ht, wt, _ = inputs()
    mask = jnp.arange(T)[None, :] < jnp.arange(B)[:, None]
    got = kl.token_kl(hs, ws, ht, wt, spec=KLSpec(), mask_BT=mask, labels_BT=labels_of((B, T)))
    assert np.all((np.asarray(got.logp_BT) < 0) == np.asarray(mask))
    assert np.all((np.asarray(got.teacher_logp_BT) < 0) == np.asarray(mask))


def test_labels_cost_no_copy_of_the_logits():
    """The gradient takes the place of the student's logits, labels read or not."""
    rows, ids, shape = 256, 40000, jax.ShapeDtypeStruct

    def run(hs, ws, ht, wt, weight, labels):
        return jax.value_and_grad(
            lambda hs, ws: kl.weighted_kl(
                hs, ws, ht, wt, weight, spec=KLSpec(chunk=rows), labels_BT=labels
            ),
            (0, 1),
            has_aux=True,
        )(hs, ws)

    states, head = shape((1, rows, D), jnp.float32), shape((ids, D), jnp.float32)
    args = states, head, states, head, shape((1, rows), jnp.float32)
    temporary = [
        jax.jit(run).lower(*args, labels).compile().memory_analysis().temp_size_in_bytes
        for labels in (None, shape((1, rows), jnp.int32))
    ]
    assert temporary[1] - temporary[0] < rows * ids  # a quarter of such an array


@pytest.mark.parametrize(
    ("axes", "real"),
    [((2, 2, 2), 37), ((1, 1, 8), 37), ((1, 1, 8), 34), ((4, 2, 1), 37)],
    ids=["all", "model", "a shard of padding", "batch"],
)
def test_mesh_does_not_matter(axes, real):
    hs, ws, ht, wt, weight = inputs()
    hs, ht, weight = (jnp.concatenate([x, x[::-1]]) for x in (hs, ht, weight))
    labels = labels_of(weight.shape) % real
    spec = KLSpec("jsd", chunk=3, vocab_size=real, ce=0.25)

    def run(hs, ws, ht, wt, weight, labels):
        (loss, tokens), grads = jax.value_and_grad(
            lambda hs, ws: kl.weighted_kl(hs, ws, ht, wt, weight, spec=spec, labels_BT=labels),
            (0, 1),
            has_aux=True,
        )(hs, ws)
        return loss, tokens, grads

    expected = jax.jit(run)(hs, ws, ht, wt, weight, labels)
    m = mesh.make(*axes)
    rows, heads = P(mesh.BATCH, None, None), P("model", None)
    with jax.set_mesh(m):
        put = lambda x, s: jax.device_put(x, NamedSharding(m, s))  # noqa: E731
        args = (
            put(hs, rows),
            put(ws, heads),
            put(ht, rows),
            put(wt, heads),
            put(weight, P(mesh.BATCH, None)),
            put(labels, P(mesh.BATCH, None)),
        )
        program = jax.jit(run).lower(*args).compile()
        got = program(*args)
        measured = kl.token_kl(*args[:4], spec=spec, labels_BT=args[5])
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=2e-6), got, expected)
    is_kept = np.asarray(weight) != 0
    for name in ("reverse_BT", "logp_BT", "teacher_logp_BT"):
        np.testing.assert_allclose(
            np.asarray(getattr(measured, name))[is_kept],
            np.asarray(getattr(got[1], name))[is_kept],
            rtol=1e-5,
            atol=1e-6,
        )
    for line in program.as_text().splitlines():
        is_collective = any(c in line for c in ("all-gather", "all-reduce", "collective-permute"))
        assert not (is_collective and f",{V}]" in line), f"a full-vocabulary array travels: {line}"


def test_equal_models_give_zero_and_finite_gradients():
    hs, ws, _, _, weight = inputs()
    for direction in DIRECTIONS:
        loss, grads = jax.value_and_grad(
            lambda hs, ws, d=direction: kl.weighted_kl(hs, ws, hs, ws, weight, spec=KLSpec(d))[0],
            (0, 1),
        )(hs, ws)
        assert abs(float(loss)) < 1e-5
        assert all(np.abs(np.asarray(g)).max() < 1e-4 for g in grads)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_extreme_logits_stay_finite(direction):
    hs, ws, ht, wt, weight = inputs(scale=1e4)
    (loss, tokens), grads = jax.value_and_grad(
        lambda hs, ws: kl.weighted_kl(
            hs, ws, ht, wt, weight, spec=KLSpec(direction, vocab_size=37)
        ),
        (0, 1),
        has_aux=True,
    )(hs, ws)
    for leaf in jax.tree.leaves((loss, tokens, grads)):
        assert np.isfinite(np.asarray(leaf)).all()
    assert np.all(np.asarray(grads[1])[37:] == 0), "padded ids must not be trained"


def test_bf16_inputs_are_summed_in_f32():
    """Exact sums over 64k rows: a bf16 accumulator would stall at a few hundred."""
    rows = 65536
    rng = np.random.default_rng(0)
    hs, ht = (jnp.asarray(rng.normal(size=(1, rows, 4)), jnp.bfloat16) for _ in range(2))
    ws, wt = (jnp.asarray(rng.normal(size=(16, 4)), jnp.bfloat16) for _ in range(2))
    weight = jnp.ones((1, rows), jnp.float32)
    loss, dws = jax.jit(
        jax.value_and_grad(
            lambda ws: kl.weighted_kl(hs, ws, ht, wt, weight, spec=KLSpec(chunk=4096))[0]
        )
    )(ws)
    exact = reference(hs, ws, ht, wt, KLSpec(), np.zeros((1, rows), int))[0].sum()
    np.testing.assert_allclose(loss, exact, rtol=1e-4)
    dense = jax.grad(
        lambda ws: jnp.sum(
            jnp.exp(jax.nn.log_softmax(hs.astype(jnp.float32) @ ws.T))
            * (
                jax.nn.log_softmax(hs.astype(jnp.float32) @ ws.T)
                - jax.nn.log_softmax(ht.astype(jnp.float32) @ wt.astype(jnp.float32).T)
            )
        )
    )(ws.astype(jnp.float32))
    np.testing.assert_allclose(dws.astype(jnp.float32), dense, rtol=2e-2, atol=2.0)


@pytest.mark.parametrize(
    ("platform", "ids", "rows"),
    [
        ("cpu", 151_936, 256),
        ("cpu", 49_152, 256),
        ("cpu", 32_000, 512),
        ("cpu", 100, 1024),
        ("tpu", 151_936, 512),
        ("gpu", 75_968, 1024),
        ("tpu", 1_000_000, 256),
    ],
)
def test_size_of_a_chunk(monkeypatch, platform, ids, rows):
    monkeypatch.setattr(mesh, "platform", lambda: platform)
    assert kl.auto_chunk(ids) == rows


def test_bad_shapes():
    hs, ws, ht, wt, weight = inputs()
    with pytest.raises(ValueError, match="does not fit"):
        kl.token_kl(hs, wt, ht, wt, spec=KLSpec())
    with pytest.raises(ValueError, match="rows: expected"):
        kl.token_kl(hs, ws, ht, wt[:30], spec=KLSpec())
    with pytest.raises(ValueError, match="vocab_size"):
        kl.token_kl(hs, ws, ht, wt, spec=KLSpec(vocab_size=V + 1))
    with pytest.raises(ValueError, match="no teacher"):
        kl.weighted_kl(hs, ws, None, None, weight, spec=KLSpec())
    with pytest.raises(ValueError, match="labels_BT"):
        kl.weighted_kl(hs, ws, ht, wt, weight, spec=KLSpec("forward", ce=0.5))
