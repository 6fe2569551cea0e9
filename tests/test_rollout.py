"""A rollout is the policy's own: its log-probabilities are those of a full forward, row by row."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import mesh, model, params, rollout
from opd_jax.model import ModelConfig
from opd_jax.pytrees import Prompt
from opd_jax.sampling import Sampler

CFG = ModelConfig(
    "qwen3",
    vocab_size=64,
    width=16,
    ffn=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    qk_norm=True,
    max_positions=48,
)
REAL_IDS = 60
PLAIN = Sampler(vocab_size=REAL_IDS)
STOPPING = Sampler(vocab_size=REAL_IDS, stop_ids=(5, 20, 33, 41, 50, 59), pad_id=5)
STARTS = (0, 3, 6, 2)
WIDTH = 7
MAX_NEW = 9


@pytest.fixture(scope="module")
def weights():
    """Weights large enough that what is sampled depends on the whole context."""
    drawn = params.init(model.specs(CFG), jax.random.key(0))
    return jax.tree.map(lambda w: w * 12 if w.ndim > 1 and w.shape[0] != 1 else w, drawn) | {
        "embed": drawn["embed"] * 50
    }


def prompt_of(starts=STARTS, width=WIDTH, seed=0):
    """Random prompts; a row's real tokens are the same for every padded width."""
    ids = np.random.default_rng(seed).integers(0, REAL_IDS, size=(len(starts), WIDTH))
    extra = width - WIDTH
    padded = np.full((len(starts), width), 1, np.int32)
    padded[:, extra:] = ids
    for row, start in enumerate(starts):
        padded[row, : start + extra] = 1
    return Prompt(ids_BP=padded, start_B=np.asarray(starts, np.int32) + extra)


def run(weights, prompt=None, *, seed=1, sampler=PLAIN, max_new=MAX_NEW, samples=1, **more):
    prompt = prompt_of() if prompt is None else prompt
    key = jax.random.key(seed)
    return rollout.sample(
        weights, prompt, key, cfg=CFG, sampler=sampler, max_new=max_new, samples=samples, **more
    )


def teacher_forced(weights, result, sampler, bias=0.0):
    """Log-probabilities of a rollout's ids from one full forward without a cache, in float64."""
    ids = np.asarray(result.ids_BT)
    slots = np.arange(ids.shape[1])[None]
    ends = slots.max() - np.asarray(result.mask_BT)[:, ::-1].argmax(1)
    valid = (slots >= np.asarray(result.start_B)[:, None]) & (slots <= ends[:, None])
    raw = model.logits(weights, jnp.asarray(ids), cfg=CFG, valid_BT=jnp.asarray(valid))
    z = (np.asarray(raw, np.float64)[:, :-1, :REAL_IDS] + bias) / sampler.temperature
    z = z - z.max(-1, keepdims=True)
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return np.take_along_axis(logp, ids[:, 1:, None] % REAL_IDS, axis=2)[..., 0]


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_log_probabilities_equal_a_full_forward_over_the_same_ids(weights, temperature):
    sampler = Sampler(vocab_size=REAL_IDS, temperature=temperature, stop_ids=STOPPING.stop_ids)
    bias = np.linspace(-1, 1, CFG.vocab_size).astype(np.float32)
    result = run(weights, sampler=sampler, samples=2, bias_V=bias)
    expected = teacher_forced(weights, result, sampler, bias[:REAL_IDS])
    mask = np.asarray(result.mask_BT)
    found = np.asarray(result.logp_BT)
    np.testing.assert_allclose(found[:, 1:][mask[:, 1:]], expected[mask[:, 1:]], atol=1e-4)
    assert np.ptp(expected[mask[:, 1:]]) > 1  # the comparison is not of constants
    np.testing.assert_array_equal(found[~mask], 0)


def test_a_row_ends_with_the_stop_id_that_it_sampled_and_with_nothing_else(weights):
    result = run(weights, sampler=STOPPING, samples=8, policy_step=17)
    ids, mask = np.asarray(result.ids_BT), np.asarray(result.mask_BT)
    prompt = prompt_of()
    np.testing.assert_array_equal(ids[:, :WIDTH], np.repeat(prompt.ids_BP, 8, axis=0))
    np.testing.assert_array_equal(result.start_B, np.repeat(prompt.start_B, 8))
    assert int(result.policy_step) == 17
    assert not mask[:, :WIDTH].any()
    is_stop = np.isin(ids, STOPPING.stop_ids)
    for row, is_truncated in enumerate(np.asarray(result.truncated_B)):
        length = mask[row].sum()
        end = WIDTH + length
        assert mask[row, WIDTH:end].all()
        assert (ids[row, end:] == STOPPING.pad_id).all()
        assert not is_stop[row, WIDTH : end - 1].any()
        assert is_stop[row, end - 1] != is_truncated
        assert length == MAX_NEW or not is_truncated
    # Both kinds of row occur, and so does a stop id that is not the pad id.
    assert 0 < np.asarray(result.truncated_B).sum() < len(ids)
    assert len(set(ids[mask & is_stop])) > 1
    # The pad id is itself a stop id here: it is scored where sampled and only there.
    assert (ids[:, WIDTH:] == STOPPING.pad_id).sum() > (~mask[:, WIDTH:]).sum()


