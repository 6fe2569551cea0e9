"""The files of a run: what a line holds, when it is due, and what a resume cuts."""

import dataclasses
import math

import jax.numpy as jnp
import pytest
import tiny_run

from opd_jax import config, rock
from opd_jax.data import tokenizer as tokenizers
from opd_jax.evaluate import heldout
from opd_jax.rock import RockConfig
from opd_jax.run import journal

tiny = tiny_run.tiny
VALUES = {
    "rock_members": 2.0,
    "rock_entries": 1.0,
    "rock_exits": 0.0,
    "rock_jaccard": 0.5,
    "gated_share": 0.25,
    "gated_kl_share": math.nan,
}


@pytest.fixture(scope="module")
def run(tiny):
    return tiny_run.resolved(tiny)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.load(config.path_of("embedded:student"))


@pytest.fixture(scope="module")
def state():
    """Two members; 30 types of falling Rock Score, then nothing."""
    empty = rock.init(640)
    kl_sum = jnp.zeros(640).at[jnp.arange(30)].set(jnp.arange(30.0, 0.0, -1.0))
    member = jnp.zeros(640, bool).at[jnp.asarray([1, 99])].set(True)
    return empty.replace(kl_sum_V=kl_sum, count_V=2 * kl_sum, member_V=member)


def rock_steps(folder, run, tokenizer, state, restored=None, steps=(1, 2, 3, 4)):
    with journal.open(folder, run, tokenizer, restored) as opened:
        for step in steps:
            opened.rocks(step, VALUES, state)
    return [line["step"] for line in tiny_run.read_lines(folder / "rocks.jsonl")]


def test_a_line_of_rocks_holds_the_members_and_the_top_types(run, tokenizer, state, tmp_path):
    run = dataclasses.replace(run, rock=RockConfig("ema"))
    with journal.open(tmp_path, run, tokenizer, None) as opened:
        opened.rocks(3, VALUES, state)
        assert opened.last_rocks is not None
    (line,) = tiny_run.read_lines(tmp_path / "rocks.jsonl")
    top = line.pop("top")
    assert line == {
        "step": 3,
        "members": 2,
        "entered": 1,
        "left": 0,
        "jaccard": 0.5,
        "gated_share": 0.25,
        "gated_kl_share": None,
    }
    assert [row["token_id"] for row in top] == list(range(10))
    assert [row["member"] for row in top] == [False, True, *[False] * 8]
    assert top[1] == {
        "token_id": 1,
        "token": tokenizers.token_text(tokenizer, 1),
        "share": pytest.approx(29 / 465),
        "member": True,
    }


@pytest.mark.parametrize(
    ("gate", "eval_every", "checkpoint_every", "expected"),
    [
        (RockConfig("ema", every=1), 0, 0, [1, 2, 3, 4]),
        (RockConfig("adaptive", every=3), 1, 1, [3]),
        (RockConfig("off"), 0, 0, [4]),  # the end
        (RockConfig("off"), 2, 3, [2, 3, 4]),
        (RockConfig("static", ids=(1,)), 0, 2, [2, 4]),
        (RockConfig("random", share=0.5), 3, 0, [3, 4]),
    ],
    ids=str,
)
def test_rocks_are_written_when_they_are_refreshed(
    run, tokenizer, state, tmp_path, gate, eval_every, checkpoint_every, expected
):
    run = dataclasses.replace(
        run,
        rock=gate,
        eval=dataclasses.replace(run.eval, every=eval_every),
        checkpoint=dataclasses.replace(run.checkpoint, every=checkpoint_every),
    )
    assert rock_steps(tmp_path, run, tokenizer, state) == expected


def test_a_resume_cuts_every_file_where_it_goes_on(run, tokenizer, state, tmp_path):
    run = dataclasses.replace(run, rock=RockConfig("ema"))
    reasons = (("same number", "no answer"), ("another number", "no answer"))
    said = (("5", "none"), ("6", "none"))
    graded = heldout.Graded((4, 7), ((True, False), (False, False)), reasons, text=said)
    with journal.open(tmp_path, run, tokenizer, None) as opened:
        for step in range(4):
            opened.samples(step, [])
            opened.rocks(step + 1, VALUES, state)
            opened.step(step + 1, {"loss": 1.0})
            opened.evaluation(step + 1, {"accuracy": 0.25}, graded)
    line = tiny_run.read_lines(tmp_path / "graded.jsonl")[0]
    assert line == {
        "step": 1,
        "index": [4, 7],
        "correct": [[True, False], [False, False]],
        "reason": [list(row) for row in reasons],
        "text": [list(row) for row in said],
    }
    assert rock_steps(tmp_path, run, tokenizer, state, restored=2, steps=(3,)) == [1, 2, 3]
    # A step's samples are written before its update.
    expected = {"metrics": [1, 1, 2, 2], "graded": [1, 2], "samples": [0, 1]}
    for name, steps in expected.items():
        lines = tiny_run.read_lines(tmp_path / f"{name}.jsonl")
        assert [line["step"] for line in lines] == steps, name
    assert tiny_run.read_lines(tmp_path / "metrics.jsonl")[1]["eval/accuracy"] == 0.25
