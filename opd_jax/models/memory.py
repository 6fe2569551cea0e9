"""What models need of a device's memory, known before anything is allocated.

These are lower bounds, of what is certain to be there at one time: the compiler adds temporaries. A
number that is out by a factor of a thousand is told at once, with the key that lowers it.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opd_jax import mesh as meshlib
from opd_jax.models import params, transformer
from opd_jax.models.transformer import ModelConfig

_GIB = 2**30


class FitError(ValueError):
    """Something cannot fit into the devices; the message says what is needed and what lowers it."""


@dataclasses.dataclass(frozen=True)
class Need:
    """A part of what has to be in a device's memory.

    Attributes:
      what: in words.
      num_bytes: on each device.
      change: what lowers it.
    """

    what: str
    num_bytes: float
    change: str


def weights(
    cfg: ModelConfig,
    dtype,
    mesh: Mesh,
    part: Callable[[params.Specs], params.Specs] | None = None,
) -> float:
    """Bytes of a model's parameters, or the part of them that is given, on each device."""
    specs = transformer.specs(cfg)
    specs = jax.tree.leaves(specs if part is None else part(specs))

    def on_device(spec: params.ParamSpec) -> float:
        shards = math.prod(mesh.shape[axis] for axis in spec.axes if axis is not None)
        return math.prod(spec.shape) / shards

    return sum(map(on_device, specs)) * jnp.dtype(dtype).itemsize


def cache(cfg: ModelConfig, rows: int, slots: int, mesh: Mesh) -> float:
    """Bytes of the keys and values of ``rows`` answers of ``slots`` tokens on each device."""
    rows_here = rows / meshlib.batch_shards(mesh)
    heads = cfg.num_kv_heads / mesh.shape["model"]
    numbers = 2 * cfg.num_layers * rows_here * slots * heads * cfg.head_dim
    return numbers * cfg.compute_dtype.itemsize


def states(width: int, rows: int, slots: int, itemsize: int, mesh: Mesh) -> float:
    """Bytes of one hidden state per token on each device."""
    return rows / meshlib.batch_shards(mesh) * slots * width * itemsize


def device_bytes(mesh: Mesh) -> float | None:
    """Memory of one device, as far as it is known; devices of a CPU share the machine's."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        try:
            return (
                os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(mesh.local_devices)
            )
        except (ValueError, OSError, AttributeError):
            return None
    local = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    found = (local[0].memory_stats() or {}) if local else {}
    return found.get("bytes_limit")


def check(needs: Sequence[Need], mesh: Mesh) -> None:
    """Check that what is needed together fits into one device.

    Raises:
      FitError: it cannot; names the parts and what lowers the largest.
    """
    limit, total = device_bytes(mesh), sum(need.num_bytes for need in needs)
    if limit is None or total <= limit:
        return
    largest = max(needs, key=lambda need: need.num_bytes)
    parts = ", ".join(f"{n.what} {text(n.num_bytes)}" for n in needs if n.num_bytes > total / 1000)
    raise FitError(
        f"at least {text(total)} are needed on each device ({parts}): expected at most the "
        f"{text(limit)} that it has; {largest.change}"
    )


def is_exhausted(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a device or on the host."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError)
        and ("resource_exhausted" in text or "out of memory" in text)
    )


def advice(what: str, error: BaseException, needs: Sequence[Need], change: str) -> str:
    """What to do about memory that ran out: what is there anyway, and what lowers the rest.

    Args:
      what: was being done.
      error: that said so.
      needs: what is in memory all along.
      change: what lowers what was being done.
    """
    short = " ".join(str(error).split())[:200] or type(error).__name__
    there = ", ".join(f"{need.what} {text(need.num_bytes)}" for need in needs)
    anyway = f"; in memory all along on each device: {there}" * bool(there)
    return f"memory ran out while {what} ({short}){anyway}: expected it to fit; {change}"


def text(num_bytes: float) -> str:
    """Bytes in words: 12.3 GiB, 4e+09 GiB."""
    return f"{num_bytes / _GIB:.3g} GiB"
