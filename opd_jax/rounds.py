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
# Closed by the names of transformations.
_NAME = re.compile(r"(scored_)?rounds_(\d+)\)*(?:/while)?$")
_FILLED = re.compile(r"filled_(\d+)_of_(\d+)\)*(?:/while)?$")
_PAGES = re.compile(r"pages_(\d+)_of_(\d+)")
_PART = re.compile(r"part_(\d+)_of_(\d+)")
_BEGIN = re.compile(r"begins_(\d+)_")


def expected(
    number: int, *, scored: bool = False, begin: int = 0
) -> contextlib.AbstractContextManager[Any]:
    """A scope for one loop, entered right around it.

    Args:
      number: of rounds; 0 for a loop that takes a share of one on average.
      scored: it goes through those positions of a batch that are scored, and ``number`` is where
        all of them are.
      begin: slots of a cache that are filled before it, and one more with every round.
    """
    return jax.named_scope(f"{f'begins_{begin}_' * (begin > 0)}{'scored_' * scored}rounds_{number}")


def filled(blocks: int, slots: int) -> contextlib.AbstractContextManager[Any]:
    """A scope for a loop over those blocks of a cache that hold something, entered right around it.

    It stands in a loop that fills the cache: from ``begin`` of :func:`expected` slots to all.
    """
    return jax.named_scope(f"filled_{blocks}_of_{slots}")


def visits(number: int) -> contextlib.AbstractContextManager[Any]:
    """A scope around a kernel of which ``number`` programs work, and the others of its grid do not.

    What it skips by what it reads, its grid does not say.
    """
    return jax.named_scope(f"visits_{number}")


def pages(number: int, slots: int) -> contextlib.AbstractContextManager[Any]:
    """A scope around a kernel that reads those of a row's ``number`` pages that hold something.

    It stands in a loop that fills them, as that of :func:`filled`.
    """
    return jax.named_scope(f"pages_{number}_of_{slots}")


def part(slots: int, whole: int) -> contextlib.AbstractContextManager[Any]:
    """A scope around a kernel that touches ``slots`` of each row's ``whole``."""
    return jax.named_scope(f"part_{slots}_of_{whole}")


def paged(name: str) -> float | None:
    """Pages that a row's part of a kernel reads, on average; None where its scopes do not say."""
    found = _PAGES.search(name)
    return _mean(int(found[1]), int(found[2]), name) if found else None


def share(name: str) -> float:
    """Of the cache that a kernel is given, how much it reads or writes."""
    if found := _PART.search(name):
        return int(found[1]) / int(found[2])
    found, number = _PAGES.search(name), paged(name)
    return number / int(found[1]) if found and number is not None else 1.0


def _mean(blocks: int, slots: int, name: str) -> float:
    """Blocks of a cache that hold something, over a loop that fills it."""
    begun = _BEGIN.search(name)
    share = (int(begun[1]) / slots if begun else 0.0) / 2 + 0.5
    return blocks * share + 0.5  # the last block is half full


def visited(name: str) -> int | None:
    """Programs that work in the kernels whose scopes are ``name``; None where they do not say."""
    found = _VISITS.search(name)
    return int(found[1]) if found else None


def of(name: str, scored_share: float = 1.0) -> float | None:
    """Rounds of the loop whose scopes are ``name``, on average; None where they do not say.

    Args:
      name: the scopes, as a traced or a compiled program has them.
      scored_share: of the positions of a batch.
    """
    if found := _FILLED.search(name):
        return _mean(int(found[1]), int(found[2]), name)
    found = _NAME.search(name)
    if not found:
        return None
    return math.ceil(int(found[2]) * (scored_share if found[1] else 1.0))
