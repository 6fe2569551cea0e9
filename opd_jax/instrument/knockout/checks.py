"""Whether the answers can be trusted: arms may differ from the baseline by their bans alone.

Three checks, token for token, on what was decoded:

* ``null``: a ban of ids that cannot occur changes no answer;
* ``absent``: a ban of types that an answer does not hold does not change it (tried on some; these
  are the answers that no arm decodes);
* ``prefix``: every answer of every arm is the baseline's up to the first banned id, and leaves it
  there.

One answer that is off means that something else than the ban was measured, and nothing is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from opd_jax.instrument.knockout.answered import ABSENT, NULL, Job
from opd_jax.instrument.knockout.ledger import Line
from opd_jax.instrument.knockout.request import KnockoutError

_WHY = (
    "the decode is not deterministic on these devices: expected the same ids whatever is decoded "
    "beside a row; compute in --dtype=float32, on other devices, or with another --batch or --slots"
)


def difference(ids: np.ndarray, baseline: np.ndarray) -> int:
    """Place of the first id that differs, or the length of equal answers."""
    shared = min(len(ids), len(baseline))
    differs = np.flatnonzero(ids[:shared] != baseline[:shared])
    return int(differs[0]) if len(differs) else shared


def trusted(done: Sequence[tuple[Job, Line]]) -> dict[str, Any]:
    """What was checked, and how much of it.

    Raises:
      KnockoutError: an answer is off; the message says how many, and where.
    """
    told = {}
    for name in (NULL, ABSENT, "prefix"):
        some = [
            (job, line)
            for job, line in done
            if (job.arm.family if job.arm.family in (NULL, ABSENT) else "prefix") == name
        ]
        off = [(job, line) for job, line in some if line["start"] != job.differs]
        if name != "prefix":
            off = [(job, line) for job, line in some if line["start"] != job.differs or line["ids"]]
        if off:
            job, line = off[0]
            what = {
                NULL: "a ban of ids that cannot occur changed",
                ABSENT: "a ban of types that the baseline's answer does not hold changed",
                "prefix": "before, or not at, the first banned id a ban changed",
            }[name]
            raise KnockoutError(
                f"{what} {len(off)} of {len(some)} answers, first problem {line['index']} of "
                f"{line['task']}, sample {line['sample']}, arm {line['arm']!r}, at id "
                f"{line['start']} instead of {job.differs}; {_WHY}"
            )
        told[name] = {"answers": len(some), "off": 0}
    return told
