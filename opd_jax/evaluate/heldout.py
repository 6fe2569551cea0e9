"""Evaluation of a student on held-out prompts: accuracy against answers, and KL to the teacher.

KL is the reverse KL at temperature 1 on *fresh* samples of the policy itself, over all scored
positions and split by the gate: a run that gates more tokens lowers its weighted loss without
learning anything, and cannot lower these.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from opd_jax import mesh as meshlib
from opd_jax import pytrees, stats, steps
from opd_jax.data.prompts import Example
from opd_jax.evaluate import finding, grading
from opd_jax.models import resting
from opd_jax.models.transformer import ModelConfig
from opd_jax.objective import ObjectiveConfig
from opd_jax.pytrees import Mean, Params, RockState, Rollout, Teacher
from opd_jax.rollout import answers as drawing
from opd_jax.rollout.sampling import Sampler

FIELDS = (
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "unparsed_share",
    "kl_nats",
    "kl_gated",
    "kl_ungated",
    "stop_kl_share",
    "mean_length",
    "truncated_share",
)
OF_ONE_TEACHER = "kl_nats/"  # beside them, of several teachers: the KL of each one's rows
EMPTY: dict[str, float | None] = dict.fromkeys(FIELDS)


@dataclasses.dataclass(frozen=True)
class Graded:
    """Which answers to graded prompts are right.

    Attributes:
      index: ``Example.index`` of every graded prompt: the same prompt in every run on that file.
      correct: prompt by prompt, whether each of its sampled answers is right.
      reason: prompt by prompt, why, as ``grading.Verdict`` says.
      unparsed: prompt by prompt, whether each of its samples holds no recognisable answer.
      text: prompt by prompt, its sampled answers.
    """

    index: tuple[int, ...] = ()
    correct: tuple[tuple[bool, ...], ...] = ()
    reason: tuple[tuple[str, ...], ...] = ()
    unparsed: tuple[tuple[bool, ...], ...] = ()
    text: tuple[tuple[str, ...], ...] = ()

    @property
    def accuracy(self) -> float | None:
        """Share of right answers; None without any."""
        return _share(self.correct)

    @property
    def interval(self) -> tuple[float | None, float | None]:
        """Ends of the interval of the accuracy, over prompts; Nones without any."""
        if not self.correct:
            return None, None
        return stats.share_interval([float(np.mean(right)) for right in self.correct])

    @property
    def unparsed_share(self) -> float | None:
        """Share of answers without a recognisable answer; None without any."""
        return _share(self.unparsed)


def _share(rows: Sequence[Sequence[bool]]) -> float | None:
    found = [value for row in rows for value in row]
    return sum(found) / len(found) if found else None


@dataclasses.dataclass(frozen=True)
class EvalPlan:
    """How a student is evaluated.

    Attributes:
      policy: the sampler of training; KL is measured on its samples.
      max_new: most ids of an answer.
      width: padded prompt width.
      widths: of answers, that KL is measured in; default: ``max_new``.
      teacher_width: padded width of the prompts that the teacher reads; 0: the student's.
      size: prompts at a time, over all processes.
      num_graded: prompts whose answers are graded; 0: none.
      num_kl: prompts for KL; 0: none.
      temperature: of graded answers; 0 is greedy.
      samples: graded answers per prompt.
      slots: rows decoded at a time; 0: all.
      grader: of answers: a name of ``grading.GRADERS``, or a function of the user's own.
      bias_V: logit bias of the policy, also in evaluation.
      on: the devices in the arrangement that a student samples in; None: that of its parameters.
    """

    policy: Sampler
    max_new: int
    width: int
    size: int
    num_graded: int
    num_kl: int
    temperature: float = 0.0
    samples: int = 1
    slots: int = 0
    grader: str = "math"
    bias_V: jax.Array | None = None
    widths: tuple[int, ...] = ()
    teacher_width: int = 0
    on: Mesh | None = None

    def __post_init__(self):
        grading.named(self.grader)  # raises before anything is sampled

    @property
    def drawing(self) -> dict[str, Any]:
        """What ``answers.sample`` is told of both."""
        return {
            "max_new": self.max_new,
            "width": self.width,
            "size": self.size,
            "slots": self.slots,
            "bias_V": self.bias_V,
            "on": self.on,
        }

    @property
    def graded_sampler(self) -> Sampler:
        """The sampler of graded answers: the policy's ids at the plan's temperature, unfiltered."""
        return dataclasses.replace(
            self.policy, temperature=self.temperature, top_k=0, top_p=1.0, min_p=0.0
        )


def evaluation_key(seed: int, number: int = 0) -> jax.Array:
    """Of the draws of the evaluations of a run with a seed.

    Args:
      seed: of the run.
      number: evaluation seed; the run itself draws with 0.
    """
    # Rollouts fold the same key by step, ``steps`` by 2^32 - 2.
    key = jax.random.fold_in(jax.random.key(seed), 2**32 - 1)
    return jax.random.fold_in(key, number) if number else key


def grade(
    rows: Sequence[Example],
    answers: Sequence[str],
    samples: int,
    *,
    truncated: Sequence[bool] = (),
    grader: str = "math",
) -> Graded:
    """Grade ``samples`` answers per row; rows without an answer of their own are left out.

    Args:
      rows: prompts.
      answers: row by row, ``samples`` of each.
      samples: answers per row.
      truncated: of each answer, whether its length limit cut it; default: none.
      grader: as :class:`EvalPlan` has it.

    Raises:
      ValueError: a gold answer that the grader cannot use.
      GraderError: there is no such grader, or a user's own failed.
    """
    cut = truncated or [False] * len(answers)
    judge = grading.named(grader)
    index, verdicts, texts = [], [], []
    for number, row in enumerate(rows):
        if row.answer is None:
            continue
        in_thought = finding.opens_thought(row.text)
        own = range(number * samples, (number + 1) * samples)
        index.append(row.index)
        texts.append(tuple(answers[i] for i in own))
        verdicts.append(
            [
                grading.any_of(
                    judge, answers[i], row.answer, truncated=cut[i], in_thought=in_thought
                )
                for i in own
            ]
        )

    def each(name: str) -> tuple[tuple, ...]:
        return tuple(tuple(getattr(verdict, name) for verdict in row) for row in verdicts)

    return Graded(tuple(index), each("correct"), each("reason"), each("is_unparsed"), tuple(texts))


def heldout_kl(
    params: Params,
    teacher: Teacher,
    state: RockState,
    rollouts: Iterator[tuple[Rollout, Rollout | None, int]],
    *,
    cfg: ObjectiveConfig,
) -> dict[str, Mean]:
    """Pool the measurements of ``steps.measure`` over rollouts, real rows only.

    Each comes as the teacher sees it, too (None: the same), and with the number of its real rows.
    """
    pooled = []
    for answers, seen, real in rollouts:
        whole = resting.awake(teacher)  # for one batch: answers are sampled without it
        measured, _ = steps.eval_step(params, whole, _only(answers, real), state, seen, cfg=cfg)
        del whole
        pooled.append(measured)
    return pytrees.pool(pooled)


@functools.partial(jax.jit, static_argnames=("real",))
def _only(answers: Rollout, real: int) -> Rollout:
    """Unscore the rows that only fill a batch up."""
    is_real_B = np.arange(answers.mask_BT.shape[0]) < real
    return answers.replace(
        mask_BT=answers.mask_BT & is_real_B[:, None],
        truncated_B=answers.truncated_B & is_real_B,
    )


def evaluate(
    params: Params,
    teacher: Teacher | None,
    state: RockState,
    rows: Sequence[Example],
    tokenizer: Any,
    key: jax.Array,
    mesh: Mesh,
    *,
    cfg: ObjectiveConfig,
    plan: EvalPlan,
) -> tuple[dict[str, float | None], Graded]:
    """Measure a student on held-out prompts; None where nothing was measured.

    Args:
      params, teacher: the models; the teacher may be None where no KL is measured.
      state: rock state whose members split the KL.
      rows: held-out prompts; the first ``plan.num_graded`` with an answer are graded, and KL is
        measured on the first ``plan.num_kl``.
      tokenizer: decodes answers.
      key: the same key gives the same draws, so that before and after meet on equal terms.
      mesh: devices.
      cfg, plan: static.

    Returns:
      ``FIELDS``: accuracy, unparsed_share (graded answers without a recognisable answer), kl_nats,
      kl_gated, kl_ungated (nats per token), stop_kl_share (of the KL, where an answer ends),
      ``kl_nats/NAME`` against each of several teachers over its rows,
      mean_length (tokens) and truncated_share, the last two of the samples that KL was measured on
      (of the graded answers where there are none); and which answers were right.
    """
    graded_key, kl_key = jax.random.split(key)
    result, graded = answered(params, rows, tokenizer, graded_key, mesh, cfg=cfg.student, plan=plan)
    if plan.num_kl:
        assert teacher is not None
        drawn = _drawn(params, rows[: plan.num_kl], kl_key, mesh, cfg, plan)
        measured = heldout_kl(params, teacher, state, drawn, cfg=cfg)
        for name, value in pytrees.reduce(measured).items():
            if name in result or name.startswith(OF_ONE_TEACHER):
                result[name] = None if math.isnan(value) else value
        num_rows = min(plan.num_kl, len(rows))
        result["mean_length"] = float(measured["length_tokens"].total) / num_rows
        result["truncated_share"] = float(measured["truncated_share"].total) / num_rows
    return result, graded


def _drawn(
    params: Params,
    rows: Sequence[Example],
    key: jax.Array,
    mesh: Mesh,
    cfg: ObjectiveConfig,
    plan: EvalPlan,
) -> Iterator[tuple[Rollout, Rollout | None, int]]:
    """Samples of the policy to measure KL on, as it and as the teacher sees them."""
    drawn = drawing.sample(
        params, rows, key, mesh, cfg=cfg.student, sampler=plan.policy, **plan.drawing
    )
    own = meshlib.own(plan.size)
    for (part, _), (answers, real) in zip(drawing.batches(rows, plan.size), drawn, strict=True):
        if plan.widths:
            answers = drawing.crop(answers, plan.max_new, plan.widths)
        answers = drawing.routed(part[own], answers, mesh, cfg.names)
        seen = drawing.seen_by_teacher(
            part[own],
            answers,
            mesh,
            width=plan.teacher_width,
            room=answers.ids_BT.shape[1] - plan.width,
            pad_id=plan.policy.pad_id,
        )
        yield answers, seen, real


def graded_rows(rows: Sequence[Example], plan: EvalPlan) -> list[Example]:
    """The held-out prompts whose answers are graded."""
    return [row for row in rows if row.answer is not None][: plan.num_graded]


def answered(
    params: Params,
    rows: Sequence[Example],
    tokenizer: Any,
    key: jax.Array,
    mesh: Mesh,
    *,
    cfg: ModelConfig,
    plan: EvalPlan,
) -> tuple[dict[str, float | None], Graded]:
    """Let any model answer the graded prompts; what :func:`evaluate` does first.

    Args:
      params: of the model that answers.
      rows, tokenizer, mesh: see there.
      key: of the draws.
      cfg: of the model.
      plan: static.

    Returns:
      Those of ``FIELDS`` that need no teacher, and which answers were right.
    """
    chosen = graded_rows(rows, plan)
    if not chosen:
        return dict(EMPTY), Graded()
    answers: list[str] = []
    truncated: list[bool] = []
    num_tokens = 0
    for rollouts, real in drawing.sample(
        params,
        chosen,
        key,
        mesh,
        cfg=cfg,
        sampler=plan.graded_sampler,
        samples=plan.samples,
        **plan.drawing,
    ):
        answers += drawing.texts(rollouts, real, tokenizer)
        host = meshlib.to_host(rollouts)
        num_tokens += int(host.mask_BT[:real].sum())
        truncated += host.truncated_B[:real].tolist()
    graded = grade(chosen, answers, plan.samples, truncated=truncated, grader=plan.grader)
    cut = sum(truncated) / len(answers)
    return summed_up(graded, num_tokens / len(answers), cut), graded


def summed_up(graded: Graded, mean_length: float, truncated_share: float) -> dict[str, Any]:
    """Those of ``FIELDS`` that need no teacher, of graded answers; the others None."""
    low, high = graded.interval
    return EMPTY | {
        "accuracy": graded.accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "unparsed_share": graded.unparsed_share,
        "mean_length": mean_length,
        "truncated_share": truncated_share,
    }
