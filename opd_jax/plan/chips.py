"""The machines that a run can be compiled for without having them, and what their chips can do.

Numbers are those of the makers' public tables, of one chip: peak of dense bfloat16 products, memory
and its bandwidth, links to other chips (read November 2025):

- TPU v5e: cloud.google.com/tpu/docs/v5e (197 TFLOP/s, 16 GB, 819 GB/s, 1,600 Gbit/s, 4 links)
- TPU v5p: cloud.google.com/tpu/docs/v5p (459 TFLOP/s, 95 GB, 2,765 GB/s, 4,800 Gbit/s, 6 links)
- TPU v6e: cloud.google.com/tpu/docs/v6e (918 TFLOP/s, 32 GB, 1,640 GB/s, 3,200 Gbit/s, 4 links)
- H100 SXM: nvidia.com/en-us/data-center/h100 (989 TFLOP/s, 80 GB, 3.35 TB/s, NVLink 900 GB/s)

What a program may fill of a TPU's memory is what its compiler says when it refuses one. A
collective runs along one axis of the mesh, for which a TPU has two of its links.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax import mesh as meshlib
from opd_jax.models import memory

_GIB, _GBIT = 2**30, 1e9 / 8


class TopologyError(ValueError):
    """There is no such machine, or what compiles for it is missing; the message says which."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a machine.

    Attributes:
      name: as users write it.
      flops: of bfloat16 products, a second.
      memory: bytes that programs may fill; 0: not known.
      bandwidth: of that memory, bytes a second.
      link: bytes a second that it sends along one axis of the mesh.
      clock: cycles a second in which its compiler counts; 0: it counts none.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    clock: float = 0.0


# A product takes a cycle for 2 x 4 x 128 x 128 operations on a v5e, twice and four times that on
# the others; the clocks follow from the peaks.
_TPUS = {
    "v5e": Chip("v5e", 197e12, 15.75 * _GIB, 819e9, 1600 * _GBIT * 2 / 4, 197e12 / 131_072),
    "v5p": Chip("v5p", 459e12, 95.74 * _GIB, 2765e9, 4800 * _GBIT * 2 / 6, 459e12 / 262_144),
    "v6e": Chip("v6e", 918e12, 31.25 * _GIB, 1640e9, 3200 * _GBIT * 2 / 4, 918e12 / 524_288),
}
_H100 = Chip("h100", 989e12, 80e9 - 1.5 * _GIB, 3350e9, 450e9)
_NO_TPU = {  # libtpu compiles: it is to look for no TPU around this machine, and to lock none
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
TOPOLOGIES = ("v5e:4x4", "v5p:2x2x4", "v6e:4x4", "h100:8", "cpu:8")


@dataclasses.dataclass(frozen=True)
class Machine:
    """Chips in their topology.

    Attributes:
      name: as users write it, ``CHIP:SHAPE``.
      chip: what each can do.
      devices: described or virtual, to make a mesh of.
      options: of the compiler.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def machine(name: str) -> Machine:
    """The machine of a name such as ``v5p:2x2x4``.

    Raises:
      TopologyError: there is none, or a package that compiles for it is missing.
    """
    kind, _, shape = name.partition(":")
    known = ", ".join(TOPOLOGIES)
    if kind not in (*_TPUS, "h100", "cpu"):
        raise TopologyError(
            f"topology {name!r}: no chip {kind!r} is known; expected one such as {known} (other "
            "shapes of these chips work too); set --topology"
        )
    sides = shape.split("x")
    if not all(side.isascii() and side.isdigit() and 0 < int(side) <= 4096 for side in sides):
        raise TopologyError(
            f"topology {name!r}: found the shape {shape!r}, expected numbers joined by x, such as "
            f"{known}; set --topology"
        )
    if kind in _TPUS:
        return Machine(name, _TPUS[kind], _tpus(name))
    if len(sides) > 1:
        raise TopologyError(f"topology {name!r}: expected {kind}:N, N devices; set --topology")
    if kind == "cpu":
        devices = _cpus(int(shape))
        return Machine(name, _this_machine(devices), devices)
    # Tiles of Triton's products are chosen by running them: without a GPU, cuBLAS computes them.
    return Machine(name, _H100, _gpus(int(shape)), {"xla_gpu_enable_triton_gemm": False})


def _tpus(name: str) -> tuple[Any, ...]:
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(
            f"topology {name!r} is compiled for by libtpu, which is not installed: expected the "
            "extra plan; pip install 'opd-jax[plan]', or take --topology=cpu:8"
        )
    for variable, value in _NO_TPU.items():
        os.environ.setdefault(variable, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # the runtime raises what it likes
        short = " ".join(str(error).split())[:200]
        raise TopologyError(
            f"topology {name!r}: libtpu describes no such machine ({short}); expected one such as "
            f"{', '.join(TOPOLOGIES[:3])}; set --topology"
        ) from error
    return tuple(found.devices)


def _gpus(count: int) -> tuple[Any, ...]:
    from jax.experimental import topologies

    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        raise TopologyError(
            f"topology 'h100:{count}' is compiled for by the CUDA plugin of jax, which is not "
            "installed: expected the extra cuda; pip install 'opd-jax[cuda]', or take another "
            "--topology"
        )
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # of libraries that run things
    try:
        found = topologies.get_topology_desc(
            platform="cuda",
            topology_name="h100",
            target_config=_H100_TARGET,
            topology=f"1x1x{count}",
        )
    except Exception as error:  # the runtime raises what it likes
        short = " ".join(str(error).split())[:300]
        raise TopologyError(
            f"topology 'h100:{count}': the CUDA plugin of this jax cannot describe it ({short}); "
            "expected one that compiles without a GPU; take another --topology"
        ) from error
    return tuple(found.devices)


# Of an H100 SXM5 of 80 GB, as XLA describes a GPU (stream_executor's GpuTargetConfigProto).
_H100_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def _cpus(count: int) -> tuple[Any, ...]:
    """Virtual devices of this machine, of which there must be enough before jax begins."""
    with contextlib.suppress(RuntimeError):  # begun already
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise TopologyError(
            f"topology 'cpu:{count}' needs {count} virtual devices, and jax has begun with "
            f"{len(devices)}: expected no more, or a process of its own; set --topology, or "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return tuple(devices[:count])


def _this_machine(devices: tuple[Any, ...]) -> Chip:
    """One of the devices that share this machine, measured by a product and by a copy."""
    count, side = len(devices), 1024
    a = jnp.ones((side, side), jnp.float32)
    product, copy = jax.jit(jnp.matmul), jax.jit(jnp.negative)
    wide = jnp.ones((1 << 24,), jnp.float32)
    flops = 2 * side**3 / _seconds(lambda: product(a, a).block_until_ready())
    bandwidth = 2 * wide.nbytes / _seconds(lambda: copy(wide).block_until_ready())
    whole = memory.device_bytes(meshlib.make(devices=devices)) or 0.0
    return Chip("cpu", flops / count, whole, bandwidth / count, bandwidth / count)


def _seconds(run) -> float:
    """Best of a few."""
    run()
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begun)
    return best


@contextlib.contextmanager
def afresh() -> Iterator[None]:
    """Compile without jax's cache: a program for a TPU can be read from it only where one is."""
    from jax.experimental.compilation_cache import compilation_cache

    config: Any = jax.config
    was = config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", was)
        compilation_cache.reset_cache()
