"""What a list of types stands for in a corpus: shares of its tokens and of its KL, and overlap."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from opd_jax.instrument.corpus import Occurrences, TypeStats
from opd_jax.instrument.scores import SelectError


def coverage(stats: TypeStats, ids: ArrayLike) -> float:
    """Share of the corpus's KL at positions of these types; 0 where there is no KL.

    Raises:
      SelectError: an id outside the vocabulary.
    """
    return _part(stats.kl_sum, checked(ids, len(stats.count)))


def token_share(stats: TypeStats, ids: ArrayLike) -> float:
    """Share of the corpus's positions that are of these types."""
    return _part(stats.count, checked(ids, len(stats.count)))


def _part(sum_V: np.ndarray, ids: np.ndarray) -> float:
    total = sum_V.sum()
    return float(sum_V[ids].sum() / total) if total else 0.0


def jaccard(a: ArrayLike, b: ArrayLike) -> float:
    """Size of the intersection over that of the union; 1 for two empty sets."""
    a, b = np.unique(np.asarray(a)), np.unique(np.asarray(b))
    both = len(np.intersect1d(a, b))
    union = len(a) + len(b) - both
    return both / union if union else 1.0


def checked(ids: ArrayLike, vocab_size: int) -> np.ndarray:
    """Distinct ids as an integer array, in their order.

    Raises:
      SelectError: one is outside the vocabulary or stands twice.
    """
    ids = np.asarray(ids, np.int64).ravel()
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise SelectError(
            f"ids {outside[:5].tolist()} are outside the vocabulary: expected 0 to "
            f"{vocab_size - 1}; give ids of this tokenizer"
        )
    if len(np.unique(ids)) < len(ids):
        raise SelectError(
            f"{len(ids)} ids of which {len(np.unique(ids))} differ: expected every id once; drop "
            "the repeated ones"
        )
    return ids


@dataclasses.dataclass(frozen=True)
class Density:
    """Per answer with scored positions, f64: shares at positions of some types."""

    token_share: np.ndarray
    kl_share: np.ndarray  # 0 where the answer has no KL


def density(found: Occurrences, ids: Sequence[int] | np.ndarray) -> Density:
    """Share of each answer's tokens, and of its KL, at positions of these types.

    Raises:
      SelectError: an id outside the vocabulary.
    """
    is_in_V = np.zeros(found.vocab_size, bool)
    is_in_V[checked(ids, found.vocab_size)] = True
    inside = is_in_V[found.token_id]
    answers, number = np.unique(found.answer, return_inverse=True)
    kl = found.kl.astype(np.float64)
    tokens, tokens_in, kl_all, kl_in = (
        np.bincount(number, weights, minlength=len(answers))
        for weights in (np.ones_like(kl), inside, kl, kl * inside)
    )
    kl_share = np.divide(kl_in, kl_all, out=np.zeros_like(kl_all), where=kl_all > 0)
    return Density(tokens_in / tokens, kl_share)