def test_decoding_stops_with_the_last_row(weights):
    arguments = (weights, prompt_of(), jax.random.key(1))
    options = {"cfg": CFG, "sampler": STOPPING, "max_new": 30, "samples": 1}
    result, steps = rollout._sample(*arguments, None, jnp.int32(0), None, **options)
    longest = int(np.asarray(result.mask_BT).sum(1).max())
    assert 1 < longest < 30
    assert int(steps) == longest
    always_stop = np.where(np.arange(CFG.vocab_size) == 20, 1e4, 0.0).astype(np.float32)
    result, steps = rollout._sample(*arguments, always_stop, jnp.int32(0), None, **options)
    assert int(steps) == 1
    np.testing.assert_array_equal(result.ids_BT[:, WIDTH], 20)
    np.testing.assert_array_equal(result.mask_BT.sum(1), 1)
    assert not result.truncated_B.any()


def test_samples_of_a_prompt_share_one_prefill_and_differ(weights, monkeypatch):
    result = run(weights, samples=3)
    rows = {tuple(row) for row in np.asarray(result.ids_BT)[:, WIDTH:].tolist()}
    assert len(rows) == 3 * len(STARTS)

    seen = []
    forward = model.hidden

    def recording(params, ids_BT, *args, **kwargs):
        seen.append(ids_BT.shape)
        return forward(params, ids_BT, *args, **kwargs)

    monkeypatch.setattr(model, "hidden", recording)
    program = traced(weights, samples=3)
    assert set(seen) == {(len(STARTS), WIDTH), (3 * len(STARTS), 1)}
    # Only the last prompt position meets the vocabulary, and the loop carries no logits.
    assert f"[{len(STARTS)},{WIDTH},{CFG.vocab_size}]" not in str(program)
    carried = [var.aval.shape for eqn in loops_of(program) for var in eqn.outvars]
    assert (3 * len(STARTS), MAX_NEW) in carried
    assert (3 * len(STARTS), CFG.vocab_size) not in carried


def traced(weights, **options):
    """The jaxpr of a rollout, from a function that no earlier trace is cached for."""

    def sample(weights, prompt, key):
        return run_traced(weights, prompt, key, **options)

    return jax.make_jaxpr(sample)(weights, prompt_of(), jax.random.key(0))


def run_traced(weights, prompt, key, *, samples=1):
    return rollout._sample.__wrapped__(
        weights, prompt, key, None, jnp.int32(0), None,
        cfg=CFG, sampler=PLAIN, max_new=MAX_NEW, samples=samples,
    )  # fmt: skip


def loops_of(program):
    return [eqn for eqn in program.jaxpr.eqns if eqn.primitive.name == "while"]


def test_a_row_does_not_depend_on_its_batch_or_its_padding(weights):
    whole = run(weights, samples=2)
    ids, logp = np.asarray(whole.ids_BT)[:, WIDTH:], np.asarray(whole.logp_BT)[:, WIDTH:]
    prompt = prompt_of()
    for rows in ([0, 1], [3, 1]):
        rows = np.array(rows, np.int32)
        part = run(
            weights, Prompt(prompt.ids_BP[rows], prompt.start_B[rows]), samples=2, rows_B=rows
        )
        picked = (rows[:, None] * 2 + np.arange(2)).ravel()
        np.testing.assert_array_equal(np.asarray(part.ids_BT)[:, WIDTH:], ids[picked])
        np.testing.assert_allclose(np.asarray(part.logp_BT)[:, WIDTH:], logp[picked], atol=1e-5)
    wide = run(weights, prompt_of(width=WIDTH + 5), samples=2)
    np.testing.assert_array_equal(np.asarray(wide.ids_BT)[:, WIDTH + 5 :], ids)
    longer = run(weights, max_new=MAX_NEW + 4, samples=2)
    np.testing.assert_array_equal(np.asarray(longer.ids_BT)[:, WIDTH : WIDTH + MAX_NEW], ids)
    # The row number and the key do matter: without them the samples of a run would repeat.
    other_rows = run(weights, samples=2, rows_B=np.arange(4, 8, dtype=np.int32))
    other_key = run(weights, samples=2, seed=2)
    for other in (other_rows, other_key):
        assert (np.asarray(other.ids_BT)[:, WIDTH:] != ids).any(axis=1).all()


