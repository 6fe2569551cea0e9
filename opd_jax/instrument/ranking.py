"""How types are ranked and which of them are Rock Tokens. Ties go to the smaller id everywhere."""

from __future__ import annotations

import dataclasses

import numpy as np

from opd_jax.instrument import scores
from opd_jax.instrument.corpus import TypeStats
from opd_jax.instrument.scores import METRICS, SelectError


@dataclasses.dataclass(frozen=True)
class Rule:
    """How types are ranked: the flags ``--score``, ``--skip-top`` and ``--min-count``.

    Attributes:
      score: one of ``METRICS``.
      skip_top: the most frequent types that are never selected.
      min_count: positions that a type must have.

    Raises:
      SelectError: an unknown score or a negative number.
    """

    score: str = "rock"
    skip_top: int = 0
    min_count: float = 1

    def __post_init__(self):
        if self.score not in METRICS:
            raise SelectError(f"score {self.score!r}: expected one of {METRICS}; set --score")
        if self.skip_top < 0:
            raise SelectError(f"skip_top {self.skip_top}: expected at least 0; set --skip-top")
        if self.min_count < 0:
            raise SelectError(f"min_count {self.min_count}: expected at least 0; set --min-count")

    def rank(self, stats: TypeStats, score_V: np.ndarray | None = None) -> np.ndarray:
        """All types that may be selected, the highest score first, as ids.

        ``score_V`` stands in for the rule's own metric. Types where it is -inf may not be selected.
        """
        score_V = scores.metric(stats, self.score) if score_V is None else score_V
        is_eligible_V = stats.seen & (stats.count >= self.min_count) & (score_V > -np.inf)
        if self.skip_top:
            is_eligible_V[descending(stats.count)[: self.skip_top]] = False
        order = descending(score_V)
        return order[is_eligible_V[order]]

    def rocks(self, stats: TypeStats, k: int) -> np.ndarray:
        """Ids of the ``k`` types with the highest score, in order.

        Raises:
          SelectError: fewer types than ``k`` can be selected.
        """
        ranked = self.rank(stats)
        if not 1 <= k <= len(ranked):
            raise SelectError(
                f"k {k} of {len(ranked)} types that can be selected ({int(stats.seen.sum())} seen, "
                f"skip_top {self.skip_top}, min_count {self.min_count:g}): expected 1 to "
                f"{len(ranked)}; lower --k, --skip-top or --min-count, or collect more answers"
            )
        return ranked[:k]

    def at_least(self, count: float) -> Rule:
        """The same rule for types with at least that many positions."""
        return dataclasses.replace(self, min_count=max(self.min_count, count))


PLAIN = Rule()  # by Rock Score, any type


def descending(score_V: np.ndarray) -> np.ndarray:
    """Ids by falling score."""
    return np.argsort(-score_V, kind="stable")
