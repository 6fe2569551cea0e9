"""Answers with and without a ban: what the baseline said, and what has to be decoded for an arm.

An answer that holds none of an arm's ids is the arm's answer as well, by construction (see
``rollout.sampling.sample``), so only the others are decoded; ``checks.py`` tries that on some.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from opd_jax.evaluate.asked import Row

BASELINE, NULL, ABSENT = "baseline", "null", "absent"


@dataclasses.dataclass(frozen=True)
class Arm:
    """Ids that are banned together.

    Attributes:
      name: unique.
      family: one of ``request.FAMILIES``, or ``null`` or ``absent``.
      ids: banned.
      window: positions of a local ban, from one occurrence on; None: everywhere.
      is_second: only the second half of the problems is decoded, as the first chose the ids.
    """

    name: str
    family: str
    ids: tuple[int, ...]
    window: int | None = None
    is_second: bool = False


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer of the baseline, or of an arm.

    Attributes:
      ids: sampled, a stop id included.
      correct, found: its verdict, and the answer that was found.
    """

    ids: np.ndarray
    correct: bool
    found: str | None

    @functools.cached_property
    def first(self) -> Mapping[int, int]:
        """Place of the first occurrence of every id in it."""
        ids, places = np.unique(self.ids, return_index=True)
        return dict(zip(ids.tolist(), places.tolist(), strict=True))


@dataclasses.dataclass(frozen=True)
class Job:
    """One answer to be decoded: row (of ``Baseline.rows``), sample, and the ban.

    Attributes:
      first, end: new ids at which the ban holds.
      differs: the id at which the answer leaves the baseline's, its length where it never does.
    """

    arm: Arm
    row: int
    sample: int
    first: int
    end: int
    differs: int


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Answers without a ban.

    Attributes:
      rows: problems.
      answers: of each.
      max_new: most ids of an answer.
      seed: of what is drawn here.
    """

    rows: Sequence[Row]
    answers: Sequence[Sequence[Answer]]
    max_new: int
    seed: int

    @functools.cached_property
    def correct_NK(self) -> np.ndarray:
        """Right (1) or wrong (0), problem by problem, float64."""
        return np.array([[answer.correct for answer in found] for found in self.answers], float)

    @functools.cached_property
    def is_second_N(self) -> np.ndarray:
        """Which problems are the second half, drawn by lot."""
        order = np.random.default_rng((self.seed, 0)).permutation(len(self.rows))
        return order >= len(self.rows) // 2

    def counts(self, vocab_size: int) -> np.ndarray:
        """Occurrences of every id, [V]."""
        flat = [answer.ids for found in self.answers for answer in found]
        return np.bincount(np.concatenate(flat), minlength=vocab_size)

    def holds(self, ids: Sequence[int]) -> np.ndarray:
        """Which answers hold one of the ids, bool [N, K]."""
        return np.array(
            [
                [any(i in answer.first for i in ids) for answer in found]
                for found in self.answers
            ]
        )  # fmt: skip

    def used(self, arm: Arm) -> np.ndarray:
        """Which problems an arm is measured on, bool [N]."""
        return self.is_second_N if arm.is_second else np.ones(len(self.rows), bool)

    def jobs(self, arm: Arm) -> list[Job]:
        """What has to be decoded for an arm: the answers of its problems that hold its ids."""
        found, used_N = [], self.used(arm)
        for row, answers in enumerate(self.answers):
            for sample, answer in enumerate(answers):
                places = [answer.first[i] for i in arm.ids if i in answer.first]
                if not places or not used_N[row]:
                    continue
                first, end, differs = 0, self.max_new, min(places)
                if arm.window is not None:
                    rng = np.random.default_rng((self.seed, 1, row, sample, *arm.ids))
                    first = differs = int(rng.choice(np.flatnonzero(np.isin(answer.ids, arm.ids))))
                    end = first + arm.window
                found.append(Job(arm, row, sample, first, end, differs))
        return found

    def everywhere(self, arm: Arm) -> list[Job]:
        """All answers under a ban that changes none."""
        return [
            Job(arm, row, sample, 0, self.max_new, len(answer.ids))
            for row, answers in enumerate(self.answers)
            for sample, answer in enumerate(answers)
        ]

    def without(self, arms: Sequence[Arm], number: int) -> list[Job]:
        """Some answers that hold nothing of the arm that they are decoded under, drawn by lot."""
        apart = [
            (arm, int(row), int(sample))
            for arm in arms
            for row, sample in np.argwhere(~self.holds(arm.ids))
        ]
        rng = np.random.default_rng((self.seed, 2))
        chosen = rng.permutation(len(apart))[:number]
        found = []
        for place in np.sort(chosen).tolist():
            arm, row, sample = apart[place]
            ban = dataclasses.replace(arm, name=f"{ABSENT}: {arm.name}", family=ABSENT)
            length = len(self.answers[row][sample].ids)
            found.append(Job(ban, row, sample, 0, self.max_new, length))
        return found
