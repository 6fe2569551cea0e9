"""Keys and values of earlier tokens, an array per layer, laid out as the decode loop reads them.

Keys lie with slots last and values with slots second to last, so that both products of
``attention.attend`` take them as they are: a layer's slice of one stacked array, or slots before
heads, would be copied for every token (LOG.md has what that cost).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from opd_jax import mesh
from opd_jax.models import paged

AXES = tuple(paged.HELD)
_TILE = 128  # slots of a TPU's register: blocks are whole ones
_BLOCK = range(12, 24)  # tiles of a block; the loop's own cost grows below (LOG.md has by how much)


@struct.dataclass
class Cache:
    """What a decode loop carries; one cursor serves all rows (prompts are left-padded), or each
    has its own where rows began at different times, or where they begin at slot 0: in pages.

    **Sharding**: rows over the batch axes, heads over ``model``.
    """

    keys: tuple[jax.Array, ...]  # per layer [B, K, H, S]; in pages [B, K, S, H]
    values: tuple[jax.Array, ...]  # per layer [B, K, S, H]
    valid_BS: jax.Array | None  # [B, S] bool, slots that hold a real token; None in pages
    length: jax.Array  # [] i32, slots written so far; [B]: of each row
    is_paged: bool = struct.field(pytree_node=False, default=False)

    @property
    def size(self) -> int:
        """Slots of a row."""
        return self.values[0].shape[2]

    @property
    def key_slots(self) -> int:
        """The axis of the slots in keys."""
        return 2 if self.is_paged else 3


def block(slots: int) -> int:
    """Slots that a token reads at a time; all of them where reading those in use gains nothing.

    That is where a slice of the cache is copied before a product takes it: on all but TPUs.
    """
    if mesh.platform() != "tpu" or slots % _TILE:
        return slots
    fitting = [_TILE * size for size in _BLOCK if slots % (_TILE * size) == 0]
    return min(fitting, key=lambda size: abs(size - 16 * _TILE), default=slots)


def whole(slots: int, is_paged: bool = False) -> int:
    """At least as many slots, few more, that are whole blocks where a cache is read in those."""
    if is_paged:
        return paged.whole(slots)
    if mesh.platform() != "tpu" or slots < _BLOCK[-1] * _TILE:
        return slots
    num = round(slots / (16 * _TILE))
    return -(-slots // (num * _TILE)) * num * _TILE


def start(
    k_LBKHT: Float[Array, "L B K H T"] | Float[Array, "L B K T H"],
    v_LBKTH: Float[Array, "L B K T H"],
    valid_BT: Bool[Array, "B T"],
    size: int,
    is_paged: bool = False,
) -> Cache:
    """A cache of ``size`` slots whose first T hold what a prefill computed.

    In pages, keys are given as values are, and rows begin with their first token.

    Raises:
      ValueError: fewer slots than tokens.
    """
    num_layers, rest = k_LBKHT.shape[0], size - valid_BT.shape[1]
    if rest < 0:
        raise ValueError(
            f"a cache of {size} slots for {valid_BT.shape[1]} tokens: expected at least as many"
        )

    def grown(x: jax.Array, axis: int, *axes) -> jax.Array:
        widths = [(0, rest if a == axis else 0) for a in range(x.ndim)]
        return mesh.constrain(jnp.pad(x, widths), *axes)

    length = jnp.asarray(valid_BT.shape[1], jnp.int32)
    return Cache(
        keys=tuple(grown(k_LBKHT[i], 2 if is_paged else 3, *AXES) for i in range(num_layers)),
        values=tuple(grown(v_LBKTH[i], 2, *AXES) for i in range(num_layers)),
        valid_BS=None if is_paged else grown(valid_BT, 1, mesh.BATCH, None),
        length=jnp.sum(valid_BT, axis=1, dtype=jnp.int32) if is_paged else length,
        is_paged=is_paged,
    )


def grow(cache: Cache, size: int) -> Cache:
    """The same cache with ``size`` slots.

    Raises:
      ValueError: fewer slots than the cache has.
    """
    rest = _rest(cache, size)

    def grown(x: jax.Array, axis: int, *axes) -> jax.Array:
        widths = [(0, rest if a == axis else 0) for a in range(x.ndim)]
        return mesh.constrain(jnp.pad(x, widths), *axes)

    return dataclasses.replace(
        cache,
        keys=tuple(grown(x, cache.key_slots, *AXES) for x in cache.keys),
        values=tuple(grown(x, 2, *AXES) for x in cache.values),
        valid_BS=None if cache.valid_BS is None else grown(cache.valid_BS, 1, mesh.BATCH, None),
    )


def _rest(cache: Cache, size: int) -> int:
    rest = size - cache.size
    if rest < 0:
        raise ValueError(f"a cache of {size} slots for {cache.size}: expected at least as many")
    return rest


def repeat(cache: Cache, n: int) -> Cache:
    """Each row ``n`` times in a row, for several samples of one prompt: ``mesh.repeat_rows``."""

    def copies(x: jax.Array) -> jax.Array:
        return mesh.repeat_rows(x, n, *AXES[1:])

    return dataclasses.replace(
        cache,
        keys=jax.tree.map(copies, cache.keys),
        values=jax.tree.map(copies, cache.values),
        valid_BS=None if cache.valid_BS is None else mesh.repeat_rows(cache.valid_BS, n),
        length=mesh.repeat_rows(cache.length, n) if cache.length.ndim else cache.length,
    )


def pick(cache: Cache, row_R: Int[Array, " R"], size: int) -> Cache:
    """Some rows, each as often as it is named, in a cache of ``size`` slots.

    **Sharding**: a row may be picked from another device's; what moves is what it holds so far.

    Raises:
      ValueError: fewer slots than the cache has.
    """
    rest = _rest(cache, size)

    def picked(x: jax.Array, slots: int, *axes) -> jax.Array:
        rows = x.at[row_R].get(out_sharding=mesh.out(*axes))
        widths = [(0, rest if axis == slots else 0) for axis in range(x.ndim)]
        return mesh.constrain(jnp.pad(rows, widths), *axes)

    length = cache.length
    if length.ndim:
        length = length.at[row_R].get(out_sharding=mesh.out(mesh.BATCH))
    return dataclasses.replace(
        cache,
        keys=tuple(picked(x, cache.key_slots, *AXES) for x in cache.keys),
        values=tuple(picked(x, 2, *AXES) for x in cache.values),
        valid_BS=None if cache.valid_BS is None else picked(cache.valid_BS, 1, mesh.BATCH, None),
        length=length,
    )


def extend(cache: Cache, valid_BT: Bool[Array, "B T"]) -> Cache:
    """Move the cursor over ``T`` more slots; each layer then fills them with :func:`write`."""
    length = cache.length + valid_BT.shape[1]
    if cache.valid_BS is None:
        return dataclasses.replace(cache, length=length)
    valid_BS = _put(cache.valid_BS, valid_BT, cache.length, 1, mesh.BATCH, None)
    return dataclasses.replace(cache, valid_BS=valid_BS, length=length)


def write(
    cache: Cache, layer: int, k_BTKH: Float[Array, "B T K H"], v_BTKH: Float[Array, "B T K H"]
) -> Cache:
    """Put one layer's keys and values into the last ``T`` slots (in place once compiled).

    In pages ``T`` is 1.
    """
    first = cache.length - k_BTKH.shape[1]
    if cache.is_paged:
        held = cache.keys[layer], cache.values[layer]
        k_BKSH, v_BKSH = paged.write(*held, k_BTKH, v_BTKH, first)
        return dataclasses.replace(
            cache,
            keys=(*cache.keys[:layer], k_BKSH, *cache.keys[layer + 1 :]),
            values=(*cache.values[:layer], v_BKSH, *cache.values[layer + 1 :]),
        )

    def put(old: tuple[jax.Array, ...], new: jax.Array, axis: int) -> tuple[jax.Array, ...]:
        new = new.astype(old[layer].dtype)
        written = _put(old[layer], new, first, axis, *AXES)
        return (*old[:layer], written, *old[layer + 1 :])

    return dataclasses.replace(
        cache,
        keys=put(cache.keys, k_BTKH.transpose(0, 2, 3, 1), 3),
        values=put(cache.values, v_BTKH.transpose(0, 2, 1, 3), 2),
    )


def _put(old: jax.Array, new: jax.Array, first: jax.Array, axis: int, *axes) -> jax.Array:
    """``new`` written into ``old`` along an axis, from ``first`` on ([B]: each row from its own).

    **Sharding**: ``axes`` of both; a device writes what it has.
    """
    if not first.ndim:
        return jax.lax.dynamic_update_slice_in_dim(old, new, first, axis=axis)

    def put_row(old_S, new_T, first):
        return jax.lax.dynamic_update_slice_in_dim(old_S, new_T, first, axis=axis - 1)

    place, rows = jax.P(*axes), jax.P(mesh.BATCH)
    return mesh.on_shards(jax.vmap(put_row), (place, place, rows), place)(old, new, first)
