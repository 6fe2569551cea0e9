"""Rollouts: prefill a left-padded prompt batch once, then decode with a key/value cache.

Letters: B counts prompts in the prefill and rows (prompts x samples) in the decode loop; N is the
number of new tokens that there is room for.
"""

from __future__ import annotations

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key

from opd_jax import mesh, rounds
from opd_jax.models import kv_cache, paged, transformer
from opd_jax.models.kv_cache import Cache
from opd_jax.models.transformer import ModelConfig
from opd_jax.pytrees import Params, Prompt, Rollout
from opd_jax.rollout import drawn, refill, sampling
from opd_jax.rollout.drawn import Ban, Decoded
from opd_jax.rollout.sampling import Sampler

# What a function of each row is given and makes: its ids and a number, its states and a number.
_TURNED = ((jax.P(mesh.BATCH, None), jax.P(mesh.BATCH)), jax.P(mesh.BATCH, None))
_LAST = ((jax.P(mesh.BATCH, None, None), jax.P(mesh.BATCH)), jax.P(mesh.BATCH, None))
# Counted while tracing: under a mesh jit's cache also counts entries that share a program.
_traced: collections.Counter[str] = collections.Counter()


def sample(
    params: Params,
    prompt: Prompt,
    key: Key[Array, ""],
    *,
    cfg: ModelConfig,
    sampler: Sampler,
    max_new: int,
    samples: int = 1,
    bias_V: Float[Array, " V"] | None = None,
    policy_step: Int[Array, ""] | int = 0,
    rows_B: Int[Array, " B"] | None = None,
    slots: int = 0,
    segments: int = 1,
) -> Rollout:
    """Sample every prompt ``samples`` times; row ``b * samples + j`` is sample j of prompt b.

    A row's ids depend on its prompt, on ``key`` and on its global row number alone: not on the
    other rows, the padding, the batch size or the mesh. A part of a larger batch therefore passes
    the global numbers of its prompts as ``rows_B`` and gets the rows that the whole batch would
    have got. A failed sample (non-finite logits) shows as a NaN in ``logp_BT``.

    Args:
      params: as declared by ``model.specs``.
      prompt: left-padded, at least one real token per row.
      key: one typed key per rollout; it is only folded, never split.
      cfg: static.
      sampler: static.
      max_new: static; most ids sampled per row.
      samples: static; continuations per prompt. The prompt is prefilled once for all of them.
      bias_V: added to the logits (padded ids included) before temperature; -inf forbids an id.
      policy_step: train step of ``params``, copied into the result.
      rows_B: global prompt numbers, ``arange(B)`` when None. In slots, a row with a number below 0
        only fills the batch up, and stays empty; each shard has those behind its others.
      slots: static; rows that are decoded at a time, each of which makes room for the next when it
        has ended (:mod:`opd_jax.rollout.refill`); 0, or as many as there are: all, in step.
      segments: static; of rows in step, pieces in which the cache grows, see :func:`rooms`.

    Raises:
      ValueError: no room for prompt and new tokens, an empty prompt, or a bias, vocabulary or
        slots that do not fit the model or the mesh.

    **Sharding**: rows over the batch axes throughout; a row's samples stay where its prompt is.
    """
    check(prompt, cfg=cfg, sampler=sampler, max_new=max_new, samples=samples, rows_B=rows_B)
    refill.check(slots, len(prompt.start_B) * samples)
    if bias_V is not None:
        sampling.check_bias(bias_V, sampler, num_ids=cfg.vocab_size)
    rollout, _ = _sample(
        params,
        prompt,
        key,
        bias_V,
        jnp.asarray(policy_step, jnp.int32),
        rows_B,
        cfg=cfg,
        sampler=sampler,
        max_new=max_new,
        samples=samples,
        slots=slots,
        segments=segments,
    )
    return rollout


