r"""What graded samples say about a model, with intervals over problems and, of several runs, seeds.

Of n samples of a problem, c right:

* ``pass@1`` is the mean over problems of c / n (with several samples also called avg@n);
* ``pass@k`` is the mean of :math:`1 - \binom{n-c}{k} / \binom{n}{k}` (Chen et al. 2021), unbiased;
* ``maj@n`` is how often the answer that most samples give is right; answers that are equally
  frequent count as if one of them were drawn, and samples without an answer have no vote.

The unit of every interval is the problem: samples of one problem are not independent. That of
pass@k is Wilson's for as many answers as there are problems, which is too wide: no share can spread
more than right and wrong do. Narrower ones fail where most problems have a pass@k of 1 and few a
lower one (those of resampling then hold the truth in 82% of simulated task files).
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opd_jax import stats
from opd_jax.evaluate import arithmetic, cleaning, quantities


@dataclasses.dataclass(frozen=True)
class Sample:
    """One graded response.

    Attributes:
      correct: whether it is right.
      found: its answer; None where none was recognised.
      truncated: whether its length limit cut it.
      tokens: its length.
    """

    correct: bool
    found: str | None
    truncated: bool
    tokens: int


Problems = Sequence[Sequence[Sample]]  # problem by problem, the same number of samples of each


@dataclasses.dataclass(frozen=True)
class Value:
    """A number with its interval at ``stats.LEVEL``; None where it cannot be had."""

    value: float | None
    low: float | None = None
    high: float | None = None


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, hold one of the c right ones.

    Raises:
      ValueError: not 0 <= c <= n, or not 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(
            f"pass@{k} of {n} samples, {c} right: expected k from 1 to the number of samples; "
            "lower --k or raise --samples"
        )
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(samples: Sequence[Sample]) -> float:
    """Share of the most frequent answers of a problem that are right; 0 without any answer."""
    votes: collections.Counter[Any] = collections.Counter()
    right: dict[Any, bool] = {}
    for sample in samples:
        if sample.found is not None:
            name = _name(sample)
            votes[name] += 1
            right.setdefault(name, sample.correct)
    most = max(votes.values(), default=0)
    first = [name for name, count in votes.items() if count == most]
    return sum(right[name] for name in first) / len(first) if first else 0.0


def default_ks(samples: int) -> list[int]:
    """The powers of 2 up to the number of samples, and that number."""
    return sorted({1 << i for i in range(samples.bit_length()) if 1 << i <= samples} | {samples})


def summarise(problems: Problems, ks: Sequence[int] = ()) -> dict[str, Value]:
    """All measures of one model on one task, by name.

    Args:
      problems: graded samples, the same number of each problem.
      ks: of pass@k; default: :func:`default_ks`.

    Raises:
      ValueError: no problems, unequal numbers of samples, or a k above that.
    """
    n = _num_samples(problems)
    found = {"pass@1": _share([_mean(s.correct for s in problem) for problem in problems])}
    right = [sum(s.correct for s in problem) for problem in problems]
    for k in ks or default_ks(n):
        if k > 1:
            share = float(np.mean([pass_at_k(n, c, k) for c in right]))
            found[f"pass@{k}"] = Value(share, *stats.wilson(share, len(right)))
    if n > 1:
        found[f"maj@{n}"] = _share([majority(problem) for problem in problems])
    found["unparsed_share"] = _share([_mean(s.found is None for s in p) for p in problems])
    found["truncated_share"] = _share([_mean(s.truncated for s in p) for p in problems])
    found["accuracy_untruncated"] = _untruncated(problems)
    found["mean_length"] = _mean_value([_mean(s.tokens for s in p) for p in problems])
    return found


def shares(problems: Problems) -> np.ndarray:
    """Share of right samples, problem by problem."""
    return np.array([_mean(sample.correct for sample in problem) for problem in problems])


def over_seeds(models: Sequence[Problems]) -> Value:
    """pass@1 over models that differ by their training seed, with both spreads.

    Raises:
      ValueError: they were not graded on the same problems.
    """
    arm = [shares(problems) for problems in models]
    if len(arm) == 1:
        return _share(arm[0].tolist())
    found = stats.hierarchical_bootstrap([np.zeros(len(x)) for x in arm], arm)
    return Value(found.delta, _clipped(found.low), _clipped(found.high))


@dataclasses.dataclass(frozen=True)
class Contrast:
    """One model against another on one task.

    Attributes:
      base, arm: their pass@1.
      delta, low, high: arm minus base, with its interval.
      p: of "no difference".
      test: which test gave it: ``McNemar, exact``, ``paired bootstrap``, ``paired bootstrap over
        seeds and problems``.
      p_equivalent: of "the difference is at least the margin".
      verdict: ``different``, ``equivalent`` (within the margin) or ``undecided``.
    """

    base: float
    arm: float
    delta: float
    low: float | None
    high: float | None
    p: float
    test: str
    p_equivalent: float
    verdict: str


def compare(base: Sequence[Problems], arm: Sequence[Problems], *, margin: float) -> Contrast:
    """Compare two models on the same problems, or two groups of training seeds.

    One greedy response each: McNemar's exact test on the problems that only one of them solves.
    Several samples: a paired bootstrap over problems. Several seeds: over seeds and problems. The
    test of equivalence is two one-sided tests by the same bootstrap.

    Args:
      base, arm: one entry per seed; seed i of both are paired.
      margin: the smallest difference that counts, in shares (0.02 is two points).

    Raises:
      ValueError: other problems, other numbers of seeds, or no margin.
    """
    ours, theirs = [shares(x) for x in base], [shares(x) for x in arm]
    if len(ours) == len(theirs) == 1:
        found = stats.paired_bootstrap(ours[0], theirs[0], margin=margin)
        is_single = _num_samples(base[0]) == _num_samples(arm[0]) == 1
        test = "McNemar, exact" if is_single else "paired bootstrap"
        p = stats.mcnemar(ours[0], theirs[0]) if is_single else found.p
    else:
        found = stats.hierarchical_bootstrap(ours, theirs, margin=margin)
        test, p = "paired bootstrap over seeds and problems", found.p
    assert found.p_equivalent is not None
    alpha = 1 - stats.LEVEL
    is_equivalent = found.p_equivalent <= alpha
    verdict = "different" if p <= alpha else "equivalent" if is_equivalent else "undecided"
    if p <= alpha and is_equivalent:
        verdict = "different, within the margin"
    return Contrast(
        base=float(np.mean([x.mean() for x in ours])),
        arm=float(np.mean([x.mean() for x in theirs])),
        delta=found.delta,
        low=found.low,
        high=found.high,
        p=p,
        test=test,
        p_equivalent=found.p_equivalent,
        verdict=verdict,
    )


def table(tasks: Mapping[str, Mapping[str, Value]]) -> list[str]:
    """Measures of every task for a reader, shares in per cent."""
    width = max(map(len, tasks), default=4)
    lines = []
    for name, measures in tasks.items():
        for number, (measure, value) in enumerate(measures.items()):
            head = name if number == 0 else ""
            lines.append(f"{head:<{width}}  {measure:<21} {show(value, measure)}")
    return lines


def show(value: Value, measure: str) -> str:
    """One value with its interval."""
    if value.value is None:
        return "-"
    form = "{:.1f}" if measure == "mean_length" else "{:.1%}"
    text = form.format(value.value)
    if value.low is None or value.high is None:
        return text
    return f"{text} ({form.format(value.low)} to {form.format(value.high)})"


def _name(sample: Sample) -> Any:
    """What samples of one answer share: all right ones are one, others meet by number or text."""
    if sample.correct:
        return "right"
    text = cleaning.clean(sample.found or "")
    try:
        number = quantities.read(text)
    except (arithmetic.TooLargeError, RecursionError):
        number = None
    return number.value if number is not None else cleaning.key(text).casefold()


def _num_samples(problems: Problems) -> int:
    numbers = {len(problem) for problem in problems}
    if len(numbers) != 1 or not min(numbers):
        raise ValueError(
            f"problems with {sorted(numbers)} samples: expected the same number of each, at least "
            "one; finish the evaluation"
        )
    return numbers.pop()


def _mean(values: Any) -> float:
    found = [float(value) for value in values]
    return sum(found) / len(found)


def _clipped(value: float | None) -> float | None:
    return None if value is None else min(1.0, max(0.0, value))


def _share(values: Sequence[float]) -> Value:
    return Value(float(np.mean(values)), *stats.share_interval(values))


def _mean_value(values: Sequence[float]) -> Value:
    found = stats.bootstrap(values)
    return Value(found.delta, found.low, found.high)


def _untruncated(problems: Problems) -> Value:
    """Accuracy among the samples that were not cut; problems are resampled."""
    counts = np.array(
        [
            (sum(s.correct and not s.truncated for s in p), sum(not s.truncated for s in p))
            for p in problems
        ],
        np.float64,
    )
    right, whole = counts.sum(axis=0)
    if not whole:
        return Value(None)
    used = counts[counts[:, 1] > 0]
    if right in (0, whole) or whole == sum(map(len, problems)):  # no spread, or nothing was cut
        return _share((used[:, 0] / used[:, 1]).tolist())
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(used), np.full(len(used), 1 / len(used)), size=10_000) @ used
    found = stats.interval(float(right / whole), drawn[:, 0] / drawn[:, 1], len(used))
    return Value(found.delta, _clipped(found.low), _clipped(found.high))
