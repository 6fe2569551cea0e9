"""Rows of the table of embeddings, whose gradient is summed in f32 and in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from opd_jax import mesh


@jax.custom_vjp
def look_up(table_VD: jax.Array, ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows of the table, and the table itself for its other uses.

    Those uses must take what is returned: then their gradient is there first, and that of the rows
    is added to it in place. Left to autodiff there are two arrays of the table's size and a third
    for their sum.
    """
    return table_VD.at[ids_BT].get(out_sharding=mesh.out("data", None, "fsdp")), table_VD


def _backward(ids_BT, cotangents):
    drows_BTD, dtable_VD = cotangents
    # A frequent id adds up thousands of rows: in bfloat16 the sum would soon stand still.
    sums_VD = dtable_VD.astype(jnp.float32)
    placed = mesh.out("model", "fsdp")
    sums_VD = sums_VD.at[ids_BT].add(drows_BTD.astype(jnp.float32), out_sharding=placed)
    return sums_VD.astype(dtable_VD.dtype), None


look_up.defvjp(lambda table_VD, ids_BT: (look_up(table_VD, ids_BT), ids_BT), _backward)
