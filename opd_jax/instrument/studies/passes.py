"""Passes over a corpus that sum exact gradients: over all positions, and type by type.

One pass gives the sums over positions and, for as many types as a byte budget holds rows [V] of,
their own sums; further types take further passes, over their own positions only. The output head's
gradient of a type is [V, D]: it is summed for one type at a time, from hidden states of the type's
positions that a pass fetches to the host, as many types at once as another budget holds.

All functions run under ``jax.set_mesh(pair.mesh)``.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from opd_jax import mesh as meshlib
from opd_jax import objective
from opd_jax.evaluate import growth
from opd_jax.instrument.corpus import Corpus
from opd_jax.instrument.studies import logit_sums
from opd_jax.instrument.studies.logit_sums import DROPPED
from opd_jax.store.pair import Pair

_TYPES_BYTES = 2**29  # of the sums by type, on each vocabulary shard
_STATES_BYTES = 2**31  # of hidden states held on the host
_ROWS = 512  # of one type at a time, per batch shard
_FEW_ROWS = 8  # rarer types are filled up to this


@dataclasses.dataclass(frozen=True)
class Logits:
    """Sums of logit gradients on the host, and of head gradients on the devices.

    Attributes:
      square: ||g||^2 of every position.
      norm: of the whole, ``global`` and ``balanced``.
      beside: each type's part beside either whole, as ``logit_sums.compare_types`` has it.
      total_global: entries of the global sum added up.
      rest_contribution: to the global sum, of all types that were not asked for.
      head_VD: gradient of the output head.
    """

    square: np.ndarray
    norm: dict[str, float]
    beside: dict[str, dict[str, np.ndarray]]
    total_global: float
    rest_contribution: float
    head_VD: jax.Array | None


def logits(
    corpus: Corpus,
    pair: Pair,
    ids,
    count_V,
    *,
    batch: int,
    has_head: bool = False,
    say: Callable[[str], None],
) -> Logits:
    """Sum over all positions and over those of each type, in as many passes as the budget takes."""
    row_bytes = 4 * len(count_V) // pair.mesh.shape["model"]
    slots = max(_TYPES_BYTES // row_bytes - 2, 1)
    pieces = [ids[first : first + slots] for first in range(0, len(ids), slots)] or [ids]
    square = np.zeros(corpus.num_positions, np.float32)
    inverse_V = np.divide(1.0, count_V, out=np.zeros(len(count_V)), where=count_V > 0)
    names = ("global_V", "balanced_V", *(("head_VD",) if has_head else ()), "types_KV")
    # Two more rows in the first pass: types of later passes, and types that nobody asks for.
    slot_V = np.where(np.isin(np.arange(len(count_V)), ids), len(pieces[0]), len(pieces[0]) + 1)
    sums: logit_sums.Sums = {}
    beside: dict[str, list] = {"global": [], "balanced": []}
    rest = 0.0
    progress = growth.Progress("answers", len(pieces) * len(corpus.answers), 0, say)
    for number, piece in enumerate(pieces):
        is_first = number == 0
        if not is_first:
            slot_V = np.full(len(count_V), DROPPED)
        slot_V[piece] = np.arange(len(piece))
        used = names if is_first else ("types_KV",)
        added = logit_sums.zeros(used, cfg=pair.cfg, slots=len(piece) + 2 * is_first)
        for host, index_B, slot_BT, inverse_BT in _batches(corpus, pair, slot_V, inverse_V, batch):
            placed = meshlib.to_global(meshlib.own_rows((host, slot_BT, inverse_BT)), pair.mesh)
            added, square_BT = logit_sums.add_rollout(
                added, pair.student, pair.teacher, *placed, cfg=pair.cfg
            )
            if is_first:
                corpus.place(square, meshlib.to_host(square_BT), host, index_B)
            progress.add(int(np.sum(index_B >= 0)), [{"tokens": int(np.sum(slot_BT != DROPPED))}])
        progress.done = (number + 1) * len(corpus.answers)  # those without such a type included
        sums |= added
        scales = {"global": np.ones(len(count_V)), "balanced": inverse_V}
        for name, scale_V in scales.items():
            scale_K = np.ones(added["types_KV"].shape[0], np.float32)
            scale_K[: len(piece)] = scale_V[piece]
            part = logit_sums.compare_types(added["types_KV"], scale_K, sums[f"{name}_V"])
            part = {key: np.asarray(x, np.float64) for key, x in meshlib.to_host(part).items()}
            beside[name].append({key: x[: len(piece)] for key, x in part.items()})
            if is_first and name == "global":
                rest = float(part["dot"][-1])
    progress.tell()
    wholes = meshlib.to_host({n: sums[f"{n}_V"] for n in beside})
    norm = {n: float(np.linalg.norm(x.astype(np.float64))) for n, x in wholes.items()}
    return Logits(
        square=square,
        norm=norm,
        beside={
            n: {key: np.concatenate([p[key] for p in x]) for key in x[0]} for n, x in beside.items()
        },
        total_global=float(wholes["global"].sum(dtype=np.float64)),
        rest_contribution=rest / norm["global"] if norm["global"] else 0.0,
        head_VD=sums.get("head_VD"),
    )


def _batches(corpus: Corpus, pair: Pair, slot_V, inverse_V, batch: int):
    """Batches with a position that is looked at, and where its gradients go."""
    for host, index_B in corpus.batches(batch, pad_id=pair.sampler.pad_id):
        next_ = objective.predicted(host)
        ids_BT = np.asarray(next_.ids_BT)
        slot_BT = np.where(next_.mask_BT, slot_V[ids_BT], DROPPED).astype(np.int32)
        if (slot_BT != DROPPED).any():
            yield host, index_B, slot_BT, inverse_V[ids_BT].astype(np.float32)


def heads(
    corpus: Corpus,
    pair: Pair,
    ids,
    count_V,
    whole_VD,
    *,
    batch: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Norm of the summed head gradient of each type, and its inner product with the whole."""
    found: dict[str, Any] = {"norm": {}, "dot": {}}
    pieces = states(corpus, pair, ids, count_V, batch)
    progress = growth.Progress("types", len(ids), 0, say)
    for token, parts in itertools.groupby(pieces, key=lambda piece: piece[0]):
        sums = logit_sums.zeros(("head_VD",), cfg=pair.cfg)
        for _, hs_ND, ht_NE in parts:
            for rows in _cut(hs_ND, ht_NE, meshlib.batch_shards(pair.mesh)):
                placed = meshlib.to_global(meshlib.own_rows(rows), pair.mesh)
                sums = logit_sums.add_states(
                    sums, pair.student, pair.teacher, *placed, cfg=pair.cfg
                )
        norm, dot = meshlib.to_host(logit_sums.norm_and_dot(sums["head_VD"], whole_VD))
        found["norm"][token], found["dot"][token] = float(norm), float(dot)
        progress.add(1, [])
    progress.tell()
    found["norm_global"] = float(meshlib.to_host(logit_sums.norm_and_dot(whole_VD, whole_VD))[0])
    return found


