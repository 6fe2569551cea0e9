"""Products of rows with one of several weights each, rows sorted by which.

``jax.lax.ragged_dot`` is a kernel on a TPU, which visits the tiles that belong to a group and no
others. Elsewhere, and for the gradient of the weights on a TPU too, it computes every row with
every weight (LOG.md), so there a loop over blocks of rows stands in: each multiplies rows of one
group, and there are as many as the groups need.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from opd_jax import mesh, rounds

LARGEST_BLOCK = 512  # rows; enough for a product to be bound by arithmetic, not by its weight
_SMALLEST_BLOCK = 8


@jax.custom_vjp
def times(
    x_NI: Float[Array, "N I"], w_XIO: Float[Array, "X I O"], sizes_X: Int[Array, " X"]
) -> Float[Array, "N O"]:
    """Rows of group x times ``w[x]``; rows after the last group give 0.

    The first ``sizes[0]`` rows are group 0, the next ``sizes[1]`` group 1, and so on. Sums are
    taken in f32, in the gradients too; results have the dtype of ``x``.

    **Sharding**: of one device; call it inside ``shard_map``.
    """
    if mesh.platform() != "tpu":
        return by_blocks(x_NI, w_XIO, sizes_X)
    return _first_rows(jax.lax.ragged_dot(x_NI, w_XIO, sizes_X), jnp.sum(sizes_X))


def _first_rows(y_NO: jax.Array, num: jax.Array) -> jax.Array:
    """The rows up to ``num``, 0 in the others: the kernel leaves them as they were in memory."""
    return jnp.where(jnp.arange(y_NO.shape[0])[:, None] < num, y_NO, 0)


def _forward(x_NI, w_XIO, sizes_X):
    return times(x_NI, w_XIO, sizes_X), (x_NI, w_XIO, sizes_X)


def _backward(residuals, dy_NO):
    x_NI, w_XIO, sizes_X = residuals
    dx_NI = times(dy_NO, w_XIO.swapaxes(1, 2), sizes_X)
    return dx_NI, sums(x_NI, dy_NO, sizes_X).astype(w_XIO.dtype), None


times.defvjp(_forward, _backward)


def by_blocks(x_NI: jax.Array, w_XIO: jax.Array, sizes_X: jax.Array) -> jax.Array:
    """:func:`times` as a loop over blocks of rows."""

    def body(block, y_NO):
        group, at, rows, is_own_R = block
        old_RO = jax.lax.dynamic_slice_in_dim(y_NO, at, rows)
        w_IO = jax.lax.dynamic_index_in_dim(w_XIO, group, keepdims=False)
        new_RO = _rows(x_NI, at, rows) @ w_IO
        new_RO = jnp.where(is_own_R[:, None], new_RO.astype(y_NO.dtype), old_RO)
        return jax.lax.dynamic_update_slice_in_dim(y_NO, new_RO, at, axis=0)

    start = jnp.zeros((x_NI.shape[0], w_XIO.shape[2]), x_NI.dtype)
    return _loop(body, start, x_NI.shape[0], sizes_X)


def sums(x_NI: jax.Array, y_NO: jax.Array, sizes_X: jax.Array) -> Float[Array, "X I O"]:
    """``x^T y`` over the rows of each group, f32: the gradient of the weights."""

    def body(block, sum_XIO):
        group, at, rows, is_own_R = block
        own_RI = jnp.where(is_own_R[:, None], _rows(x_NI, at, rows), 0)
        more_IO = jax.lax.dot_general(
            own_RI,
            _rows(y_NO, at, rows),
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        return sum_XIO.at[group].add(more_IO)

    start = jnp.zeros((sizes_X.shape[0], x_NI.shape[1], y_NO.shape[1]), jnp.float32)
    return _loop(body, start, x_NI.shape[0], sizes_X)


def _rows(x_NI: jax.Array, at, num: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_NI, at, num)


def _loop(body, carry, num_rows: int, sizes_X: jax.Array):
    """Fold ``body`` over the blocks of all groups, in order.

    It gets the group, the first row, the number of rows and which of them are the block's own: a
    group's last block reads on into others' rows, or begins earlier, so as to be whole.
    """
    size = block_size(num_rows, sizes_X.shape[0])
    ends_X = jnp.cumsum(sizes_X)
    num_blocks_X = -(-sizes_X // size)
    last_X = jnp.cumsum(num_blocks_X)

    def step(index, carry):
        group = jnp.searchsorted(last_X, index, side="right")
        before = last_X[group] - num_blocks_X[group]
        first = ends_X[group] - sizes_X[group] + (index - before) * size
        at = jnp.minimum(first, num_rows - size)
        row_R = at + jnp.arange(size)
        is_own_R = (row_R >= first) & (row_R < ends_X[group])
        return body((group, at, size, is_own_R), carry)

    shared = -(-num_rows // mesh.size("model"))  # rows of experts that lie elsewhere come last
    with rounds.expected(shared // size + sizes_X.shape[0] // 2):  # half of each last block
        return jax.lax.fori_loop(0, last_X[-1], step, carry)


@functools.cache
def block_size(num_rows: int, num_groups: int) -> int:
    """Rows of a block: a power of 2, about a quarter of a group's mean.

    So the halves that are wasted in each group's last block add up to an eighth of the work.
    """
    wanted = max(num_rows // (4 * num_groups), 1)
    size = min(max(1 << (wanted.bit_length() - 1), _SMALLEST_BLOCK), LARGEST_BLOCK)
    return min(size, num_rows)
