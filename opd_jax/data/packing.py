"""Rows of unequal length laid end to end in fewer rows, so that little padding is computed.

Which row goes where is decided on the host, from lengths alone, and is the same on every process
and in every run. Widths and numbers of packed rows come from short ladders: few programs serve all.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from opd_jax.pytrees import Packing

_WORTH = 0.05  # share of the computed positions that wider rows have to save


def plan(
    start_B: ArrayLike,
    end_B: ArrayLike,
    *,
    columns: int,
    shards: int = 1,
    pieces: int = 1,
) -> Packing:
    """Where each position is computed.

    Of a row those from its first token to its last scored one are laid out, all others are left
    out; the batch's last column predicts nothing and is none of them. Packed rows are as wide as a
    row may be, or half as much again where that saves enough. Longest rows are placed first, each
    where it first fits.

    Args:
      start_B: column of each row's first token.
      end_B: column after its last scored token; 0 where it has none, which is left out.
      columns: of the batch, T.
      shards: packed rows are a multiple of this.
      pieces: micro-batches; a packed one holds at most as many positions as one of rows as they
        are, so that it needs no more memory.

    Returns:
      The layout as numpy arrays, see :class:`~opd_jax.pytrees.Packing`.
    """
    start_B, end_B = np.asarray(start_B), np.asarray(end_B)
    width = columns - 1
    length_B = np.maximum(np.minimum(end_B, width) - start_B, 0)
    most = -(-len(length_B) // (shards * pieces))  # rows of a piece on a shard
    shape = _shape(length_B, width, most, shards, pieces)
    if most > 1:
        wider = _shape(length_B, width * 3 // 2, most * 2 // 3, shards, pieces)
        if wider.positions < (1 - _WORTH) * shape.positions:
            shape = wider
    return _laid_out(shape, start_B, length_B, width, shards, pieces)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Rows in bins, of ``width`` columns; ``rows`` bins of a shard are one of ``live`` pieces."""

    bins: list[list[int]]
    width: int
    rows: int
    live: int

    @property
    def positions(self) -> int:
        """Computed on each shard."""
        return self.width * self.rows * self.live


def _shape(length_B, width: int, most: int, shards: int, pieces: int) -> _Shape:
    bins = _first_fit(length_B, width)
    needed = max(-(-len(bins) // shards), 1)
    live = min(-(-needed // most), pieces)
    rows = -(-needed // live)
    return _Shape(bins, width, max(min(_step(rows), most), rows), live)


def _first_fit(length_B, width: int) -> list[list[int]]:
    """Rows by bin, the longest first, those of equal length in their own order."""
    bins: list[list[int]] = []
    room: list[int] = []
    for row in np.argsort(-length_B, kind="stable"):
        length = int(length_B[row])
        if not length:
            break
        at = next((i for i, left in enumerate(room) if left >= length), len(bins))
        if at == len(bins):
            bins.append([])
            room.append(width)
        bins[at].append(int(row))
        room[at] -= length
    return bins


def _step(rows: int) -> int:
    """The step of the ladder 1, 2, ... 16, 18, 20, ... 32, 36, ... that holds ``rows``."""
    unit = max(1 << (rows - 1).bit_length() >> 4, 1)
    return -(-rows // unit) * unit


def _laid_out(shape: _Shape, start_B, length_B, columns: int, shards: int, pieces: int) -> Packing:
    rows, width = shards * shape.rows, shape.width
    source_RPL: Any = np.full((rows, pieces, width), -1, np.int32)
    first_RPL: Any = np.broadcast_to(np.arange(width, dtype=np.int32), source_RPL.shape).copy()
    place_BT: Any = np.full((len(length_B), columns), -1, np.int32)
    for number, members in enumerate(shape.bins):
        # Dealt out in turn: what is left empty is spread over shards, then over pieces.
        turn, shard = divmod(number, shards)
        place, piece = divmod(turn, shape.live)
        row, at = shard * shape.rows + place, 0
        for member in members:
            start, length = int(start_B[member]), int(length_B[member])
            slots = slice(at, at + length)
            source_RPL[row, piece, slots] = member * columns + start + np.arange(length)
            first_RPL[row, piece, slots] = at
            begin = (piece * rows + row) * width + at
            place_BT[member, start : start + length] = begin + np.arange(length)
            at += length
    live: Any = np.int32(shape.live)
    return Packing(source_RPL, first_RPL, place_BT, live)
