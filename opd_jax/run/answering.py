"""What a step trains on: the student's answers to its prompts, or completions from the file.

And how the teacher sees them, where it reads other prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax

from opd_jax import mesh as meshlib
from opd_jax import objective
from opd_jax.data import batches, packing, widths
from opd_jax.data.batches import Batch
from opd_jax.data.prompts import Example
from opd_jax.pytrees import Packing, Params, Rollout
from opd_jax.rollout import regrouped
from opd_jax.rollout.answers import crop, routed, seen_by_teacher
from opd_jax.run.assemble import Assembly
from opd_jax.spec import RunConfig


def sample(parts: Assembly, params: Params, batch: Batch, step: int) -> Rollout:
    """The policy's answers to a batch of prompts, cropped to the width that they need."""
    spec = parts.run.rollout
    width = widths.bucket(batch.longest, parts.prompt_widths)
    rows = asked(parts.run, batch.examples)
    prompt = batches.pad([row.ids for row in rows], width, parts.policy.pad_id)
    answers = regrouped.sample(
        regrouped.policy(params, cfg=parts.cfg.student, on=parts.rollout_mesh),
        meshlib.to_global(prompt, parts.mesh),
        jax.random.fold_in(jax.random.key(parts.run.seed), step),
        on=parts.rollout_mesh,
        cfg=parts.cfg.student,
        sampler=parts.policy,
        max_new=spec.max_new,
        samples=spec.samples,
        bias_V=parts.bias_V,
        policy_step=step,
        slots=spec.slots,
        segments=spec.segments,
    )
    with jax.profiler.TraceAnnotation("crop"):
        answers = crop(answers, spec.max_new, parts.answer_widths)
    return routed(rows, answers, parts.mesh, parts.cfg.names)


def given(parts: Assembly, batch: Batch) -> Rollout:
    """A batch of prompts and completions, laid out as answers of as many columns would be.

    Nothing is sampled: ``logp_BT`` is 0 and ``policy_step`` -1.
    """
    width = widths.bucket(batch.longest, parts.prompt_widths)
    room = widths.bucket(batch.longest_completion, parts.answer_widths)
    rows = batches.pad_completions(batch.examples, width, room, parts.policy.pad_id)
    answers = meshlib.to_global(rows, parts.mesh)
    return routed(batch.examples, answers, parts.mesh, parts.cfg.names)


def seen(parts: Assembly, batch: Batch, answers: Rollout, step: int) -> Rollout | None:
    """The same answers as the teacher reads them; None where it reads the student's prompts."""
    if not parts.run.data.frames:
        return None
    is_on_policy = parts.run.train.is_on_policy(step)
    first = widths.bucket(batch.longest, parts.prompt_widths)
    return seen_by_teacher(
        asked(parts.run, batch.examples) if is_on_policy else batch.examples,
        answers,
        parts.mesh,
        width=widths.bucket(batch.longest_teacher, parts.teacher_widths),
        room=answers.ids_BT.shape[1] - first,
        pad_id=parts.policy.pad_id,
    )


def packed(parts: Assembly, answers: Rollout) -> Packing | None:
    """How the rows of a step are packed; None where they are not.

    On a mesh of several processes every process must call it: all of them know all lengths.
    """
    if not parts.run.train.pack:
        return None
    start_B, end_B = meshlib.to_host((answers.start_B, _ends(answers)))
    layout = packing.plan(
        start_B,
        end_B,
        columns=answers.ids_BT.shape[1],
        shards=meshlib.batch_shards(parts.mesh),
        pieces=parts.run.train.microbatches,
    )
    return meshlib.to_global(meshlib.own_rows(layout), parts.mesh)


_ends = jax.jit(objective.ends)


def asked(run: RunConfig, examples: Sequence[Example]) -> Sequence[Example]:
    """Of the rows that a step has read, those whose prompts the student answers."""
    return examples[:: run.rows_read // run.train.prompts]
