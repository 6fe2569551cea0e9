"""A cache that kernels of TPUs read and write: each row as far as it is filled, page by page.

Rows begin at slot 0, so a token's slot is its position, and keys lie as values do. A row that has
ended costs the reading of one page, whatever it holds. Reading is jax's paged attention (Pallas),
in which a row's pages follow each other; writing a token, for which XLA would go through the rows
one by one, is a kernel of a few lines.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from opd_jax import mesh, rounds
from opd_jax.models.architecture import ModelConfig

FEWEST_SLOTS = 1024  # below, a row is hardly more than a page
HELD = P(mesh.BATCH, "model", None, None)
_ROWS = P(mesh.BATCH)
_HEADS = P(mesh.BATCH, None, "model", None, None)
_LANES = 128  # of a TPU's registers: heads are multiples of it
_PAGES = (512, 1024)  # slots read at a time: half of them too many for a row, on average
_TILE = 16  # slots that are written together: rows of a register in 16 bits


def fits(cfg: ModelConfig, slots: int) -> bool:
    """Whether the devices' kernels take caches of ``slots`` slots of a model."""
    return (
        mesh.platform() == "tpu"
        and cfg.attention == "auto"
        and slots >= FEWEST_SLOTS
        and cfg.head_dim % _LANES == 0
        and cfg.compute_dtype == jnp.bfloat16  # the kernel rounds keys and values to it
        and not any(kind.is_sliding for kind in cfg.kinds)
    )


def whole(slots: int) -> int:
    """At least as many slots, in whole pages."""
    size = _PAGES[slots >= 4 * _PAGES[1]]
    return -(-slots // size) * size


def page(slots: int) -> int:
    """Slots of a page of a cache that has :func:`whole` ones."""
    return max(size for size in _PAGES if slots % size == 0)


def attend(
    q_B1KGH: Float[Array, "B 1 K G H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    length_B: Int[Array, " B"],
    scale: float,
) -> Float[Array, "B 1 K G H"]:
    """Grouped-query attention of one token a row over the first ``length_B`` (i32, from 1) slots.

    **Sharding**: rows over the batch axes, key/value heads over ``model``; nothing is communicated.
    """
    read = functools.partial(by_pages, scale=scale)
    return mesh.on_shards(read, (_HEADS, HELD, HELD, _ROWS), _HEADS)(
        q_B1KGH, k_BKSH, v_BKSH, length_B
    )


def by_pages(q_B1KGH, k_BKSH, v_BKSH, length_B, *, scale: float):
    """:func:`attend` of what one device has; each head of a row is a sequence of its own.

    Queries are in f32, so that what is summed from page to page is, too.
    """
    # Here and not above: Pallas takes a third of a second to import, and a CPU never calls it.
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    rows, _, num_kv, group, head_dim = q_B1KGH.shape
    slots, sequences = k_BKSH.shape[2], rows * num_kv
    size = page(slots)
    num = slots // size

    def in_pages(x_BKSH: jax.Array) -> jax.Array:
        return x_BKSH.reshape(1, sequences * num, size, head_dim)

    has_halves = mesh.cores() == 2 and sequences % 2 == 0
    with rounds.pages(num, slots):
        mixed = paged_attention(
            (q_B1KGH.astype(jnp.float32) * scale).reshape(sequences, group, head_dim),
            in_pages(k_BKSH),
            in_pages(v_BKSH),
            jnp.repeat(length_B, num_kv),
            jnp.arange(sequences * num, dtype=jnp.int32).reshape(sequences, num),
            pages_per_compute_block=1,
            megacore_mode="batch" if has_halves else None,
        )
    return mixed.astype(v_BKSH.dtype).reshape(q_B1KGH.shape)


def write(
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    k_B1KH: Float[Array, "B 1 K H"],
    v_B1KH: Float[Array, "B 1 K H"],
    slot_B: Int[Array, " B"],
) -> tuple[jax.Array, jax.Array]:
    """Put a token's keys and values into a slot of each row, in place once compiled.

    **Sharding**: as :func:`attend`.
    """
    new = P(mesh.BATCH, None, "model", None)
    put = mesh.on_shards(_write, (HELD, HELD, new, new, _ROWS), (HELD, HELD))
    return put(k_BKSH, v_BKSH, k_B1KH, v_B1KH, slot_B)


def _write(k_BKSH, v_BKSH, k_B1KH, v_B1KH, slot_B):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    rows, num_kv, slots, head_dim = k_BKSH.shape

    def put(slot_B, k_new, v_new, k_old, v_old, k_out, v_out):
        """One row's tile of slots; selected in f32, which all TPUs can."""
        place = jax.lax.broadcasted_iota(jnp.int32, (1, num_kv, _TILE, head_dim), 2)
        is_new = place == slot_B[pl.program_id(0)] % _TILE
        for new, old, out in ((k_new, k_old, k_out), (v_new, v_old, v_out)):
            chosen = jnp.where(is_new, new[...].astype(jnp.float32), old[...].astype(jnp.float32))
            out[...] = chosen.astype(out.dtype)

    new = pl.BlockSpec((1, num_kv, 1, head_dim), lambda row, slot_B: (row, 0, 0, 0))
    held = pl.BlockSpec(
        (1, num_kv, _TILE, head_dim), lambda row, slot_B: (row, 0, slot_B[row] // _TILE, 0)
    )
    with rounds.part(_TILE, slots):
        return pl.pallas_call(
            put,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(rows,),
                in_specs=[new, new, held, held],
                out_specs=[held, held],
            ),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BKSH, v_BKSH)],
            input_output_aliases={3: 0, 4: 1},
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
            name="write_cache",
        )(
            slot_B,
            k_B1KH.astype(k_BKSH.dtype).transpose(0, 2, 1, 3),
            v_B1KH.astype(v_BKSH.dtype).transpose(0, 2, 1, 3),
            k_BKSH,
            v_BKSH,
        )
