"""Mesh axes, mesh construction, and host data to global arrays.

All programs run under explicit sharding: an array's type carries its placement, and an operation
that would silently gather a sharded axis is refused at trace time. Without a mesh the helpers below
do nothing, so the same functions run on one device with no set-up at all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "model")
BATCH = ("data", "fsdp")  # the batch is split over both; parameters over fsdp and model


def make(data: int = -1, fsdp: int = 1, model: int = 1, devices=None) -> Mesh:
    """Build the ``data x fsdp x model`` mesh; one axis may be -1 and takes what is left.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "model": model}
    free = [name for name, size in sizes.items() if size == -1]
    bad = {name: size for name, size in sizes.items() if size < 1 and size != -1}
    if len(free) > 1 or bad:
        raise ValueError(
            f"mesh axes {sizes}: expected positive sizes and at most one -1; "
            "set --config.mesh.data / .fsdp / .model"
        )
    known = math.prod(size for size in sizes.values() if size != -1)
    if free and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh axes {sizes} ask for {math.prod(abs(s) for s in sizes.values())} devices, found "
            f"{len(devices)}: change --config.mesh.data / .fsdp / .model to multiply to that"
        )
    return jax.make_mesh(tuple(sizes[a] for a in AXES), AXES, devices=devices)


def regrouped(mesh: Mesh, model: int) -> Mesh:
    """The same devices in the same order with ``model`` of them along that axis; 0: as they are.

    Raises:
      ValueError: they do not divide so.
    """
    data, fsdp, now = (mesh.shape[axis] for axis in AXES)
    if model in (0, now):
        return mesh
    group = model // now
    is_whole = model == group * now and data * fsdp % max(group, 1) == 0
    if not is_whole or max(group, fsdp) % min(group, fsdp):
        raise ValueError(
            f"mesh.rollout_model is {model} for a mesh of data {data} x fsdp {fsdp} x model {now}: "
            f"expected 0 or {now} times a number that divides fsdp, or fsdp and then data; set "
            "--config.mesh.rollout_model"
        )
    shape = (data, fsdp // group) if group <= fsdp else (data * fsdp // group, 1)
    devices = mesh.devices.reshape(*shape, model)
    return Mesh(devices, AXES, axis_types=mesh.axis_types)


def is_active() -> bool:
    """Whether code is being run or traced under ``jax.set_mesh``."""
    return not jax.sharding.get_abstract_mesh().empty


def platform() -> str:
    """Kind of device that is traced for (``cpu``, ``tpu``, ...): the mesh's, else the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def cores() -> int:
    """Cores of a device that is traced for, which work together as one on some TPUs."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return getattr(jax.devices()[0], "num_cores", None) or 1
    return device.num_cores or 1


def size(axis: str | tuple[str, ...]) -> int:
    """Number of shards along an axis (or several) of the current mesh, 1 without a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    names = (axis,) if isinstance(axis, str) else axis
    return math.prod(shape.get(name, 1) for name in names)


def out(*spec) -> P | None:
    """The ``out_sharding=`` argument of an operation; None without a mesh."""
    return P(*spec) if is_active() else None


def constrain(x: jax.Array, *spec) -> jax.Array:
    """Move ``x`` to the given placement (a no-op without a mesh)."""
    return jax.sharding.reshard(x, P(*spec)) if is_active() else x


def replicated(tree):
    """Move every leaf of ``tree`` to all devices (a no-op without a mesh)."""
    return jax.tree.map(lambda x: constrain(x, *([None] * x.ndim)), tree) if is_active() else tree


def repeat_rows(x: jax.Array, n: int, *rest) -> jax.Array:
    """Each row ``n`` times in a row (b0, b0, b1, b1, ...), every copy on the device of its row.

    ``rest`` are the mesh axes of the other dimensions, all None where left out.
    """
    rest = rest or (None,) * (x.ndim - 1)
    spread = jnp.broadcast_to(x[:, None], (x.shape[0], n, *x.shape[1:]))
    merged = (x.shape[0] * n, *x.shape[1:])
    return jax.lax.reshape(
        constrain(spread, BATCH, None, *rest), merged, out_sharding=out(BATCH, *rest)
    )


def text(shape: Mapping[str, int]) -> str:
    """The axes of a mesh and their sizes, in words."""
    return " x ".join(f"{axis} {size}" for axis, size in shape.items())


def on_shards(function: Callable[..., Any], given: Any, made: Any) -> Callable[..., Any]:
    """``function`` of what each device has; as it is without a mesh.

    Args:
      function: of arrays.
      given, made: trees of specs for its arguments and results.
    """
    if not is_active():
        return function
    return jax.shard_map(function, in_specs=given, out_specs=made, check_vma=False)


def placed(tree, mesh: Mesh):
    """Abstract leaves with their place on the devices of ``mesh``; one without a place is on all.

    ``jax.eval_shape`` says how a leaf is split, but not over which devices, and nothing at all of
    scalars.
    """

    def place(leaf):
        spec = leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


def moved(tree, to: Mesh, dtypes=None, run: Callable[..., Any] | None = None):
    """The leaves of ``tree`` as they would lie on another arrangement of the same devices.

    Args:
      tree: arrays; those that lie on no mesh stay as they are.
      to: the arrangement; devices in the order that they have.
      dtypes: of each leaf, a tree like it; default: their own.
      run: called with the program and its arrays, for a caller that watches it.
    """
    leaves, structure = jax.tree.flatten(tree)
    wanted = [x.dtype for x in leaves] if dtypes is None else jax.tree.leaves(dtypes)
    here = [i for i, x in enumerate(leaves) if isinstance(x.sharding, NamedSharding)]
    places = tuple(NamedSharding(to, leaves[i].sharding.spec) for i in here)
    move = _mover(places, tuple(wanted[i] for i in here))
    arrays = [leaves[i] for i in here]
    for i, x in zip(here, run(move, *arrays) if run else move(*arrays), strict=True):
        leaves[i] = x
    return structure.unflatten(leaves)


@functools.lru_cache
def _mover(places: tuple[NamedSharding, ...], dtypes: tuple) -> Any:
    """The program that lays arrays out anew."""
    return jax.jit(
        lambda *arrays: tuple(
            x if x.dtype == dtype else x.astype(dtype)
            for x, dtype in zip(arrays, dtypes, strict=True)
        ),
        out_shardings=places,
    )


def batch_shards(mesh: Mesh) -> int:
    """Parts that a batch is split into: its rows are a multiple of this."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_rows(wanted: int, mesh: Mesh) -> int:
    """``wanted`` rows, rounded up to what divides over the batch shards."""
    shards = batch_shards(mesh)
    return -(-wanted // shards) * shards


def own(rows: int) -> slice:
    """Which of a batch's rows this process hands to :func:`to_global`."""
    share = rows // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def own_rows(tree):
    """Those rows of every leaf of a host batch; scalars as they are."""
    return jax.tree.map(lambda x: x[own(len(x))] if np.ndim(x) else x, tree)


def to_global(tree, mesh: Mesh):
    """Turn each process's rows into global arrays, split over the batch axes by their first axis.

    Scalars (rank 0) are replicated.

    Raises:
      ValueError: the rows do not divide over the batch shards.
    """
    shards = batch_shards(mesh)

    def put(x):
        x = np.asarray(x)
        if x.ndim == 0:
            return jax.make_array_from_process_local_data(NamedSharding(mesh, P()), x)
        rows = x.shape[0] * jax.process_count()
        if rows % shards:
            raise ValueError(
                f"{rows} rows do not divide over {shards} batch shards (mesh data x fsdp): change "
                "--config.train.prompts, --config.rollout.samples or the mesh"
            )
        return jax.make_array_from_process_local_data(
            NamedSharding(mesh, P(BATCH, *([None] * (x.ndim - 1)))), x
        )

    return jax.tree.map(put, tree)


def to_host(tree):
    """Fetch a pytree to every process as numpy arrays, whatever its placement."""

    def get(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            from jax.experimental import multihost_utils

            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(get, tree)