_STATIC = ("cfg", "sampler", "max_new", "samples", "slots", "segments")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _sample(
    params,
    prompt,
    key,
    bias_V,
    policy_step,
    rows_B,
    *,
    cfg,
    sampler,
    max_new,
    samples,
    slots=0,
    segments=1,
):
    """The compiled rollout, and the number of ids that its longest row sampled."""
    _traced["sample"] += 1
    num_prompts, width = prompt.ids_BP.shape
    has_fill = rows_B is not None
    if rows_B is None:
        rows_B = jnp.arange(num_prompts, dtype=jnp.int32)
    rows_B = mesh.constrain(jnp.asarray(rows_B, jnp.int32), mesh.BATCH)
    is_refilled = refill.slots(slots, num_prompts * samples) < num_prompts * samples
    room = 0 if is_refilled else rooms(max_new, segments)[0]
    is_paged = paged.fits(cfg, width + max_new)
    size = width if is_refilled else kv_cache.whole(width + room, is_paged)
    h_BD, cache = prefill(params, prompt, cfg=cfg, size=size, is_paged=is_paged)
    ids_BP, start_B = (
        mesh.repeat_rows(prompt.ids_BP, samples),
        mesh.repeat_rows(prompt.start_B, samples),
    )
    copy_B = mesh.constrain(jnp.tile(jnp.arange(samples), num_prompts), mesh.BATCH)
    row_B = mesh.repeat_rows(rows_B, samples) * samples + copy_B
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, row_B)
    given: dict[str, Any] = {"cfg": cfg, "sampler": sampler, "max_new": max_new, "bias_V": bias_V}
    if is_refilled:
        given |= {"slots": slots, "samples": samples, "is_real_R": row_B >= 0 if has_fill else None}
        new = refill.decode(params, h_BD, cache, width - start_B, keys_B, **given)
    else:
        h_BD, cache = mesh.repeat_rows(h_BD, samples), kv_cache.repeat(cache, samples)
        given |= {"segments": segments}
        new = decode(params, h_BD, cache, width - start_B, keys_B, **given)
    is_new_BN = jnp.arange(max_new)[None, :] < new.length_B[:, None]
    rollout = Rollout(
        ids_BT=jnp.concatenate([ids_BP, new.ids_BN], axis=1),
        start_B=start_B,
        mask_BT=jnp.pad(is_new_BN, ((0, 0), (width, 0))),
        logp_BT=jnp.pad(new.logp_BN, ((0, 0), (width, 0))),
        truncated_B=~new.is_done_B,
        policy_step=policy_step,
    )
    return rollout, new.num_steps


def compiles() -> int:
    """How often the rollout has been traced, hence compiled, in this process."""
    return _traced["sample"]


def prefill(
    params: Params, prompt: Prompt, *, cfg: ModelConfig, size: int, is_paged: bool = False
) -> tuple[Float[Array, "B D"], Cache]:
    """Run the prompts once: the hidden state of each last token, and a cache of ``size`` slots.

    Args:
      params: as declared by ``model.specs``.
      prompt: left-padded.
      cfg: static.
      size: static.
      is_paged: static; whether the cache is in pages, see :func:`paged.fits`.

    **Sharding**: rows over the batch axes.
    """
    width = prompt.ids_BP.shape[1]
    ids_BP = mesh.constrain(prompt.ids_BP, mesh.BATCH, None)
    start_B = mesh.constrain(prompt.start_B, mesh.BATCH)
    valid_BP = jnp.arange(width)[None, :] >= start_B[:, None]
    if is_paged:  # the padding behind the tokens
        turn = mesh.on_shards(jax.vmap(lambda x_P, by: jnp.roll(x_P, -by)), *_TURNED)
        ids_BP, valid_BP = turn(ids_BP, start_B), turn(valid_BP, start_B)
    h_BPD, cache = transformer.hidden(
        params,
        ids_BP,
        transformer.positions(valid_BP),
        valid_BP,
        cfg=cfg,
        room=size,
        is_paged=is_paged,
    )
    assert cache is not None  # there is room
    if not is_paged:
        return h_BPD[:, -1], cache
    last = mesh.on_shards(jax.vmap(lambda h_PD, length: h_PD[length - 1]), *_LAST)
    return last(h_BPD, cache.length), cache


