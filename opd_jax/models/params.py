"""One declaration per parameter, from which shapes, placements and initial values all follow.

A model describes itself as a nested dict of :class:`ParamSpec`. The three functions here turn that
dict into abstract arrays (for ahead-of-time compilation and checkpoint templates), into shardings
(for loading and for ``jit``), or into random values.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from opd_jax import mesh as meshlib
from opd_jax.pytrees import Params

Specs = dict[str, Any]  # nested dict with ParamSpec leaves


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Shape, placement and initial values of one parameter array.

    Attributes:
      shape: sizes of the dimensions.
      axes: mesh axis name (or None) per dimension.
      std: standard deviation of the normal initial values; 0 gives constants.
      mean: mean of the initial values.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    std: float = 0.0
    mean: float = 0.0

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(
                f"parameter shape {self.shape} has {len(self.shape)} dimensions, axes {self.axes} "
                f"name {len(self.axes)}: expected one mesh axis (or None) per dimension"
            )


def count(specs: Specs) -> int:
    """Number of scalar parameters."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs))


def abstract(specs: Specs, dtype, mesh: Mesh | None = None) -> Params:
    """Shape-and-dtype stand-ins for every parameter, with their placement where a mesh is given.

    Raises:
      ValueError: a dimension does not divide over its mesh axis.
    """
    if mesh is None:
        return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype), specs)
    return jax.tree.map(
        lambda spec, place: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=place),
        specs,
        shardings(specs, mesh),
    )


def shardings(specs: Specs, mesh: Mesh) -> Params:
    """The placement of every parameter on ``mesh``.

    Raises:
      ValueError: a dimension does not divide over its mesh axis.
    """

    def place(path, spec: ParamSpec) -> NamedSharding:
        for dim, (size, axis) in enumerate(zip(spec.shape, spec.axes, strict=True)):
            if axis is not None and size % mesh.shape[axis]:
                name = "/".join(str(key.key) for key in path)
                raise ValueError(
                    f"parameter {name} has shape {spec.shape}: dimension {dim} of size {size} does "
                    f"not divide over {mesh.shape[axis]} shards of mesh axis '{axis}'; choose "
                    f"--config.mesh.{axis} so that it divides {size}"
                )
        return NamedSharding(mesh, P(*spec.axes))

    return jax.tree_util.tree_map_with_path(place, specs)


def init(specs: Specs, key: jax.Array, dtype=jnp.float32) -> Params:
    """Draw initial values; under a mesh each array is born in its own placement (call under jit).

    The draw does not depend on the mesh.
    """
    leaves, tree = jax.tree.flatten(specs)

    def draw(spec: ParamSpec, leaf_key: jax.Array) -> jax.Array:
        if spec.std == 0.0:
            value = jnp.full(spec.shape, spec.mean, dtype)
        else:
            value = spec.mean + spec.std * jax.random.normal(leaf_key, spec.shape, jnp.float32)
        return meshlib.constrain(value.astype(dtype), *spec.axes)

    keys = jax.random.split(key, len(leaves))
    return tree.unflatten([draw(spec, keys[i]) for i, spec in enumerate(leaves)])
