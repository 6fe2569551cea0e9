"""A corpus summed by problem and type, so that any choice of problems is one small product."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from scipy import sparse

from opd_jax.instrument.corpus import Occurrences, TypeStats
from opd_jax.instrument.scores import SelectError


@dataclasses.dataclass(frozen=True)
class Tally:
    """Sums by problem and type, and the positions that they are of.

    Attributes:
      token_U: i64, ids of the U types seen, ascending; the columns.
      count, kl_sum, kl_sq: sparse [problems, U].
      row, column: the problem and the type of every position, i64.
      kl: KL of every position, f64 nats.
    """

    token_U: np.ndarray
    count: sparse.csr_array
    kl_sum: sparse.csr_array
    kl_sq: sparse.csr_array
    row: np.ndarray
    column: np.ndarray
    kl: np.ndarray

    @classmethod
    def of(
        cls,
        found: Occurrences,
        *,
        problems: np.ndarray | None = None,
        token_U: np.ndarray | None = None,
    ) -> Tally:
        """Sum a corpus; ``problems`` and ``token_U`` (all its ids among them) give other axes."""
        if problems is None:
            problems = np.unique(found.problem)
        if token_U is None:
            token_U = np.unique(found.token_id)
        found = found.where(np.isin(found.problem, problems))
        row = np.searchsorted(problems, found.problem)
        column = np.searchsorted(token_U, found.token_id)
        kl = found.kl.astype(np.float64)

        def summed(value):
            shape = (len(problems), len(token_U))
            return sparse.coo_array((value, (row, column)), shape).tocsr()

        return cls(token_U, summed(np.ones_like(kl)), summed(kl), summed(kl**2), row, column, kl)

    @property
    def num_problems(self) -> int:
        """Rows."""
        return int(self.count.shape[0])  # pyright: ignore[reportOptionalSubscript]

    def stats(self, weight_P: np.ndarray | None = None) -> TypeStats:
        """Sums by type [U], each problem counting ``weight_P`` times."""
        weight_P = np.ones(self.num_problems) if weight_P is None else weight_P.astype(np.float64)
        return TypeStats(weight_P @ self.count, weight_P @ self.kl_sum, weight_P @ self.kl_sq)

    def parts(self, part_P: np.ndarray, weight_P: np.ndarray | None = None) -> list[TypeStats]:
        """Sums by type of each part of the problems, ``part_P`` naming every problem's."""
        weight_P = np.ones(self.num_problems) if weight_P is None else weight_P
        return [self.stats(weight_P * (part_P == part)) for part in range(int(part_P.max()) + 1)]

    def shuffled(self, group_P: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """KL of every position, shuffled among those whose problems are of one group."""
        return shuffled(self.kl, group_P[self.row], rng)

    def parts_of(self, kl: np.ndarray, part_P: np.ndarray) -> list[TypeStats]:
        """As :meth:`parts`, with other values in place of the KL of every position."""
        part_N = part_P[self.row]
        return [
            TypeStats.of(self.column[part_N == part], kl[part_N == part], len(self.token_U))
            for part in range(int(part_P.max()) + 1)
        ]


def shuffled(values: np.ndarray, group: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Values in a random order among those of each group."""
    result = np.empty_like(values)
    mixed = np.lexsort((rng.random(len(values)), group))
    result[np.argsort(group, kind="stable")] = values[mixed]
    return result


def halves(tally: Tally, number: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Random halvings of the problems: 0 and 1 for either half, -1 for an odd one out.

    Raises:
      SelectError: fewer than two problems.
    """
    size = tally.num_problems // 2
    if not size:
        raise SelectError(
            f"{tally.num_problems} problem: expected at least 2 for disjoint halves; raise --limit "
            "or give more --prompts"
        )
    for _ in range(number):
        order = rng.permutation(tally.num_problems)
        part_P = np.full(tally.num_problems, -1)
        part_P[order[:size]], part_P[order[size : 2 * size]] = 0, 1
        yield part_P


def folds(tally: Tally, number: int, rng: np.random.Generator) -> np.ndarray:
    """A random fold for every problem, of sizes that differ by one at most; see :func:`halves`."""
    if tally.num_problems < 2:
        next(halves(tally, 1, rng))  # raises
    return rng.permutation(tally.num_problems) % min(number, tally.num_problems)
