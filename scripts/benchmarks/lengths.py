"""Rows of unequal length, as the benchmarks have them: the law that lengths are drawn from."""

from __future__ import annotations

import numpy as np

LONGEST_PROMPT, LONGEST_ANSWER = 128, 512
MEDIAN, SIGMA = 120, 0.7  # of log-normal answers of at most 512 ids


def draw(
    rng: np.random.Generator,
    rows: int,
    *,
    longest_prompt: int = LONGEST_PROMPT,
    longest_answer: int = LONGEST_ANSWER,
) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of prompts, uniform from an eighth of the longest, and of answers, log-normal.

    The median of the answers is to the longest as ``MEDIAN`` to ``LONGEST_ANSWER``; each has one id
    or more, and what would be longer than the longest has its length.
    """
    prompts_B = rng.integers(max(longest_prompt // 8, 1), longest_prompt + 1, rows)
    median = longest_answer * MEDIAN / LONGEST_ANSWER
    answers_B = np.clip(rng.lognormal(np.log(median), SIGMA, rows), 1, longest_answer)
    return prompts_B, answers_B.astype(int)
