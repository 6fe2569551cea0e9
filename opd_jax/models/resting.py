"""A frozen model that rests in the host's memory while nobody asks it.

Between its passes the devices hold only the table that projects to the vocabulary, which the
student's update reads beside the states that the model gave. Values are moved, never changed.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from opd_jax.pytrees import Params

HOST, _DEVICE = "pinned_host", "device"  # kinds of memory, by jax's names


def head(params: Any) -> Any:
    """Of a model's parameters, or what declares them, the table that its head reads.

    Of several models that of each; of none nothing.
    """
    if isinstance(params, tuple):
        return tuple(map(head, params))
    if params is None:  # a run without this model
        return {}
    name = "head" if "head" in params else "embed"  # a tied one's
    return {name: params[name]}


def is_possible(device: Any) -> bool:
    """Whether the host of a device has memory that its arrays may rest in."""
    return HOST in (memory.kind for memory in device.addressable_memories())


def rested(params: Params) -> Params:
    """The parameters in the host's memory, but for those of the head; theirs on devices are freed.

    Args:
      params: arrays, donated, or their shapes and placements.

    **Sharding**: as it was; each process has on its host what its devices had.
    """
    stay = head(params)
    return {**jax.tree.map(_to_host, {n: x for n, x in params.items() if n not in stay}), **stay}


def awake(params: Any) -> Any:
    """The parameters on their devices: new arrays of those that rest, the others as they are."""
    return jax.tree.map(lambda leaf: _moved(leaf, _DEVICE) if is_resting(leaf) else leaf, params)


def is_resting(leaf: Any) -> bool:
    """Whether an array, or what describes one, is in the host's memory."""
    return leaf.sharding is not None and leaf.sharding.memory_kind == HOST


def _to_host(leaf: Any) -> Any:
    moved = _moved(leaf, HOST)
    if isinstance(leaf, jax.Array):
        moved.block_until_ready()
        leaf.delete()
    return moved


def _moved(leaf: Any, kind: str) -> Any:
    place = leaf.sharding.with_memory_kind(kind)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    # Shard by shard: device_put of an array that other processes hold parts of is not for all.
    shards = leaf.addressable_shards
    parts = jax.device_put(
        [shard.data for shard in shards],
        [SingleDeviceSharding(shard.device, memory_kind=kind) for shard in shards],
    )
    return jax.make_array_from_single_device_arrays(leaf.shape, place, parts)
