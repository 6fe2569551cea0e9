"""How much the selected types carry and how stable they are, beside what Zipf's law alone gives.

A few frequent types carry much of any quantity that is spread over tokens, and are found again in
any other half of the text. The permutation null measures that: KL values are shuffled among
positions, which keeps how often each type occurs and removes all that the type has to do with its
KL. What a claim about types rests on is the excess over this null.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import sparse

from opd_jax import stats
from opd_jax.instrument import metrics, shares
from opd_jax.instrument.corpus import Occurrences, TypeStats
from opd_jax.instrument.metrics import SelectError
from opd_jax.instrument.rule import Rule

# find_rock_cutoff.py and test_stability.py of the code published with arXiv 2605.09253.
K_GRID = (5, 10, 20, 30, 50, 75, 100, 150, 200, 300, 500, 750, 1000, 1500, 2000, 3000)
NESTED_SHARES = (0.1, 0.2, 0.4, 0.6, 0.8)  # of the problems: 50 to 400 of its 500
NOTE = (
    "null: the same quantity after KL values are shuffled among all positions (for the split-half: "
    "among those of each half), which keeps how often each type occurs and removes any effect of "
    "the type on its KL"
)


@dataclasses.dataclass(frozen=True)
class Table:
    """A corpus summed by problem and type, so that any choice of problems is one small product.

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
    ) -> Table:
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

    def shuffled(self, chosen: np.ndarray | slice, rng: np.random.Generator) -> TypeStats:
        """Sums by type [U] of the chosen positions, their KL shuffled among them."""
        return TypeStats.of(
            self.column[chosen], rng.permutation(self.kl[chosen]), len(self.token_U)
        )


def k_grid(k: int, most: int) -> list[int]:
    """The published values of K and ``k`` itself, up to ``most``."""
    return sorted({size for size in (*K_GRID, k) if size <= most})


