"""What ``opd-jax rocks`` writes for readers: types, answers token by token, a summary.

Host only: everything here follows from a corpus and its scored positions.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from opd_jax.instrument import scores, shares
from opd_jax.instrument.corpus import Corpus, Occurrences, TypeStats
from opd_jax.instrument.ranking import Rule

_COLUMNS = (
    *("token_id", "token", "count", "token_share", "kl_sum", "kl_mean", "kl_std", "share", "rank"),
    *("member", "group", "log_ratio_mean", "entropy_mean", "teacher_entropy_mean"),
)
_DIGITS = 6  # significant digits in a table, far above its statistical error


def order(stats: TypeStats, rocks_k: np.ndarray, score: str) -> np.ndarray:
    """All types seen: the rocks first, in their order, then the others by the same score."""
    value_V = np.where(stats.seen, scores.metric(stats, score), -np.inf)
    # A metric may be undefined for a type: those come last, by their KL.
    ranked = np.lexsort((np.arange(len(value_V)), -stats.kl_sum, -value_V))
    ranked = ranked[stats.seen[ranked]]
    return np.concatenate([rocks_k, ranked[~np.isin(ranked, rocks_k)]]).astype(int)


def types_csv(
    found: Occurrences,
    rocks_k: np.ndarray,
    kind: Mapping[int, str],
    *,
    score: str,
    token_text: Callable[[int], str],
) -> str:
    """The table of all types seen, best rank first: ``types.csv``.

    ``share`` is of all KL, ``token_share`` of all positions, ``kl_std`` the sample standard
    deviation (empty for a single position); the last columns are the selection metrics, empty where
    one is undefined.

    Args:
      found: the scored positions.
      rocks_k: ids of the rocks, in their order.
      kind: group of every type seen.
      score: the metric that ranks.
      token_text: printable text of an id.
    """
    stats = TypeStats.of_occurrences(found)
    means = {
        name: _mean(found, getattr(found, name.removesuffix("_mean")), stats)
        for name in ("log_ratio_mean", "entropy_mean", "teacher_entropy_mean")
    }
    share_V, mean_V, std_V = stats.share, stats.mean, stats.std
    values = {name: scores.metric(stats, name) for name in scores.METRICS}
    members = set(np.asarray(rocks_k).tolist())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_COLUMNS, *values])
    for rank, token_id in enumerate(order(stats, rocks_k, score).tolist(), start=1):
        count, kl_sum = stats.count[token_id], stats.kl_sum[token_id]
        row = {
            "token_id": token_id,
            "token": token_text(token_id),
            "count": int(count),
            "token_share": count / len(found),
            "kl_sum": kl_sum,
            "kl_mean": mean_V[token_id],
            "kl_std": std_V[token_id],
            "share": share_V[token_id],
            "rank": rank,
            "member": int(token_id in members),
            "group": kind[token_id],
            **{name: values_V[token_id] for name, values_V in means.items()},
            **{name: values_V[token_id] for name, values_V in values.items()},
        }
        writer.writerow([_cell(row[name]) for name in (*_COLUMNS, *values)])
    return text.getvalue()


def list_entry(
    stats: TypeStats, ids: np.ndarray, residual: Mapping[str, Any] | None
) -> dict[str, Any]:
    """An entry of ``lists.json``: how much the ids stand for, and how well they match the rocks."""
    return {
        "types": len(ids),
        "token_share": shares.token_share(stats, ids),
        "kl_share": shares.coverage(stats, ids),
        "residual": None if residual is None else dict(residual),
    }


def reader(
    corpus: Corpus,
    found: Occurrences,
    rocks_k: np.ndarray,
    *,
    score: str,
    tokenizer: Any,
    token_text: Callable[[int], str],
    answers: int = 8,
) -> dict[str, Any]:
    """Answers token by token, ``reader.json``: spread evenly over the corpus, in its order.

    ``score`` and ``rank`` are of the token's type; ``weight`` is what a static gate over the rocks
    would give the position (arXiv 2605.09253 freezes with 0).
    """
    stats = TypeStats.of_occurrences(found)
    rank_V = np.zeros(found.vocab_size, int)
    ranked = order(stats, rocks_k, score)
    rank_V[ranked] = np.arange(1, len(ranked) + 1)
    is_rock_V = np.isin(np.arange(found.vocab_size), rocks_k)
    number = min(answers, len(corpus.answers))
    shown = []
    for index in np.unique(np.linspace(0, len(corpus.answers) - 1, number).round().astype(int)):
        here = slice(corpus.offset_A[index], corpus.offset_A[index + 1])
        ids = found.token_id[here]
        tokens = {
            "id": ids.tolist(),
            "text": [token_text(int(i)) for i in ids],
            "rank": rank_V[ids].tolist(),
            "rock": is_rock_V[ids].tolist(),
            "weight": np.where(is_rock_V[ids], 0.0, 1.0).tolist(),
            "score": _rounded(stats.kl_sum[ids]),
        }
        for name in ("kl", "entropy", "teacher_entropy", "logp"):
            tokens[name] = _rounded(getattr(found, name)[here])
        tokens["teacher_logp"] = _rounded(found.logp[here] - found.log_ratio[here])
        shown.append(
            {
                "problem": int(corpus.problem_A[index]),
                "prompt": tokenizer.decode(corpus.prompts[index].tolist()),
                "text": tokenizer.decode(corpus.answers[index].tolist()),
                "truncated": bool(corpus.truncated_A[index]),
                "writer": corpus.info["writer"],
                "tokens": tokens,
            }
        )
    return {"answers": shown}


def summary(
    corpus: Corpus,
    found: Occurrences,
    selection: Mapping[str, Any],
    rocks_k: np.ndarray,
    kind: Mapping[int, str],
    *,
    token_text: Callable[[int], str],
    rule: Rule,
) -> dict[str, Any]:
    """The numbers that a reader wants first, ``summary.json``."""
    stats = TypeStats.of_occurrences(found)
    k = len(rocks_k)
    coverage, halves = at_k(selection["coverage"], k), at_k(selection["split_half"], k)
    density = next(row for row in selection["density"] if row["skip_top"] == rule.skip_top)
    estimators, share_V, mean_V = selection["estimators"], stats.share, stats.mean
    return {
        "problems": len(np.unique(corpus.problem_A)),
        "answers": len(corpus.answers),
        "tokens": len(found),
        "types_seen": int(stats.seen.sum()),
        "kl_nats": float(found.kl.mean(dtype=np.float64)),
        "kl_sum": float(stats.kl_sum.sum()),
        "k": k,
        "skip_top": rule.skip_top,
        "min_count": rule.min_count,
        "coverage": coverage["value"],
        "coverage_low": coverage["low"],
        "coverage_high": coverage["high"],
        "coverage_in_sample": coverage["in_sample"],
        "coverage_null": coverage["null"],
        "coverage_null_within": coverage["null_within"],
        "density_median": density["median"],
        "density_corpus": density["corpus"],
        "split_half": halves["value"],
        "split_half_null": halves["null"],
        "split_half_null_within": halves["null_within"],
        "spearman_exact_vs_sampled": estimators["spearman"],
        "jaccard_exact_vs_sampled": at_k(estimators["jaccard"], k)["value"],
        "rocks": [
            {
                "token_id": int(i),
                "token": token_text(int(i)),
                "count": int(stats.count[i]),
                "share": float(share_V[i]),
                "kl_mean": float(mean_V[i]),
                "group": kind[int(i)],
            }
            for i in rocks_k[:20]
        ],
    }


def at_k(rows: Sequence[Mapping[str, Any]], k: int) -> Mapping[str, Any]:
    """The row of this K, or of the largest below it."""
    return max((row for row in rows if row["k"] <= k), key=lambda row: row["k"])


def _mean(found: Occurrences, values: np.ndarray, stats: TypeStats) -> np.ndarray:
    total_V = np.bincount(found.token_id, values.astype(np.float64), minlength=found.vocab_size)
    return np.divide(total_V, stats.count, out=np.zeros_like(total_V), where=stats.seen)


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.{_DIGITS}g}" if np.isfinite(value) else ""
    return value


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(x), 5) for x in values]
