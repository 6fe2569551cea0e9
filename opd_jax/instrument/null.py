"""How much the selected types carry and how stable they are, beside what chance alone gives.

A few frequent types carry much of any quantity that is spread over tokens, and are found again in
any other half of the text. Permutation nulls measure that: KL values are shuffled, which keeps how
often each type occurs and removes what the type has to do with its KL. Shuffled among *all*
positions they also lose that the KL of one problem is alike; shuffled *within problems* they keep
it. What a claim about types rests on is the excess over both.

Types are never measured where they were chosen: they are chosen on all folds of the problems but
one and measured on that one (:func:`coverage`), or on one half and compared with the other
(:func:`split_half`). Where it was chosen, a list of 100 types of a thousand carries several points
more of the KL than anywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats as distributions

from opd_jax import stats
from opd_jax.instrument import scores, shares
from opd_jax.instrument import tally as tallies
from opd_jax.instrument.corpus import TypeStats
from opd_jax.instrument.ranking import Rule
from opd_jax.instrument.tally import Tally

# find_rock_cutoff.py and test_stability.py of the code published with arXiv 2605.09253.
K_GRID = (5, 10, 20, 30, 50, 75, 100, 150, 200, 300, 500, 750, 1000, 1500, 2000, 3000)
NESTED_SHARES = (0.1, 0.2, 0.4, 0.6, 0.8)  # of the problems: 50 to 400 of its 500
FOLDS = 5  # of the problems: types are chosen on four and measured on the fifth
NOTE = (
    "null: the same quantity after KL values are shuffled among all positions (for the split-half: "
    "among those of each half), which keeps how often each type occurs and removes any effect of "
    "the type on its KL; null within problems: shuffled among the positions of each problem, which "
    "also keeps that the KL of a problem is alike"
)


def covered(problems: int) -> str:
    """In words how the coverage of a corpus with so many problems was measured."""
    folds = min(FOLDS, problems)
    return (
        f"coverage: types are chosen on {folds - 1} of {folds} parts of the {problems} problems "
        "and measured on the part left out, by turns; low and high: Student's interval with the "
        "spread of resampled problems, types chosen anew in each; in_sample: measured where "
        "they were chosen, as published; a share of a corpus of another size does not compare"
    )


def k_grid(k: int, most: int) -> list[int]:
    """The published values of K and ``k`` itself, up to ``most``."""
    return sorted({size for size in (*K_GRID, k) if size <= most})


def coverage(
    tally: Tally,
    sizes: Sequence[int],
    *,
    rule: Rule,
    resamples: int,
    permutations: int,
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    """Share of the KL that the top k types carry in text they were not chosen on, for several k.

    ``value`` is cross-fitted over ``FOLDS`` folds of the problems; ``low`` and ``high`` are
    Student's interval with the standard deviation of resamples of the problems in which types are
    chosen anew (copies of a problem stay in its fold). It also holds the share that the list chosen
    on all problems has in further text. (Percentiles of the resamples would lie too low: a resample
    has fewer different problems to choose on.) ``in_sample`` is the share where they were chosen.
    ``null*`` are the same of shuffled KL, ``*_low`` and ``*_high`` the middle 95 % of permutations,
    ``*_p`` one-sided permutation p-values of "no more than by chance".

    Raises:
      SelectError: fewer than two problems.
    """
    fold_P = tallies.folds(tally, FOLDS, rng)
    value_K = crossfitted(tally.parts(fold_P), sizes, rule=rule)
    whole = tally.stats()
    in_sample_K = _covered(whole.kl_sum, rule.rank(whole), sizes)
    problems = tally.num_problems
    drawn_RK = np.stack(
        [
            crossfitted(tally.parts(fold_P, weight_P), sizes, rule=rule)
            for weight_P in rng.multinomial(problems, np.full(problems, 1 / problems), resamples)
        ]
    )
    reach_K = drawn_RK.std(axis=0, ddof=1) if resamples > 1 else np.full(len(sizes), np.inf)
    reach_K = reach_K * distributions.t.ppf((1 + stats.LEVEL) / 2, problems - 1)
    ends = np.clip([value_K - reach_K, value_K + reach_K], 0.0, 1.0)

    def shuffled(group_P: np.ndarray) -> np.ndarray:
        kl = tally.shuffled(group_P, rng)
        return crossfitted(tally.parts_of(kl, fold_P), sizes, rule=rule)

    nulls = {
        name: np.stack([shuffled(group_P) for _ in range(permutations)])
        for name, group_P in _groups(problems).items()
    }
    p = {
        f"{name}_p": (1 + np.sum(drawn_RK >= value_K * (1 - 1e-12), axis=0)) / (permutations + 1)
        for name, drawn_RK in nulls.items()
    }
    return _rows(sizes, value_K, ends, nulls, {"in_sample": in_sample_K} | p)


def crossfitted(parts: Sequence[TypeStats], sizes: Sequence[int], *, rule: Rule) -> np.ndarray:
    """Share of all KL at the first k types, [K]: in each part, types that the others choose."""
    carried_K, total = np.zeros(len(sizes)), 0.0
    for part in parts:
        ranked = rule.rank(TypeStats.total([other for other in parts if other is not part]))
        carried_K += _running(part.kl_sum, ranked, sizes)
        total += part.kl_sum.sum()
    return carried_K / total if total else carried_K


def split_half(
    tally: Tally,
    sizes: Sequence[int],
    *,
    rule: Rule,
    splits: int,
    permutations: int,
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    """Jaccard of the top k types of two disjoint halves of the problems, beside the nulls.

    ``value`` is the mean over random halvings. ``low`` and ``high`` hold the middle 95% of them:
    how much the choice of the halves matters, no interval of the mean.

    Raises:
      SelectError: fewer than two problems.
    """

    def overlap(parts: Sequence[TypeStats]) -> np.ndarray:
        a, b = (rule.rank(part) for part in parts)
        return _overlap(a, b, sizes)

    found_RK = np.stack(
        [overlap(tally.parts(part_P)) for part_P in tallies.halves(tally, splits, rng)]
    )
    nulls = {}
    for name, group_P in _groups(tally.num_problems).items():
        nulls[name] = np.stack(
            [
                # Groups are three apart, so that a half (-1 to 1) is a group of its own in each.
                overlap(tally.parts_of(tally.shuffled(group_P + part_P, rng), part_P))
                for part_P in tallies.halves(tally, permutations, rng)
            ]
        )
    return _rows(sizes, found_RK.mean(0), stats.quantiles(found_RK), nulls, {})


def _groups(problems: int) -> dict[str, np.ndarray]:
    """By the name of a null the groups of problems among whose positions KL is shuffled."""
    return {"null": np.zeros(problems, int), "null_within": 3 * np.arange(problems)}


def nested(
    tally: Tally, sizes: Sequence[int], *, rule: Rule, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Jaccard of the top k of the first n problems with that of all of them, as published.

    The n problems are among all of them, so it is inflated (at 80 % of the problems four fifths of
    the data are the same); :func:`split_half` is not.
    """
    whole = rule.rank(tally.stats())
    return [
        {"k": size, "n": int(chosen.sum()), "value": float(value)}
        for chosen in _prefixes(tally, rng)
        for size, value in zip(
            sizes, _overlap(rule.rank(tally.stats(chosen)), whole, sizes), strict=True
        )
    ]


