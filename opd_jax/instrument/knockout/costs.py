r"""What a knockout costs, before it is paid: answers, tokens, and seconds at a measured rate.

**A census of 200 types x 500 problems, a 4B model, one H100.** Decoding is bound by memory traffic:
every step reads the weights once and the keys and values of all rows, at 3.35 TB/s, of which 60% is
what a well-fed program reaches (:func:`seconds`). Qwen3-4B in bfloat16: 8 GB of weights, and 36
layers x 8 heads x 128 x 2 x 2 bytes = 147 kB of keys and values per token. With prompts of 150
tokens and room for 2,048 new ones a row takes 0.32 GB of the 72 GB left: 192 rows. The rows' whole
room is read at every step: 8 + 192 x 0.32 = 70 GB, 35 ms for 192 tokens, 5,500 tokens/s.

The published answers have 745,422 tokens, 1,491 per answer, so the upper end, every type in every
problem, is 100,000 answers, 149 million tokens, 7.5 hours. But an answer that does not hold a type
is not decoded. Of the published 200 types the answers hold 728 occurrences: at most 728 answers of
1.1 million tokens, 3 minutes, beside 4.5 minutes for the baseline and its null arm; rocks, which
are frequent, are the upper end. ``tests/instrument/knockout`` does these sums again.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence

from opd_jax.evaluate.growth import duration
from opd_jax.instrument.knockout.answered import Baseline, Job

H100_BYTES_PER_S = 3.35e12
REACHED = 0.6  # of the bandwidth


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a number of answers costs.

    Attributes:
      answers, tokens: to decode; tokens as if every answer had the length of the baseline's.
      steps: of the decode loop, of all rows of a call at a time, or of as many as have slots.
      families: answers by family of arms.
    """

    answers: int
    tokens: int
    steps: int
    families: dict[str, int]


def of_calls(
    calls: Sequence[Sequence[Job]],
    baseline: Baseline,
    rounds: Callable[[Sequence[int]], int] = max,
) -> Cost:
    """The cost of jobs that are decoded call by call.

    Args:
      calls: jobs of each.
      baseline: whose lengths their answers are taken to have.
      rounds: of the decode loop for answers of such lengths.
    """
    lengths = [[len(baseline.answers[job.row][job.sample].ids) for job in jobs] for jobs in calls]
    kinds = collections.Counter(job.arm.family for jobs in calls for job in jobs)
    return Cost(
        answers=sum(map(len, calls)),
        tokens=sum(map(sum, lengths)),
        steps=sum(map(rounds, lengths)),
        families=dict(kinds),
    )


def lines(cost: Cost, calls: int, steps_per_s: float | None) -> list[str]:
    """The cost for a reader."""
    if not cost.answers:
        return ["to decode: nothing, all answers are there"]
    parts = ", ".join(f"{name} {count:,}" for name, count in cost.families.items())
    told = [
        f"to decode: {cost.answers:,} answers ({parts}), about {cost.tokens:,} tokens in {calls:,} "
        f"batches of {cost.steps:,} steps together"
    ]
    if steps_per_s:
        told.append(
            f"at the baseline's {steps_per_s:,.1f} steps/s: about "
            f"{duration(cost.steps / steps_per_s)}"
        )
    return told


def seconds(
    tokens: float,
    rows: int,
    *,
    weights: float,
    row: float,
    bytes_per_s: float = H100_BYTES_PER_S,
    reached: float = REACHED,
) -> float:
    """Seconds that decoding takes where memory traffic is what binds.

    Args:
      tokens: to decode, of all answers together.
      rows: decoded at a time.
      weights: bytes of the model.
      row: bytes of one row's keys and values, of all the slots there is room for.
      bytes_per_s: of the memory; default: an H100's.
      reached: share of it.
    """
    step = (weights + rows * row) / (bytes_per_s * reached)
    return tokens / rows * step
