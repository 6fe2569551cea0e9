"""One step of a run: answers are sampled or taken, scored by the teacher, and trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from opd_jax import steps
from opd_jax.data.batches import Batch
from opd_jax.models import resting
from opd_jax.pytrees import Mean, Packing, Rollout, Teacher, TrainState
from opd_jax.run import answering
from opd_jax.run.assemble import Assembly


@dataclasses.dataclass(frozen=True)
class Programs:
    """What a step runs, one after the other."""

    sample: Callable[..., Rollout] = answering.sample
    awake: Callable[[Any], Any] = resting.awake
    teacher_states: Callable[..., jax.Array] = steps.teacher_states
    distill_step: Callable[..., tuple[TrainState, dict[str, Mean]]] = steps.distill_step
    given: Callable[..., Rollout] = answering.given
    seen: Callable[..., Rollout | None] = answering.seen
    pack: Callable[..., Packing | None] = answering.packed


def one_step(
    parts: Assembly,
    teacher: Teacher | None,
    state: TrainState,
    batch: Batch,
    step: int,
    programs: Programs | None = None,
) -> tuple[TrainState, dict[str, Mean]]:
    """One step of distillation: take answers, score them by the teacher, update.

    The student samples them on-policy; off-policy they are the completions of the batch.

    Args:
      parts: what :func:`assemble.assemble` made; call it under ``jax.set_mesh(parts.mesh)``.
      teacher: its parameters; those of several; None where nothing compares with one.
      state: donated.
      batch: this process's prompts.
      step: finished updates; with the seed it fixes the draws.
      programs: those that are run, for a caller that watches them.

    Returns:
      The new state, and measurements as (total, weight) pairs.
    """
    run = programs or Programs()
    if parts.run.train.is_on_policy(step):
        answers = run.sample(parts, state.params, batch, step)
    else:
        answers = run.given(parts, batch)
    seen = run.seen(parts, batch, answers, step)
    layout = run.pack(parts, answers)
    more = {} if layout is None else {"packing": layout}
    states_BTE = run.teacher_states(run.awake(teacher), answers, seen, cfg=parts.cfg, **more)
    head = resting.head(teacher)
    return run.distill_step(
        state, head, answers, cfg=parts.cfg, tx=parts.tx, states_BTE=states_BTE, **more
    )
