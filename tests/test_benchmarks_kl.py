"""scripts/benchmarks/{kl,gate,scaling}.py: the arithmetic that their printed numbers rest on."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

FOLDER = Path(__file__).parent.parent / "scripts" / "benchmarks"
sys.path.insert(0, str(FOLDER))  # they import one another, as scripts of one folder
bench, gate, scaling = (importlib.import_module(name) for name in ("kl", "gate", "scaling"))
sys.path.remove(str(FOLDER))


def small(rows=24, dtype=jnp.float32):
    return bench.draw(bench.shapes(rows, dtype, vocab=48, student=8, teacher=12))


def test_all_losses_agree_with_float64():
    inputs = small()
    exact = bench.exact_kl(*inputs[:4]).mean()
    assert exact > 0.1
    for name, loss in bench.LOSSES.items():
        value, (dhs, dws) = bench.gradient(loss)(*inputs)
        assert value == pytest.approx(exact, rel=1e-5), name
        _, dense = bench.gradient(bench.dense_loss)(*inputs)
        assert bench.relative_difference(dhs, dense[0]) < 1e-5
        assert bench.relative_difference(dws, dense[1]) < 1e-5


def test_drawn_logits_have_the_wanted_spread():
    hs, ws, ht, wt, weight = bench.draw(bench.shapes(512, jnp.float32, 512, 64, 96))
    for states, head in ((hs, ws), (ht, wt)):
        assert float(jnp.std(states @ head.T)) == pytest.approx(bench.LOGIT_STD, rel=0.05)
    assert float(weight.sum()) == pytest.approx(1.0)


def test_relative_difference_divides_by_the_largest_of_the_reference():
    gap = bench.relative_difference(jnp.array([1.0, -4.0, 0.5]), jnp.array([1.0, -5.0, 0.0]))
    assert gap == pytest.approx(1 / 5)


def test_sums_round_in_their_own_type():
    ones = np.ones(1024)
    assert bench.running_sum(ones, jnp.bfloat16) == 256  # 8 bits: 256 + 1 rounds to 256
    assert bench.running_sum(ones, np.float32) == 1024
    assert bench.paired_sum(ones, jnp.bfloat16) == 1024
    assert bench.paired_sum([1.0, 2.0, 4.0], np.float32) == 7  # an odd one is carried along
    assert bench.paired_sum([256.0, 1.0, 1.0, 1.0], jnp.bfloat16) == 258


def test_temporary_memory_counts_the_logits_of_the_dense_loss():
    rows, vocab = 256, 4096
    inputs = bench.shapes(rows, jnp.float32, vocab, 16, 16)
    assert bench.temporary_bytes(bench.dense_loss, inputs) >= 2 * 4 * rows * vocab


def test_calls_are_timed_in_turns_after_one_that_compiles():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    assert set(bench.interleaved(calls, 3)) == {"a", "b"}
    assert "".join(order) == "ab" * 4
    bench.interleaved(calls, 1, is_warm=True)
    assert "".join(order) == "ab" * 5


def test_summary_is_median_and_relative_range():
    assert bench.summary([1.0, 9.0, 2.0]) == {"seconds": 2.0, "spread": 4.0}


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "many"])
def test_counts_are_whole_and_positive(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected a whole number.*give one"):
        bench.whole(text)
    assert bench.whole("7") == 7


def test_results_are_written_with_machine_and_work(tmp_path):
    out = tmp_path / "new" / "kl.json"
    bench.write(out, "the work", [{"seconds": 1.5}])
    record = json.loads(out.read_text())
    assert record["work"] == "the work"
    assert record["results"] == [{"seconds": 1.5}]
    assert record["machine"]["cores"] >= 1


def test_head_share_counts_heads_and_bodies():
    # A body of next to nothing leaves all to the heads; more layers or longer rows take from them.
    student = gate.dataclasses.replace(gate.BODY, num_layers=2)
    deep = gate.dataclasses.replace(gate.BODY, num_layers=8)
    share = gate.head_share(student, student, 128)
    assert gate.head_share(deep, deep, 128) < share
    assert gate.head_share(student, student, 4096) < share
    # By hand: width 2, ffn 4, 1 layer, 1 head of 2: attention 4 x (2 x 2), ffn 3 x (2 x 4), norms
    # 2 x 2, hence 44 weights; rows of 3 tokens: 4 x 3 x 2 = 24 FLOPs of attention.
    tiny = gate.ModelConfig("llama", 10, 2, 4, 1, 1, 1, 2)
    assert gate.body_flops(tiny, 3) == 2 * 44 + 24
    assert gate.head_share(tiny, tiny, 3) == pytest.approx(160 / (160 + 4 * 112))


def test_predicted_gain_at_its_ends():
    assert gate.predicted_gain(1.0, 0.5) == pytest.approx(2.0)
    assert gate.predicted_gain(0.5, 0.5) == pytest.approx(4 / 3)
    assert gate.predicted_gain(0.0, 0.5) == 1.0
    assert gate.predicted_gain(0.7, 1.0) == 1.0


def test_half_of_the_scored_ids_are_frozen():
    rollout = gate.half_frozen(np.random.default_rng(0), 4, 32, 100)
    ids, mask = np.asarray(rollout.ids_BT), np.asarray(rollout.mask_BT)
    assert ids.shape == (4, 33)
    assert mask.sum() == 4 * 32
    assert np.isin(ids[mask], gate.FROZEN).sum() == 64
    assert ids.max() < 100


def test_fit_recovers_a_power_and_reports_scatter():
    sizes = [1, 2, 4, 8]
    exponent, r_squared = scaling.fit(sizes, [0.5 * n**1.5 for n in sizes])
    assert exponent == pytest.approx(1.5)
    assert r_squared == pytest.approx(1.0)
    # log2 seconds 0, 2, 1, 3 over 0, 1, 2, 3: slope 0.8; 1.8 of the variance of 5 is left.
    exponent, r_squared = scaling.fit(sizes, [1, 4, 2, 8])
    assert exponent == pytest.approx(0.8)
    assert r_squared == pytest.approx(0.64)


def test_fit_needs_two_sizes():
    with pytest.raises(ValueError, match=r"sizes \[4, 4\]: expected at least two.*measure another"):
        scaling.fit([4, 4], [1.0, 2.0])
