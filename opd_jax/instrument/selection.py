"""Everything about one corpus's Rock Tokens in one table: ``selection.json``.

How much they carry and how stable they are against the null, how dense they are, where they lie
among all types, what the controls match, what kinds of token they are, and whether the exact KL and
its one-sample estimate select the same ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from opd_jax import stats
from opd_jax.instrument import controls, groups, null, scores, shares
from opd_jax.instrument import tally as tallies
from opd_jax.instrument.corpus import Occurrences, TypeStats
from opd_jax.instrument.ranking import PLAIN, Rule
from opd_jax.instrument.tally import Tally

RESAMPLES = 1000  # bootstrap draws of an interval
PERMUTATIONS = 100  # shuffles of the null, and random halvings
FUNNEL_BINS = 40  # equal ones of log10 count (arXiv 2605.09253, rerun_unrestricted.py of its code)
SKIP_TOPS = (0, 5)  # densities are told with both published rules
_HIGH_KL = 0.95  # quantile of all positions' KL from which a position counts as an event, as there
_SPEARMAN_MIN = 2  # positions of a type that enters the rank correlation of estimators


def selection(
    found: Occurrences,
    k: int,
    *,
    token_text: Callable[[int], str],
    rule: Rule = PLAIN,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> dict[str, Any]:
    """Analyse the selection of rocks in a corpus.

    Args:
      found: its scored positions.
      k: number of rocks.
      token_text: text of an id, as ``tokenizer.token_text`` gives it.
      skip_top, min_count, score: see :class:`Rule`.
      resamples: bootstrap draws of an interval.
      permutations: shuffles of the null, and random halvings.
      seed: of all draws.

    Returns:
      A JSON-ready dict; every share is of all positions or of all KL of the corpus. Where types are
      chosen, they are measured on other problems, except where ``in_sample`` says so and in the
      densities, the funnel and the kinds, which describe this corpus and this list.

    Raises:
      SelectError: more rocks than types, fewer than two problems, or a bad rule.
    """
    sums = TypeStats.of_occurrences(found)
    rocks_k = rule.rocks(sums, k)
    sizes = null.k_grid(k, len(rule.rank(sums)))
    rng = np.random.default_rng(seed)
    tally = Tally.of(found)
    coverage = null.coverage(
        tally, sizes, rule=rule, resamples=resamples, permutations=permutations, rng=rng
    )
    nested = null.nested(tally, sizes, rule=rule, rng=rng)
    return {
        "k": k,
        "corpus": size_of(found),
        "k_grid": sizes,
        "resamples": resamples,
        "permutations": permutations,
        "coverage": coverage,
        "coverage_note": null.covered(tally.num_problems),
        "split_half": null.split_half(
            tally, sizes, rule=rule, splits=permutations, permutations=permutations, rng=rng
        ),
        "nested": nested,
        "nested_mean": [
            {"k": size, "value": float(np.mean([r["value"] for r in nested if r["k"] == size]))}
            for size in sizes
        ],
        "metrics": null.by_metric(tally, k, rule=rule, splits=permutations, rng=rng),
        "density": [
            density_row(found, sums, k, dataclasses.replace(rule, skip_top=skip))
            for skip in sorted({*SKIP_TOPS, rule.skip_top})
        ],
        "answer_shares": [float(x) for x in shares.density(found, rocks_k).token_share],
        "funnel": funnel(sums, rocks_k, token_text),
        "controls": control_rows(tally, k, rule=rule, seed=seed),
        "groups": groups.table(sums, groups.of_types(found, token_text), rocks_k),
        "estimators": estimators(found, sizes, rule=rule),
        "null_note": null.NOTE,
    }


def joint_metrics(
    found: Occurrences,
    other: Occurrences,
    k: int,
    *,
    rule: Rule,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Stability of the four joint metrics, the minimum of one over two writers' answers.

    Both corpora answer the same problems, and are halved alike; see :func:`null.metrics`.
    """
    axes = {
        "problems": np.unique(found.problem),
        "token_U": np.union1d(found.token_id, other.token_id),
    }
    rows = null.by_metric(
        Tally.of(found, **axes),
        k,
        rule=rule,
        splits=permutations,
        rng=np.random.default_rng(seed),
        other=Tally.of(other, **axes),
    )
    return [row for row in rows if row["name"] in scores.JOINT]


def density_row(found: Occurrences, sums: TypeStats, k: int, rule: Rule) -> dict[str, Any]:
    """Density of the top ``k`` (or as many as there are) over answers.

    ``high_kl_outside`` is the median number of an answer's positions at or above the 95th
    percentile of all KL that are of no rock type.
    """
    ids = rule.rank(sums)[:k]
    per_answer = shares.density(found, ids)
    is_event = (found.kl >= np.quantile(found.kl, _HIGH_KL)) & ~np.isin(found.token_id, ids)
    answers, number = np.unique(found.answer, return_inverse=True)
    events = np.bincount(number, is_event, minlength=len(answers))
    p25, median, p75 = np.quantile(per_answer.token_share, [0.25, 0.5, 0.75])
    return {
        "skip_top": rule.skip_top,
        "k": len(ids),
        "median": float(median),
        "p25": float(p25),
        "p75": float(p75),
        "corpus": shares.token_share(sums, ids),
        "kl_share_median": float(np.median(per_answer.kl_share)),
        "high_kl_outside": float(np.median(events)),
    }


