"""Ids drawn by inverting the cumulative distribution, of rows on one device or split over several.

Two levels: first over blocks of about sqrt(V) ids, then inside the chosen block, with one uniform
number for each. Gumbel noise would need a random number per vocabulary item, which is the dearest
part of a decode step on CPU.

Where the vocabulary is split over ``model``, nothing of its size is gathered: devices exchange the
masses of the blocks, about sqrt(V) numbers for each row, and then the one block that was chosen.
The blocks are those of a vocabulary in one piece, so the ids are those, too, up to the rounding of
the mass of a block that lies on two devices.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from opd_jax import mesh

_AXIS = "model"
_ROWS, _SPLIT = jax.P(mesh.BATCH), jax.P(mesh.BATCH, _AXIS)


def is_split(x_BV: jax.Array) -> bool:
    """Whether rows lie split over ``model``, by their type."""
    return mesh.size(_AXIS) > 1 and jax.typeof(x_BV).sharding.spec[1] == _AXIS


def draw(
    z_BV: Float[Array, "B V"], uniform_B2: Float[Array, "B 2"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """An id of each row of logits whose maximum is 0, and its log-probability.

    Args:
      z_BV: -inf where an id has no mass.
      uniform_B2: numbers in [0, 1), of the block and inside of it.

    **Sharding**: rows over the batch axes; the vocabulary whole, or split over ``model``.
    """
    if not is_split(z_BV):
        return jax.vmap(_draw)(z_BV, uniform_B2)
    num_ids = z_BV.shape[1]
    drawn = mesh.on_shards(
        lambda z_BV, uniform_B2: _draw_split(z_BV, uniform_B2, num_ids),
        (_SPLIT, jax.P(mesh.BATCH, None)),
        (_ROWS, _ROWS),
    )
    return drawn(z_BV, mesh.constrain(uniform_B2, mesh.BATCH, None))


def highest(x_BV: Float[Array, "B V"]) -> Float[Array, " B"]:
    """The largest logit of each row, NaN where one is.

    **Sharding**: as :func:`draw`.
    """

    def of_shards(x_BV):
        highest_B, is_nan_B = jax.lax.pmax(_highest(x_BV), _AXIS)
        return jnp.where(is_nan_B > 0, jnp.nan, highest_B)

    if is_split(x_BV):
        return mesh.on_shards(of_shards, (_SPLIT,), _ROWS)(x_BV)
    highest_B, is_nan_B = _highest(x_BV)
    return jnp.where(is_nan_B > 0, jnp.nan, highest_B)


def _highest(x_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest of each row, and 1 where one is NaN: XLA's maximum may pass over it on CPU."""
    is_nan_BV = jnp.isnan(x_BV)
    highest_B = jnp.max(jnp.where(is_nan_BV, -jnp.inf, x_BV), axis=1)
    return highest_B, jnp.any(is_nan_BV, axis=1).astype(x_BV.dtype)


def best(z_BV: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The first id with the largest logit of each row; some id where all are NaN.

    **Sharding**: as :func:`draw`.
    """
    if not is_split(z_BV):
        return jnp.argmax(z_BV, axis=1).astype(jnp.int32)

    num_ids = z_BV.shape[1]

    def of_shards(z_BV):
        value_B, first = jnp.max(z_BV, axis=1), _first(z_BV)
        id_B = first + jnp.argmax(z_BV, axis=1).astype(jnp.int32)
        is_best_B = value_B >= jax.lax.pmax(value_B, _AXIS)
        last = num_ids - 1  # NaNs compare with nothing
        return jax.lax.pmin(jnp.where(is_best_B, id_B, last), _AXIS)

    return mesh.on_shards(of_shards, (_SPLIT,), _ROWS)(z_BV)


def _draw(z_V: jax.Array, uniform_2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draw one id from logits whose maximum is 0; also return its log-probability."""
    num_ids = z_V.shape[0]
    width = _width(num_ids)
    p_V = jnp.exp(z_V)
    p_NC = jnp.pad(p_V, (0, -num_ids % width)).reshape(-1, width)
    mass_N = jnp.sum(p_NC, axis=1)
    block = _invert(mass_N, uniform_2[0])
    # A second number, because one f32 number has too few bits to tell rare ids of one block apart.
    id_ = block * width + _invert(p_NC[block], uniform_2[1])
    return id_, z_V[id_] - jnp.log(jnp.sum(mass_N))


def _draw_split(
    z_BV: jax.Array, uniform_B2: jax.Array, num_ids: int
) -> tuple[jax.Array, jax.Array]:
    """The same of many rows whose vocabulary this device has a part of."""
    width, first = _width(num_ids), _first(z_BV)
    rows, own = z_BV.shape
    num_blocks, own_blocks = -(-num_ids // width), -(-own // width) + 1
    # The part is laid into whole blocks, of which it may begin and end within one.
    frame_BU = jnp.zeros((rows, own_blocks * width), z_BV.dtype)
    frame_BU = jax.lax.dynamic_update_slice_in_dim(frame_BU, jnp.exp(z_BV), first % width, axis=1)
    own_BM = jnp.sum(frame_BU.reshape(rows, own_blocks, width), axis=2)
    mass_BN = jnp.zeros((rows, num_blocks + own_blocks), z_BV.dtype)
    mass_BN = jax.lax.dynamic_update_slice_in_dim(mass_BN, own_BM, first // width, axis=1)
    mass_BN = jax.lax.psum(mass_BN[:, :num_blocks], _AXIS)
    block_B = jax.vmap(_invert)(mass_BN, uniform_B2[:, 0])

    ids_BC = block_B[:, None] * width + jnp.arange(width)[None, :]
    at_BC = ids_BC - first
    is_own_BC = (at_BC >= 0) & (at_BC < own)
    picked_BC = jnp.take_along_axis(z_BV, jnp.clip(at_BC, 0, own - 1), axis=1)
    # One device has each id: its number is the only one that is added up.
    z_BC = jax.lax.psum(jnp.where(is_own_BC, picked_BC, 0.0), _AXIS)
    p_BC = jnp.where(ids_BC < num_ids, jnp.exp(z_BC), 0.0)
    in_block_B = jax.vmap(_invert)(p_BC, uniform_B2[:, 1])
    z_B = jnp.take_along_axis(z_BC, in_block_B[:, None], axis=1)[:, 0]
    return block_B * width + in_block_B, z_B - jnp.log(jnp.sum(mass_BN, axis=1))


def _width(num_ids: int) -> int:
    """Ids in a block."""
    return math.isqrt(num_ids - 1) + 1


def _first(z_BV: jax.Array) -> jax.Array:
    """The id of the first column that this device has."""
    return (jax.lax.axis_index(_AXIS) * z_BV.shape[1]).astype(jnp.int32)


def _invert(mass_N: jax.Array, uniform: jax.Array) -> jax.Array:
    """First index with mass above 0 whose cumulative mass passes ``uniform`` x total."""
    cumulative_N = jnp.cumsum(mass_N)
    is_positive_N = mass_N > 0
    # XLA sums prefixes in its own order, so an empty entry may still change the rounding of its
    # sum, and no sum may pass the target. Neither may yield an id that cannot be sampled.
    is_passed_N = (cumulative_N > uniform * cumulative_N[-1]) & is_positive_N
    last = mass_N.shape[0] - 1 - jnp.argmax(is_positive_N[::-1])
    return jnp.where(jnp.any(is_passed_N), jnp.argmax(is_passed_N), last).astype(jnp.int32)