def by_metric(
    tally: Tally,
    k: int,
    *,
    rule: Rule,
    splits: int,
    rng: np.random.Generator,
    other: Tally | None = None,
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
    names = (*scores.METRICS, *(scores.JOINT if other is not None else ()))

    def ranked(weight_P: np.ndarray | None) -> Mapping[str, np.ndarray]:
        sums, joint = tally.stats(weight_P), other.stats(weight_P) if other is not None else None
        return {name: rule.rank(sums, scores.metric(sums, name, joint))[:k] for name in names}

    pairs = [
        (ranked(part_P == 0), ranked(part_P == 1)) for part_P in tallies.halves(tally, splits, rng)
    ]
    whole, prefixes = ranked(None), [ranked(chosen) for chosen in _prefixes(tally, rng)]
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


def _prefixes(tally: Tally, rng: np.random.Generator) -> list[np.ndarray]:
    """Growing subsets of the problems in one random order, as weights."""
    order = rng.permutation(tally.num_problems)
    sizes = sorted({max(1, round(share * len(order))) for share in NESTED_SHARES})
    return [np.isin(np.arange(len(order)), order[:size]) for size in sizes]


def _running(kl_U: np.ndarray, ranked: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """KL at the first k of a ranking, for several k."""
    running = np.concatenate([[0.0], np.cumsum(kl_U[ranked])])
    return running[np.minimum(sizes, len(ranked))]


def _covered(kl_U: np.ndarray, ranked: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    total = kl_U.sum()
    return _running(kl_U, ranked, sizes) / total if total else np.zeros(len(sizes))


def _overlap(a: np.ndarray, b: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Jaccard of the first k of two rankings, for several k."""
    _, place_a, place_b = np.intersect1d(a, b, assume_unique=True, return_indices=True)
    worst = np.sort(np.maximum(place_a, place_b))  # a type is in both lists from this k on
    both = np.searchsorted(worst, sizes)
    union = np.minimum(sizes, len(a)) + np.minimum(sizes, len(b)) - both
    return np.divide(both, union, out=np.ones(len(sizes)), where=union > 0)


def _rows(sizes, value_K, ends, nulls, more) -> list[dict[str, Any]]:
    columns = {"value": value_K, "low": ends[0], "high": ends[1]} | more
    for name, drawn_RK in nulls.items():
        low_K, high_K = stats.quantiles(drawn_RK)
        columns |= {name: drawn_RK.mean(0), f"{name}_low": low_K, f"{name}_high": high_K}
    columns["excess"] = value_K - columns["null"]
    columns["excess_within"] = value_K - columns["null_within"]
    return [
        {"k": int(size)} | {name: float(column[i]) for name, column in columns.items()}
        for i, size in enumerate(sizes)
    ]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
