"""A run in words."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from opd_jax import config, rock
from opd_jax.data import tokenizer as tokenizers
from opd_jax.evaluate import heldout
from opd_jax.run import digest, narrate

tiny = tiny_run.tiny


@pytest.mark.parametrize(
    ("keys", "formula"),
    [
        ({}, "KL(student || teacher) / number of scored tokens; no gate"),
        ({"kl__direction": "forward"}, "KL(teacher || student)"),
        ({"kl__direction": "jsd", "kl__beta": 0.25}, "student weight 0.25"),
        ({"kl__direction": "skew_reverse"}, "KL(student || 0.1 student + 0.9 teacher)"),
        ({"kl__direction": "skew_forward"}, "KL(teacher || 0.1 teacher + 0.9 student)"),
        ({"kl__temperature": 2.0}, "at temperature 2"),
        ({"train__normaliser": "weight"}, "/ sum of weights; no gate"),
        ({"train__normaliser": "per_sequence"}, "/ sum of weights, by sequence, averaged over"),
        ({"rock__mode": "ema", "rock__inside": 0.5}, "rock gate ema, weight 0.5 inside"),
    ],
)
def test_the_objective_is_a_formula(tiny, keys, formula):
    assert formula in narrate.objective_text(tiny_run.resolved(tiny, **keys))


@pytest.mark.parametrize(
    ("gate", "text"),
    [
        (rock.RockConfig(start=3), "no gate (rock state measured)"),
        (
            rock.RockConfig("random", share=0.25),
            "rock gate random 25.0% of positions, weight 0 inside",
        ),
        (
            rock.RockConfig("ema", key="input", start=3, ramp=10, until=90),
            "rock gate ema, weight 0 inside, looked up by the token before the predicted one, "
            "from step 3, over 10 steps, until step 90",
        ),
    ],
)
def test_the_gate_says_what_it_acts_on_and_when(gate, text):
    assert narrate.gate_text(gate) == text


def test_the_last_change_of_the_members_is_brief():
    line = {"step": 40, "members": 12, "entered": 3, "left": 2}
    assert narrate.moves_text(line) == ", rocks 12 (+3 -2 at step 40)"
    assert narrate.moves_text(None) == ""


def test_an_evaluation_leaves_out_what_was_not_measured():
    result = dict(heldout.EMPTY)
    assert narrate.evaluation_text(result) == "not measured"
    result |= {"accuracy": 0.5, "kl_nats": 0.25}
    assert narrate.evaluation_text(result) == "accuracy 50.0%, KL 0.2500 nats"
    result |= {"unparsed_share": 0.0, "kl_ungated": 0.25, "truncated_share": 1e-9}
    assert narrate.evaluation_text(result) == "accuracy 50.0%, KL 0.2500 nats"
    result |= {"accuracy_low": 0.4, "accuracy_high": 0.6, "kl_gated": 0.5, "kl_nats": -1e-9}
    assert narrate.evaluation_text(result, {"accuracy": 0.25, "kl_nats": 1.0}) == (
        "accuracy 50.0% [40.0%, 60.0%] (+25.0 points), KL 0.0000 nats (-1.0000), gated 0.5000, "
        "ungated 0.2500"
    )


@pytest.mark.parametrize(
    ("ends", "text"),
    [
        ((0.32, 0.59, 0.98), "41% of the way from 32.0% to the teacher's 98.0%"),
        ((0.5, 0.4, 0.9), ""),
        ((0.5, 0.95, 0.9), ""),
        ((0.5, 0.6, None), ""),
    ],
)
def test_the_way_to_the_teacher(ends, text):
    sides = zip(("before", "after", "teacher"), ends, strict=True)
    assert narrate.way_text({side: {"accuracy": value} for side, value in sides}) == text
    assert narrate.way_text({"before": {}, "after": {}, "teacher": None}) == ""


def test_the_rock_table_ranks_by_carried_kl():
    tokenizer = tokenizers.load(config.path_of("embedded:student"))
    cfg = rock.RockConfig(decay=1.0, fast_decay=1.0)
    ids = jnp.asarray([[7, 7, 9, 11]])
    kl = jnp.asarray([[1.0, 2.0, 4.0, 1.0]])
    state = rock.update(rock.init(640, cfg=cfg), ids, kl, jnp.ones((1, 4), bool), cfg=cfg)
    table = digest.rock_table(state, tokenizer, 2)
    assert [row["token_id"] for row in table] == [9, 7]
    np.testing.assert_allclose([row["share"] for row in table], [4 / 8, 3 / 8])
    np.testing.assert_allclose([row["kl_mean"] for row in table], [4.0, 1.5])
    np.testing.assert_allclose([row["token_share"] for row in table], [1 / 4, 2 / 4])
    assert digest.rock_table(rock.init(640), tokenizer, 5) == []


def test_the_table_at_the_end_is_about_the_last_steps():
    """Type 7 carried all at first, type 9 carries all now."""
    tokenizer = tokenizers.load(config.path_of("embedded:student"))
    cfg = rock.RockConfig(decay=1.0, fast_decay=0.5)
    state = rock.init(640, cfg=cfg)
    for kl in ([[9.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]], [[0.0, 1.0]]):
        ids, all_ = jnp.asarray([[7, 9]]), jnp.ones((1, 2), bool)
        state = rock.update(state, ids, jnp.asarray(kl), all_, cfg=cfg)
    assert digest.rock_table(state, tokenizer, 1)[0]["token_id"] == 7
    now = digest.rock_table(state, tokenizer, 1, is_fast=True)[0]
    assert now["token_id"] == 9
    np.testing.assert_allclose(now["share"], 1.75 / (1.75 + 9 / 8))
    assert (cfg.fast_span, rock.RockConfig(fast_decay=1.0, decay=1.0).fast_span) == (2, None)


def test_the_conclusion_has_both_sides_and_the_table():
    row = {"token_id": 9, "token": "x", "share": 0.5, "kl_mean": 4.0, "token_share": 0.25}
    sides = {"before": dict(heldout.EMPTY), "after": heldout.EMPTY | {"accuracy": 1.0}}
    lines = narrate.conclusion(
        {"rocks": [row], **sides, "steps": 3, "seconds": 61.0, "compiles": 4, "phase_share": {}}
    )
    text = "\n".join(lines)
    assert "50.0%" in text
    assert "before: not measured" in text
    assert "after: accuracy 100.0%" in text
    assert "3 steps in 1m01s, 4 programs compiled" in text


def test_shares_are_of_all_timed_seconds_and_medians_of_steps():
    took = [
        {},
        {"update": 3.0, "host": 1.0, "step": 4.0},
        {"eval": 6.0},
        {"update": 1.0, "samples": 1.0, "host": 2.0, "step": 4.0},
        {"update": 2.0, "host": 0.0, "step": 2.0},
        {"save": 4.0},
    ]
    times = digest.phase_seconds(took)
    assert times["median_s"] == {"host": 1.0, "samples": 0.0, "step": 4.0, "update": 2.0}
    assert times["phase_share"] == {
        "update": 0.3,
        "eval": 0.3,
        "save": 0.2,
        "host": 0.15,
        "samples": 0.05,
    }
    text = narrate.time_text(times | {"first_step_s": 9.0})
    assert "update 30%" in text
    assert "median step 4.00s, first step after 9.0s" in text
    assert digest.phase_seconds([{"save": 1.0}]) == {"median_s": {}, "phase_share": {}}
