"""Data whose truth is known, for ``scripts/calibrate``: what each procedure is tried on."""

from __future__ import annotations

import numpy as np

from opd_jax.instrument.corpus import Occurrences
from opd_jax.instrument.studies.matrix import Matrix

Rng = np.random.Generator


_HARD, _SKILL, _OWN, _LOGIT = 1.5, 0.3, 0.5, 0.6  # spreads of problems, seeds, both; and the middle


def answers(rng: Rng, problems: int, samples: int = 1, seeds: int = 1) -> np.ndarray:
    """Shares of right answers of an arm under each seed, [seeds, problems].

    Problems differ in difficulty; a seed makes the model better or worse at all of them, and at
    each by itself. A single seed is as skilled as the mean of all.
    """
    return _graded(rng, rng.normal(0, _HARD, problems), samples, seeds)


def two_arms(
    rng: Rng, problems: int, samples: int = 1, seeds: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Two equally good arms on the same problems, [seeds, problems] each."""
    hard = rng.normal(0, _HARD, problems)
    return _graded(rng, hard, samples, seeds), _graded(rng, hard, samples, seeds)


def accuracy(seeds: int = 1) -> float:
    """What :func:`answers` has in the mean over all problems (and seeds)."""
    spread = np.sqrt(_HARD**2 + _OWN**2 + (_SKILL**2 if seeds > 1 else 0.0))
    z, weight = np.polynomial.hermite_e.hermegauss(60)
    return float(weight @ _logistic(_LOGIT + spread * z) / weight.sum())


def _graded(rng: Rng, hard: np.ndarray, samples: int, seeds: int) -> np.ndarray:
    skill = rng.normal(0, _SKILL, (seeds, 1)) if seeds > 1 else 0.0
    own = rng.normal(0, _OWN, (seeds, len(hard)))
    return rng.binomial(samples, _logistic(_LOGIT + hard + skill + own)) / samples


def _logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def corpus(
    rng: Rng, problems: int, types: int, *, length: int = 60, effect: float = 0.7
) -> tuple[Occurrences, np.ndarray]:
    """A corpus and the share of KL of each type in endless further text, [types].

    Types follow Zipf's law, come in bursts (a type that is in an answer is there again), and their
    KL has a mean by type (``effect`` 0: the same for all), a level by problem and a long tail.
    """
    rate = 1 / np.arange(1, types + 1)
    rate *= length / rate.sum()
    mean = np.exp(effect * np.random.default_rng(7).normal(size=types))
    count = rng.poisson(rate * rng.gamma(1.0, 1.0, (problems, types)))
    problem, kind = np.nonzero(count)
    times = count[problem, kind]
    problem, kind = np.repeat(problem, times), np.repeat(kind, times)
    level = np.exp(rng.normal(-(0.5**2) / 2, 0.5, problems))
    kl = mean[kind] * level[problem] * np.exp(rng.normal(-0.5, 1.0, len(kind)))
    return scored(problem, kind, kl, types), rate * mean / np.sum(rate * mean)


def topics(rng: Rng, problems: int = 30, length: int = 60) -> Occurrences:
    """Types that belong to one of ten topics, whose KL is the topic's: no effect of the type."""
    problem = np.repeat(np.arange(problems), length)
    kind = np.where(rng.random(len(problem)) < 0.5, 0, 1 + problem % 10)
    level = np.exp(rng.normal(0, 1.0, 10))
    return scored(problem, kind, level[problem % 10] * rng.exponential(size=len(problem)), 11)


def unlearned(
    rng: Rng, problems: int = 40, length: int = 60, types: int = 60, keeps: float = 1.0
) -> Matrix:
    """Two models on one text: the second is better or worse at whole problems, by luck alone.

    ``keeps``: how much more of its KL the first ten types keep than the others.
    """
    share = 1 / np.arange(1, types + 1)
    mean = np.exp(0.4 * np.random.default_rng(7).normal(size=types))
    mean[10:] *= 0.3  # so that any half of the problems chooses the same ten
    kind = rng.choice(types, problems * length, p=share / share.sum())
    problem = np.repeat(np.arange(problems), length)
    kl = mean[kind] * rng.exponential(size=len(kind))
    luck = np.exp(rng.normal(-(0.4**2) / 2, 0.4, problems))[problem]
    after = kl * luck * np.where(kind < 10, keeps, 1.0)
    cells = {
        (i, j): scored(problem, kind, x, types) for i, x in enumerate((kl, after)) for j in (0, 1)
    }
    return Matrix(("first", "last"), ("first", "last"), cells)


def scored(problem: np.ndarray, kind: np.ndarray, kl: np.ndarray, types: int) -> Occurrences:
    """Positions as the instrument has them."""
    problem, kind = problem.astype(np.int32), kind.astype(np.int32)
    kl = kl.astype(np.float32)
    return Occurrences(
        problem, problem, np.zeros_like(problem), kind, kl, kl, kl, kl, kl, vocab_size=types
    )


def confounded(
    rng: Rng, num: int, reliability: float
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """x and y that have nothing in common but z, and z measured twice so reliably."""
    z = rng.normal(size=num)
    x, y = (0.8 * z + 0.6 * rng.normal(size=num) for _ in range(2))
    noise = np.sqrt(1 / reliability - 1)
    return x, y, (z + noise * rng.normal(size=num), z + noise * rng.normal(size=num))
