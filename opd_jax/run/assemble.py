"""From a checked ``RunConfig`` to everything a run needs: mesh, tokenizers, data, models, programs.

Cheap checks come first (configs, tokenizers, prompts, shapes against the mesh), weights last, so
that a mistake costs seconds.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from opd_jax import divergence, optim, steps
from opd_jax import mesh as meshlib
from opd_jax.data import tokenizer as tokenizers
from opd_jax.data import widths
from opd_jax.data.prompts import Example
from opd_jax.evaluate.heldout import EvalPlan
from opd_jax.models import hf_config, memory, params, resting, transformer
from opd_jax.models.transformer import ModelConfig
from opd_jax.objective import ObjectiveConfig
from opd_jax.rollout import decode, sampling
from opd_jax.rollout.sampling import Sampler
from opd_jax.run import reading
from opd_jax.spec import ConfigError, ModelSpec, RunConfig
from opd_jax.store import hub
from opd_jax.store import pair as pairs


@dataclasses.dataclass(frozen=True)
class Assembly:
    """The static parts of a run; weights are loaded by ``initial``."""

    run: RunConfig
    mesh: Mesh
    cfg: ObjectiveConfig
    tx: optax.GradientTransformation
    tokenizer: Any
    stop_ids: tuple[int, ...]
    policy: Sampler
    rows: tuple[Example, ...]
    heldout: tuple[Example, ...]
    plan: EvalPlan
    bias_V: jax.Array | None  # [V] f32
    prompt_widths: tuple[int, ...]  # that a batch of prompts is padded to
    answer_widths: tuple[int, ...]  # that its answers are cut back to

    @property
    def last_step(self) -> int:
        """Step at which the run ends: ``train.steps``, or where its epochs of prompts do."""
        return min(self.run.train.steps, steps_of_epochs(self.run, len(self.rows)))


def steps_of_epochs(run: RunConfig, num_rows: int) -> int:
    """Steps that the epochs of prompts are enough for; endless where they are not limited."""
    full = num_rows // run.rows_read
    return run.data.epochs * full if run.data.epochs else sys.maxsize


def assemble(
    run: RunConfig, *, now: str | None = None, say: Callable[[str], None] = print
) -> Assembly:
    """Check all parts of a run against each other, without reading weights.

    Args:
      run: its config. The learning-rate schedule of the result ends where the run does, also where
        its prompts are used up before.
      now: when the run started, as ``run.json`` has it: the date that chat templates write.
      say: receives what a user should know.

    Raises:
      ConfigError, ValueError, FileNotFoundError: the first thing that does not fit.
    """
    mesh = meshlib.make(run.mesh.data, run.mesh.fsdp, run.mesh.model)
    check_batches(run, meshlib.batch_shards(mesh))
    student_path, teacher_path = hub.folder(run.student.path), hub.folder(run.teacher.path)
    student = model_config(run.student, student_path)
    teacher = model_config(run.teacher, teacher_path)
    params.shardings(transformer.specs(student), mesh)
    params.shardings(transformer.specs(teacher), mesh)

    tokenizer, other = tokenizers.load(student_path), tokenizers.load(teacher_path)
    if tokenizers.lend_template(tokenizer, other):
        say("the student has no chat template: prompts are written by the teacher's")
    vocab_size = tokenizers.compare(tokenizer, other, student.vocab_size, teacher.vocab_size)
    teacher = dataclasses.replace(teacher, vocab_size=student.vocab_size)
    stop_ids, message = tokenizers.stop_set(
        tokenizer,
        hf_config.generation_eos(student_path),
        other,
        hf_config.generation_eos(teacher_path),
    )
    if message:
        say(f"warning: {message}")

    rows, heldout = reading.prompts(run, tokenizer, other, stop_ids, now, say)
    words = Words(vocab_size, stop_ids, not message, tokenizers.pad_id(tokenizer), tokenizer)
    parts = composed(run, mesh, student, teacher, words, rows, heldout, say=say)
    if run.teacher.offload and not resting.is_possible(mesh.local_devices[0]):
        raise ConfigError(
            f"teacher.offload: the {mesh.local_devices[0].platform} devices know no memory of "
            f"their host ({resting.HOST}): expected a platform that does, such as TPU or GPU; set "
            "--config.teacher.offload=False"
        )
    for is_scoring in (False, True):
        memory.check(needs(parts, is_scoring=is_scoring), mesh)
    return parts


@dataclasses.dataclass(frozen=True)
class Words:
    """What the tokenizers of a pair say together.

    Attributes:
      vocab_size: ids that both have.
      stop_ids: that end an answer.
      are_stops_equal: whether both models end by the same.
      pad_id: that fills rows up.
      tokenizer: the student's; None where there is none and nothing is run.
    """

    vocab_size: int
    stop_ids: tuple[int, ...]
    are_stops_equal: bool
    pad_id: int
    tokenizer: Any = None


def composed(
    run: RunConfig,
    mesh: Mesh,
    student: ModelConfig,
    teacher: ModelConfig,
    words: Words,
    rows: Sequence[Example],
    heldout: Sequence[Example],
    *,
    say: Callable[[str], None] = print,
) -> Assembly:
    """The static parts of a run on any mesh, from what was read of its files.

    Raises:
      ConfigError, ValueError: the first thing that does not fit.
    """
    vocab_size, stop_ids = words.vocab_size, words.stop_ids
    shards = meshlib.batch_shards(mesh)
    check_batches(run, shards)
    run = _ended(run, len(rows), say)
    policy = Sampler(
        vocab_size=vocab_size,
        temperature=run.rollout.temperature,
        top_k=run.rollout.top_k,
        top_p=run.rollout.top_p,
        min_p=run.rollout.min_p,
        stop_ids=stop_ids,
        pad_id=words.pad_id,
    )
    if run.train.stage != "off_policy" and (warning := sampling.off_policy_warning(policy)):
        say(f"warning: {warning}")
    cfg = ObjectiveConfig(
        student=student,
        teacher=teacher,
        kl=dataclasses.replace(
            run.kl,
            vocab_size=vocab_size,
            stop_ids=divergence.merged_stops(
                run.kl.merge_stops, stop_ids, are_equal=words.are_stops_equal
            ),
        ),
        rock=dataclasses.replace(run.rock, never=() if run.rock.stops else stop_ids),
        position=run.position,
        normaliser=run.train.normaliser,
        microbatches=run.train.microbatches,
        stop_ids=stop_ids,
    )
    if cfg.kl.stop_ids:
        say(f"the KL counts the stop ids {cfg.kl.stop_ids} as one event (kl.merge_stops)")
    longest = max(len(row.ids) for row in (*rows, *heldout))
    key = "eval.max_new" if run.eval.max_new > run.rollout.max_new else "rollout.max_new"
    max_new = max(run.rollout.max_new, run.eval.max_new)
    for name, part in (("student", student), ("teacher", teacher)):
        if longest + max_new > part.max_positions:
            raise ConfigError(
                f"the longest prompt has {longest} ids and {key} is {max_new}: the {name} has "
                f"{part.max_positions} positions; lower --config.data.max_prompt or --config.{key}"
            )
    bias_V = _bias(run, vocab_size, student.vocab_size)
    prompt_widths = run.data.buckets or widths.of_prompts(
        [len(row.ids) for row in rows], batch=run.rows_read, limit=run.data.max_prompt
    )
    return Assembly(
        run=run,
        mesh=mesh,
        cfg=cfg,
        tx=optim.make(run.optim),
        tokenizer=words.tokenizer,
        stop_ids=stop_ids,
        policy=policy,
        rows=tuple(rows),
        heldout=tuple(heldout),
        plan=_eval_plan(run, policy, heldout, shards, bias_V, prompt_widths),
        bias_V=bias_V,
        prompt_widths=prompt_widths,
        answer_widths=run.rollout.buckets or widths.ladder(run.rollout.max_new),
    )


def needs(parts: Assembly, *, is_scoring: bool = False) -> list[memory.Need]:
    """What is in memory together, at the least, while the student samples or is updated.

    Args:
      parts: of the run.
      is_scoring: while the teacher is asked, instead; the same where it does not rest between.
    """
    run, cfg, mesh = parts.run, parts.cfg, parts.mesh
    assert cfg.teacher is not None
    f32 = jnp.float32
    stored = run.student.stored_dtype("float32")
    moments = {"adamw": 2, "sgd": 1, "signsgd": 1}[run.optim.name]
    rows = run.train.prompts * run.rollout.samples
    slots = parts.prompt_widths[-1] + run.rollout.max_new
    eval_rows = (run.eval.batch or rows) * run.eval.samples if run.eval.every else 0
    is_resting = run.teacher.offload and not is_scoring
    answering = [cfg.teacher] * (bool(eval_rows) and run.eval.teacher and not is_resting)
    answering += [cfg.student] * (is_resting or not run.teacher.offload)
    split = "raise --config.mesh.fsdp or .model, which split it"
    fewer = "lower --config.rollout.samples, .max_new, --config.train.prompts or data.max_prompt"
    if eval_rows > rows:
        rows, fewer = eval_rows, "lower --config.eval.batch or .samples"
    teacher_dtype = run.teacher.stored_dtype(cfg.teacher.dtype)
    teacher = memory.Need(
        "the teacher",
        memory.weights(cfg.teacher, teacher_dtype, mesh),
        split if run.teacher.offload else f"{split}, or set --config.teacher.offload=True",
    )
    if is_resting:
        head = memory.weights(cfg.teacher, teacher_dtype, mesh, part=resting.head)
        teacher = memory.Need("the teacher's head", head, split)
    caches = [memory.cache(c, rows, slots, mesh) for c in answering]
    return [
        memory.Need("the student", memory.weights(cfg.student, stored, mesh), split),
        memory.Need("its optimizer", moments * memory.weights(cfg.student, f32, mesh), split),
        teacher,
        memory.Need("keys and values", max(caches, default=0.0), fewer),
    ]


def model_config(spec: ModelSpec, path: str) -> ModelConfig:
    """Read a model's config and give it the run's compute dtype and remat policy."""
    cfg = hf_config.read_config(path, dtype=pairs.compute_dtype(spec.dtype))
    return dataclasses.replace(cfg, remat=spec.remat)


def programs() -> dict[str, int]:
    """How often each program of the loop has been compiled in this process."""
    return steps.programs() | {"sample": decode.compiles()}


def check_batches(run: RunConfig, shards: int) -> None:
    """Check that a step's rows divide over the mesh.

    Raises:
      ConfigError: they do not.
    """
    rows = run.train.prompts * run.rollout.samples
    if run.train.prompts % shards or rows % (run.train.microbatches * shards):
        raise ConfigError(
            f"{run.train.prompts} prompts x {run.rollout.samples} samples in "
            f"{run.train.microbatches} micro-batches do not divide over {shards} batch shards "
            "(mesh data x fsdp): change --config.train.prompts, --config.train.microbatches or "
            "the mesh"
        )
    if run.train.prompts % jax.process_count():
        raise ConfigError(
            f"{run.train.prompts} prompts do not divide over {jax.process_count()} processes: "
            "change --config.train.prompts"
        )


def _ended(run: RunConfig, num_rows: int, say: Callable[[str], None]) -> RunConfig:
    """The run with a schedule that ends where its prompts are used up."""
    limit = steps_of_epochs(run, num_rows)
    if limit >= run.train.steps:
        return run
    say(
        f"data.epochs: {run.data.epochs} x {num_rows} prompts are used up after {limit} steps, "
        f"before train.steps ({run.train.steps}): there the run ends, and its schedule"
    )
    return dataclasses.replace(run, optim=dataclasses.replace(run.optim, steps=max(limit, 1)))


def _eval_plan(
    run: RunConfig,
    policy: Sampler,
    heldout: Sequence[Example],
    shards: int,
    bias_V: jax.Array | None,
    prompt_widths: Sequence[int],
) -> EvalPlan:
    size = run.eval.batch or run.train.prompts * run.rollout.samples
    if size % (shards * run.train.microbatches):
        raise ConfigError(
            f"eval.batch {size}: expected a multiple of batch shards x micro-batches "
            f"({shards} x {run.train.microbatches}); set --config.eval.batch"
        )
    longest = max((len(row.ids) for row in heldout), default=1)
    if longest > prompt_widths[-1]:  # than any prompt of training
        prompt_widths = widths.of_prompts([longest], batch=1, limit=run.data.max_prompt)
    max_new = run.eval.max_new or run.rollout.max_new
    return EvalPlan(
        policy=policy,
        max_new=max_new,
        width=widths.bucket(longest, prompt_widths),
        widths=run.rollout.buckets * (max_new == run.rollout.max_new) or widths.ladder(max_new),
        size=size,
        num_graded=run.eval.prompts,
        num_kl=run.eval.kl_prompts,
        temperature=run.eval.temperature,
        samples=run.eval.samples,
        grader=run.eval.grader,
        bias_V=bias_V,
    )


def _bias(run: RunConfig, vocab_size: int, num_rows: int) -> jax.Array | None:
    if not run.rollout.bias:
        return None
    bias_V = np.zeros(num_rows, np.float32)
    for token_id, value in run.rollout.bias:
        if not 0 <= token_id < vocab_size:
            raise ConfigError(
                f"rollout.bias names id {token_id}: expected 0 to {vocab_size - 1}; "
                "set --config.rollout.bias"
            )
        bias_V[token_id] = value
    return jnp.asarray(bias_V)