def decode(
    params: Params,
    h_BD: Float[Array, "B D"],
    cache: Cache,
    position_B: Int[Array, " B"],
    keys_B: Key[Array, " B"],
    *,
    cfg: ModelConfig,
    sampler: Sampler,
    max_new: int,
    bias_V: Float[Array, " V"] | None = None,
    ban: Ban | None = None,
    segments: int = 1,
) -> Decoded:
    """Sample up to ``max_new`` ids per row, stopping as soon as every row has sampled a stop id.

    Args:
      params: as declared by ``model.specs``.
      h_BD: hidden state that predicts each row's first new id.
      cache: the prompts, with room for the first of :func:`rooms` more tokens.
      position_B: position of each row's first new id (its number of prompt tokens).
      keys_B: a key per row; id t of a row is drawn with ``fold_in(key, t)``.
      cfg: static.
      sampler: static.
      max_new: static.
      bias_V: added to the logits before temperature.
      ban: what each row may not sample, see ``sampling.sample``.
      segments: static; pieces in which the cache grows.

    **Sharding**: rows over the batch axes; logits leave the projection split over ``model``.
    """
    w_VD = transformer.head(params, cfg=cfg)
    params = transformer.for_decoding(params, cfg=cfg)

    def draw(new: Decoded, h_BD: jax.Array) -> tuple[Decoded, jax.Array]:
        step = new.num_steps
        ids_B, logp_B = drawn.draw(
            w_VD, h_BD, keys_B, step, sampler=sampler, bias_V=bias_V, ban=ban
        )
        ids_B = jnp.where(new.is_done_B, sampler.pad_id, ids_B)
        logp_B = jnp.where(new.is_done_B, 0.0, logp_B)
        new = Decoded(
            ids_BN=_put(new.ids_BN, ids_B, step),
            logp_BN=_put(new.logp_BN, logp_B, step),
            length_B=new.length_B + ~new.is_done_B,
            is_done_B=new.is_done_B | drawn.is_stop(ids_B, sampler),
            num_steps=step + 1,
        )
        return new, ids_B

    def step(carry):
        new, last_B, cache = carry
        # The token that goes in is the one before the id that comes out, hence the - 1. A finished
        # row feeds padding: the batch is in step, and what it writes is never read.
        h_B1D, cache = transformer.hidden(
            params,
            last_B[:, None],
            (position_B + new.num_steps - 1)[:, None],
            ~new.is_done_B[:, None],
            cfg=cfg,
            cache=cache,
        )
        return *draw(new, h_B1D[:, 0]), cache

    def is_running(limit: int, carry) -> jax.Array:
        new = carry[0]
        return (new.num_steps < limit) & ~jnp.all(new.is_done_B)

    carry = *draw(drawn.nothing(h_BD.shape[0], max_new, sampler), h_BD), cache
    width, begin = cache.size - rooms(max_new, segments)[0], 1
    for room in rooms(max_new, segments):
        new, last_B, held = carry
        assert held is not None  # a step gives back the cache that it was given
        if width + room > held.size:
            carry = new, last_B, kv_cache.grow(held, kv_cache.whole(width + room, held.is_paged))
        limit = min(room + 1, max_new)  # the last id needs no place: nothing comes after it
        with rounds.expected(limit - begin, begin=width + begin - 1):
            carry = jax.lax.while_loop(functools.partial(is_running, limit), step, carry)
        begin = limit
    return carry[0]


def rooms(max_new: int, segments: int) -> tuple[int, ...]:
    """Places for new ids that the cache has in each piece of a decode: equal steps to all.

    Where a token reads the whole width of the cache, live or not (:func:`kv_cache.block`), with n
    pieces it reads what its piece has, (n + 1) / 2n of all places on average over a row of full
    length instead of all; each piece compiles the loop once more, and between two of them the cache
    is copied.
    """
    return tuple(sorted({-(-max_new * piece // segments) for piece in range(1, segments + 1)}))


def check(
    prompt: Prompt,
    *,
    cfg: ModelConfig,
    sampler: Sampler,
    max_new: int,
    samples: int = 1,
    rows_B: Int[Array, " B"] | None = None,
) -> None:
    """Refuse a rollout that the model has no positions or ids for.

    Under a trace, where row lengths are not known, the padded width counts as the prompt length.

    Raises:
      ValueError: as :func:`sample`.
    """
    if max_new < 1 or samples < 1:
        raise ValueError(
            f"max_new is {max_new} and samples is {samples}: expected at least 1 of both; set "
            "--config.rollout.max_new / --config.rollout.samples"
        )
    if sampler.vocab_size > cfg.vocab_size:
        raise ValueError(
            f"the sampler has {sampler.vocab_size} ids, the model {cfg.vocab_size}: expected no "
            "more than the model has; use the tokenizer that belongs to the model"
        )
    num_prompts, width = prompt.ids_BP.shape
    if rows_B is not None and np.shape(rows_B) != (num_prompts,):
        raise ValueError(
            f"rows_B has shape {np.shape(rows_B)} for {num_prompts} prompts: expected one global "
            f"prompt number each, ({num_prompts},)"
        )
    starts = _host_starts(prompt.start_B)
    if starts.size and (starts.min() < 0 or starts.max() >= width):
        row = int(np.argmax((starts < 0) | (starts >= width)))
        raise ValueError(
            f"prompt row {row} starts at {starts[row]} of {width} columns: expected at least one "
            "real token per row; drop empty prompts (see --config.data.max_prompt)"
        )
    longest = width - int(starts.min()) if starts.size else width
    if longest + max_new > cfg.max_positions:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new {max_new} need {longest + max_new} "
            f"positions, the model has {cfg.max_positions}: expected no more; lower "
            "--config.data.max_prompt or --config.rollout.max_new"
        )


def _host_starts(start_B) -> np.ndarray:
    """Row starts that this process holds; none under a trace."""
    if isinstance(start_B, Tracer | jax.ShapeDtypeStruct):
        return np.zeros(0, np.int32)
    if isinstance(start_B, jax.Array) and not start_B.is_fully_addressable:
        return np.concatenate([np.asarray(shard.data) for shard in start_B.addressable_shards])
    return np.asarray(start_B)


def _put(buffer_BN: jax.Array, value_B: jax.Array, step: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer_BN, value_B[:, None], step, axis=1)
