"""The arithmetic of a census, as its docstring states it."""

import functools

import numpy as np
import pytest

from opd_jax.instrument.knockout import costs
from opd_jax.instrument.knockout.answered import Answer, Arm, Baseline, Job
from opd_jax.rollout import refill

LAYERS, HEADS, WIDTH, BYTES = 36, 8, 128, 2  # Qwen3-4B, bfloat16


def test_the_census_of_200_types_and_500_problems_on_an_h100():
    token = 2 * LAYERS * HEADS * WIDTH * BYTES
    assert token == pytest.approx(147e3, rel=0.01)
    row = token * (150 + 2048)
    assert row == pytest.approx(0.32e9, rel=0.02)
    rows = 192
    assert 8e9 + rows * row < 80e9

    def hours(tokens):
        return costs.seconds(tokens, rows, weights=8e9, row=row) / 3600

    assert hours(rows) * 3600 == pytest.approx(0.035, rel=0.01)  # one step
    assert pytest.approx(1491, abs=1) == 745_422 / 500
    assert hours(200 * 500 * 1491) == pytest.approx(7.5, abs=0.1)
    assert hours(728 * 1491) * 60 == pytest.approx(3.3, abs=0.1)
    assert hours(2 * 745_422) * 60 == pytest.approx(4.5, abs=0.1)


def test_the_cost_of_calls_is_that_of_their_longest_answers():
    answers = [[Answer(np.arange(n), True, None)] for n in (9, 4, 7)]
    baseline = Baseline([], answers, 16, 0)
    single, null = Arm("single 1", "single", (1,)), Arm("null", "null", (5,))
    jobs = [Job(arm, row, 0, 0, 16, 0) for arm in (single, null) for row in range(3)]
    cost = costs.of_calls([jobs[:2], jobs[2:4], jobs[4:]], baseline)
    assert (cost.answers, cost.tokens, cost.steps) == (6, 40, 9 + 9 + 7)
    in_slots = costs.of_calls([jobs], baseline, functools.partial(refill.taken, slots=2))
    assert in_slots.steps == max(9 + 9, 4 + 7 + 4 + 7)  # the third where the second ended
    assert cost.families == {"single": 3, "null": 3}
    first, second = costs.lines(cost, 3, 10.0)
    assert "6 answers (single 3, null 3), about 40 tokens in 3 batches of 25 steps" in first
    assert "10.0 steps/s: about" in second
