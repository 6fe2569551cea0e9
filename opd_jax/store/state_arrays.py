"""The leaves of a train state as the arrays that a checkpoint stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, SingleDeviceSharding


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by dotted path, in tree order.

    Raises:
      TypeError: a leaf that is no array, or two of one name.
    """
    leaves = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not hasattr(leaf, "dtype") or name in leaves:
            raise TypeError(
                f"leaf {name!r} is a {type(leaf).__name__}{' (twice)' * (name in leaves)}; "
                "expected arrays under unique names; keep other values out of the state"
            )
        leaves[name] = leaf
    return leaves


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a PRNG key, which is stored as the numbers it consists of."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def describe(leaf: Any) -> dict[str, Any]:
    """Shape and dtype of a leaf, as ``record.json`` has them."""
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}  # names a key's implementation too


def raw(leaf: Any) -> Any:
    """The array that is stored of a leaf."""
    if is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.array(leaf)  # numpy: a copy, it is mutable


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """What orbax is asked for: the stored array on the template's placement."""
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        sharding = NamedSharding(jax.sharding.get_mesh(), sharding.spec)  # from eval_shape
    if is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def unraw(array: Any, leaf: Any, key_impl: str | None) -> Any:
    """Back from what is stored; empty arrays are not stored at all (orbax refuses them)."""
    if array is None:
        return jax.device_put(np.zeros(leaf.shape, leaf.dtype), abstract(leaf).sharding)
    return jax.random.wrap_key_data(array, impl=key_impl) if key_impl else array


def check(path: Path, saved: dict, wanted: dict, partial: bool) -> None:
    """Check that what was saved is what is wanted.

    Args:
      path: of the checkpoint.
      saved: what :func:`describe` said of each leaf.
      wanted: the leaves to be read.
      partial: whether the checkpoint may have more.

    Raises:
      ValueError: leaves are missing, are too many, or have another shape or dtype.
    """
    problems = [f"{n} is not in the checkpoint" for n in wanted if n not in saved]
    if not partial:
        problems += [f"{n} is only in the checkpoint" for n in saved if n not in wanted]
    for name in wanted.keys() & saved.keys():
        if saved[name] != (want := describe(wanted[name])):
            problems.append(
                f"{name} is {saved[name]['dtype']}{saved[name]['shape']} in the checkpoint and "
                f"{want['dtype']}{want['shape']} in this run"
            )
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{path} does not fit this run: {'; '.join(sorted(problems)[:5])}{more}; expected the "
            "same model, optimizer and rock settings; set them back or give another --workdir"
        )
