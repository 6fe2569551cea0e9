"""A rollout is the policy's own: its log-probabilities are those of a full forward, row by row."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import SMALL, drawn_weights

from opd_jax import mesh
from opd_jax.models import params, transformer
from opd_jax.pytrees import Prompt
from opd_jax.rollout import decode
from opd_jax.rollout.sampling import Sampler

CFG = dataclasses.replace(SMALL, qk_norm=True, max_positions=48)
REAL_IDS = 60
STOPS = (5, 20, 33, 41, 50, 59)
SAMPLER = Sampler(vocab_size=REAL_IDS, stop_ids=STOPS, pad_id=5)  # the pad id is a stop id
STARTS = (0, 3, 6, 2)
WIDTH = 7
MAX_NEW = 9
NO_BIAS = np.zeros(CFG.vocab_size, np.float32)
SLOPE = np.linspace(-1, 1, CFG.vocab_size).astype(np.float32)


def towards(ids, by):
    """A bias that raises some ids."""
    bias = NO_BIAS.copy()
    bias[list(ids)] = by
    return bias


WEIGHTS = drawn_weights(CFG)


def prompt_of(starts=STARTS, width=WIDTH):
    """Random prompts; a row's real tokens are the same for every padded width."""
    ids = np.random.default_rng(0).integers(0, REAL_IDS, size=(len(starts), WIDTH))
    padded = np.full((len(starts), width), 1, np.int32)
    padded[:, width - WIDTH :] = ids
    start_B = np.asarray(starts, np.int32) + width - WIDTH
    padded[np.arange(width)[None] < start_B[:, None]] = 1
    return Prompt(ids_BP=padded, start_B=start_B)


def run(
    prompt=None, *, weights=WEIGHTS, seed=1, bias_V=NO_BIAS, policy_step=0, rows_B=None, **options
):
    """One rollout; tests that change only these arguments share one compiled program."""
    prompt = prompt_of() if prompt is None else prompt
    rows_B = np.arange(len(prompt.start_B), dtype=np.int32) if rows_B is None else rows_B
    options = {"sampler": SAMPLER, "max_new": MAX_NEW, "samples": 2} | options
    return decode.sample(
        weights,
        prompt,
        jax.random.key(seed),
        cfg=CFG,
        bias_V=bias_V,
        policy_step=policy_step,
        rows_B=rows_B,
        **options,
    )


def run_counted(bias_V):
    """The same program as ``run``, with its number of decode steps."""
    return decode._sample(
        WEIGHTS,
        prompt_of(),
        jax.random.key(1),
        bias_V,
        jnp.int32(0),
        np.arange(len(STARTS), dtype=np.int32),
        cfg=CFG,
        sampler=SAMPLER,
        max_new=MAX_NEW,
        samples=2,
    )


def new_ids(result, width=WIDTH):
    return np.asarray(result.ids_BT)[:, width:]


def test_log_probabilities_equal_a_full_forward_over_the_same_ids():
    result = run(bias_V=SLOPE)
    ids, mask = np.asarray(result.ids_BT), np.asarray(result.mask_BT)
    valid = np.arange(ids.shape[1])[None] >= np.asarray(result.start_B)[:, None]
    forward = jax.jit(transformer.logits, static_argnames="cfg")
    raw = forward(WEIGHTS, jnp.asarray(ids), cfg=CFG, valid_BT=jnp.asarray(valid))
    z = (np.asarray(raw, np.float64) + SLOPE)[:, :-1, :REAL_IDS]
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    expected = np.take_along_axis(logp, ids[:, 1:, None], axis=2)[..., 0][mask[:, 1:]]
    found = np.asarray(result.logp_BT)
    np.testing.assert_allclose(found[:, 1:][mask[:, 1:]], expected, atol=1e-4)
    assert np.ptp(expected) > 1  # the comparison is not of constants
    np.testing.assert_array_equal(found[~mask], 0)


