"""Means that no split of the data can change, and states that are pytrees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.pytrees import Mean, Rollout


def test_pooling_is_the_mean_of_all_and_not_of_means():
    x = np.array([1.0, 2.0, 3.0, 10.0])
    parts = [Mean.of(x[:3].mean(), 3), Mean.of(x[3:].mean(), 1)]
    pooled = parts[0] + parts[1]
    assert pooled.value() == pytest.approx(4.0)
    assert pooled.value() != pytest.approx(np.mean([p.value() for p in parts]))
    assert (float(pooled.total), float(pooled.weight)) == (16.0, 4.0)


def test_a_mean_of_nothing_is_zero_and_changes_nothing():
    nothing = Mean(jnp.zeros(()), jnp.zeros(()))
    assert nothing.value() == 0.0
    assert (Mean.of(3.0) + nothing).value() == 3.0


def test_sums_are_f32_whatever_goes_in():
    mean = Mean.of(jnp.bfloat16(2.0), np.int32(3))
    assert (mean.total.dtype, mean.weight.dtype) == (jnp.float32, jnp.float32)
    assert float(mean.total) == 6.0


def test_states_pass_through_jit():
    rollout = Rollout(
        jnp.ones((2, 3), jnp.int32),
        jnp.zeros(2, jnp.int32),
        jnp.ones((2, 3), bool),
        jnp.zeros((2, 3)),
        jnp.zeros(2, bool),
        jnp.int32(7),
    )
    back = jax.jit(lambda r: r.replace(policy_step=r.policy_step + 1))(rollout)
    assert int(back.policy_step) == 8
    assert int(rollout.policy_step) == 7
    assert len(jax.tree.leaves(back)) == 6
