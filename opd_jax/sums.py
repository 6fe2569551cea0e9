"""Rows added up by id: the sums of the rock state, the gradient of the table of embeddings."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from opd_jax import mesh

# XLA for TPU sorts the ids of a large sum, and those of each of several sums by the same ids. It
# compiles a sort of as many as these in a tenth of the time of one of 144,000 (LOG.md).
_PIECE = 8192


def by_id(sums: Any, ids_N: Int[Array, " N"], rows: Any) -> Any:
    """The sums with every row added to that of its id; ids that there are no sums for are left out.

    On a TPU a piece of the rows at a time, sorted once for all sums; rows of one id are added in
    their order either way.

    Args:
      sums: [V, ...], or a tree of such.
      ids_N: not negative.
      rows: [N, ...], a tree like ``sums``.

    **Sharding**: of one device.
    """
    if mesh.platform() != "tpu" or ids_N.size <= _PIECE:
        return jax.tree.map(lambda sum_V, row_N: sum_V.at[ids_N].add(row_N), sums, rows)
    num = -(-ids_N.size // _PIECE)

    def split(x_N: jax.Array, fill: int) -> jax.Array:
        widths = [(0, num * _PIECE - len(x_N))] + [(0, 0)] * (x_N.ndim - 1)
        padded_N = jnp.pad(x_N, widths, constant_values=fill)
        return padded_N.reshape(num, _PIECE, *x_N.shape[1:])

    def add(sums: Any, piece: Any):
        ids_n, rows = piece
        order_n = jnp.argsort(ids_n, stable=True)

        def added(sum_V, row_n):
            place = sum_V.at[ids_n[order_n]]
            return place.add(row_n[order_n], mode="drop", indices_are_sorted=True)

        return jax.tree.map(added, sums, rows), None

    nowhere = jnp.iinfo(ids_N.dtype).max
    pieces = split(ids_N, nowhere), jax.tree.map(lambda x_N: split(x_N, 0), rows)
    return jax.lax.scan(add, sums, pieces)[0]
