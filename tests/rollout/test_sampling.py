"""Sampling draws from the distribution it reports, and never what a filter or bias removes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import mesh
from opd_jax.rollout import inversion, sampling
from opd_jax.rollout.sampling import Sampler

SAMPLE = jax.jit(sampling.sample, static_argnames="sampler")


def logits_of(rows, num_ids, seed=0, scale=2.0):
    return (np.random.default_rng(seed).normal(size=(rows, num_ids)) * scale).astype(np.float32)


def keys_of(rows, seed=0):
    return jax.random.split(jax.random.key(seed), rows)


def reference_log_probs(logits, sampler, bias=0.0):
    """The sampling distribution of one row in float64, the filters spelled out on sorted ids."""
    z = np.asarray(logits, np.float64) + bias
    z[sampler.vocab_size :] = -np.inf
    z = z / sampler.temperature
    keep = np.isfinite(z)
    if sampler.top_k:
        keep &= z >= np.sort(z)[-sampler.top_k]
    if sampler.top_p < 1:
        order = np.argsort(-np.where(keep, z, -np.inf), kind="stable")
        p = np.where(keep, np.exp(z - z[keep].max()), 0)[order]
        mass = np.cumsum(p / p.sum())
        size = int(np.searchsorted(mass, sampler.top_p)) + 1  # the first prefix with that mass
        in_set = np.zeros_like(keep)
        in_set[order[:size]] = True
        keep &= in_set
    if sampler.min_p:
        keep &= np.exp(z - z.max()) >= sampler.min_p
    z = np.where(keep, z, -np.inf)
    return z - z[keep].max() - np.log(np.exp(z - z[keep].max())[keep].sum())


def draw(logits, sampler, draws, bias=None, seed=0):
    """Many draws of one row, as one batch of equal rows."""
    bias = None if bias is None else jnp.asarray(bias, jnp.float32)
    rows = jnp.tile(jnp.asarray(logits)[None], (draws, 1))
    ids, logp = SAMPLE(rows, keys_of(draws, seed), sampler=sampler, bias_V=bias)
    return np.asarray(ids), np.asarray(logp)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    ],
    ids=lambda fields: "-".join(fields) or "plain",
)
def test_draws_follow_the_float64_distribution_and_report_its_log_probability(fields):
    sampler = Sampler(vocab_size=45, **fields)
    logits, bias = logits_of(1, 48)[0], np.linspace(-1, 1, 48)
    expected = reference_log_probs(logits, sampler, bias)
    draws = 8192
    ids, logp = draw(logits, sampler, draws, bias)
    kept = np.flatnonzero(np.isfinite(expected))
    assert set(ids) <= set(kept)
    np.testing.assert_allclose(logp, expected[ids], atol=2e-6)
    # Pearson's statistic over the ids that are expected often enough has mean `cells` and variance
    # 2 x cells; five standard deviations above it does not happen by chance.
    p = np.exp(expected[kept])
    counts = np.bincount(ids, minlength=48)[kept]
    often = p * draws >= 5
    chi2 = np.sum((counts - p * draws)[often] ** 2 / (p * draws)[often])
    cells = often.sum()
    assert chi2 < cells + 5 * np.sqrt(2 * cells), (chi2, cells)


@pytest.mark.parametrize(
    "fields",
    [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.5}, {"top_k": 99}],
)
def test_filters_keep_exactly_the_reference_sets(fields):
    sampler = Sampler(vocab_size=61, **fields)
    logits_BV = logits_of(6, 64, seed=1)
    logits_BV[:, 61:] = -np.inf
    z_BV = jnp.asarray(logits_BV - logits_BV.max(1, keepdims=True))
    kept = np.asarray(sampling.keep(z_BV, sampler=sampler))
    if sampler.top_k > 61:
        fields, sampler = {}, Sampler(vocab_size=61)
    for row in range(6):
        expected = np.isfinite(reference_log_probs(logits_BV[row], sampler))
        np.testing.assert_array_equal(kept[row], expected)


def test_ties_are_kept_together_and_the_best_id_always_stays():
    z_BV = jnp.array([[0.0, 0.0, 0.0, -1.0]])
    for fields in ({"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}):
        kept = sampling.keep(z_BV, sampler=Sampler(vocab_size=4, **fields))
        np.testing.assert_array_equal(kept, [[True, True, True, False]])


def test_greedy_is_the_argmax_with_log_probability_zero():
    logits_BV, bias_V = logits_of(9, 40), np.zeros(40, np.float32)
    bias_V[:20] = -np.inf
    sampler = Sampler(vocab_size=33, temperature=0)
    ids, logp = SAMPLE(
        jnp.asarray(logits_BV), keys_of(9), sampler=sampler, bias_V=jnp.asarray(bias_V)
    )
    np.testing.assert_array_equal(ids, 20 + logits_BV[:, 20:33].argmax(1))
    np.testing.assert_array_equal(logp, np.zeros(9))


@pytest.mark.parametrize("low", [-np.inf, -1e30, -100.0])
def test_bias_forbids_ids_and_stays_finite(low):
    logits = logits_of(1, 30)[0]
    bias = np.full(30, low, np.float32)
    bias[[4, 17]] = 0
    ids, logp = draw(logits, Sampler(vocab_size=30), 256, bias)
    assert set(ids) == {4, 17}
    pair = logits[[4, 17]].astype(np.float64)
    expected = dict(zip([4, 17], pair - np.logaddexp(*pair), strict=True))
    np.testing.assert_allclose(logp, [expected[i] for i in ids], atol=1e-6)


@pytest.mark.parametrize("num_ids", [1, 2, 3, 16, 17, 50])
@pytest.mark.parametrize("uniform", [0.0, 0.5, np.nextafter(np.float32(1), np.float32(0))])
def test_the_ends_of_the_uniform_range_never_give_an_impossible_id(num_ids, uniform):
    uniform_2 = jnp.full(2, uniform, jnp.float32)
    for allowed in {0, num_ids // 2, num_ids - 1}:
        z_V = jnp.full(num_ids, -jnp.inf).at[allowed].set(0.0)
        id_, logp = inversion._draw(z_V, uniform_2)
        assert (int(id_), float(logp)) == (allowed, 0.0)


def test_a_rounded_prefix_sum_never_gives_an_id_without_mass():
    # Prefix sums of these lose the small entries, so targets near the total pass no prefix cleanly.
    mass = np.zeros(301, np.float32)
    mass[[3, 100, 250]] = [1.0, 1e-9, 1e-9]
    for uniform in np.linspace(0, 1, 97, dtype=np.float32):
        assert mass[int(inversion._invert(jnp.asarray(mass), jnp.float32(uniform)))] > 0


def test_ids_rarer_than_the_spacing_of_one_uniform_can_all_be_drawn():
    # 2**16 - 1 ids share 0.02 % of the mass, 3e-9 each; one f32 uniform moves in steps of 1.2e-7
    # and would reach one in forty of them.
    num_ids, width = 2**16, 2**8
    z_V = jnp.full(num_ids, np.log(2e-4 / (num_ids - 1)), jnp.float32).at[0].set(0.0)
    inside = (jnp.arange(width) + 0.5) / width
    uniforms = jnp.stack([jnp.full(width, 1 - 1e-4), inside], axis=1)
    ids, _ = jax.jit(jax.vmap(inversion._draw, in_axes=(None, 0)))(z_V, uniforms)
    ids = np.asarray(ids)
    assert ids[0] % width == 0
    np.testing.assert_array_equal(ids, ids[0] + np.arange(width))


@pytest.mark.optimized
def test_a_row_depends_on_its_own_key_only():
    logits_BV, keys = jnp.asarray(logits_of(6, 64, scale=0.5)), keys_of(6)
    whole, _ = SAMPLE(logits_BV, jax.random.clone(keys), sampler=Sampler(vocab_size=64))
    order = np.array([4, 1, 5])
    part, _ = SAMPLE(
        logits_BV[order], jax.random.clone(keys)[order], sampler=Sampler(vocab_size=64)
    )
    np.testing.assert_array_equal(part, whole[order])
    assert len(set(np.asarray(whole).tolist())) > 1


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_cannot_be_sampled_show_as_nan_in_their_row_only(value, temperature):
    logits_BV = logits_of(2, 16)
    logits_BV[0] = value
    sampler = Sampler(vocab_size=16, temperature=temperature)
    ids, logp = SAMPLE(jnp.asarray(logits_BV), keys_of(2), sampler=sampler)
    assert np.isnan(logp[0])
    assert np.isfinite(logp[1])
    assert 0 <= int(ids[0]) < 16


@pytest.mark.optimized
@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 0.7}, {"temperature": 0.0}, {"top_k": 9, "top_p": 0.8, "min_p": 0.01}],
    ids=str,
)
@pytest.mark.parametrize(("num_ids", "real_ids"), [(4, 3), (64, 60), (100, 99), (4096, 4095)])
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 4)], ids=str)
def test_a_mesh_changes_nothing(fields, num_ids, real_ids, shape):
    """Also where a block of ids lies on two devices (100 ids: blocks of 10, parts of 25)."""
    sampler = Sampler(vocab_size=real_ids, **fields)
    rows = 256
    logits_BV, bias_V = logits_of(rows, num_ids), jnp.linspace(-1, 1, num_ids)
    logits_BV[3] = np.nan
    logits_BV[5, num_ids // 2] = np.nan  # on one device alone
    logits_BV[7] = -np.inf
    logits_BV[9, : real_ids - 1] = -np.inf  # one real id of the last device, and its padding
    alone = SAMPLE(jnp.asarray(logits_BV), keys_of(rows), sampler=sampler, bias_V=bias_V)
    devices = mesh.make(*shape)
    with jax.set_mesh(devices):
        split_BV = jax.device_put(logits_BV, jax.NamedSharding(devices, jax.P(mesh.BATCH, "model")))
        ids, logp = SAMPLE(split_BV, keys_of(rows), sampler=sampler, bias_V=bias_V)
    assert ids.sharding.spec == jax.P(mesh.BATCH)
    assert np.flatnonzero(np.isnan(logp)).tolist() == [3, 5, 7]
    is_drawn_B = ~np.isnan(alone[1])
    np.testing.assert_array_equal(is_drawn_B, ~np.isnan(logp))
    np.testing.assert_array_equal(np.asarray(ids)[is_drawn_B], np.asarray(alone[0])[is_drawn_B])
    np.testing.assert_allclose(logp, alone[1], atol=1e-6)
    ids = np.asarray(ids)
    assert ids[9] == real_ids - 1
    assert ids.max() < num_ids
    assert len(np.unique(ids)) > min(num_ids, 50) / 2


def test_only_plain_sampling_is_on_policy():
    assert Sampler(vocab_size=9, stop_ids=(1,)).on_policy
    assert sampling.off_policy_warning(Sampler(vocab_size=9)) is None
    for fields in ({"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}):
        sampler = Sampler(vocab_size=9, **fields)
        ((name, value),) = fields.items()
        message = sampling.off_policy_warning(sampler)
        assert not sampler.on_policy
        assert f"{name}={value}" in message
        assert f"--config.rollout.{name}=" in message


def test_equal_samplers_are_one_static_argument():
    assert Sampler(vocab_size=9, stop_ids=[2, 1, 2]) == Sampler(vocab_size=9, stop_ids=(1, 2))
    assert hash(Sampler(vocab_size=9, stop_ids=[2, 1])) == hash(
        Sampler(vocab_size=9, stop_ids=(1, 2))
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": -1.0}, "--config.rollout.temperature"),
        ({"temperature": float("nan")}, "--config.rollout.temperature"),
        ({"top_k": -1}, "--config.rollout.top_k"),
        ({"top_p": 0.0}, "--config.rollout.top_p"),
        ({"top_p": 1.5}, "--config.rollout.top_p"),
        ({"min_p": 2.0}, "--config.rollout.min_p"),
        ({"stop_ids": (3, 9)}, r"\[9\] are not ids of a vocabulary of 9"),
        ({"pad_id": -1}, r"\[-1\] are not ids of a vocabulary of 9"),
        ({"vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_a_field_out_of_range_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        Sampler(**{"vocab_size": 9, **fields})


def test_a_bias_that_cannot_be_sampled_with_is_refused():
    sampler = Sampler(vocab_size=5)
    good = np.zeros(8, np.float32)
    sampling.check_bias(good, sampler, num_ids=8)
    sampling.check_bias(np.where(np.arange(8) == 2, 0, -np.inf), sampler, num_ids=8)
    with pytest.raises(ValueError, match=r"shape \(5,\)"):
        sampling.check_bias(good[:5], sampler, num_ids=8)
    with pytest.raises(ValueError, match="nan at id 3"):
        sampling.check_bias(np.where(np.arange(8) == 3, np.nan, 0), sampler, num_ids=8)
    with pytest.raises(ValueError, match="inf at id 1"):
        sampling.check_bias(jnp.zeros(8).at[1].set(jnp.inf), sampler, num_ids=8)
    with pytest.raises(ValueError, match="all 5 ids"):
        sampling.check_bias(np.where(np.arange(8) < 5, -np.inf, 0), sampler, num_ids=8)
