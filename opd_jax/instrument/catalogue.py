"""The further questions of ``opd-jax rocks`` (``--with``): one record each.

How to add a study:

1. Write ``studies/NAME.py`` with ``study(bench: Workbench) -> dict``: take the answers
   (``bench.corpus``), their scores (``bench.found``) and the rocks (``bench.rocks``), return what
   JSON can hold. Every number stands beside its control, and ``"note"`` says what they mean.
2. Add its record to ``STUDIES``. ``--with=NAME`` then fills ``OUT/NAME.json``, once.
3. Name a plate of ``report/study_figures.py`` that draws such a file, or add one to ``PLATES``
   there: a function from the file's content to a figure with a note.
4. Add both to ``ORDER`` of ``tests/test_layering.py``. ``tests/instrument/test_studies.py`` takes
   every record from here: it must resume, refuse, write its file and draw its plate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from opd_jax.instrument.flags import RocksError
from opd_jax.instrument.studies import (
    context,
    gradients,
    persistence,
    references,
    second_moments,
)
from opd_jax.instrument.workbench import Workbench


@dataclasses.dataclass(frozen=True)
class Study:
    """A question that is asked of a corpus on request.

    Attributes:
      name: in ``--with``, and of its file without ``.json``.
      question: in words; it goes into the file, and into the report where there is none.
      run: answers it; what it returns is the file.
      plate: the plate of ``report.study_figures.PLATES`` that draws the file.
      needs_run: it looks back at the student before training, so the student is a step of a run.
    """

    name: str
    question: str
    run: Callable[[Workbench], dict[str, Any]]
    plate: str
    needs_run: bool = False

    @property
    def file(self) -> str:
        """Name of its file in the folder of results."""
        return f"{self.name}.json"

    def fill(self, bench: Workbench) -> None:
        """Answer the question and write the file."""
        about = {"question": self.question, "plate": self.plate}
        bench.folder.write(self.file, about | self.run(bench) | about)


STUDIES = (
    Study(
        "references",
        "Do other writers' answers to the same prompts have the same rocks?",
        references.study,
        plate="references",
    ),
    Study(
        "gradients",
        "Do the rocks' gradients pull with the rest, and how hard?",
        gradients.study,
        plate="gradients",
    ),
    Study(
        "context",
        "Which rocks stay when only high-loss occurrences in like contexts count?",
        context.study,
        plate="context",
        needs_run=True,
    ),
    Study(
        "persistence",
        "Do the rocks' KL values fall over training, on the same text and on new text?",
        persistence.study,
        plate="persistence",
        needs_run=True,
    ),
    Study(
        "optimizer",
        "Does Adam's second moment hold the rocks back?",
        second_moments.study,
        plate="optimizer",
        needs_run=True,
    ),
)
NAMES = tuple(study.name for study in STUDIES)


def chosen(names: Sequence[str]) -> list[Study]:
    """The studies of these names, in the order of the names.

    Raises:
      RocksError: an unknown name.
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise RocksError(
            f"--with names {', '.join(unknown)}: expected a comma list of {', '.join(NAMES)}; "
            "change --with"
        )
    return [STUDIES[NAMES.index(name)] for name in names]