def states(
    corpus: Corpus, pair: Pair, ids, count_V, batch: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Hidden states of both models at the positions of each type, type by type.

    As many types as the budget holds share a pass. A type beyond it has one to itself and comes in
    several pieces.
    """
    cfg = pair.cfg
    assert cfg.teacher is not None
    position_bytes = sum(m.width * m.compute_dtype.itemsize for m in (cfg.student, cfg.teacher))
    most = max(_STATES_BYTES // position_bytes, 1)
    for group in _groups(ids, count_V, most):
        slot_V = np.full(len(count_V), DROPPED)
        slot_V[group] = np.arange(len(group))
        held: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for host, _, slot_BT, _ in _batches(corpus, pair, slot_V, np.zeros(len(count_V)), batch):
            rollout = meshlib.to_global(meshlib.own_rows(host), pair.mesh)
            both = meshlib.to_host(logit_sums.states(pair.student, pair.teacher, rollout, cfg=cfg))
            chosen = slot_BT != DROPPED
            held.append((slot_BT[chosen], both[0][chosen], both[1][chosen]))
            if len(group) == 1 and sum(len(slot) for slot, _, _ in held) >= most:
                _, hs_ND, ht_NE = _joined(held)
                yield group[0], hs_ND, ht_NE
                held = []
        if held:
            slot_N, hs_ND, ht_NE = _joined(held)
            for slot, token in enumerate(group):
                here = slot_N == slot
                if here.any():
                    yield token, hs_ND[here], ht_NE[here]


def _groups(ids, count_V, most: int) -> Iterator[list[int]]:
    """Cut the types so that the positions of a group are at most ``most``, or of one type."""
    group: list[int] = []
    for token in ids.tolist():
        if group and count_V[[*group, token]].sum() > most:
            yield group
            group = []
        group.append(token)
    if group:
        yield group


def _joined(held):
    return [np.concatenate(column) for column in zip(*held, strict=True)]


def _cut(hs_ND, ht_NE, shards: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pieces of few sizes that divide over the batch shards, with the slot of each row."""
    for first in range(0, len(hs_ND), _ROWS * shards):
        parts = [x[first : first + _ROWS * shards] for x in (hs_ND, ht_NE)]
        rows = len(parts[0])
        local = max(_FEW_ROWS, -(-rows // shards))
        size = shards * (1 << (local - 1).bit_length())
        slot_R = np.where(np.arange(size) < rows, 0, DROPPED).astype(np.int32)
        hs_RD, ht_RE = (np.pad(x, ((0, size - rows), (0, 0))) for x in parts)
        yield hs_RD, ht_RE, slot_R
