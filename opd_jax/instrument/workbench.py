"""What a study works with: the answers, their scores, the rocks, and where results go."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from opd_jax.files import path_of
from opd_jax.instrument import corpus as corpora
from opd_jax.instrument import outputs
from opd_jax.instrument.corpus import Corpus, Occurrences, TypeStats
from opd_jax.instrument.flags import Flags
from opd_jax.instrument.folder import Folder
from opd_jax.instrument.lab import Lab
from opd_jax.instrument.ranking import Rule
from opd_jax.instrument.subject import Subject
from opd_jax.store.pair import Pair


class Workbench:
    """One analysis: what it is about, who works on it, where its results are.

    Attributes:
      flags: what is asked for.
      say: receives lines of progress.
      subject: the models, prompts and writer that the flags name.
      folder: of the results.
      lab: the models at work.
    """

    def __init__(self, flags: Flags, say: Callable[[str], None]):
        self.flags, self.say = flags, say
        self.subject = Subject.of(flags)
        self.folder = Folder(Path(path_of(flags.out)))
        self.lab = Lab(flags, self.subject, say)

    @property
    def pair(self) -> Pair:
        """Student and teacher."""
        return self.lab.pair

    @property
    def rule(self) -> Rule:
        """How types are ranked."""
        return self.flags.rule

    @functools.cached_property
    def corpus(self) -> Corpus:
        """The answers."""
        return corpora.read(self.folder.path / "corpus")

    @property
    def scores_file(self) -> Path:
        """The answers' positions, scored by the student."""
        return self.folder.path / "scores" / "student.npz"

    @functools.cached_property
    def found(self) -> Occurrences:
        """The scored positions."""
        return Occurrences.load(self.scores_file)

    @functools.cached_property
    def sums(self) -> TypeStats:
        """Sums of the scored positions by type."""
        return TypeStats.of_occurrences(self.found)

    @functools.cached_property
    def rocks(self) -> np.ndarray:
        """Ids of the rocks, in their order."""
        return self.rule.rocks(self.sums, self.flags.k)

    def before(self) -> Occurrences:
        """The answers scored by the student before training."""
        ref = f"{self.subject.student.run}@0"
        path = self.folder.path / "scores" / "undistilled.npz"
        student = None if path.exists() else self.lab.load(ref)
        return self.lab.scored(path, self.corpus, student)

    def write_list(
        self, name: str, ids: np.ndarray, residual: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Write ids that a training run can gate, and return their entry in ``lists.json``."""
        self.folder.write(f"lists/{name}.json", ids.tolist())
        return outputs.list_entry(self.sums, ids, residual)
