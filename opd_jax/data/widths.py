"""Padded widths: how wide a batch is laid out, so that few programs serve all lengths.

Every width is a program to compile and every column beyond a row's end is computed for nothing.
Widths therefore come from the data: those of prompts from their lengths, which are known before
the run, those of answers from a fixed ladder, whose steps are compiled when a batch needs one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_LEAST = 64  # columns of the narrowest step: below it, a program costs more than it saves
_UNIT = 8  # a width of the data's own is a multiple of this
_WORTH = 0.05  # share of all prompt columns that a further prompt width has to save
_MOST = 3  # prompt widths


def padded(length: int) -> int:
    """The step of the ladder 64, 96, 128, 192, 256, 384, ... that holds ``length`` columns.

    A row is padded to less than one and a half times its length, beyond the first step.
    """
    width = _LEAST
    while width < length:
        width = width * 3 // 2 if width & (width - 1) == 0 else width * 4 // 3
    return width


def ladder(limit: int) -> tuple[int, ...]:
    """The steps below ``limit``, and ``limit``: widths of answers that may have so many ids."""
    steps = [padded(1)]
    while steps[-1] < limit:
        steps.append(padded(steps[-1] + 1))
    return (*steps[:-1], limit)


def of_prompts(lengths: Sequence[int], *, batch: int, limit: int) -> tuple[int, ...]:
    """Widths for batches of prompts, of which each is as wide as its longest needs.

    The widest holds all. Steps of the ladder are added while one of them saves enough columns of
    the average batch: n prompts drawn at random all fit with probability F(width) ** n.

    Args:
      lengths: ids of every prompt.
      batch: prompts of a batch.
      limit: widest that may be; no prompt is longer.
    """
    sizes = np.sort(np.asarray(lengths))
    widest = min(-(-int(sizes[-1]) // _UNIT) * _UNIT, limit)

    def columns(chosen: Sequence[int]) -> float:
        """Of the average batch."""
        fits = (np.searchsorted(sizes, chosen, side="right") / len(sizes)) ** batch
        return float(np.dot(np.diff(fits, prepend=0.0), chosen))

    chosen, steps = (widest,), ladder(widest)[:-1]
    while len(chosen) < _MOST and (left := [w for w in steps if w not in chosen]):
        best = min((tuple(sorted((*chosen, width))) for width in left), key=columns)
        if columns(chosen) - columns(best) < _WORTH * widest:
            break
        chosen = best
    return chosen


def bucket(length: int, buckets: Sequence[int]) -> int:
    """Smallest width that holds ``length`` ids.

    Raises:
      ValueError: none does.
    """
    fitting = [width for width in buckets if width >= length]
    if not fitting:
        raise ValueError(
            f"a prompt of {length} ids and buckets {tuple(buckets)}: expected a bucket at least "
            "that wide; add one, or lower max_prompt"
        )
    return min(fitting)
