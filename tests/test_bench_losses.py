"""scripts/bench {kl,gate,scaling}: the arithmetic that their printed numbers rest on."""

import dataclasses
import importlib
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.models.transformer import ModelConfig

FOLDER = Path(__file__).parent.parent / "scripts" / "benchmarks"
sys.path.insert(0, str(FOLDER))  # they import one another, as scripts of one folder
bench_kl, bench_gate, bench_scaling, toolkit, workloads = (
    importlib.import_module(name)
    for name in ("bench_kl", "bench_gate", "bench_scaling", "toolkit", "workloads")
)
sys.path.remove(str(FOLDER))


def small(rows=24, dtype=jnp.float32):
    return workloads.draw(workloads.shapes(rows, dtype, vocab=48, student=8, teacher=12))


def test_all_losses_agree_with_float64():
    inputs = small()
    exact = bench_kl.exact_kl(*inputs[:4]).mean()
    assert exact > 0.1
    for name, loss in bench_kl.LOSSES.items():
        value, (dhs, dws) = workloads.gradient(loss)(*inputs)
        assert value == pytest.approx(exact, rel=1e-5), name
        _, dense = workloads.gradient(bench_kl.dense_loss)(*inputs)
        assert bench_kl.relative_difference(dhs, dense[0]) < 1e-5
        assert bench_kl.relative_difference(dws, dense[1]) < 1e-5


def test_drawn_logits_have_the_wanted_spread():
    hs, ws, ht, wt, weight = workloads.draw(workloads.shapes(512, jnp.float32, 512, 64, 96))
    for states, head in ((hs, ws), (ht, wt)):
        assert float(jnp.std(states @ head.T)) == pytest.approx(workloads.LOGIT_STD, rel=0.05)
    assert float(weight.sum()) == pytest.approx(1.0)


def test_relative_difference_divides_by_the_largest_of_the_reference():
    gap = bench_kl.relative_difference(jnp.array([1.0, -4.0, 0.5]), jnp.array([1.0, -5.0, 0.0]))
    assert gap == pytest.approx(1 / 5)


def test_sums_round_in_their_own_type():
    ones = np.ones(1024)
    assert bench_kl.running_sum(ones, jnp.bfloat16) == 256  # 8 bits: 256 + 1 rounds to 256
    assert bench_kl.running_sum(ones, np.float32) == 1024
    assert bench_kl.paired_sum(ones, jnp.bfloat16) == 1024
    assert bench_kl.paired_sum([1.0, 2.0, 4.0], np.float32) == 7  # an odd one is carried along
    assert bench_kl.paired_sum([256.0, 1.0, 1.0, 1.0], jnp.bfloat16) == 258


def test_temporary_memory_counts_the_logits_of_the_dense_loss():
    rows, vocab = 256, 4096
    inputs = workloads.shapes(rows, jnp.float32, vocab, 16, 16)
    assert (
        toolkit.temporary_bytes(workloads.gradient(bench_kl.dense_loss), inputs)
        >= 2 * 4 * rows * vocab
    )


def test_head_share_counts_heads_and_bodies():
    # A body of next to nothing leaves all to the heads; more layers or longer rows take from them.
    student = dataclasses.replace(bench_gate.BODY, num_layers=2)
    deep = dataclasses.replace(bench_gate.BODY, num_layers=8)
    share = bench_gate.head_share(student, student, 128)
    assert bench_gate.head_share(deep, deep, 128) < share
    assert bench_gate.head_share(student, student, 4096) < share
    # By hand: width 2, ffn 4, 1 layer, 1 head of 2: attention 4 x (2 x 2), ffn 3 x (2 x 4), norms
    # 2 x 2, hence 44 weights; rows of 3 tokens: 4 x 3 x 2 = 24 FLOPs of attention.
    tiny = ModelConfig("llama", 10, 2, 4, 1, 1, 1, 2)
    assert bench_gate.body_flops(tiny, 3) == 2 * 44 + 24
    assert bench_gate.head_share(tiny, tiny, 3) == pytest.approx(160 / (160 + 4 * 112))


def test_predicted_gain_at_its_ends():
    assert bench_gate.predicted_gain(1.0, 0.5) == pytest.approx(2.0)
    assert bench_gate.predicted_gain(0.5, 0.5) == pytest.approx(4 / 3)
    assert bench_gate.predicted_gain(0.0, 0.5) == 1.0
    assert bench_gate.predicted_gain(0.7, 1.0) == 1.0


def test_half_of_the_scored_ids_are_frozen():
    rollout = workloads.half_frozen(np.random.default_rng(0), 4, 32, 100)
    ids, mask = np.asarray(rollout.ids_BT), np.asarray(rollout.mask_BT)
    assert ids.shape == (4, 33)
    assert mask.sum() == 4 * 32
    assert np.isin(ids[mask], workloads.FROZEN).sum() == 64
    assert ids.max() < 100


def test_fit_recovers_a_power_and_reports_scatter():
    sizes = [1, 2, 4, 8]
    exponent, r_squared = workloads.fit(sizes, [0.5 * n**1.5 for n in sizes])
    assert exponent == pytest.approx(1.5)
    assert r_squared == pytest.approx(1.0)
    # log2 seconds 0, 2, 1, 3 over 0, 1, 2, 3: slope 0.8; 1.8 of the variance of 5 is left.
    exponent, r_squared = workloads.fit(sizes, [1, 4, 2, 8])
    assert exponent == pytest.approx(0.8)
    assert r_squared == pytest.approx(0.64)


def test_fit_needs_two_sizes():
    with pytest.raises(ValueError, match=r"sizes \[4, 4\]: expected at least two.*measure another"):
        workloads.fit([4, 4], [1.0, 2.0])
