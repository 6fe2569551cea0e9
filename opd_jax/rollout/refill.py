"""Decoding in slots: a row that has ended makes room for the next one, in one compiled loop.

A batch in step takes as long as its longest row, while most rows are short. Here only ``slots``
rows are decoded at a time, and each device starts its next row where one of its own has ended, so
that a token's work is that of rows that still run.

All prompts are read before the loop, each once for all its samples, as for a batch in step. Their
keys and values lie there until the last row is started: P columns for each prompt, while every row
that waits for a slot saves the P + N columns of an answer. (Reading a few prompts at a time inside
of the loop would save those P columns, and multiply few rows by all weights instead of many.)

A row's tokens stand in the columns in which they stand in a batch in step, what its slot held
before is cleared, and its draws are keyed by its own number. So its ids do not depend on the number
of slots, and its log-probabilities only by the rounding of products of another shape.

Letters: S counts slots, R rows and P prompts of all devices; N is the number of new tokens that
there is room for.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from opd_jax import mesh, rounds
from opd_jax.models import kv_cache, memory, transformer
from opd_jax.models.kv_cache import Cache
from opd_jax.models.transformer import ModelConfig
from opd_jax.pytrees import Params
from opd_jax.rollout import drawn
from opd_jax.rollout.drawn import Ban, Decoded
from opd_jax.rollout.sampling import Sampler

FILL = -1  # number of a row that is there to fill a batch up
FLAGS = "--slots, --batch, --samples or --max-new"  # of a command that needs less memory with less
_ROWS = jax.P(mesh.BATCH)
_WIDE = jax.P(mesh.BATCH, None)


@struct.dataclass
class _Slots:
    """What is being decoded.

    **Sharding**: slots over the batch axes, and so is ``next_H``, which has one number a shard.
    """

    row_S: jax.Array  # i32, of the rows of its shard
    age_S: jax.Array  # i32, ids that the row has sampled
    is_on_S: jax.Array  # bool, the row has not ended
    last_S: jax.Array  # i32, the id sampled last
    h_SD: jax.Array  # of a row without ids: what predicts the first one
    next_H: jax.Array  # i32, the row of its shard that is started next
    cache: Cache


def slots(wanted: int, rows: int) -> int:
    """How many of ``rows`` rows are decoded at a time: ``wanted``; all where that is 0 or more."""
    return wanted if 0 < wanted < rows else rows


def taken(lengths: Sequence[int], slots: int, shards: int = 1) -> int:
    """Rounds of the loop over tokens for rows of these lengths, dealt to the shards in turn.

    Args:
      lengths: ids of each row, in the order in which rows are started.
      slots: of all shards; 0: all rows are in step.
      shards: of the batch.
    """
    if not slots:
        return max(lengths)
    most = 0
    for shard in range(shards):
        ends = [0] * (slots // shards)  # a heap: the next row begins where one ends first
        for length in lengths[shard::shards]:
            heapq.heapreplace(ends, ends[0] + length)
        most = max(most, *ends)
    return most


def cells(
    cfg: ModelConfig, prompts: int, samples: int, width: int, max_new: int, on: Mesh, *, wanted: int
) -> float:
    """Bytes on each device of the keys and values of a rollout in ``wanted`` slots."""
    rows = prompts * samples
    held = memory.cache(cfg, slots(wanted, rows), width + max_new, on)
    is_refilled = slots(wanted, rows) < rows
    return held + is_refilled * memory.cache(cfg, prompts, width, on)


def check(slots: int, rows: int) -> None:
    """Refuse slots that the devices cannot share.

    Raises:
      ValueError: they, or the rows, do not divide over the batch shards.
    """
    shards = mesh.size(mesh.BATCH)
    if slots < 0 or slots % shards or (slots and rows % shards):
        raise ValueError(
            f"{slots} slots for {rows} rows over {shards} batch shards (mesh data x fsdp): "
            "expected 0 (all rows at once) or a number that divides over them, as that of rows; "
            "set --config.rollout.slots"
        )


def decode(
    params: Params,
    h_PD: Float[Array, "P D"],
    prompts: Cache,
    position_R: Int[Array, " R"],
    keys_R: Key[Array, " R"],
    *,
    cfg: ModelConfig,
    sampler: Sampler,
    max_new: int,
    slots: int,
    samples: int = 1,
    bias_V: Float[Array, " V"] | None = None,
    ban: Ban | None = None,
    is_real_R: Bool[Array, " R"] | None = None,
) -> Decoded:
    """Sample up to ``max_new`` ids per row, ``slots`` rows at a time; see ``decode.decode``.

    Args:
      params: as declared by ``model.specs``.
      h_PD: hidden state that predicts the first new id after each prompt.
      prompts: keys and values of all prompts, without room for more.
      position_R: position of each row's first new id (its number of prompt tokens).
      keys_R: a key per row; id t of a row is drawn with ``fold_in(key, t)``.
      cfg: static.
      sampler: static.
      max_new: static.
      slots: static; divides over the batch shards.
      samples: static; row ``b * samples + j`` is sample j of prompt b.
      bias_V: added to the logits before temperature.
      ban: what each row may not sample, see ``sampling.sample``.
      is_real_R: rows that are decoded, default: all; the others only fill up, and each shard has
        them behind its real ones. They stay empty.

    **Sharding**: rows and slots over the batch axes, every row in a slot of its own device; a token
    costs the collectives that it costs in a batch in step. The loop runs while any device has work.
    """
    w_VD = transformer.head(params, cfg=cfg)
    params = transformer.for_decoding(params, cfg=cfg)
    width, num_rows = prompts.size, position_R.shape[0]
    rows_here = num_rows // mesh.size(mesh.BATCH)
    length_P = jnp.broadcast_to(prompts.length, (h_PD.shape[0],))
    prompts = dataclasses.replace(prompts, length=mesh.constrain(length_P, mesh.BATCH))
    # Keys as numbers, which every primitive takes.
    of_rows = (jnp.asarray(position_R), jax.random.key_data(keys_R), ban)
    rows_H = _counts(is_real_R, rows_here)
    seat = mesh.on_shards(
        lambda *given: _seat(*given, samples=samples),
        (_slots_spec(prompts), _ROWS, _WIDE, _cache_spec(prompts)),
        (_slots_spec(prompts), _ROWS),
    )

    def step(carry: tuple[_Slots, Decoded]) -> tuple[_Slots, Decoded]:
        now, new = carry
        now, is_fresh_S = seat(now, rows_H, h_PD, prompts)
        position_S, key_S, ban_S = _picked(of_rows, now.row_S)
        keys_S = jax.random.wrap_key_data(key_S, impl=jax.random.key_impl(keys_R))
        # The token that goes in is the one before the id that comes out, hence the - 1. A slot that
        # has none, or no row, writes what is never read.
        before_S = jnp.maximum(now.age_S - 1, 0)
        h_S1D, cache = transformer.hidden(
            params,
            now.last_S[:, None],
            (position_S + before_S)[:, None],
            (now.is_on_S & ~is_fresh_S)[:, None],
            cfg=cfg,
            cache=dataclasses.replace(
                now.cache, length=(position_S if prompts.is_paged else width) + before_S
            ),
        )
        h_SD = jnp.where(is_fresh_S[:, None], now.h_SD, h_S1D[:, 0])
        ids_S, logp_S = drawn.draw(
            w_VD, h_SD, keys_S, now.age_S, sampler=sampler, bias_V=bias_V, ban=ban_S
        )
        is_stop_S = drawn.is_stop(ids_S, sampler)
        new = _recorded(new, now, ids_S, logp_S, is_stop_S)
        return dataclasses.replace(
            now,
            age_S=now.age_S + now.is_on_S,
            is_on_S=now.is_on_S & ~is_stop_S & (now.age_S + 1 < max_new),
            last_S=ids_S,
            cache=cache,
        ), new

    def is_running(carry: tuple[_Slots, Decoded]) -> jax.Array:
        now = carry[0]
        return jnp.any(now.is_on_S) | jnp.any(now.next_H < rows_H)

    carry = _empty(h_PD, prompts, slots, max_new), drawn.nothing(num_rows, max_new, sampler)
    with rounds.expected(-(-num_rows // slots) * max_new, begin=width):
        return jax.lax.while_loop(is_running, step, carry)[1]


def _counts(is_real_R: jax.Array | None, rows_here: int) -> jax.Array:
    """How many rows of each shard are decoded, [H]."""
    if is_real_R is None:
        return mesh.constrain(jnp.full(mesh.size(mesh.BATCH), rows_here, jnp.int32), mesh.BATCH)
    count = mesh.on_shards(lambda x: jnp.sum(x, dtype=jnp.int32, keepdims=True), (_ROWS,), _ROWS)
    return count(is_real_R)


def _cache_spec(like: Cache) -> Any:
    held: Any = jax.P(*kv_cache.AXES)
    valid: Any = None if like.valid_BS is None else _WIDE
    rows: Any = _ROWS
    return dataclasses.replace(like, keys=held, values=held, valid_BS=valid, length=rows)


def _slots_spec(prompts: Cache) -> Any:
    per_slot: Any = (_ROWS, _ROWS, _ROWS, _ROWS, _WIDE, _ROWS, _cache_spec(prompts))
    return _Slots(*per_slot)


def _empty(h_PD: jax.Array, prompts: Cache, slots: int, max_new: int) -> _Slots:
    """Slots without rows, with room for prompt and new tokens each."""

    def zeros(like: jax.Array, *axes, **sides: int) -> jax.Array:
        shape = [slots, *like.shape[1:]]
        for axis in sides.values():
            shape[axis] = kv_cache.whole(shape[axis] + max_new, prompts.is_paged)
        return mesh.constrain(jnp.zeros(shape, like.dtype), *axes)

    number_S = mesh.constrain(jnp.zeros(slots, jnp.int32), mesh.BATCH)
    return _Slots(
        row_S=number_S,
        age_S=number_S,
        is_on_S=mesh.constrain(jnp.zeros(slots, bool), mesh.BATCH),
        last_S=number_S,
        h_SD=zeros(h_PD, mesh.BATCH, None),
        next_H=mesh.constrain(jnp.zeros(mesh.size(mesh.BATCH), jnp.int32), mesh.BATCH),
        cache=dataclasses.replace(
            prompts,
            keys=tuple(zeros(x, *kv_cache.AXES, grown=prompts.key_slots) for x in prompts.keys),
            values=tuple(zeros(x, *kv_cache.AXES, grown=2) for x in prompts.values),
            valid_BS=None
            if prompts.valid_BS is None
            else zeros(prompts.valid_BS, mesh.BATCH, None, grown=1),
            length=number_S,
        ),
    )


def _seat(
    now: _Slots, rows_H: jax.Array, h_PD: jax.Array, prompts: Cache, *, samples: int
) -> tuple[_Slots, jax.Array]:
    """Start the next rows in the slots that have none; also return which slots those are.

    It runs on each device by itself, and costs a row its own part of the cache.
    """

    def is_wanted(carry: tuple[_Slots, jax.Array]) -> jax.Array:
        now = carry[0]
        return ~jnp.all(now.is_on_S) & (now.next_H[0] < rows_H[0])

    def start(carry: tuple[_Slots, jax.Array]) -> tuple[_Slots, jax.Array]:
        now, is_fresh_S = carry
        slot, row = jnp.argmin(now.is_on_S), now.next_H[0]

        def put(old: jax.Array, prompt: jax.Array) -> jax.Array:
            """A prompt's part, and zeros behind it: what was there before may not be finite."""
            own = jax.lax.dynamic_slice_in_dim(prompt, row // samples, 1)
            sides = [(0, a - b) for a, b in zip(old.shape, own.shape, strict=True)]
            own = jnp.pad(own, [(0, 0), *sides[1:]])
            return jax.lax.dynamic_update_slice_in_dim(old, own, slot, 0)

        return dataclasses.replace(
            now,
            row_S=now.row_S.at[slot].set(row),
            age_S=now.age_S.at[slot].set(0),
            is_on_S=now.is_on_S.at[slot].set(True),
            h_SD=put(now.h_SD, h_PD),
            next_H=now.next_H + 1,
            cache=jax.tree.map(put, now.cache, prompts),
        ), is_fresh_S.at[slot].set(True)

    with rounds.expected(0):  # once a row, hence in few of the rounds of the loop over tokens
        return jax.lax.while_loop(is_wanted, start, (now, jnp.zeros_like(now.is_on_S)))


def _picked(of_rows: Any, row_S: jax.Array) -> Any:
    """What each slot's row has of some arrays of all rows."""
    spec = jax.tree.map(lambda x: jax.P(mesh.BATCH, *[None] * (x.ndim - 1)), of_rows)
    pick = mesh.on_shards(lambda x, row: jax.tree.map(lambda y: y[row], x), (spec, _ROWS), spec)
    return pick(of_rows, row_S)


def _recorded(
    new: Decoded, now: _Slots, ids_S: jax.Array, logp_S: jax.Array, is_stop_S: jax.Array
) -> Decoded:
    """The answers with what the running slots have drawn."""

    def put(ids_RN, logp_RN, length_R, is_done_R, now, ids_S, logp_S, is_stop_S):
        row_S = jnp.where(now[2], now[0], len(length_R))  # past the end: dropped
        age_S = now[1]
        return (
            ids_RN.at[row_S, age_S].set(ids_S, mode="drop"),
            logp_RN.at[row_S, age_S].set(logp_S, mode="drop"),
            length_R.at[row_S].set(age_S + 1, mode="drop"),
            is_done_R.at[row_S].set(is_stop_S, mode="drop"),
        )

    old = (_WIDE, _WIDE, _ROWS, _ROWS)
    place = mesh.on_shards(put, (*old, (_ROWS,) * 3, _ROWS, _ROWS, _ROWS), old)
    ids_RN, logp_RN, length_R, is_done_R = place(
        new.ids_BN,
        new.logp_BN,
        new.length_B,
        new.is_done_B,
        (now.row_S, now.age_S, now.is_on_S),
        ids_S,
        logp_S,
        is_stop_S,
    )
    return Decoded(ids_RN, logp_RN, length_R, is_done_R, new.num_steps + 1)
