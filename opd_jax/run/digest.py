"""What a run writes down about itself: decoded answers, where its time went, its leading types."""

from __future__ import annotations

import collections
import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from opd_jax import mesh, objective, rock
from opd_jax.data import tokenizer as tokenizers
from opd_jax.data.batches import Batch
from opd_jax.data.prompts import Example
from opd_jax.evaluate import heldout
from opd_jax.pytrees import RockState, Rollout
from opd_jax.run import answering
from opd_jax.spec import RunConfig


def samples(
    answers: Rollout,
    kl_BT: np.ndarray | None,
    tokenizer: Any,
    limit: int,
    *,
    examples: Sequence[Example] = (),
    each: int = 1,
    grader: str = "math",
) -> list[dict[str, Any]]:
    """Decode the first ``limit`` answers of a batch, with the KL of every token.

    Args:
      answers: on the host.
      kl_BT: [B, T-1], nats at the predicting positions; None without a teacher.
      tokenizer: decodes.
      limit: most rows.
      examples: the prompts of the first rows, ``each`` answers to each of them; where there is a
        gold answer, they are graded.
      each: see there.
      grader: of answers.
    """
    chosen, scored_BT = [], objective.predicted(answers).mask_BT
    for row in range(min(limit, len(answers.ids_BT))):
        ids, mask = answers.ids_BT[row], answers.mask_BT[row]
        first = int(np.argmax(mask))
        chosen.append(
            {
                "prompt": tokenizer.decode(ids[answers.start_B[row] : first]),
                "answer": tokenizer.decode(ids[mask]),
                "text": tokenizer.decode(ids[mask], skip_special_tokens=True),
                "ids": ids[mask].tolist(),
                "truncated": bool(answers.truncated_B[row]),
            }
        )
        if kl_BT is not None:
            kl = kl_BT[row][scored_BT[row]]
            chosen[-1]["kl_nats"] = [round(float(x), 5) for x in kl]
    for row, told in enumerate(chosen):
        example = examples[row // each] if row // each < len(examples) else None
        if example is not None and example.teacher_ids:
            told["teacher_prompt"] = tokenizer.decode(example.teacher_ids)
        if example is not None and example.taught_by:
            told["teacher"] = example.taught_by
        if example is not None and example.answer is not None:
            verdict = heldout.grade(
                [example], [told["text"]], 1, truncated=[told["truncated"]], grader=grader
            )
            told |= {
                "gold": example.answer,
                "correct": verdict.correct[0][0],
                "reason": verdict.reason[0][0],
            }
    return chosen


def of_step(
    run: RunConfig,
    answers: Rollout,
    kl_BT: np.ndarray | None,
    tokenizer: Any,
    batch: Batch,
    step: int,
) -> list[dict[str, Any]]:
    """:func:`samples` of what a step trains on: ``log.samples`` of its first answers."""
    # The first rows of all processes are those of the first one, which writes.
    examples = batch.examples if jax.process_index() == 0 else ()
    is_on_policy = run.train.is_on_policy(step)
    return samples(
        answers,
        kl_BT,
        tokenizer,
        run.log.samples,
        examples=answering.asked(run, examples) if is_on_policy else examples,
        each=run.rollout.samples if is_on_policy else 1,
        grader=run.eval.grader,
    )


def phase_seconds(took: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Sum up where the time of a process went.

    Args:
      took: seconds by phase, one entry a step, where an absent phase took 0 s and ``step`` is their
        sum; entries without ``step`` are of the time between steps.

    Returns:
      ``median_s``, the median over steps of each of their phases and of ``step``, and
      ``phase_share``, the part of all timed seconds that each phase took, largest first. Both are
      empty without steps.
    """
    steps = [seconds for seconds in took if "step" in seconds]
    names = sorted({name for seconds in steps for name in seconds})
    medians = {name: statistics.median(s.get(name, 0.0) for s in steps) for name in names}
    totals = collections.Counter()
    for seconds in took if steps else ():
        totals.update({name: value for name, value in seconds.items() if name != "step"})
    whole = sum(totals.values())
    return {
        "median_s": medians,
        "phase_share": {name: value / whole for name, value in totals.most_common()},
    }


_leaders = functools.partial(jax.jit, static_argnames=("limit", "never", "is_fast"))(rock.leaders)


def rock_table(
    state: RockState,
    tokenizer: Any,
    limit: int,
    never: tuple[int, ...] = (),
    *,
    is_fast: bool = False,
) -> list[dict[str, Any]]:
    """The types with the highest Rock Score, decoded, with their share of KL and of tokens.

    See ``rock.leaders`` for ``is_fast``.
    """
    found = mesh.to_host(_leaders(state, limit=limit, never=never, is_fast=is_fast))
    all_kl, all_tokens = float(found["kl_sum"]), float(found["count"])
    columns = (found[name].tolist() for name in ("ids_K", "kl_sum_K", "count_K", "member_K"))
    return [
        {
            "token_id": token_id,
            "token": tokenizers.token_text(tokenizer, token_id),
            "share": kl_sum / all_kl,
            "kl_mean": kl_sum / count,
            "token_share": count / all_tokens,
            "member": member,
        }
        for token_id, kl_sum, count, member in zip(*columns, strict=True)
        if kl_sum > 0 and math.isfinite(all_kl)
    ]