def test_a_row_ends_with_the_stop_id_that_it_sampled_and_with_nothing_else():
    is_truncated, last_ids, padding = [], set(), 0
    for seed in range(6):
        result = run(seed=seed, policy_step=seed)
        ids, mask = np.asarray(result.ids_BT), np.asarray(result.mask_BT)
        np.testing.assert_array_equal(ids[:, :WIDTH], np.repeat(prompt_of().ids_BP, 2, axis=0))
        np.testing.assert_array_equal(result.start_B, np.repeat(STARTS, 2))
        assert int(result.policy_step) == seed
        assert not mask[:, :WIDTH].any()
        is_stop = np.isin(ids, STOPS)
        for row, truncated in enumerate(np.asarray(result.truncated_B)):
            length = mask[row].sum()
            end = WIDTH + length
            assert mask[row, WIDTH:end].all()
            assert (ids[row, end:] == SAMPLER.pad_id).all()
            assert not is_stop[row, WIDTH : end - 1].any()
            assert is_stop[row, end - 1] != truncated
            assert length == MAX_NEW or not truncated
            is_truncated.append(truncated)
            last_ids.add(int(ids[row, end - 1]))
            padding += MAX_NEW - length
    # All kinds occur: cut off, ended, ended by the id that also pads, and padded.
    assert 0 < np.mean(is_truncated) < 1
    assert SAMPLER.pad_id in last_ids
    assert len(last_ids & set(STOPS)) > 1
    assert padding > 0


def test_decoding_stops_with_the_last_row():
    result, steps = run_counted(towards(STOPS, 3.0))
    longest = int(np.asarray(result.mask_BT).sum(1).max())
    assert 1 < longest < MAX_NEW
    assert int(steps) == longest
    result, steps = run_counted(towards([20], 1e4))
    assert int(steps) == 1
    np.testing.assert_array_equal(new_ids(result)[:, 0], 20)
    np.testing.assert_array_equal(np.asarray(result.mask_BT).sum(1), 1)
    assert not np.asarray(result.truncated_B).any()
    _, steps = run_counted(towards(STOPS, -np.inf))
    assert int(steps) == MAX_NEW


def test_samples_of_a_prompt_share_one_prefill_and_differ(monkeypatch):
    rows = {tuple(row) for row in new_ids(run(bias_V=towards(STOPS, -np.inf))).tolist()}
    assert len(rows) == 2 * len(STARTS)

    seen = []
    forward = transformer.hidden

    def recording(params, ids_BT, *args, **kwargs):
        seen.append(ids_BT.shape)
        return forward(params, ids_BT, *args, **kwargs)

    monkeypatch.setattr(transformer, "hidden", recording)
    decode._sample.clear_cache()  # so that the rollout is traced again, with the recorder
    program = jax.make_jaxpr(lambda weights: run(weights=weights, samples=3))(WEIGHTS)
    assert set(seen) == {(len(STARTS), WIDTH), (3 * len(STARTS), 1)}
    # Only the last prompt position meets the vocabulary, and the loop carries no logits.
    assert f"[{len(STARTS)},{WIDTH},{CFG.vocab_size}]" not in str(program)
    (inner,) = (eqn.params["jaxpr"] for eqn in program.eqns if eqn.params.get("name") == "_sample")
    (loop,) = (eqn for eqn in inner.eqns if eqn.primitive.name == "while")
    carried = [var.aval.shape for var in loop.outvars]
    assert (3 * len(STARTS), MAX_NEW) in carried
    assert (3 * len(STARTS), CFG.vocab_size) not in carried


