"""How often a loop goes round whose number of rounds is data: said where the loop is written.

A compiler knows the rounds of a counted loop and not those of a loop that ends when rows do. The
scope of :func:`expected` carries their number in the name of the operation, through tracing and
compilation, to whoever adds up what a program costs (``plan``). It changes nothing else.
Where the data decides, the number is that of full rows: answers as long as they may be, experts
that are chosen equally often.
"""

from __future__ import annotations

import contextlib
import math
import re
from typing import Any

import jax

_VISITS = re.compile(r"visits_(\d+)")
_NAME = re.compile(r"(scored_)?rounds_(\d+)\)*(?:/while)?$")  # closed by transformations' names


def expected(number: int, *, scored: bool = False) -> contextlib.AbstractContextManager[Any]:
    """A scope for one loop, entered right around it.

    Args:
      number: of rounds; 0 for a loop that takes a share of one on average.
      scored: it goes through those positions of a batch that are scored, and ``number`` is where
        all of them are.
    """
    return jax.named_scope(f"{'scored_' * scored}rounds_{number}")


def visits(number: int) -> contextlib.AbstractContextManager[Any]:
    """A scope around a kernel of which ``number`` programs work, and the others of its grid do not.

    What it skips by what it reads, its grid does not say.
    """
    return jax.named_scope(f"visits_{number}")


def visited(name: str) -> int | None:
    """Programs that work in the kernels whose scopes are ``name``; None where they do not say."""
    found = _VISITS.search(name)
    return int(found[1]) if found else None


def of(name: str, scored_share: float = 1.0) -> int | None:
    """Rounds of the loop whose scopes are ``name``; None where they do not say.

    Args:
      name: the scopes, as a traced or a compiled program has them.
      scored_share: of the positions of a batch.
    """
    found = _NAME.search(name)
    if not found:
        return None
    return math.ceil(int(found[2]) * (scored_share if found[1] else 1.0))
