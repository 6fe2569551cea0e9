"""An array put together on its devices, a bounded block at a time.

A leaf that is stacked by layers, or by layers and experts, may be larger than the host's memory. It
is born as zeros on its devices, and each block is written into its place there.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

# Of one block on the host. Enough that a block takes far longer to read than to hand over.
BLOCK_BYTES = 32 * 2**20

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How an array is cut: the same part of every device's shard is one block.

    Attributes:
      shape: of the array.
      sharding: its placement; None: on the default device.
      size: of a block in a shard, along the leading axes that are cut; (): the array is one block.
    """

    shape: tuple[int, ...]
    sharding: NamedSharding | None
    size: tuple[int, ...]

    @property
    def shard(self) -> tuple[int, ...]:
        """Shape of a shard of the array."""
        return self.shape if self.sharding is None else self.sharding.shard_shape(self.shape)

    @property
    def block(self) -> tuple[int, ...]:
        """Shape of a block over all shards."""
        pairs = zip(self.size, self.shape, self.shard, strict=False)
        cut = tuple(size * (whole // shard) for size, whole, shard in pairs)
        return cut + self.shape[len(cut) :]

    def starts(self) -> Iterator[tuple[int, ...]]:
        """Where each block begins in every shard, along the axes that are cut."""
        pairs = zip(self.shard, self.size, strict=False)
        return itertools.product(*(range(0, shard, size) for shard, size in pairs))

    def index(self, of_block: Index, start: Sequence[int]) -> Index:
        """Where a part of a block lies in the array."""
        found = list(of_block)
        for axis, (size, first) in enumerate(zip(self.size, start, strict=True)):
            number = of_block[axis].indices(self.block[axis])[0] // size  # of the shard
            begin = number * self.shard[axis] + first
            found[axis] = slice(begin, begin + size)
        return tuple(found)


def blocks(
    shape: Sequence[int],
    sharding: NamedSharding | None,
    dtype: Any,
    *,
    lead: int,
) -> Blocks:
    """Cut an array into blocks that take a process at most ``BLOCK_BYTES``, if its axes allow.

    Args:
      shape, sharding, dtype: of the array; without a sharding it lies on the default device.
      lead: leading axes that may be cut.
    """
    whole = tuple(shape) if sharding is None else sharding.shard_shape(tuple(shape))
    rest = math.prod(whole) * jnp.dtype(dtype).itemsize * _most_shards(sharding, tuple(shape))
    if rest <= BLOCK_BYTES:
        return Blocks(tuple(shape), sharding, ())
    sizes = []
    for axis in range(lead):  # the last one is cut only where one index of those before is too much
        rest //= whole[axis]
        fitting = [n for n in range(1, whole[axis] + 1) if whole[axis] % n == 0]
        sizes.append(max((n for n in fitting if n * rest <= BLOCK_BYTES), default=1))
        if sizes[-1] * rest <= BLOCK_BYTES:
            break
    return Blocks(tuple(shape), sharding, tuple(sizes))


def _most_shards(sharding: NamedSharding | None, shape: tuple[int, ...]) -> int:
    """Different shards that any one process holds: all of them must cut alike."""
    if sharding is None:
        return 1
    held: dict[int, set] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        spans = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        held.setdefault(device.process_index, set()).add(spans)
    return max(map(len, held.values()))


def written(
    cut: Blocks,
    dtype: Any,
    read: Callable[[Index], np.ndarray],
    so_far: jax.Array | None,
    start: Sequence[int],
) -> jax.Array:
    """The array with one more block in its place.

    Args:
      cut: how it is cut.
      dtype: of it.
      read: gives the values at an index of the array.
      so_far: what this gave for the block before, donated; None: this is the first.
      start: of the block, one of ``cut.starts()``.
    """
    seen: dict[Any, np.ndarray] = {}  # replicas on other local devices ask for the same part

    def part(of_block: Index | None) -> np.ndarray:
        assert of_block is not None
        index = cut.index(of_block, start)
        key = tuple(s.indices(n) for s, n in zip(index, cut.shape, strict=True))
        if key not in seen:
            seen[key] = read(index)
        return seen[key]

    if cut.sharding is None:
        block = jax.device_put(part((slice(None),) * len(cut.shape)))
    else:
        block = jax.make_array_from_callback(cut.block, cut.sharding, part)
    if not cut.size:
        return block
    if so_far is None:
        make = functools.partial(jnp.zeros, cut.shape, dtype)
        so_far = jax.jit(make, out_shardings=cut.sharding)()
    else:
        so_far.block_until_ready()  # no more than two blocks of it wait on the host
    return _put(so_far, block, tuple(map(np.int32, start)), sharding=cut.sharding)


@functools.partial(jax.jit, static_argnames=("sharding",), donate_argnames=("array",))
def _put(array: jax.Array, block: jax.Array, start: tuple, *, sharding) -> jax.Array:
    """Write a block into every shard, at the same place of each."""

    def local(array, block, start):
        rest = (0,) * (array.ndim - len(start))
        return jax.lax.dynamic_update_slice(array, block, (*start, *rest))

    if sharding is None:
        return local(array, block, start)
    specs = (sharding.spec, sharding.spec, jax.sharding.PartitionSpec())
    placed = jax.shard_map(
        local, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec, check_vma=False
    )
    return placed(array, block, start)
