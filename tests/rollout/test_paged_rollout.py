"""A rollout whose cache is in pages, as on a TPU, its kernels exchanged for plain products."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import SMALL, drawn_prompts, drawn_weights

from opd_jax import mesh
from opd_jax.models import attention, kv_cache, paged, params, transformer
from opd_jax.rollout import decode, refill
from opd_jax.rollout.sampling import Sampler

pytestmark = pytest.mark.optimized  # what two programs sample is compared

BIASED = dataclasses.replace(SMALL, qkv_bias=True, qk_norm=True)
SAMPLER = Sampler(vocab_size=60, stop_ids=(5, 33, 59), pad_id=5)
ROWS, WIDTH, MAX_NEW, PAGE = 8, 7, 14, 4


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
    return drawn_prompts(ROWS, WIDTH, starts=(0, WIDTH - 1))


@functools.cache
def unpaged(cfg, samples=1):
    return jax.device_get(run(cfg, drawn_weights(cfg), prompts(), samples=samples))


def read_plainly(q_B1KGH, k_BKSH, v_BKSH, length_B, *, scale):
    is_read = jnp.arange(k_BKSH.shape[2])[None, None] < length_B[:, None, None]
    return attention.attend(q_B1KGH, k_BKSH.transpose(0, 1, 3, 2), v_BKSH, is_read, scale)


def write_plainly(k_BKSH, v_BKSH, k_B1KH, v_B1KH, slot_B):
    rows = jnp.arange(len(slot_B))
    return (
        k_BKSH.at[rows, :, slot_B].set(k_B1KH[:, 0]),
        v_BKSH.at[rows, :, slot_B].set(v_B1KH[:, 0]),
    )


@pytest.fixture
def in_pages(monkeypatch):
    """Caches in pages of four slots from here on; the shapes of those that were traced."""
    traced = []

    def watched(q_B1KGH, k_BKSH, *args, **options):
        traced.append(k_BKSH.shape)
        return read_plainly(q_B1KGH, k_BKSH, *args, **options)

    def turn_on():
        monkeypatch.setattr(paged, "fits", lambda cfg, slots: True)
        monkeypatch.setattr(paged, "_PAGES", (PAGE, PAGE))
        monkeypatch.setattr(paged, "by_pages", watched)
        monkeypatch.setattr(paged, "_write", write_plainly)
        jax.clear_caches()  # programs do not know how a cache was read
        return traced

    yield turn_on
    monkeypatch.undo()
    jax.clear_caches()


@pytest.mark.parametrize("axes", [{}, {"data": 2, "fsdp": 2, "model": 2}], ids=["one", "mesh"])
@pytest.mark.parametrize(
    "options",
    [{}, {"slots": 4}, {"segments": 2}, {"samples": 2}, {"samples": 2, "slots": 4}],
    ids=str,
)
@pytest.mark.parametrize("cfg", [SMALL, BIASED], ids=["plain", "biased"])
def test_the_rows_are_those_of_a_cache_without_pages(cfg, options, axes, in_pages):
    weights = drawn_weights(cfg)
    wanted = unpaged(cfg, options.get("samples", 1))
    length_B = np.asarray(wanted.mask_BT).sum(1)
    assert length_B.max() == MAX_NEW  # so that all pages are used
    assert length_B.min() < MAX_NEW // 2  # and rows end while others go on
    traced = in_pages()
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
    rows = options.get("slots", ROWS * options.get("samples", 1)) // (4 if axes else 1)
    assert {shape[0] for shape in traced} == {rows}
    assert all(shape[2] % PAGE == 0 for shape in traced)
    for name in ("ids_BT", "mask_BT", "truncated_B", "start_B"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)
    np.testing.assert_allclose(found.logp_BT, wanted.logp_BT, atol=2e-5)


@pytest.mark.parametrize("slots", [0, 2])
def test_picked_rows_go_on_as_without_pages(slots, in_pages):
    """What a knockout's trials do: one prefill, and answers of some of its rows, several times."""
    weights, prompt = jax.tree.map(jnp.asarray, drawn_weights(SMALL)), prompts()
    pick_R = jnp.array([5, 1, 1, 0])
    keys_R = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(2), jnp.arange(4))

    def answers(is_paged):
        h_PD, cache = decode.prefill(weights, prompt, cfg=SMALL, size=WIDTH, is_paged=is_paged)
        size = WIDTH if slots else kv_cache.whole(WIDTH + MAX_NEW, is_paged)
        given = (
            weights,
            h_PD[pick_R],
            kv_cache.pick(cache, pick_R, size),
            WIDTH - jnp.asarray(prompt.start_B)[pick_R],
            keys_R,
        )
        how = {"cfg": SMALL, "sampler": SAMPLER, "max_new": MAX_NEW}
        if slots:
            return refill.decode(*given, **how, slots=slots)
        return decode.decode(*given, **how)

    wanted = answers(False)
    traced = in_pages()
    found = answers(True)
    assert traced
    np.testing.assert_array_equal(found.ids_BN, wanted.ids_BN)
    np.testing.assert_array_equal(found.length_B, wanted.length_B)
    np.testing.assert_allclose(found.logp_BN, wanted.logp_BN, atol=2e-5)
