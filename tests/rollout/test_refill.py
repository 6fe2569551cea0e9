"""Rows decoded in slots are the rows of a batch in step, whatever the number of slots."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import SMALL, drawn_prompts, drawn_weights

from opd_jax import mesh
from opd_jax.models import params, transformer
from opd_jax.models.architecture import Experts, LayerKind
from opd_jax.plan import hlo
from opd_jax.plan.chips import afresh
from opd_jax.rollout import decode, refill
from opd_jax.rollout.sampling import Sampler

CFG = dataclasses.replace(
    SMALL,
    max_positions=40,
    window=4,
    pattern=(LayerKind(is_sliding=True), LayerKind(is_sparse=True)),
    experts=Experts(num=4, top_k=2, ffn=16),
)
ROWS, WIDTH, MAX_NEW = 8, 7, 10
SAMPLER = Sampler(vocab_size=60, stop_ids=(5, 20, 33, 41, 50, 59), pad_id=5)
GREEDY = Sampler(vocab_size=60, temperature=0.0, stop_ids=tuple(range(0, 60, 7)), pad_id=1)
FIELDS = ("ids_BT", "start_B", "mask_BT", "truncated_B", "policy_step")


WEIGHTS = drawn_weights(CFG)


def prompts(num=ROWS):
    return drawn_prompts(num, WIDTH)


def run(slots, *, tree=WEIGHTS, prompt=None, sampler=SAMPLER, samples=1, seed=1, **options):
    prompt = prompts() if prompt is None else prompt
    return decode.sample(
        tree,
        prompt,
        jax.random.key(seed),
        cfg=CFG,
        sampler=sampler,
        max_new=MAX_NEW,
        samples=samples,
        slots=slots,
        **options,
    )


def equal(found, expected):
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(found.logp_BT, expected.logp_BT, atol=2e-5)


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("sampler", "slots"), [(SAMPLER, 1), (SAMPLER, 3), (GREEDY, 3)], ids=["one", "three", "greedy"]
)
def test_any_number_of_slots_gives_the_rows_of_a_batch_in_step(sampler, slots):
    in_step = run(0, sampler=sampler, policy_step=3)
    lengths = np.asarray(in_step.mask_BT).sum(1)
    assert len(set(lengths.tolist())) > 2  # rows end at different times
    equal(run(slots, sampler=sampler, policy_step=3), in_step)


def test_samples_of_a_prompt_bias_and_numbers_of_rows_are_those_of_a_batch_in_step():
    bias_V = np.linspace(-1, 1, CFG.vocab_size).astype(np.float32)
    options = {"samples": 3, "bias_V": bias_V, "rows_B": np.arange(20, 20 + ROWS, dtype=np.int32)}
    in_step = run(0, **options)
    equal(run(4, **options), in_step)
    assert (np.asarray(in_step.ids_BT) != np.asarray(run(0, samples=3).ids_BT)).any()


@pytest.mark.optimized
def test_as_many_slots_as_rows_is_the_batch_in_step_itself():
    in_step, slots = (np.asarray(run(n).logp_BT) for n in (0, ROWS))
    np.testing.assert_array_equal(in_step, slots)


def test_a_loop_takes_as_many_rounds_as_its_slots_need():
    """Rows are started in order, each where one ended first: the schedule on paper."""
    lengths = np.asarray(run(0).mask_BT).sum(1).tolist()
    numbers = np.arange(ROWS, dtype=np.int32)
    numbers[5:] = refill.FILL  # are not started
    for slots, given in ((1, None), (3, numbers), (3, None)):
        rollout, rounds = decode._sample(
            WEIGHTS, prompts(), jax.random.key(1), None, jnp.int32(0), given,
            cfg=CFG, sampler=SAMPLER, max_new=MAX_NEW, samples=1, slots=slots,
        )  # fmt: skip
        started = lengths if given is None else lengths[:5]
        ends = [0] * slots
        for length in started:
            ends[int(np.argmin(ends))] += length
        assert int(rounds) == max(ends) == refill.taken(started, slots)
        found = np.asarray(rollout.mask_BT).sum(1).tolist()
        assert found == started + [0] * (ROWS - len(started))
    in_step = sum(max(lengths[i : i + slots]) for i in range(0, ROWS, slots))
    assert int(rounds) < in_step  # than batches of as many rows, one after the other


@pytest.mark.parametrize(
    "axes", [{"data": 4}, {"data": 2, "fsdp": 2, "model": 2}, {"model": 2}], ids=str
)
def test_a_mesh_changes_no_id(axes):
    alone = run(0, samples=2)
    devices = mesh.make(
        **{"data": 1} | axes, devices=jax.devices()[: int(np.prod([*axes.values()]))]
    )
    slots = 4 if mesh.batch_shards(devices) > 1 else 3
    with jax.set_mesh(devices):
        placed = jax.device_put(WEIGHTS, params.shardings(transformer.specs(CFG), devices))
        rows = mesh.to_global(np.arange(ROWS, dtype=np.int32), devices)
        prompt = mesh.to_global(prompts(), devices)
        split = run(slots, tree=placed, prompt=prompt, samples=2, rows_B=rows)
    assert isinstance(split.ids_BT.sharding, jax.NamedSharding)
    assert split.ids_BT.sharding.spec == jax.P(mesh.BATCH, None)
    equal(split, alone)


def test_bans_are_those_of_the_row_that_a_slot_has():
    prompt, position = prompts(), WIDTH - prompts().start_B
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(1), jnp.arange(ROWS))
    free = np.asarray(run(0).ids_BT)[:, WIDTH:]
    ban = decode.Ban(
        jnp.asarray(np.where(np.arange(ROWS) % 2, free[:, 1], 63)[:, None], jnp.int32),
        jnp.full(ROWS, 1, jnp.int32),
        jnp.full(ROWS, 4, jnp.int32),
    )
    given = {"cfg": CFG, "sampler": SAMPLER, "max_new": MAX_NEW}

    def answer(decoder, room, **more):
        def program(tree, ban):
            h_BD, cache = decode.prefill(tree, prompt, cfg=CFG, size=WIDTH + room)
            return decoder(tree, h_BD, cache, position, keys, ban=ban, **given, **more)

        return jax.jit(program)(WEIGHTS, ban)

    in_step, found = answer(decode.decode, MAX_NEW), answer(refill.decode, 0, slots=3)
    np.testing.assert_array_equal(found.ids_BN, in_step.ids_BN)
    np.testing.assert_array_equal(found.length_B, in_step.length_B)
    np.testing.assert_array_equal(found.is_done_B, in_step.is_done_B)
    moved = (np.asarray(found.ids_BN) != free).any(1)
    assert moved.any()
    assert not moved[::2].any()


def test_a_row_that_fails_leaves_nothing_in_its_slot():
    """Its keys and values are not finite, and weight zero times those is not zero."""
    embed = WEIGHTS["embed"].copy()
    embed[62] = np.nan
    prompt = prompts()
    prompt.ids_BP[1, -1] = 62
    found, whole = (run(n, tree=WEIGHTS | {"embed": embed}, prompt=prompt) for n in (3, 0))
    logp, mask = np.asarray(found.logp_BT), np.asarray(found.mask_BT)
    assert np.isnan(logp[1][mask[1]]).all()
    assert np.isfinite(np.delete(logp, 1, 0)).all()
    np.testing.assert_array_equal(found.ids_BT, whole.ids_BT)


def test_slots_that_devices_cannot_share_are_refused():
    with jax.set_mesh(mesh.make(data=4, devices=jax.devices()[:4])):
        for slots in (-4, 3):
            with pytest.raises(
                ValueError, match=rf"{slots} slots for 8 rows over 4 .*rollout.slots"
            ):
                run(slots)


def test_the_loop_over_tokens_moves_no_cache():
    """Slots are filled and written in place: nothing inside copies a layer's keys or values."""
    lowered = decode._sample.lower(
        WEIGHTS, prompts(), jax.random.key(1), None, jnp.int32(0), None,
        cfg=CFG, sampler=SAMPLER, max_new=MAX_NEW, samples=1, slots=3,
    )  # fmt: skip
    with afresh():  # a kept program has the names of the code that first compiled it
        program = hlo.read(lowered.compile().as_text())
    heads = (3, CFG.num_kv_heads)
    caches = {(*heads, CFG.head_dim, WIDTH + MAX_NEW), (*heads, WIDTH + MAX_NEW, CFG.head_dim)}
    runs = [(op, times) for _, op, times, in_open in program.runs() if in_open]
    assert any(op.kind in ("dynamic-update-slice", "scatter", "fusion") for op, _ in runs)
    moves = [op for op, _ in runs if op.kind in ("copy", "transpose")]
    moved = [op.name for op in moves if op.arrays[0].dims in caches]
    assert not moved, moved
