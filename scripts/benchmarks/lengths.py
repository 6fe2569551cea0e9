"""Rows of unequal length, as the benchmarks have them: the law that lengths are drawn from."""

from __future__ import annotations

import statistics

import numpy as np

LONGEST_PROMPT, LONGEST_ANSWER = 128, 512
MEDIAN, SIGMA = 120, 0.7  # of log-normal answers of at most 512 ids


def draw(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of prompts, uniform from 16, and of answers, log-normal: each row by itself."""
    prompts_B = rng.integers(LONGEST_PROMPT // 8, LONGEST_PROMPT + 1, rows)
    return prompts_B, _answers(rng.lognormal(0, SIGMA, rows), LONGEST_ANSWER)


def spread(
    rng: np.random.Generator, rows: int, *, longest_prompt: int, longest_answer: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lengths that are spread as those laws are: a quantile of each to every row, in drawn order.

    For a batch that is measured over and over: of few drawn rows the longest is luck, and the time
    of a batch is that of its longest row. The laws are scaled to the longest rows that may be.
    """
    share_B = (np.arange(rows) + 0.5) / rows
    least = max(longest_prompt // 8, 1)
    prompts_B = (least + share_B * (longest_prompt + 1 - least)).astype(int)
    normal = statistics.NormalDist(sigma=SIGMA)
    answers_B = _answers(np.exp([normal.inv_cdf(share) for share in share_B]), longest_answer)
    return rng.permutation(prompts_B), rng.permutation(answers_B)


def _answers(relative_B: np.ndarray, longest: int) -> np.ndarray:
    """From lengths over their median: at least one id, and at most the longest."""
    median = longest * MEDIAN / LONGEST_ANSWER
    return np.clip(relative_B * median, 1, longest).astype(int)
