"""Rows of the table of embeddings, whose gradient is summed in f32 and in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from opd_jax import mesh, sums


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
    sums_VD, drows_BTD = dtable_VD.astype(jnp.float32), drows_BTD.astype(jnp.float32)
    given = (P("model", "fsdp"), P("data", None), P("data", None, "fsdp"))
    sums_VD = mesh.on_shards(_added, given, given[0])(sums_VD, ids_BT, drows_BTD)
    return sums_VD.astype(dtable_VD.dtype), None


def _added(sums_VD, ids_BT, drows_BTD):
    """The rows of all devices along ``data`` added to what one has of the table."""
    num_ids = sums_VD.shape[0]
    if mesh.size("model") > 1:  # ids before the device's own must not count from the end
        ids_BT = ids_BT - jax.lax.axis_index("model") * num_ids
        ids_BT = jnp.where(ids_BT < 0, num_ids, ids_BT)
    ids_N, drows_ND = ids_BT.ravel(), drows_BTD.reshape(ids_BT.size, -1)
    if mesh.size("data") == 1:
        return sums.by_id(sums_VD, ids_N, drows_ND)
    own_VD = sums.by_id(jnp.zeros_like(sums_VD), ids_N, drows_ND)
    with jax.named_scope("rows_of_table"):
        return sums_VD + jax.lax.psum(own_VD, "data")


look_up.defvjp(lambda table_VD, ids_BT: (look_up(table_VD, ids_BT), ids_BT), _backward)