def funnel(
    sums: TypeStats, rocks_k: np.ndarray, token_text: Callable[[int], str]
) -> dict[str, Any]:
    """Mean KL of types against their log10 count, in bins with at least two types.

    All types seen are in it, and ``kl_mean`` is over positions. The published funnel leaves out
    types seen once, and its line is the mean over the types.
    """
    log10_count, mean = np.log10(sums.count[sums.seen]), sums.mean[sums.seen]
    edges = np.linspace(log10_count.min(), log10_count.max(), FUNNEL_BINS + 1)
    place = np.clip(np.searchsorted(edges, log10_count, side="right") - 1, 0, FUNNEL_BINS - 1)
    bins = []
    for number in np.flatnonzero(np.bincount(place) >= 2):
        inside = mean[place == number]
        p10, p90 = np.quantile(inside, [0.1, 0.9])
        bins.append(
            {
                "log10_count": float((edges[number] + edges[number + 1]) / 2),
                "mean": float(inside.mean()),
                "p10": float(p10),
                "p90": float(p90),
                "types": len(inside),
            }
        )
    return {
        "bins": bins,
        "kl_mean": float(sums.kl_sum.sum() / sums.count.sum()),
        "rocks": [
            {
                "token_id": int(i),
                "token": token_text(int(i)),
                "count": float(sums.count[i]),
                "kl_mean": float(sums.mean[i]),
            }
            for i in rocks_k
        ],
    }


def size_of(found: Occurrences) -> dict[str, int]:
    """How much text a number is of: shares and overlaps grow and fall with it."""
    return {
        "problems": len(np.unique(found.problem)),
        "answers": len(np.unique(found.answer)),
        "tokens": len(found),
        "types": len(np.unique(found.token_id)),
    }


def control_rows(tally: Tally, k: int, *, rule: Rule, seed: int) -> list[dict[str, Any]]:
    """The rocks, then every control: size, shares, overlap and what it leaves unmatched.

    ``types``, ``overlap_with_rocks`` and ``residual`` are of the lists chosen on all problems,
    which are the ones that can be gated; ``token_share`` and ``kl_share`` are measured on problems
    that lists were not chosen on, by turns over ``null.FOLDS`` folds; ``in_sample_kl_share`` is
    measured where they were.
    """
    whole = tally.stats()
    lists = _lists(whole, k, rule, seed)
    fold_P = tallies.folds(tally, null.FOLDS, np.random.default_rng(seed))
    parts = tally.parts(fold_P)
    carried = {name: np.zeros(2) for name in lists}
    for part in parts:
        others = TypeStats.total([other for other in parts if other is not part])
        for name, ids in _lists(others, k, rule, seed).items():
            carried[name] += part.count[ids].sum(), part.kl_sum[ids].sum()
    total = np.maximum([whole.count.sum(), whole.kl_sum.sum()], np.finfo(float).tiny)
    rocks = lists["rock"]
    return [
        {
            "name": name,
            "types": len(ids),
            "token_share": float(carried[name][0] / total[0]),
            "kl_share": float(carried[name][1] / total[1]),
            "in_sample_kl_share": shares.coverage(whole, ids),
            "residual": None if name == "rock" else controls.residual(whole, rocks, ids),
            "overlap_with_rocks": len(np.intersect1d(ids, rocks)),
        }
        for name, ids in lists.items()
    ]


def _lists(sums: TypeStats, k: int, rule: Rule, seed: int) -> dict[str, np.ndarray]:
    """The rocks (or as many as can be chosen) and their controls."""
    rocks_k = rule.rank(sums)[:k]
    return {"rock": rocks_k} | {
        how: controls.choose(sums, rocks_k, how, rule=rule, seed=seed) for how in controls.CONTROLS
    }


def estimators(found: Occurrences, sizes: list[int], *, rule: Rule) -> dict[str, Any]:
    """Whether the exact KL and its one-sample estimate, the log-ratio, select the same types.

    Given the text before a token both have one expectation, if the student sampled it at
    temperature 1; given the token they do not, so the scores differ however long the corpus is.
    Spearman is of the summed KL, over types with at least two positions.
    """
    exact = TypeStats.of_occurrences(found)
    sampled = TypeStats.of(found.token_id, found.log_ratio, found.vocab_size)
    several_V = exact.count >= _SPEARMAN_MIN
    ranked = rule.rank(exact), rule.rank(sampled)
    return {
        "spearman": stats.spearman(exact.kl_sum[several_V], sampled.kl_sum[several_V]),
        "jaccard": [
            {"k": size, "value": shares.jaccard(ranked[0][:size], ranked[1][:size])}
            for size in sizes
        ],
        "kl_mean": float(found.kl.mean(dtype=np.float64)),
        "log_ratio_mean": float(found.log_ratio.mean(dtype=np.float64)),
    }