def test_every_step_and_row_draws_afresh(weights):
    # A model of zeros is uniform over the real ids, at every step and in every row.
    zeros = jax.tree.map(jnp.zeros_like, weights)
    result = run(zeros, samples=32, max_new=16)
    ids = np.asarray(result.ids_BT)[:, WIDTH:]
    expected = ids.size / REAL_IDS
    counts = np.bincount(ids.ravel(), minlength=REAL_IDS)
    assert len(counts) == REAL_IDS
    chi2 = np.sum((counts - expected) ** 2 / expected)
    assert chi2 < REAL_IDS + 5 * np.sqrt(2 * REAL_IDS)
    for pairs in (ids[:, 1:] == ids[:, :-1], ids[1:] == ids[:-1]):
        assert pairs.mean() < 3 / REAL_IDS
    np.testing.assert_allclose(np.asarray(result.logp_BT)[:, WIDTH:], -np.log(REAL_IDS), rtol=1e-5)


def test_greedy_rollouts_repeat_and_a_bias_forbids_what_they_chose(weights):
    greedy = Sampler(vocab_size=REAL_IDS, temperature=0.0)
    first, again = run(weights, sampler=greedy), run(weights, sampler=greedy, seed=9)
    np.testing.assert_array_equal(first.ids_BT, again.ids_BT)
    mask = np.asarray(first.mask_BT)
    chosen = np.unique(np.asarray(first.ids_BT)[mask])
    bias = np.zeros(CFG.vocab_size, np.float32)
    bias[chosen] = -np.inf
    other = run(weights, sampler=greedy, bias_V=bias)
    assert not np.isin(np.asarray(other.ids_BT)[mask], chosen).any()
    np.testing.assert_array_equal(np.asarray(other.logp_BT), 0)


def test_a_mesh_changes_no_id(weights):
    bias = np.linspace(-1, 1, CFG.vocab_size).astype(np.float32)
    options = {"sampler": STOPPING, "samples": 2, "bias_V": bias}
    alone = run(weights, **options)
    devices = mesh.make(data=2, fsdp=2, model=2)
    with jax.set_mesh(devices):
        placed = jax.device_put(weights, params.shardings(model.specs(CFG), devices))
        rows = mesh.to_global(np.arange(4, dtype=np.int32), devices)
        split = run(placed, mesh.to_global(prompt_of(), devices), rows_B=rows, **options)
    assert split.ids_BT.sharding.spec == jax.P(mesh.BATCH, None)
    for name in ("ids_BT", "start_B", "mask_BT", "truncated_B"):
        np.testing.assert_array_equal(getattr(split, name), getattr(alone, name), err_msg=name)
    np.testing.assert_allclose(split.logp_BT, alone.logp_BT, atol=1e-4)


def test_the_compiled_decode_loop_writes_its_cache_in_place(weights):
    lowered = jax.jit(run_traced).lower(weights, prompt_of(), jax.random.key(0))
    text = lowered.compile().as_text()
    slots = f"{CFG.num_layers},{len(STARTS)},{WIDTH + MAX_NEW},{CFG.num_kv_heads},{CFG.head_dim}"
    bodies = computations(text)
    decode = [name for name in re.findall(r"body=%?([\w.\-]+)", text) if slots in bodies[name]]
    assert decode
    inside = "\n".join(reachable(bodies, decode[-1]))
    copies = re.findall(rf"f32\[{slots}\]\S* copy\(", inside)
    assert not copies, copies


def computations(text):
    """Bodies of an HLO module's computations, by name."""
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


def test_failed_samples_show_as_nan(weights):
    broken = weights | {"final_norm": jnp.full_like(weights["final_norm"], jnp.nan)}
    result = run(broken)
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
def test_what_cannot_be_sampled_is_refused(weights, change, words):
    with pytest.raises(ValueError, match=words):
        run(weights, **change)


def test_padding_takes_no_positions(weights):
    # Seven real tokens in sixty columns fit a model of 48 positions, on concrete prompts.
    result = run(weights, prompt_of(width=60), max_new=2)
    np.testing.assert_array_equal(
        np.asarray(result.ids_BT)[:, 60:], np.asarray(run(weights).ids_BT)[:, WIDTH : WIDTH + 2]
    )
    with pytest.raises(ValueError, match="60 tokens and max_new 2 need 62 positions"):
        jax.eval_shape(lambda prompt: run(weights, prompt, max_new=2), prompt_of(width=60))
