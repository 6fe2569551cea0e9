"""Answers of all arms by one compiled program: a ban is data, and the baseline bans nothing.

Prompts are prefilled once for many arms: the program picks the rows it needs from their cache. A
row's ids follow from its prompt, its sample, the seed and its ban alone, so that two arms differ by
their bans and by nothing else (the published census compared two code paths, and its masks of
tokens that never occur flipped a median of 35 of 500 problems).
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import mesh as meshlib
from opd_jax.data import batches
from opd_jax.evaluate import asked
from opd_jax.evaluate.asked import Row
from opd_jax.instrument.knockout.answered import Job
from opd_jax.instrument.knockout.request import Request
from opd_jax.models import kv_cache, memory, paged
from opd_jax.pytrees import Rollout
from opd_jax.rollout import answers as drawing
from opd_jax.rollout import decode, refill
from opd_jax.store.pair import Model

# Counted while tracing: no arm may have a program of its own.
_traced: collections.Counter[str] = collections.Counter()


class Prefix(NamedTuple):
    """Prompts that were read, up to ``Trials.size`` of one task and width."""

    h_PD: jax.Array
    cache: kv_cache.Cache
    position_P: jax.Array  # number of prompt tokens
    key: jax.Array
    places: dict[int, int]  # problem's place in the baseline -> row of the cache


@functools.partial(jax.jit, static_argnames=("cfg", "max_new"))
def _read(params, prompt, *, cfg, max_new):
    _traced["read"] += 1
    width = prompt.ids_BP.shape[1]
    is_paged = paged.fits(cfg, width + max_new)
    h_PD, cache = decode.prefill(params, prompt, cfg=cfg, size=width, is_paged=is_paged)
    return h_PD, cache, width - prompt.start_B


@functools.partial(jax.jit, static_argnames=("cfg", "sampler", "max_new", "slots"))
def _answer(
    params, h_PD, cache, position_P, key, pick_R, number_R, ban, *, cfg, sampler, max_new, slots
) -> Rollout:
    """Answers alone, without their prompts, of picked rows."""
    _traced["answer"] += 1
    width, num_rows = cache.size, pick_R.shape[0]
    is_refilled = refill.slots(slots, num_rows) < num_rows
    size = width if is_refilled else kv_cache.whole(width + max_new, cache.is_paged)
    given = (
        params,
        h_PD.at[pick_R].get(out_sharding=meshlib.out(meshlib.BATCH, None)),
        kv_cache.pick(cache, pick_R, size),
        position_P.at[pick_R].get(out_sharding=meshlib.out(meshlib.BATCH)),
        jax.vmap(jax.random.fold_in, (None, 0))(key, number_R),
    )
    how: dict[str, Any] = {"cfg": cfg, "sampler": sampler, "max_new": max_new, "ban": ban}
    if is_refilled:
        new = refill.decode(*given, **how, slots=slots, is_real_R=number_R >= 0)
    else:
        new = decode.decode(*given, **how)
    return Rollout(
        ids_BT=new.ids_BN,
        start_B=meshlib.constrain(jnp.zeros(num_rows, jnp.int32), meshlib.BATCH),
        mask_BT=jnp.arange(max_new)[None, :] < new.length_B[:, None],
        logp_BT=new.logp_BN,
        truncated_B=~new.is_done_B,
        policy_step=jnp.zeros((), jnp.int32),
    )


def compiles() -> int:
    """How many programs that answer were made in this process: one per width of prompts."""
    return _traced["answer"]


class Trials:
    """A model that answers under bans; its weights are read when they are first needed.

    Args:
      model: that answers.
      request: how.
      room: banned ids of a row, at most.
      widest: padded prompt, at most.
    """

    def __init__(self, model: Model, request: Request, room: int, widest: int):
        self.model, self.request, self.room = model, request, room
        self.size = meshlib.batch_rows(request.batch, model.mesh)
        self._shards = meshlib.batch_shards(model.mesh)
        self._widest = widest

    @functools.cached_property
    def _params(self) -> Any:
        model, settings = self.model, self.request.settings
        prompts = memory.cache(model.cfg, self.size, self._widest, model.mesh)
        answers = refill.cells(
            model.cfg, self.size, 1, self._widest, settings.max_new, model.mesh,
            wanted=self.request.slots,
        )  # fmt: skip
        memory.check(
            [
                memory.Need(
                    "the model",
                    memory.weights(model.cfg, model.stored, model.mesh),
                    "raise --mesh-fsdp",
                ),
                memory.Need(
                    "keys and values",
                    prompts + answers,
                    "lower --batch, --slots or --max-new",
                ),
            ],
            model.mesh,
        )
        return model.load()

    def read(self, rows: Sequence[Row], numbers: Sequence[int]) -> Prefix:
        """Prefill up to ``size`` problems of one task and width; ``numbers`` are their places."""
        filled = [*rows, *[rows[0]] * (self.size - len(rows))]
        own = filled[meshlib.own(self.size)]
        pad_id = self._sampler.pad_id
        host = batches.pad([row.example.ids for row in own], rows[0].width, pad_id)
        with jax.set_mesh(self.model.mesh):
            prompt = meshlib.to_global(host, self.model.mesh)
            h_PD, cache, position_P = _read(
                self._params, prompt, cfg=self.model.cfg, max_new=self.request.settings.max_new
            )
            key = asked.key_of(rows[0].task.name, self.request.settings.seed)
        places = {number: place for place, number in enumerate(numbers)}
        return Prefix(h_PD, cache, position_P, key, places)

    def answer(self, prefix: Prefix, rows: Sequence[Row], jobs: Sequence[Job]) -> Rollout:
        """Answer up to ``size`` jobs; further rows repeat the first, or have no slot.

        It does not wait.

        Args:
          prefix: that has read the problems of the jobs.
          rows: all problems, which ``Job.row`` counts.
          jobs: what is answered.
        """
        slots, samples = self.request.slots, self.request.settings.samples
        order_R = drawing.dealt(self.size, self._shards if slots else 1)
        filled = [jobs[i] if i < len(jobs) else jobs[0] for i in order_R]
        numbers = [
            rows[job.row].problem.index * samples + job.sample
            if i < len(jobs) or not slots
            else refill.FILL
            for i, job in zip(order_R, filled, strict=True)
        ]
        nothing = np.iinfo(np.int32).max
        ids_RK = np.full((self.size, self.room), nothing, np.int32)
        for place, job in enumerate(filled):
            ids_RK[place, : len(job.arm.ids)] = job.arm.ids
        host: Any = (  # of numpy arrays, to be global ones
            np.array([prefix.places[job.row] for job in filled], np.int32),
            np.array(numbers, np.int32),
            ids_RK,
            np.array([job.first for job in filled], np.int32),
            np.array([job.end for job in filled], np.int32),
        )
        with jax.set_mesh(self.model.mesh):
            pick_R, number_R, *ban = meshlib.to_global(meshlib.own_rows(host), self.model.mesh)
            answers = _answer(
                self._params,
                *prefix[:4],
                pick_R,
                number_R,
                decode.Ban(*ban),
                cfg=self.model.cfg,
                sampler=self._sampler,
                max_new=self.request.settings.max_new,
                slots=slots,
            )
            return drawing.restored(answers, order_R, self.model.mesh)

    def rounds(self, lengths: Sequence[int]) -> int:
        """Of the decode loop, for a call whose answers have these lengths."""
        return refill.taken(lengths, self.request.slots, self._shards)

    def texts(self, answers: Rollout, real: int) -> list[str]:
        """Decode the real ones.

        Raises:
          ValueError: the model's logits were not finite.
        """
        return drawing.texts(answers, real, self.model.tokenizer)

    @functools.cached_property
    def _sampler(self):
        return self.model.sampler(temperature=self.request.settings.temperature)
