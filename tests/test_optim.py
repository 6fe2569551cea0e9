"""The schedule at its corners, one update of each rule by hand, and errors that name the flag."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opd_jax import optim
from opd_jax.optim import OptimSpec

PLAIN = dict(warmup=0.0, clip=0.0, lr=0.5, min_lr=0.5)  # a constant rate


def run(spec, params, *grads):
    """Apply updates one after the other and return the parameters after each."""
    tx = optim.make(spec)
    params = jnp.asarray(params, jnp.float32)
    opt, seen = tx.init(params), []
    for grad in grads:
        updates, opt = tx.update(jnp.asarray(grad, jnp.float32), opt, params)
        params = optax.apply_updates(params, updates)
        seen.append(np.asarray(params))
    return seen


def test_schedule_rises_then_follows_a_cosine_to_the_end():
    rate = optim.schedule(OptimSpec(lr=1e-3, min_lr=1e-5, warmup=0.1, steps=110))
    expected = {
        0: 1e-3 / 11,  # the first update already moves
        5: 6e-3 / 11,
        10: 1e-3,
        11: 1e-3,
        11 + 33: 1e-5 + (1e-3 - 1e-5) * (1 + np.cos(np.pi / 3)) / 2,
        110: 1e-5,
        500: 1e-5,
    }
    for step, value in expected.items():
        np.testing.assert_allclose(rate(step), value, rtol=1e-5, err_msg=str(step))


def test_schedule_without_warm_up_starts_at_the_peak():
    rate = optim.schedule(OptimSpec(lr=1e-3, min_lr=0.0, warmup=0.0, steps=10))
    np.testing.assert_allclose([rate(0), rate(5)], [1e-3, 5e-4], rtol=1e-6)
    np.testing.assert_allclose(rate(10), 0.0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_schedules_are_positive(steps):
    rate = optim.schedule(OptimSpec(lr=1e-3, warmup=0.5, steps=steps))
    rates = [float(rate(i)) for i in range(steps)]
    assert all(0 < x <= 1e-3 * (1 + 1e-6) for x in rates)
    assert max(rates) == pytest.approx(1e-3)


def test_the_norm_of_the_whole_gradient_is_clipped():
    tx = optim.make(OptimSpec("sgd", **PLAIN | dict(clip=1.0, b1=0.0, lr=1.0, min_lr=1.0)))
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    for scale, norm in ((10.0, 1.0), (0.1, 0.5)):  # the second is below the limit: untouched
        grads = {"a": scale * jnp.array([3.0]), "b": scale * jnp.array([4.0])}
        updates, _ = tx.update(grads, tx.init(params), params)
        np.testing.assert_allclose(
            [updates["a"][0], updates["b"][0]], [-0.6 * norm, -0.8 * norm], rtol=1e-6
        )


def test_clip_zero_is_off():
    (after,) = run(OptimSpec("sgd", **PLAIN, b1=0.0), [0.0], [300.0])
    np.testing.assert_allclose(after, [-150.0])


def test_adamw_by_hand():
    b1, b2, decay, lr = 0.8, 0.9, 0.1, 0.5
    spec = OptimSpec("adamw", **PLAIN, b1=b1, b2=b2, eps=1e-8, weight_decay=decay)
    p, m, v, expected = np.array([2.0, -1.0]), 0.0, 0.0, []
    grads = [np.array([0.3, 4.0]), np.array([-0.1, 2.0])]
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
        p = p - lr * (step + decay * p)
        expected.append(p)
    np.testing.assert_allclose(run(spec, [2.0, -1.0], *grads), expected, rtol=1e-5)


@pytest.mark.parametrize("name", optim.NAMES)
def test_weight_decay_is_decoupled(name):
    # Without a gradient the weights shrink by lr x decay, again and again: neither Adam's
    # normalisation nor the momentum may touch that.
    spec = OptimSpec(name, **PLAIN, b1=0.9, weight_decay=0.1)
    first, second = run(spec, [2.0, -4.0], [0.0, 0.0], [0.0, 0.0])
    np.testing.assert_allclose(first, [1.9, -3.8], rtol=1e-6)
    np.testing.assert_allclose(second, [1.805, -3.61], rtol=1e-6)


def test_sgd_momentum():
    first, second = run(OptimSpec("sgd", **PLAIN, b1=0.5), [0.0], [1.0], [1.0])
    np.testing.assert_allclose([first[0], second[0]], [-0.5, -0.5 - 0.75])


def test_sign_sgd_moves_by_the_sign_of_the_momentum():
    # Momenta [3, -0.1], [0.5, 0], [0.25, 0.2]: the first weight goes on against its gradient, the
    # second rests where its momentum is 0, and no size is seen.
    spec = OptimSpec("signsgd", **PLAIN, b1=0.5)
    seen = run(spec, [0.0, 0.0], [3.0, -0.1], [-1.0, 0.05], [0.0, 0.2])
    np.testing.assert_allclose(seen, [[-0.5, 0.5], [-1.0, 0.5], [-1.5, 0.0]])


def test_sign_sgd_without_momentum_forgets():
    seen = run(OptimSpec("signsgd", **PLAIN, b1=0.0), [0.0], [3.0], [-1e-6])
    np.testing.assert_allclose(np.ravel(seen), [-0.5, 0.0])


@pytest.mark.parametrize(
    "bad",
    [
        dict(name="adam"),
        dict(lr=0.0),
        dict(min_lr=1.0),
        dict(min_lr=-1.0),
        dict(warmup=1.0),
        dict(warmup=-0.1),
        dict(steps=0),
        dict(b1=1.0),
        dict(b2=-0.5),
        dict(eps=0.0),
        dict(weight_decay=-0.1),
        dict(decay="norms"),
        dict(clip=-1.0),
    ],
    ids=str,
)
def test_a_bad_setting_names_its_flag(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"--config.optim.{name}$") as error:
        OptimSpec(**bad)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("name", optim.NAMES)
def test_norms_and_biases_do_not_decay_unless_asked(name):
    names = ("embed", "q", "attn_norm", "q_norm", "final_norm", "q_bias", "head")
    params = {"layers": {n: jnp.ones(2) for n in names}, "final_norm": jnp.ones(2)}
    grads = jax.tree.map(jnp.zeros_like, params)
    for decay, untouched in (("matrices", {"attn_norm", "q_norm", "q_bias"}), ("all", set())):
        spec = OptimSpec(name, **PLAIN, b1=0.9, weight_decay=0.1, decay=decay)
        tx = optim.make(spec)
        updates, _ = tx.update(grads, tx.init(params), params)
        still = {n for n, u in updates["layers"].items() if not np.any(u)}
        assert still - {"final_norm"} == untouched
        assert bool(np.any(updates["final_norm"])) == (decay == "all")


def test_moments_are_kept_in_f32_whatever_the_parameters():
    """With b2 = 0.999 a second moment in bfloat16 would never pass 1/2 of its value."""
    spec = OptimSpec("adamw", **PLAIN, b1=0.9, b2=0.999)
    tx, half = optim.make(spec), {"w": jnp.ones(8, jnp.bfloat16)}
    state, grads = tx.init(half), {"w": jnp.full(8, 0.5, jnp.bfloat16)}
    for _ in range(3000):
        updates, state = tx.update(grads, state, half)
    (adam,) = [s for s in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(s)]
    assert adam.mu["w"].dtype == adam.nu["w"].dtype == updates["w"].dtype == jnp.float32
    np.testing.assert_allclose(adam.nu["w"], 0.25 * (1 - 0.999**3000), rtol=1e-4)


def is_adam(node) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def test_the_share_that_a_step_leaves_unmoved():
    w = jnp.array([0.02, -0.02, 1.0, 0.0], jnp.bfloat16)
    for step, share in ((1e-6, 0.75), (1e-4, 0.25), (1e-2, 0.0)):
        assert optim.unmoved_share({"w": w}, step) == share
    assert optim.unmoved_share({"w": w.astype(jnp.float32)}, 1e-6) == 0


def test_a_restarted_schedule_keeps_the_moments():
    tx = optim.make(OptimSpec("adamw", lr=0.1, steps=10))
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    for _ in range(4):
        _, state = tx.update({"w": jnp.ones(3)}, state, params)
    again = optim.restarted(state)
    counts = [int(x) for x in jax.tree.leaves(again) if x.ndim == 0]
    assert sorted(counts) == [0, 4]
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
        if a.ndim:
            np.testing.assert_array_equal(a, b)
