"""A grader for answers in plain words: the last number of a response is its answer.

As ``--grader=scripts/last_number.py:last_number`` or ``eval.grader``.
"""

from __future__ import annotations

import re


def last_number(response: str, gold: str) -> bool | None:
    """Whether the last number is the gold one; None where there is no number."""
    found = re.findall(r"-?\d+", response)
    return found[-1] == gold if found else None
