"""A rollout that reads only those blocks of its cache that hold something, as it does on a TPU."""

import dataclasses

import jax
import numpy as np
import pytest
from random_models import drawn_weights

from opd_jax import mesh
from opd_jax.models import attention, kv_cache, params, transformer
from opd_jax.models.transformer import LayerKind, ModelConfig
from opd_jax.pytrees import Prompt
from opd_jax.rollout import decode
from opd_jax.rollout.sampling import Sampler

# Other programs than users get, and kept from one test to the next: all compiled as users do.
pytestmark = pytest.mark.optimized

PLAIN = ModelConfig(
    "qwen3",
    vocab_size=64,
    width=16,
    ffn=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
)
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
    rng = np.random.default_rng(1)
    start_B = rng.integers(0, WIDTH, size=ROWS).astype(np.int32)
    start_B[0], start_B[1] = 0, WIDTH - 1  # a row whose first block holds nothing
    ids_BP = rng.integers(0, 60, size=(ROWS, WIDTH)).astype(np.int32)
    ids_BP[np.arange(WIDTH)[None] < start_B[:, None]] = 1
    return Prompt(ids_BP=ids_BP, start_B=start_B)


@pytest.fixture
def in_blocks(monkeypatch):
    """Caches in blocks of four slots from here on; the blocks' loops that were traced."""
    jax.clear_caches()  # programs do not know how a cache was read
    traced = []
    attend_live = attention.attend_live

    def watched(*args, size, **options):
        traced.append((args[1].shape, size))
        return attend_live(*args, size=size, **options)

    def turn_on():
        monkeypatch.setattr(attention, "attend_live", watched)
        monkeypatch.setattr(kv_cache, "block", lambda slots: SIZE if slots % SIZE == 0 else slots)
        monkeypatch.setattr(kv_cache, "whole", lambda slots: -(-slots // SIZE) * SIZE)
        jax.clear_caches()
        return traced

    yield turn_on
    monkeypatch.undo()
    jax.clear_caches()


@pytest.mark.parametrize("axes", [{}, {"data": 2, "fsdp": 2, "model": 2}], ids=["one", "mesh"])
@pytest.mark.parametrize("options", [{}, {"slots": 4}, {"segments": 2}], ids=str)
@pytest.mark.parametrize("cfg", [PLAIN, SLIDING], ids=["plain", "sliding"])
def test_the_rows_are_those_of_a_cache_read_whole(cfg, options, axes, in_blocks):
    weights = drawn_weights(cfg)
    whole = run(cfg, weights, prompts(), **options)
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
