"""Caches in pages: the kernels of TPUs, interpreted, against products over a whole cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from random_models import SMALL, drawn_prompts, drawn_weights

from opd_jax import mesh
from opd_jax.models import attention, kv_cache, paged, params, transformer
from opd_jax.models.architecture import LayerKind
from opd_jax.rollout import decode

ROWS, HEADS, WIDTH = 4, 2, 128


def drawn(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


@pytest.mark.parametrize("axes", [{}, {"data": 2, "model": 2}], ids=["one", "mesh"])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("slots", [1536, 4096])
def test_each_row_reads_its_own_slots_alone(slots, group, axes):
    """From one slot to all, with the ends of pages; what lies behind them does not matter."""
    size = paged.page(slots)
    length_B = jnp.array([1, size, size + 1, slots], jnp.int32)
    q = drawn(ROWS, 1, HEADS, group, WIDTH)
    k, v = drawn(ROWS, HEADS, slots, WIDTH, seed=1), drawn(ROWS, HEADS, slots, WIDTH, seed=2)
    is_read = jnp.arange(slots)[None, None] < length_B[:, None, None]
    wanted = attention.attend(q, k.transpose(0, 1, 3, 2), v, is_read, 0.2)
    behind = jnp.where(is_read[:, :, :, None], 0.0, 1e4).astype(jnp.bfloat16)
    attend = functools.partial(paged.attend, scale=0.2)
    with pltpu.force_tpu_interpret_mode():
        if axes:
            with jax.set_mesh(mesh.make(**axes, devices=jax.devices()[:4])):
                held = [mesh.constrain(x, *paged.HELD) for x in (k + behind, v + behind)]
                q = mesh.constrain(q, *paged._HEADS)
                found = attend(q, *held, mesh.constrain(length_B, mesh.BATCH))
        else:
            found = attend(q, k + behind, v + behind, length_B)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(found, np.float32), np.asarray(wanted, np.float32), rtol=2**-7, atol=2**-7
    )


@pytest.mark.parametrize("axes", [{}, {"data": 2, "model": 2}], ids=["one", "mesh"])
def test_a_token_is_written_into_a_slot_of_each_row(axes):
    slots = 512
    slot_B = jnp.array([0, 15, 16, slots - 1], jnp.int32)
    k, v = drawn(ROWS, HEADS, slots, WIDTH), drawn(ROWS, HEADS, slots, WIDTH, seed=1)
    new = drawn(ROWS, 1, HEADS, WIDTH, seed=2), drawn(ROWS, 1, HEADS, WIDTH, seed=3)
    with pltpu.force_tpu_interpret_mode():
        if axes:
            with jax.set_mesh(mesh.make(**axes, devices=jax.devices()[:4])):
                held = [mesh.constrain(x, *paged.HELD) for x in (k, v)]
                tokens = [mesh.constrain(x, mesh.BATCH, None, "model", None) for x in new]
                found = paged.write(*held, *tokens, mesh.constrain(slot_B, mesh.BATCH))
        else:
            found = paged.write(k, v, *new, slot_B)
    for old, token, written in zip((k, v), new, found, strict=True):
        wanted = np.array(old.astype(jnp.float32))
        wanted[np.arange(ROWS), :, slot_B] = np.asarray(token[:, 0], np.float32)
        np.testing.assert_array_equal(np.asarray(written, np.float32), wanted)


def test_which_caches_are_in_pages(monkeypatch):
    cfg = dataclasses.replace(SMALL, head_dim=128, dtype="bfloat16")
    assert not paged.fits(cfg, 4096)  # on a CPU
    monkeypatch.setattr(mesh, "platform", lambda: "tpu")
    assert paged.fits(cfg, 4096)
    slides = (LayerKind(is_sliding=True), LayerKind(is_sliding=False))
    for change in (
        {"head_dim": 64},
        {"dtype": "float32"},
        {"attention": "blocks"},
        {"window": 8, "pattern": slides},
    ):
        assert not paged.fits(dataclasses.replace(cfg, **change), 4096), change
    assert not paged.fits(cfg, paged.FEWEST_SLOTS - 1)


@pytest.mark.parametrize("slots", [1, 512, 513, 4095, 4096, 4097, 9000])
def test_caches_have_whole_pages(slots):
    whole = paged.whole(slots)
    assert slots <= whole < slots + paged.page(whole)
    assert whole % paged.page(whole) == 0


def test_a_model_goes_on_from_its_prompts_as_from_a_cache_that_is_read_whole():
    """Prompts and four tokens more, by the kernels themselves; rows that ended read one slot."""
    cfg = dataclasses.replace(SMALL, head_dim=WIDTH, dtype="bfloat16")
    weights = jax.tree.map(jnp.asarray, drawn_weights(cfg))
    prompt = drawn_prompts(ROWS, 21, starts=(0, 4, 5, 20))
    is_on = jnp.array([True, True, False, True])
    found = {}
    with pltpu.force_tpu_interpret_mode():
        for is_paged in (False, True):
            size = kv_cache.whole(25, is_paged)
            h_BD, cache = decode.prefill(weights, prompt, cfg=cfg, size=size, is_paged=is_paged)
            states, flat = [h_BD], transformer.for_decoding(weights, cfg=cfg)
            for step in range(4):
                ids_B1 = jnp.full((ROWS, 1), 7 + step)
                position_B1 = jnp.asarray(21 - prompt.start_B + step)[:, None]
                h_B1D, cache = transformer.hidden(
                    flat, ids_B1, position_B1, is_on[:, None], cfg=cfg, cache=cache
                )
                states.append(h_B1D[:, 0])
            found[is_paged] = np.array(jnp.stack(states).astype(jnp.float32))
    assert np.isfinite(found[True]).all()
    first, rows = found[True][0], np.asarray(is_on)
    np.testing.assert_allclose(first, found[False][0], atol=0.05)
    np.testing.assert_allclose(found[True][:, rows], found[False][:, rows], atol=0.05)
    assert np.abs(np.diff(found[True][:, rows], axis=0)).max() > 0.5  # and tokens matter


def test_a_cache_in_pages_is_repeated_picked_and_grown():
    cfg = dataclasses.replace(SMALL, head_dim=8)
    weights = jax.tree.map(jnp.asarray, drawn_weights(cfg))
    prompt = drawn_prompts(ROWS, 9, starts=(0, 8, 3, 2))
    _, plain = decode.prefill(weights, prompt, cfg=cfg, size=9)
    _, cache = decode.prefill(weights, prompt, cfg=cfg, size=9, is_paged=True)
    length_B = 9 - np.asarray(prompt.start_B)
    np.testing.assert_array_equal(cache.length, length_B)
    order = np.array([2, 0, 2])
    for held, rows in (
        (kv_cache.repeat(cache, 2), np.repeat(np.arange(ROWS), 2)),
        (kv_cache.pick(cache, jnp.asarray(order), 12), order),
        (kv_cache.grow(cache, 12), np.arange(ROWS)),
    ):
        np.testing.assert_array_equal(held.length, length_B[rows])
        for place, row in enumerate(rows):
            start = int(prompt.start_B[row])
            for layer in range(cfg.num_layers):
                keys = np.asarray(plain.keys[layer][row, :, :, start:]).transpose(0, 2, 1)
                values = plain.values[layer][row, :, start:]
                count = length_B[row]
                got = held.keys[layer][place, :, :count], held.values[layer][place, :, :count]
                np.testing.assert_allclose(got[0], keys, atol=2e-5)
                np.testing.assert_allclose(got[1], values, atol=2e-5)
    with pytest.raises(ValueError, match="a cache of 8 slots for 9: expected at least as many"):
        kv_cache.grow(cache, 8)


def test_specs_of_a_cache_in_pages_are_those_of_its_arrays():
    devices = mesh.make(data=2, fsdp=2, model=2)
    cfg = dataclasses.replace(SMALL, head_dim=8)
    weights = jax.tree.map(jnp.asarray, drawn_weights(cfg))
    with jax.set_mesh(devices):
        placed = jax.device_put(weights, params.shardings(transformer.specs(cfg), devices))
        prompt = mesh.to_global(drawn_prompts(8, 9), devices)
        read = jax.jit(functools.partial(decode.prefill, cfg=cfg, size=9, is_paged=True))
        _, cache = read(placed, prompt)
    _, alone = decode.prefill(weights, drawn_prompts(8, 9), cfg=cfg, size=9, is_paged=True)
    assert cache.keys[0].sharding.spec == paged.HELD
    np.testing.assert_array_equal(cache.length, alone.length)
    # Behind a row's own tokens lies what its padding was computed to, which nothing reads.
    is_own = (np.arange(9)[None] < np.asarray(alone.length)[:, None])[:, None, :, None]
    for a, b in zip(cache.keys + cache.values, alone.keys + alone.values, strict=True):
        np.testing.assert_allclose(np.where(is_own, a, 0), np.where(is_own, b, 0), atol=1e-4)