@pytest.mark.optimized
def test_a_row_does_not_depend_on_its_batch_or_its_padding():
    whole = run()
    ids, logp = new_ids(whole), np.asarray(whole.logp_BT)[:, WIDTH:]
    prompt = prompt_of()
    for rows in ([0, 1], [3, 2]):
        rows = np.array(rows, np.int32)
        part = run(Prompt(prompt.ids_BP[rows], prompt.start_B[rows]), rows_B=rows)
        picked = (rows[:, None] * 2 + np.arange(2)).ravel()
        np.testing.assert_array_equal(new_ids(part), ids[picked])
        np.testing.assert_allclose(np.asarray(part.logp_BT)[:, WIDTH:], logp[picked], atol=1e-5)
    # More columns than the model has positions: padding takes none.
    wide = CFG.max_positions + 2
    np.testing.assert_array_equal(new_ids(run(prompt_of(width=wide)), wide), ids)
    # The row number and the key do matter: without them the rows of a run would repeat.
    for other in (run(rows_B=np.arange(4, 8, dtype=np.int32)), run(seed=2)):
        assert (new_ids(other) != ids).any(axis=1).all()


def test_every_step_and_row_draws_afresh():
    # A model of zeros is uniform over the ids that are not forbidden, whatever was sampled before.
    zeros = jax.tree.map(np.zeros_like, WEIGHTS)
    bias = towards(STOPS, -np.inf)
    results = [run(weights=zeros, bias_V=bias, seed=seed) for seed in range(8)]
    ids = np.concatenate([new_ids(result) for result in results])
    num_ids = REAL_IDS - len(STOPS)
    counts = np.delete(np.bincount(ids.ravel(), minlength=REAL_IDS), STOPS)
    assert counts.size == num_ids
    assert counts.sum() == ids.size
    expected = ids.size / num_ids
    assert np.sum((counts - expected) ** 2 / expected) < num_ids + 5 * np.sqrt(2 * num_ids)
    for equal in (ids[:, 1:] == ids[:, :-1], ids[1:] == ids[:-1]):
        assert equal.mean() < 3 / num_ids
    np.testing.assert_allclose(
        np.asarray(results[0].logp_BT)[:, WIDTH:], -np.log(num_ids), rtol=1e-5
    )


def test_greedy_rollouts_repeat_and_a_bias_forbids_what_they_chose():
    greedy = Sampler(vocab_size=REAL_IDS, temperature=0.0)
    first, again = run(sampler=greedy), run(sampler=greedy, seed=9)
    np.testing.assert_array_equal(first.ids_BT, again.ids_BT)
    chosen = np.unique(new_ids(first))
    other = run(sampler=greedy, bias_V=towards(chosen, -np.inf))
    assert not np.isin(new_ids(other), chosen).any()
    np.testing.assert_array_equal(np.asarray(other.logp_BT), 0)
    assert np.asarray(other.truncated_B).all()  # no stop id exists, so none was sampled


@pytest.mark.optimized
def test_a_mesh_changes_no_id():
    alone = run(bias_V=SLOPE)
    devices = mesh.make(data=2, fsdp=2, model=2)
    with jax.set_mesh(devices):
        placed = jax.device_put(WEIGHTS, params.shardings(transformer.specs(CFG), devices))
        rows = mesh.to_global(np.arange(4, dtype=np.int32), devices)
        split = run(mesh.to_global(prompt_of(), devices), weights=placed, rows_B=rows, bias_V=SLOPE)
    assert split.ids_BT.sharding.spec == jax.P(mesh.BATCH, None)
    for name in ("ids_BT", "start_B", "mask_BT", "truncated_B"):
        np.testing.assert_array_equal(getattr(split, name), getattr(alone, name), err_msg=name)
    np.testing.assert_allclose(split.logp_BT, alone.logp_BT, atol=1e-4)


