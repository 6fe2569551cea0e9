"""What is needed is known before it is taken, and told with what lowers it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
import tiny_run

from opd_jax import mesh
from opd_jax.models import kv_cache, memory, params, transformer
from opd_jax.models.memory import FitError, Need

CFG = dataclasses.replace(tiny_run.MODEL, num_kv_heads=4)
MESHES = [{"data": 1}, {"data": 4}, {"data": 2, "fsdp": 2, "model": 2}]


def of_one_device(tree) -> int:
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == first
    )


def on_mesh(sizes):
    return mesh.make(**sizes, devices=jax.devices()[: math.prod(sizes.values())])


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_take_what_arrays_take(sizes, dtype):
    made = on_mesh(sizes)
    with jax.set_mesh(made):
        tree = params.init(transformer.specs(CFG), jax.random.key(0), dtype=dtype)
    assert memory.weights(CFG, dtype, made) == of_one_device(tree)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_cache_takes_what_arrays_take(sizes):
    made, rows, slots = on_mesh(sizes), 8, 24
    shape = (CFG.num_layers, rows, CFG.num_kv_heads)

    def begin():
        k_LBKHT = jnp.zeros((*shape, CFG.head_dim, 3))
        return kv_cache.start(
            jax.reshard(k_LBKHT, jax.P(None, *kv_cache.AXES)),
            jax.reshard(k_LBKHT.swapaxes(3, 4), jax.P(None, *kv_cache.AXES)),
            jax.reshard(jnp.ones((rows, 3), bool), jax.P(mesh.BATCH, None)),
            slots,
        )

    with jax.set_mesh(made):
        cache = jax.jit(begin)()
    assert memory.cache(CFG, rows, slots, made) == of_one_device((cache.keys, cache.values))


def test_what_does_not_fit_names_the_parts_and_what_lowers_the_largest(monkeypatch):
    made = on_mesh({"data": 1})
    needs = [Need("the student", 2 * 2**30, "fewer layers"), Need("keys", 5 * 2**30, "lower rows")]
    memory.check(needs, made)  # this machine has as much
    monkeypatch.setattr(memory, "device_bytes", lambda _: 6 * 2**30)
    with pytest.raises(FitError) as caught:
        memory.check(needs, made)
    message = str(caught.value)
    assert "at least 7 GiB are needed on each device (the student 2 GiB, keys 5 GiB)" in message
    assert "at most the 6 GiB that it has; lower rows" in message
    monkeypatch.setattr(memory, "device_bytes", lambda _: None)
    memory.check(needs, made)


def test_only_memory_counts_as_exhausted():
    assert memory.is_exhausted(MemoryError())
    assert memory.is_exhausted(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"))
    assert not memory.is_exhausted(jax.errors.JaxRuntimeError("INTERNAL: broken"))
    assert not memory.is_exhausted(ValueError("RESOURCE_EXHAUSTED"))
