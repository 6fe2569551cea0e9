"""A rollout that reads only those blocks of its cache that hold something, as it does on a TPU."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from random_models import SMALL, drawn_prompts, drawn_weights

from opd_jax import mesh
from opd_jax.models import attention, kv_cache, params, transformer
from opd_jax.models.architecture import LayerKind
from opd_jax.rollout import decode
from opd_jax.rollout.sampling import Sampler

pytestmark = pytest.mark.optimized  # what two programs sample is compared

PLAIN = SMALL
SLIDING = dataclasses.replace(
    PLAIN, window=5, pattern=(LayerKind(is_sliding=True), LayerKind(is_sliding=False))
)
SAMPLER = Sampler(vocab_size=60, stop_ids=(5, 33, 59), pad_id=5)
ROWS, WIDTH, MAX_NEW, SIZE = 8, 7, 14, 4


def run(cfg, weights, prompt, **options):
    return decode.sample(
        weights,
        prompt,
        jax.random.key(1),
        cfg=cfg,
        sampler=SAMPLER,
        max_new=MAX_NEW,
        rows_B=options.pop("rows_B", np.arange(ROWS, dtype=np.int32)),
        **options,
    )


def prompts():
    return drawn_prompts(ROWS, WIDTH, starts=(0, WIDTH - 1))  # of one the first block holds nothing


@functools.cache
def of_whole_caches(cfg):
    """What rows in step sample that read all of their cache."""
    return jax.device_get(run(cfg, drawn_weights(cfg), prompts()))


@pytest.fixture
def in_blocks(monkeypatch):
    """Caches in blocks of four slots from here on; the blocks' loops that were traced."""
    traced = []
    attend_live = attention.attend_live

    def watched(*args, size, **options):
        traced.append((args[1].shape, size))
        return attend_live(*args, size=size, **options)

    def turn_on():
        monkeypatch.setattr(attention, "attend_live", watched)
        monkeypatch.setattr(kv_cache, "block", lambda slots: SIZE if slots % SIZE == 0 else slots)
        monkeypatch.setattr(kv_cache, "whole", lambda slots, is_paged: -(-slots // SIZE) * SIZE)
        jax.clear_caches()  # programs do not know how a cache was read
        return traced

    yield turn_on
    monkeypatch.undo()
    jax.clear_caches()


@pytest.mark.parametrize("axes", [{}, {"data": 2, "fsdp": 2, "model": 2}], ids=["one", "mesh"])
@pytest.mark.parametrize("options", [{}, {"slots": 4}, {"segments": 2}], ids=str)
@pytest.mark.parametrize("cfg", [PLAIN, SLIDING], ids=["plain", "sliding"])
def test_the_rows_are_those_of_a_cache_read_whole(cfg, options, axes, in_blocks):
    weights = drawn_weights(cfg)
    whole = of_whole_caches(cfg)
    assert np.asarray(whole.mask_BT).sum(1).max() == MAX_NEW  # so that all blocks are used
    traced = in_blocks()
    if axes:
        devices = mesh.make(**axes)
        with jax.set_mesh(devices):
            placed = jax.device_put(weights, params.shardings(transformer.specs(cfg), devices))
            rows = mesh.to_global(np.arange(ROWS, dtype=np.int32), devices)
            prompt = mesh.to_global(prompts(), devices)
            found = run(cfg, placed, prompt, rows_B=rows, **options)
    else:
        found = run(cfg, weights, prompts(), **options)
    assert traced  # by each device's own shapes
    rows = options.get("slots", ROWS) // (4 if axes else 1)
    assert {shape[0] for shape, _ in traced} == {rows}
    for name in ("ids_BT", "mask_BT", "truncated_B"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name), err_msg=name)
    np.testing.assert_allclose(found.logp_BT, whole.logp_BT, atol=2e-5)