def coverage(
    table: Table,
    sizes: Sequence[int],
    *,
    rule: Rule,
    resamples: int,
    permutations: int,
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    """Share of the KL that the top k types carry, for several k, beside the null.

    ``low`` and ``high`` are the bootstrap interval over problems of the share of *these* types;
    ``null_low`` and ``null_high`` the middle 95 % of permutations, whose types are chosen anew.
    """
    whole = table.stats()
    ranked = rule.rank(whole)
    value_K = _covered(whole.kl_sum, ranked, sizes)
    even_P = np.full(table.num_problems, 1 / table.num_problems)
    drawn_RK = np.stack(
        [
            _covered(weight_P @ table.kl_sum, ranked, sizes)
            for weight_P in rng.multinomial(len(even_P), even_P, size=resamples)
        ]
    )
    null_RK = np.empty((permutations, len(sizes)))
    for number in range(permutations):
        shuffled = table.shuffled(slice(None), rng)
        null_RK[number] = _covered(shuffled.kl_sum, rule.rank(shuffled), sizes)
    return _rows(sizes, value_K, drawn_RK, null_RK)


def split_half(
    table: Table,
    sizes: Sequence[int],
    *,
    rule: Rule,
    splits: int,
    permutations: int,
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    """Jaccard of the top k types of two disjoint halves of the problems, beside the null.

    ``value`` is the mean over random halvings. ``low`` and ``high`` hold the middle 95 % of them:
    how much the choice of the halves matters, no interval of the mean. The null shuffles within
    each half.
    """
    found_RK, null_RK = np.empty((splits, len(sizes))), np.empty((permutations, len(sizes)))
    for number, (a, b) in enumerate(_halves(table, splits, rng)):
        found_RK[number] = _overlap(rule.rank(table.stats(a)), rule.rank(table.stats(b)), sizes)
    for number, halves in enumerate(_halves(table, permutations, rng)):
        a, b = (table.shuffled(half[table.row] > 0, rng) for half in halves)
        null_RK[number] = _overlap(rule.rank(a), rule.rank(b), sizes)
    return _rows(sizes, found_RK.mean(0), found_RK, null_RK)


def nested(
    table: Table, sizes: Sequence[int], *, rule: Rule, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Jaccard of the top k of the first n problems with that of all of them, as published.

    The n problems are among all of them, so it is inflated (at 80 % of the problems four fifths of
    the data are the same); :func:`split_half` is not.
    """
    whole = rule.rank(table.stats())
    return [
        {"k": size, "n": int(chosen.sum()), "value": float(value)}
        for chosen in _prefixes(table, rng)
        for size, value in zip(
            sizes, _overlap(rule.rank(table.stats(chosen)), whole, sizes), strict=True
        )
    ]


def by_metric(
    table: Table,
    k: int,
    *,
    rule: Rule,
    splits: int,
    rng: np.random.Generator,
    other: Table | None = None,
) -> list[dict[str, Any]]:
    """Stability of the top k by every selection metric: split-half and, as published, nested.

    ``nested_spearman`` is over the union of the two lists, a missing type having rank k + 1.

    Args:
      table: the corpus.
      k: types selected.
      rule: its ``skip_top`` and ``min_count`` apply to every metric.
      splits: random halvings.
      rng: draws them.
      other: a second corpus with the rows and columns of the first, for the joint metrics.
    """
    names = (*metrics.METRICS, *(metrics.JOINT if other is not None else ()))

    def ranked(weight_P: np.ndarray | None) -> Mapping[str, np.ndarray]:
        sums, joint = table.stats(weight_P), other.stats(weight_P) if other is not None else None
        return {name: rule.rank(sums, metrics.metric(sums, name, joint))[:k] for name in names}

    pairs = [(ranked(a), ranked(b)) for a, b in _halves(table, splits, rng)]
    whole, prefixes = ranked(None), [ranked(chosen) for chosen in _prefixes(table, rng)]
    rows = []
    for name in names:
        agreement = [_rank_correlation(part[name], whole[name], k) for part in prefixes]
        known = [value for value in agreement if value is not None]
        rows.append(
            {
                "name": name,
                "split_half": _mean([shares.jaccard(a[name], b[name]) for a, b in pairs]),
                "nested_jaccard": _mean([shares.jaccard(p[name], whole[name]) for p in prefixes]),
                "nested_spearman": _mean(known) if known else None,
            }
        )
    return rows


def _rank_correlation(a: np.ndarray, b: np.ndarray, k: int) -> float | None:
    union = np.union1d(a, b)
    place_a, place_b = (
        np.array([rank.get(i, k + 1) for i in union.tolist()])
        for rank in ({int(i): n for n, i in enumerate(ids, 1)} for ids in (a, b))
    )
    return stats.spearman(place_a, place_b)


def _halves(
    table: Table, number: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Random pairs of disjoint sets of problems, equally many in each, as weights."""
    size = table.num_problems // 2
    if not size:
        raise SelectError(
            f"{table.num_problems} problem: expected at least 2 for disjoint halves; raise --limit "
            "or give more --prompts"
        )
    for _ in range(number):
        order = rng.permutation(table.num_problems)
        first, second = np.zeros((2, table.num_problems))
        first[order[:size]] = second[order[size : 2 * size]] = 1
        yield first, second


def _prefixes(table: Table, rng: np.random.Generator) -> list[np.ndarray]:
    """Growing subsets of the problems in one random order, as weights."""
    order = rng.permutation(table.num_problems)
    sizes = sorted({max(1, round(share * len(order))) for share in NESTED_SHARES})
    return [np.isin(np.arange(len(order)), order[:size]) for size in sizes]


def _covered(kl_U: np.ndarray, ranked: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Share of the KL at the first k of a ranking, for several k."""
    total, running = kl_U.sum(), np.concatenate([[0.0], np.cumsum(kl_U[ranked])])
    covered = running[np.minimum(sizes, len(ranked))]
    return covered / total if total else np.zeros(len(sizes))


def _overlap(a: np.ndarray, b: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Jaccard of the first k of two rankings, for several k."""
    _, place_a, place_b = np.intersect1d(a, b, assume_unique=True, return_indices=True)
    worst = np.sort(np.maximum(place_a, place_b))  # a type is in both lists from this k on
    both = np.searchsorted(worst, sizes)
    union = np.minimum(sizes, len(a)) + np.minimum(sizes, len(b)) - both
    return np.divide(both, union, out=np.ones(len(sizes)), where=union > 0)


def _rows(sizes, value_K, drawn_RK, null_RK) -> list[dict[str, Any]]:
    low_K, high_K = stats.quantiles(drawn_RK)
    null_low_K, null_high_K = stats.quantiles(null_RK)
    null_K = null_RK.mean(0)
    columns = {
        "value": value_K,
        "low": low_K,
        "high": high_K,
        "null": null_K,
        "null_low": null_low_K,
        "null_high": null_high_K,
        "excess": value_K - null_K,
    }
    return [
        {"k": int(size)} | {name: float(column[i]) for name, column in columns.items()}
        for i, size in enumerate(sizes)
    ]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
