"""Stop ids as one event: against dense float64, over shards, and in a run whose models differ."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from opd_jax import kl, mesh, rock
from opd_jax.divergence import DIRECTIONS, KLSpec
from opd_jax.rock import RockConfig

ROWS, TOKENS, WIDTH, NUM_ROWS, NUM_IDS = 4, 3, 8, 48, 43
STOPS = (3, 17, 40)


@functools.cache
def inputs():
    rng = np.random.default_rng(0)
    weight_BT = rng.uniform(0.1, 1, (ROWS, TOKENS))
    weight_BT[0, 1] = 0.0
    return (
        rng.normal(size=(ROWS, TOKENS, WIDTH)) * 1.5,
        rng.normal(size=(NUM_ROWS, WIDTH)),
        rng.normal(size=(ROWS, TOKENS, WIDTH)) * 1.5,
        rng.normal(size=(NUM_ROWS, WIDTH)),
        weight_BT,
    )


def merged_log_probs(z, temperature, stops=STOPS):
    """Log-probabilities of events: the other ids, and the stop ids together, in numpy float64."""
    z = z[..., :NUM_IDS] / temperature
    z = z - z.max(-1, keepdims=True)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    rest = [i for i in range(NUM_IDS) if i not in stops]
    return np.log(np.concatenate([p[..., rest], p[..., list(stops)].sum(-1, keepdims=True)], -1))


def dense(hs, ws, ht, wt, weight_BT, spec) -> float:
    logp = merged_log_probs(hs @ ws.T, spec.temperature)
    logq = merged_log_probs(ht @ wt.T, spec.temperature)
    p, q = np.exp(logp), np.exp(logq)
    mix = {"jsd": spec.beta, "skew_reverse": spec.skew, "skew_forward": 1 - spec.skew}
    m = np.log(mix.get(spec.direction, 0) * p + (1 - mix.get(spec.direction, 0)) * q)
    each = {
        "reverse": p * (logp - logq),
        "forward": q * (logq - logp),
        "jsd": spec.beta * p * (logp - m) + (1 - spec.beta) * q * (logq - m),
        "skew_reverse": p * (logp - m),
        "skew_forward": q * (logq - m),
    }[spec.direction]
    return float((weight_BT * each.sum(-1)).sum())


def loss_and_gradients(spec, sizes=None):
    args = [jnp.asarray(x, jnp.float32) for x in inputs()]

    def loss(hs, ws):
        return kl.weighted_kl(hs, ws, args[2], args[3], args[4], spec=spec)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    if sizes is None:
        return run(args[0], args[1])
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    with jax.set_mesh(mesh.make(**sizes, devices=devices)):
        rows, heads = P(mesh.BATCH, None, None), P("model", None)
        placed = (rows, heads, rows, heads, P(mesh.BATCH, None))
        args = [jax.device_put(x, spec) for x, spec in zip(args, placed, strict=True)]
        return jax.device_get(run(args[0], args[1]))


@pytest.mark.optimized  # the value stands to its last bits
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_value_and_gradient_are_those_of_the_coarser_events(direction, temperature):
    spec = KLSpec(direction, temperature, chunk=4, vocab_size=NUM_IDS, stop_ids=STOPS)
    (loss, _), gradients = loss_and_gradients(spec)
    arrays = list(inputs())
    assert float(loss) == pytest.approx(dense(*arrays, spec), abs=1e-5)
    rng = np.random.default_rng(1)
    for place in (0, 1):  # along random directions, by central differences in float64
        for _ in range(4):
            step = rng.normal(size=arrays[place].shape) * 1e-5
            moved = [
                dense(*(x + s * step if i == place else x for i, x in enumerate(arrays)), spec)
                for s in (1, -1)
            ]
            slope = np.sum(np.asarray(gradients[place], np.float64) * step) * 2
            assert slope == pytest.approx(moved[0] - moved[1], rel=1e-4, abs=2e-9)


@pytest.mark.parametrize("sizes", [{"model": 2}, {"data": 2, "fsdp": 2, "model": 2}], ids=str)
def test_stop_ids_on_different_shards(sizes):
    spec = KLSpec(vocab_size=NUM_IDS, stop_ids=STOPS, chunk=2)
    (loss, tokens), gradients = loss_and_gradients(spec)
    (other_loss, others), other_gradients = loss_and_gradients(spec, {"data": 1} | sizes)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    for ours, theirs in zip(
        jax.tree.leaves((tokens, gradients)),
        jax.tree.leaves((others, other_gradients)),
        strict=True,
    ):
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)


def test_it_is_never_larger_and_entropies_stay_the_models_own():
    plain, merged = (
        loss_and_gradients(KLSpec(vocab_size=NUM_IDS, stop_ids=ids))[0][1] for ids in ((), STOPS)
    )
    scored = inputs()[-1] > 0
    difference = np.asarray(merged.reverse_BT - plain.reverse_BT)[scored]
    assert difference.max() <= 1e-6
    assert difference.min() < -1
    assert np.all(np.asarray(merged.reverse_BT)[scored] > 0)
    for name in ("entropy_BT", "teacher_entropy_BT", "logp_BT"):
        np.testing.assert_allclose(getattr(merged, name), getattr(plain, name), atol=2e-5)


@pytest.mark.optimized
def test_one_stop_id_changes_no_bit():
    plain = loss_and_gradients(KLSpec(vocab_size=NUM_IDS))
    one = loss_and_gradients(KLSpec(vocab_size=NUM_IDS, stop_ids=(3,)))
    jax.tree.map(np.testing.assert_array_equal, plain, one)


def test_mass_on_stopping_is_no_divergence_where_only_the_ids_differ():
    """The student ends by id 3, the teacher by id 17; both at 95 %, each at 1e-11 elsewhere."""
    z_V = np.zeros(NUM_IDS)
    z_V[3], z_V[17] = np.log(0.95 / 0.05 * (NUM_IDS - 2)), np.log(1e-11)
    other_V = z_V.copy()
    other_V[[3, 17]] = z_V[[17, 3]]
    one = jnp.ones((1, 1, 1), jnp.float32)
    for stops, low, high in (((), 20.0, 40.0), ((3, 17), -1e-5, 1e-5)):
        tokens = kl.token_kl(
            one,
            jnp.asarray(z_V[:, None], jnp.float32),
            one,
            jnp.asarray(other_V[:, None], jnp.float32),
            spec=KLSpec(stop_ids=stops),
        )
        assert low <= float(tokens.kl_BT[0, 0]) <= high


def test_stop_ids_are_no_rocks():
    ids_BT = jnp.array([[1, 1, 2, 3]])
    kl_BT = jnp.array([[5.0, 5.0, 4.0, 1.0]])
    for never, members in (((), [1, 2]), ((1,), [2, 3])):
        cfg = RockConfig("ema", top_k=2, every=1, never=never)
        state = rock.update(rock.init(8), ids_BT, kl_BT, jnp.ones((1, 4)), cfg=cfg)
        assert np.flatnonzero(rock.refresh(state, cfg=cfg).member_V).tolist() == members
        led = rock.leaders(state, 2, never)
        assert led["ids_K"].tolist() == members
        assert float(led["kl_sum"]) == 15.0
