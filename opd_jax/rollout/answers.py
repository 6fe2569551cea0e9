"""Answers to a list of prompts, batch by batch, decoded."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from opd_jax import mesh as meshlib
from opd_jax.data import batches as batching
from opd_jax.data import widths as padding
from opd_jax.data.prompts import Example
from opd_jax.models.transformer import ModelConfig
from opd_jax.pytrees import Params, Prompt, Rollout
from opd_jax.rollout import refill, regrouped
from opd_jax.rollout.sampling import Sampler


def batches(rows: Sequence[Example], size: int) -> Iterator[tuple[list[Example], int]]:
    """Cut rows into batches of exactly ``size``; the last repeats its first row to fill up.

    Yields each batch and how many of its rows are real.
    """
    for first in range(0, len(rows), size):
        part = list(rows[first : first + size])
        yield part + [part[0]] * (size - len(part)), len(part)


def check_slots(
    slots: int,
    batch: int,
    samples: int,
    mesh: Mesh,
    *,
    change: str = "set --slots, or raise --batch",
) -> None:
    """Refuse the flag of a command before anything is begun; see ``command.add_slots``.

    Args:
      slots: the flag.
      batch: the flag: prompts at a time.
      samples: rows of each.
      mesh: devices.
      change: what mends it.

    Raises:
      ValueError: they are no number of slots for such a batch.
    """
    rows, shards = meshlib.batch_rows(batch, mesh) * samples, meshlib.batch_shards(mesh)
    if not 0 <= slots <= rows or slots % shards:
        raise ValueError(
            f"slots is {slots} for batches of {rows} rows over {shards} batch shards (data x "
            f"fsdp): expected 0 (all rows in step) or a multiple of {shards} up to {rows}; {change}"
        )


def dealt(size: int, shards: int) -> list[int]:
    """Which row of a batch stands where, so that every shard has as many of the first ones."""
    return [row for shard in range(shards) for row in range(shard, size, shards)]


def restored(answers: Rollout, order_B: Sequence[int], mesh: Mesh, *, samples: int = 1) -> Rollout:
    """Answers to prompts that stood as :func:`dealt` says, in their own order."""
    if list(order_B) == list(range(len(order_B))):
        return answers
    place_R = np.argsort(order_B)[:, None] * samples + np.arange(samples)
    place_R = place_R.reshape(-1).astype(np.int32)
    return _placed(answers, meshlib.to_global(place_R[meshlib.own(len(place_R))], mesh))


@jax.jit
def _placed(answers: Rollout, place_R: jax.Array) -> Rollout:
    def moved(x: jax.Array) -> jax.Array:
        rest = [None] * (x.ndim - 1)
        return x.at[place_R].get(out_sharding=meshlib.out(meshlib.BATCH, *rest)) if x.ndim else x

    return jax.tree.map(moved, answers)


def sample(
    params: Params,
    rows: Sequence[Example],
    key: jax.Array,
    mesh: Mesh,
    *,
    cfg: ModelConfig,
    sampler: Sampler,
    max_new: int,
    width: int,
    size: int,
    samples: int = 1,
    bias_V: jax.Array | None = None,
    numbers: Sequence[int] | None = None,
    slots: int = 0,
    on: Mesh | None = None,
) -> Iterator[tuple[Rollout, int]]:
    """Sample answers to all rows, batch by batch, each process its own share.

    A row's answers depend on its number and on ``key``, not on the batch size. Yields
    rollouts and how many of their rows are real (the first ones).

    Args:
      params: of the model that answers.
      rows: prompts.
      key: of the draws.
      mesh: devices.
      cfg, sampler: static.
      max_new: most ids of an answer.
      width: padded prompt width.
      size: prompts at a time, over all processes.
      samples: answers per prompt.
      bias_V: logit bias.
      slots: rows decoded at a time, see ``decode.sample``; 0: all of a batch. Rows that fill the
        last batch up then cost nothing.
      numbers: of the rows; default: their places in ``rows``.
      on: the devices in the arrangement that they sample in; default: ``mesh``.
    """
    own = meshlib.own(size)
    order_B = dealt(size, meshlib.batch_shards(on or mesh) if slots else 1)
    params = regrouped.policy(params, cfg=cfg, on=on)
    numbers = range(len(rows)) if numbers is None else numbers
    for number, (part, real) in enumerate(batches(rows, size)):
        prompt = batching.pad([part[i].ids for i in order_B[own]], width, sampler.pad_id)
        # Rows that fill a batch up are dropped, so that in step they have any number.
        fill = refill.FILL if slots else numbers[0]
        given = [numbers[number * size + i] if i < real else fill for i in order_B]
        prompt, rows_B = meshlib.to_global((prompt, np.array(given, np.int32)[own]), mesh)
        answers = regrouped.sample(
            params,
            prompt,
            key,
            on=on,
            cfg=cfg,
            sampler=sampler,
            max_new=max_new,
            samples=samples,
            bias_V=bias_V,
            rows_B=rows_B,
            slots=slots,
        )
        yield restored(answers, order_B, mesh, samples=samples), real * samples


def crop(answers: Rollout, max_new: int, widths: Sequence[int]) -> Rollout:
    """Cut what nobody sampled, to the smallest answer width that holds the longest answer.

    Args:
      answers: with room for ``max_new`` ids each.
      max_new: see there.
      widths: of answers, each of which what follows is compiled for when it is first needed.
    """
    if len(widths) == 1:
        return answers
    longest = int(jnp.max(jnp.sum(answers.mask_BT, axis=1)))
    total = answers.ids_BT.shape[1] - max_new + padding.bucket(longest, widths)
    if total >= answers.ids_BT.shape[1]:
        return answers
    return answers.replace(
        ids_BT=answers.ids_BT[:, :total],
        mask_BT=answers.mask_BT[:, :total],
        logp_BT=answers.logp_BT[:, :total],
    )


@functools.partial(jax.jit, static_argnames=("room",))
def behind(prompt: Prompt, answers: Rollout, *, room: int) -> Rollout:
    """The same answers behind other prompts, in as many columns as those have, and ``room``.

    Args:
      prompt: left-padded, one for each answer, or for as many answers in a row as divide.
      answers: whose last ``room`` columns hold nothing of their own prompts.
      room: see there.

    **Sharding**: rows over the batch axes, an answer where its prompt is.
    """
    ids_BP, start_B = (
        meshlib.repeat_rows(x, answers.ids_BT.shape[0] // x.shape[0])
        for x in (prompt.ids_BP, prompt.start_B)
    )

    def moved(x_BT: jax.Array, first_BP: jax.Array) -> jax.Array:
        kept_BT = x_BT[:, x_BT.shape[1] - room :]
        return jnp.concatenate([first_BP.astype(x_BT.dtype), kept_BT], axis=1)

    none_BP = jnp.zeros_like(ids_BP)
    return answers.replace(
        ids_BT=moved(answers.ids_BT, ids_BP),
        start_B=start_B,
        mask_BT=moved(answers.mask_BT, none_BP),
        logp_BT=moved(answers.logp_BT, none_BP),
    )


def seen_by_teacher(
    rows: Sequence[Example], answers: Rollout, mesh: Mesh, *, width: int, room: int, pad_id: int
) -> Rollout | None:
    """Answers behind the prompts that the teacher reads; None where those are the student's.

    Args:
      rows: this process's prompts.
      answers: to all of them, as many to each.
      mesh: devices.
      width: that the teacher's prompts are padded to.
      room: columns of the answers behind the student's.
      pad_id: that fills rows up.
    """
    if not rows[0].teacher_ids:
        return None
    prompt = batching.pad([row.teacher_ids for row in rows], width, pad_id)
    return behind(meshlib.to_global(prompt, mesh), answers, room=room)


def routed(rows: Sequence[Example], answers: Rollout, mesh: Mesh, names: Sequence[str]) -> Rollout:
    """Answers that say which of several teachers scores each; as they are where there is one.

    Args:
      rows: this process's prompts.
      answers: to all of them, as many to each.
      mesh: devices.
      names: of the teachers, in order; (): there is one.
    """
    if not names:
        return answers
    each = answers.ids_BT.shape[0] // (len(rows) * jax.process_count())
    places = np.repeat([names.index(row.taught_by) for row in rows], each).astype(np.int32)
    return answers.replace(teacher_B=meshlib.to_global(places, mesh))


def texts(answers: Rollout, real: int, tokenizer: Any) -> list[str]:
    """Decode what was sampled, special tokens left out; runs on every process.

    Raises:
      ValueError: the model's logits were not finite, so that the ids mean nothing.
    """
    host = meshlib.to_host(answers)
    bad = np.argwhere(np.isnan(host.logp_BT) & host.mask_BT)
    if len(bad):
        row, column = (int(i) for i in bad[0])
        first = int(np.argmax(host.mask_BT[row]))
        raise ValueError(
            f"the model's logits at token {column - first} of answer {row} of a batch are not "
            "finite: expected finite ones; check its weights, or compute in float32"
        )
    return [
        str(tokenizer.decode(ids[mask], skip_special_tokens=True))
        for ids, mask in zip(host.ids_BT[:real], host.mask_BT[:real], strict=True)
    ]
