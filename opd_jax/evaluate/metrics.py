r"""What graded samples say about a model, with intervals over problems and, of several runs, seeds.

Of n samples of a problem, c right:

* ``pass@1`` is the mean over problems of c / n, with several samples also told as ``avg@n``;
* ``pass@k`` is the mean of :math:`1 - \binom{n-c}{k} / \binom{n}{k}` (Chen et al. 2021), unbiased;
* ``maj@n`` is how often the answer that most samples give is right; answers that are equally
  frequent count as if one of them were drawn, and samples without an answer have no vote. Where
  the whole response is what is graded, there is nothing to vote on.

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

from opd_jax import changes, stats
from opd_jax.evaluate import arithmetic, cleaning, grading, quantities


@dataclasses.dataclass(frozen=True)
class Sample:
    """One graded response.

    Attributes:
      correct: whether it is right.
      found: its answer; None where none was recognised.
      truncated: whether its length limit cut it.
      tokens: its length.
      vote: what it shares with samples of the same answer, see :func:`vote`; None for no vote.
    """

    correct: bool
    found: str | None
    truncated: bool
    tokens: int
    vote: Any = None


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


def vote(correct: bool, found: str | None, response: str, grader: str) -> Any:
    """What a response votes for: all right ones are one, others meet by letter, number or text.

    None where it has no answer, or where its grader looks at the whole of it.
    """
    if found is None or grader == "ifeval" or (grader not in grading.GRADERS and found == response):
        return None
    if correct:
        return "right"
    if grader == "choice" and (letter := grading.letter(found)):
        return letter
    text = cleaning.clean(found)
    try:
        number = quantities.read(text)
    except (arithmetic.TooLargeError, RecursionError):
        number = None
    return number.value if number is not None else cleaning.key(text).casefold()


def majority(samples: Sequence[Sample]) -> float:
    """Share of the most frequent answers of a problem that are right; 0 without any vote."""
    votes = collections.Counter(s.vote for s in samples if s.vote is not None)
    right = {sample.vote: sample.correct for sample in samples}
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
    found = {}
    for name, values in _by_problem(problems, n, ks).items():
        if values is None:
            found[name] = Value(None)
        elif name.startswith("pass@") and name != "pass@1":
            found[name] = Value(_mean(values), *stats.wilson(_mean(values), len(values)))
        else:
            found[name] = _share(values)
    found["accuracy_untruncated"] = _untruncated(problems)
    found["mean_length"] = _mean_value([_mean(s.tokens for s in p) for p in problems])
    return found


def _by_problem(problems: Problems, n: int, ks: Sequence[int]) -> dict[str, list[float] | None]:
    """Each share, problem by problem; None of one that these problems cannot have."""
    right = [sum(s.correct for s in problem) for problem in problems]
    found: dict[str, list[float] | None] = {"pass@1": [c / n for c in right]}
    if n > 1:
        found[f"avg@{n}"] = found["pass@1"]
    for k in ks or default_ks(n):
        if k > 1:
            found[f"pass@{k}"] = [pass_at_k(n, c, k) for c in right]
    if n > 1:
        # Answers without a vote are whole responses: see :func:`vote`.
        can = all(s.vote is not None or s.found is None for p in problems for s in p)
        found[f"maj@{n}"] = [majority(problem) for problem in problems] if can else None
    found["unparsed_share"] = [_mean(s.found is None for s in p) for p in problems]
    found["truncated_share"] = [_mean(s.truncated for s in p) for p in problems]
    return found


def shares(problems: Problems) -> np.ndarray:
    """Share of right samples, problem by problem."""
    return np.array([_mean(sample.correct for sample in problem) for problem in problems])


def over_seeds(models: Sequence[Problems], ks: Sequence[int] = ()) -> dict[str, Value]:
    """Shares of models that differ by their training seed, their means with both spreads.

    Raises:
      ValueError: they were not graded on the same problems, or not as often.
    """
    n = _num_samples([problem for problems in models for problem in problems])
    each = [_by_problem(problems, n, ks) for problems in models]
    found = {}
    for name in each[0]:
        values = [list(shares) for model in each if (shares := model[name]) is not None]
        if len(values) < len(models):
            found[name] = Value(None)
        else:
            found[name] = Value(_mean(map(_mean, values)), *changes.accuracy_interval(values))
    return found


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
    test of equivalence is two one-sided tests by the same bootstrap. Where few problems differ,
    intervals and tests are widened as :mod:`changes` says.

    Args:
      base, arm: one entry per seed; seed i of both are paired.
      margin: the smallest difference that counts, in shares (0.02 is two points).

    Raises:
      ValueError: other problems, other numbers of seeds, or no margin.
    """
    ours, theirs = [shares(x) for x in base], [shares(x) for x in arm]
    if len(ours) == len(theirs) == 1:
        found = stats.paired_bootstrap(ours[0], theirs[0], margin=margin)
        found = changes.widened(found, theirs[0] - ours[0], margin)
        is_single = _num_samples(base[0]) == _num_samples(arm[0]) == 1
        test = "McNemar, exact" if is_single else "paired bootstrap"
        p = stats.mcnemar(ours[0], theirs[0]) if is_single else found.p
    else:
        found = stats.hierarchical_bootstrap(ours, theirs, margin=margin)
        found = changes.widened(found, np.mean(theirs, axis=0) - np.mean(ours, axis=0), margin)
        test, p = "paired bootstrap over seeds and problems", found.p
    assert found.p_equivalent is not None
    return Contrast(
        base=float(np.mean([x.mean() for x in ours])),
        arm=float(np.mean([x.mean() for x in theirs])),
        delta=found.delta,
        low=found.low,
        high=found.high,
        p=p,
        test=test,
        p_equivalent=found.p_equivalent,
        verdict=stats.verdict(p, found.p_equivalent),
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