@pytest.mark.optimized
def test_a_cache_that_grows_in_pieces_changes_no_id():
    assert decode.rooms(512, 4) == (128, 256, 384, 512)
    assert decode.rooms(2, 4) == (1, 2)
    whole, pieces = run(bias_V=SLOPE), run(bias_V=SLOPE, segments=3)
    for name in ("ids_BT", "mask_BT", "truncated_B"):
        np.testing.assert_array_equal(getattr(pieces, name), getattr(whole, name), err_msg=name)
    np.testing.assert_allclose(pieces.logp_BT, whole.logp_BT, atol=1e-5)
    assert np.asarray(whole.mask_BT).sum(1).max() == MAX_NEW  # so that all pieces are used
    program = jax.make_jaxpr(lambda: run(bias_V=SLOPE, segments=3))()
    (inner,) = (eqn.params["jaxpr"] for eqn in program.eqns if eqn.params.get("name") == "_sample")
    widths = [
        max(v.aval.shape[3] for v in eqn.outvars if len(v.aval.shape) == 4)
        for eqn in inner.eqns
        if eqn.primitive.name == "while"
    ]
    assert widths == [WIDTH + 3, WIDTH + 6, WIDTH + 9]  # beside a head of 8


def test_the_compiled_decode_loop_writes_its_cache_in_place():
    lowered = decode._sample.lower(
        WEIGHTS,
        prompt_of(),
        jax.random.key(1),
        NO_BIAS,
        jnp.int32(0),
        np.arange(len(STARTS), dtype=np.int32),
        cfg=CFG,
        sampler=SAMPLER,
        max_new=MAX_NEW,
        samples=2,
    )
    bodies = computations(lowered.compile().as_text())
    rows = 2 * len(STARTS)
    heads = f"f32[{rows},{CFG.num_kv_heads}"
    keys = f"{heads},{CFG.head_dim},{WIDTH + MAX_NEW}]"
    values = f"{heads},{WIDTH + MAX_NEW},{CFG.head_dim}]"
    (name,) = (
        called
        for body in bodies.values()
        for called in re.findall(r"while\(.*body=%?([\w.\-]+)", body)
        if keys in bodies[called] and values in bodies[called]
    )
    inside = "\n".join(reachable(bodies, name))
    assert "dynamic-update-slice(" in inside
    moved = r"= (\S+?)\{\S* (?:copy|transpose)\("
    copies = {shape for shape in re.findall(moved, inside) if shape in (keys, values)}
    assert not copies, copies


def computations(text):
    """The computations of an HLO module, by name."""
    found, name = {}, None
    for line in text.splitlines():
        opened = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if opened:
            name = opened[1]
            found[name] = ""
        elif name is not None:
            found[name] += line + "\n"
    return found


def reachable(bodies, name, seen=None):
    """The text of a computation and of all that it calls."""
    seen = set() if seen is None else seen
    if name in seen:
        return []
    seen.add(name)
    texts = [bodies[name]]
    for called in re.findall(r"(?:calls|body|condition|to_apply)=%?([\w.\-]+)", bodies[name]):
        texts += reachable(bodies, called, seen)
    return texts


def test_failed_samples_show_as_nan():
    broken = WEIGHTS | {"final_norm": np.full_like(WEIGHTS["final_norm"], np.nan)}
    result = run(weights=broken)
    assert np.isnan(np.asarray(result.logp_BT)[np.asarray(result.mask_BT)]).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_new": 42}, "7 tokens and max_new 42 need 49 positions, the model has 48"),
        ({"max_new": 0}, "--config.rollout.max_new"),
        ({"samples": 0}, "--config.rollout.samples"),
        ({"sampler": Sampler(vocab_size=65)}, "the sampler has 65 ids, the model 64"),
        ({"rows_B": np.arange(3)}, r"rows_B has shape \(3,\) for 4 prompts"),
        ({"bias_V": np.zeros(REAL_IDS)}, r"bias has shape \(60,\)"),
        ({"prompt": prompt_of(starts=(0, 7, 2, 1))}, "row 1 starts at 7 of 7 columns"),
    ],
)
def test_what_cannot_be_sampled_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        run(**change)


def test_under_a_trace_the_padded_width_is_the_prompt_length():
    with pytest.raises(ValueError, match="50 tokens and max_new 9 need 59 positions"):
        jax.eval_shape(run, prompt_of(width=50))
