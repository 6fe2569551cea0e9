"""The published predictors of a type's effect that a table of types does not hold itself.

A folder of ``opd-jax rocks`` with ``--with=context`` (or ``optimizer``) has its answers scored
twice, token by token: by the student, and by the student before training. An occurrence is
*recalcitrant* (arXiv 2605.09253, its first definition, here by reverse KL) if its KL before is
among the top fifth of all and its improvement among the lowest fifth.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from opd_jax.instrument.corpus import Occurrences

_BEFORE, _IMPROVED = 0.8, 0.2  # quantiles


def beside(table: Path, ids: Sequence[int]) -> dict[str, tuple[float | None, ...]]:
    """Further columns for the types of a table; none where the scores are not beside it.

    Args:
      table: ``types.csv`` of a folder of rocks.
      ids: its types.

    Raises:
      CorpusError: damaged scores.
    """
    paths = [table.parent / "scores" / f"{name}.npz" for name in ("student", "undistilled")]
    if not all(path.is_file() for path in paths):
        return {}
    after, before = (Occurrences.load(path) for path in paths)
    if not np.array_equal(after.token_id, before.token_id):
        return {}  # of other answers
    return columns(after, before, ids)


def columns(
    after: Occurrences, before: Occurrences, ids: Sequence[int]
) -> dict[str, tuple[float | None, ...]]:
    """Means and counts by type over the same positions, measured twice."""
    improvement = before.kl - after.kl
    is_rock = (before.kl >= np.quantile(before.kl, _BEFORE)) & (
        improvement < np.quantile(improvement, _IMPROVED)
    )
    size = max(max(ids, default=0), int(after.token_id.max(initial=0))) + 1
    count_V = np.bincount(after.token_id, minlength=size)

    def summed(values: np.ndarray) -> np.ndarray:
        return np.bincount(after.token_id, np.asarray(values, np.float64), minlength=size)

    def mean(values: np.ndarray) -> tuple[float | None, ...]:
        total_V = summed(values)
        return tuple(float(total_V[i] / count_V[i]) if count_V[i] else None for i in ids)

    rocks_V = summed(is_rock)
    return {
        "rock_count": tuple(float(rocks_V[i]) if count_V[i] else None for i in ids),
        "rock_rate": mean(is_rock),
        "kl_mean_before": mean(before.kl),
        "improvement": mean(improvement),
        "entropy_mean_before": mean(before.entropy),
    }
