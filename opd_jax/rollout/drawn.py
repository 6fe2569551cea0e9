"""What a decode loop draws and where it puts it, and what rows may not draw."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from opd_jax import mesh
from opd_jax.models import linear
from opd_jax.rollout import sampling
from opd_jax.rollout.sampling import Sampler


@struct.dataclass
class Decoded:
    """What was sampled after the prompts: the part of the decode loop's state that survives."""

    ids_BN: jax.Array  # [B, N] i32, pad after the end
    logp_BN: jax.Array  # [B, N] f32, 0 after the end
    length_B: jax.Array  # [B] i32, ids sampled, a stop id included
    is_done_B: jax.Array  # [B] bool, a stop id was sampled
    num_steps: (
        jax.Array
    )  # [] i32, ids sampled by the longest row; each but the first cost a forward


@struct.dataclass
class Ban:
    """Ids that each row may not sample, at its new ids ``first`` to ``end`` (from 0, without end).

    All of it is data: rows of any bans, and of none, share one program.
    """

    ids_BK: jax.Array  # [B, K] i32; one outside the vocabulary bans nothing
    first_B: jax.Array  # [B] i32
    end_B: jax.Array  # [B] i32

    def at(self, step: jax.Array) -> jax.Array:
        """Banned ids at new id number ``step`` ([] or [B]: of each row), [B, K]."""
        is_on_B = (self.first_B <= step) & (step < self.end_B)
        return jnp.where(is_on_B[:, None], self.ids_BK, jnp.iinfo(jnp.int32).max)


def draw(
    w_VD: Float[Array, "V D"],
    h_BD: Float[Array, "B D"],
    keys_B: Key[Array, " B"],
    step: jax.Array,
    *,
    sampler: Sampler,
    bias_V: Float[Array, " V"] | None,
    ban: Ban | None,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """New id number ``step`` ([] or [B]: of each row) and its log-probability.

    **Sharding**: rows over the batch axes; logits leave the projection split over ``model``.
    """
    logits_BV = linear.from_left(w_VD, h_BD, "model", jnp.float32)
    step_keys_B = jax.vmap(jax.random.fold_in, (0, 0 if step.ndim else None))(keys_B, step)
    return sampling.sample(
        logits_BV,
        step_keys_B,
        sampler=sampler,
        bias_V=bias_V,
        banned_BK=None if ban is None else ban.at(step),
    )


def nothing(num_rows: int, max_new: int, sampler: Sampler) -> Decoded:
    """Before the first draw."""
    shape = (num_rows, max_new)
    return Decoded(
        ids_BN=mesh.constrain(jnp.full(shape, sampler.pad_id, jnp.int32), mesh.BATCH, None),
        logp_BN=mesh.constrain(jnp.zeros(shape, jnp.float32), mesh.BATCH, None),
        length_B=mesh.constrain(jnp.zeros(num_rows, jnp.int32), mesh.BATCH),
        is_done_B=mesh.constrain(jnp.zeros(num_rows, bool), mesh.BATCH),
        num_steps=jnp.zeros((), jnp.int32),
    )


def is_stop(ids_B: jax.Array, sampler: Sampler) -> Bool[Array, " B"]:
    """Which ids end their rows."""
    stops_1S = jnp.array(sampler.stop_ids, jnp.int32)[None, :]
    return jnp.any(ids_B[:, None] == stops_1S, axis=1)
