"""From a checked ``RunConfig`` to everything a run needs: mesh, tokenizers, data, models, programs.

Cheap checks come first (configs, tokenizers, prompts, shapes against the mesh), weights last, so
that a mistake costs seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
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
from opd_jax.models import architecture, hf, hf_config, lora, memory, params, resting
from opd_jax.models.transformer import ModelConfig
from opd_jax.objective import ObjectiveConfig
from opd_jax.rollout import decode, refill, sampling
from opd_jax.rollout.sampling import Sampler
from opd_jax.run import portions, reading
from opd_jax.spec import ConfigError, ModelSpec, RunConfig, teacher_title
from opd_jax.store import hub
from opd_jax.store import pair as pairs

CELLS = "keys and values"


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
    teacher_widths: tuple[int, ...] = ()  # of prompts that the teacher reads; (): the student's

    @property
    def rollout_mesh(self) -> Mesh:
        """The devices in the arrangement that the student samples in."""
        return meshlib.regrouped(self.mesh, self.run.mesh.rollout_model)

    @property
    def last_step(self) -> int:
        """Step at which the run ends: ``train.steps``, or where its epochs of prompts do."""
        return min(self.run.train.steps, portions.steps_of_epochs(self.run, len(self.rows)))


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
    portions.check_batches(run, meshlib.batch_shards(mesh))
    path = hub.folder(run.student.path)
    student = _fitting(run.student, path, "student", mesh, say)
    folders = [path]
    adapter_specs(run, student)  # raises
    tokenizer = tokenizers.load(path)
    own_eos = hf_config.generation_eos(path)
    vocab_size = tokenizers.num_ids(tokenizer, student.vocab_size, "student")
    stop_ids, are_equal = tokenizers.stop_ids(tokenizer, own_eos), True
    teachers, others = [], {}
    for name, spec in run.teachers.items():
        path = hub.folder(spec.path)
        folders.append(path)
        teacher = _fitting(spec, path, teacher_title(name), mesh, say)
        other = tokenizers.load(path)
        if tokenizers.lend_template(tokenizer, other):
            say("the student has no chat template: prompts are written by the teacher's")
        with _of_teacher(name):
            tokenizers.compare(tokenizer, other, student.vocab_size, teacher.vocab_size)
            union, message = tokenizers.stop_set(
                tokenizer, own_eos, other, hf_config.generation_eos(path)
            )
        if message:
            say(f"warning: {f'of the teacher {name}: ' if name else ''}{message}")
        teachers.append(dataclasses.replace(teacher, vocab_size=student.vocab_size))
        stop_ids, are_equal = tuple(sorted({*stop_ids, *union})), are_equal and not message
        others[name] = other

    rows, heldout = reading.prompts(run, tokenizer, others, stop_ids, now, say)
    words = Words(vocab_size, stop_ids, are_equal, tokenizers.pad_id(tokenizer), tokenizer)
    parts = composed(run, mesh, student, teachers, words, rows, heldout, say=say)
    if run.teacher.offload and not resting.is_possible(mesh.local_devices[0]):
        raise ConfigError(
            f"teacher.offload: the {mesh.local_devices[0].platform} devices know no memory of "
            f"their host ({resting.HOST}): expected a platform that does, such as TPU or GPU; set "
            "--config.teacher.offload=False"
        )
    for is_scoring in (False, True):
        memory.check(needs(parts, is_scoring=is_scoring), mesh)
    for path in folders:
        hf.check(path)
    return parts


@contextlib.contextmanager
def _of_teacher(name: str) -> Iterator[None]:
    """Say in an error which of several teachers it is about."""
    try:
        yield
    except ValueError as error:
        if not name:
            raise
        raise ConfigError(f"teacher.paths.{name}: {error}") from error


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
    teachers: Sequence[ModelConfig],
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
    if run.train.load_balance and not student.has_experts:
        raise ConfigError(
            f"train.load_balance is {run.train.load_balance}: expected 0, since the student "
            f"({student.model_type}) has no experts; set --config.train.load_balance=0"
        )
    portions.check_batches(run, meshlib.batch_shards(mesh))
    sampling_on = meshlib.regrouped(mesh, run.mesh.rollout_model)
    architecture.check_mesh(student, sampling_on, "the student", "rollout_model")
    run = portions.ended(run, len(rows), say)
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
        teacher=teachers[0] if teachers else None,
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
        load_balance=run.train.load_balance,
        stop_ids=stop_ids,
        others=tuple(teachers[1:]),
        names=tuple(run.teachers) if len(teachers) > 1 else (),
    )
    if cfg.kl.stop_ids:
        say(f"the KL counts the stop ids {cfg.kl.stop_ids} as one event (kl.merge_stops)")
    key = "eval.max_new" if run.eval.max_new > run.rollout.max_new else "rollout.max_new"
    max_new = max(run.rollout.max_new, run.eval.max_new)
    both = (*rows, *heldout)
    for name, part in (("student", student), *(("teacher", part) for part in teachers)):
        is_own = name == "teacher" and bool(run.data.frames)
        longest = max(len(row.teacher_ids if is_own else row.ids) for row in both)
        whose, limit = (
            ("its longest prompt", "max_teacher_prompt")
            if is_own
            else ("the longest prompt", "max_prompt")
        )
        if longest + max_new > part.max_positions:
            raise ConfigError(
                f"{whose} has {longest} ids and {key} is {max_new}: the {name} has "
                f"{part.max_positions} positions; lower --config.data.{limit} or --config.{key}"
            )
    bias_V = _bias(run, vocab_size, student.vocab_size)
    prompt_widths = _widths(run, [len(row.ids) for row in rows], run.data.max_prompt)
    teacher_widths: tuple[int, ...] = ()
    if run.data.frames:
        lengths = [len(row.teacher_ids) for row in rows]
        teacher_widths = _widths(run, lengths, run.data.teacher_limit)
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
        plan=_eval_plan(run, policy, heldout, mesh, bias_V, (prompt_widths, teacher_widths)),
        bias_V=bias_V,
        prompt_widths=prompt_widths,
        answer_widths=run.rollout.buckets or widths.ladder(run.rollout.max_new),
        teacher_widths=teacher_widths,
    )


def _widths(run: RunConfig, lengths: Sequence[int], limit: int) -> tuple[int, ...]:
    """Of prompts of these lengths: those that are set, where they are enough, else the data's."""
    if run.data.buckets and run.data.buckets[-1] >= max(lengths):
        return run.data.buckets
    return widths.of_prompts(lengths, batch=run.rows_read, limit=limit)


def needs(parts: Assembly, *, is_scoring: bool = False) -> list[memory.Need]:
    """What is in memory together, at the least, while the student samples or is updated.

    Args:
      parts: of the run.
      is_scoring: while the teacher is asked, instead; the same where it does not rest between.
    """
    run, cfg, mesh = parts.run, parts.cfg, parts.mesh
    f32 = jnp.float32
    stored, adapters = run.student_dtype(cfg.student.dtype), adapter_specs(run, cfg.student)
    trained = memory.weights(cfg.student, f32, mesh, part=lambda whole: adapters or whole)
    moments = {"adamw": 2, "sgd": 1, "signsgd": 1}[run.optim.name]
    is_resting = run.teacher.offload and not is_scoring
    is_answering = not (run.teacher.offload and is_scoring)  # the student
    split = "raise --config.mesh.fsdp or .model, which split it"
    found = [
        memory.Need("the student", memory.weights(cfg.student, stored, mesh), split),
        *[memory.Need("its adapters", trained, split)] * bool(adapters),
        memory.Need("its optimizer", moments * trained, split),
    ]
    if is_answering and parts.rollout_mesh != mesh:
        again = memory.weights(cfg.student, cfg.student.compute_dtype, parts.rollout_mesh)
        found.append(memory.Need("the student as it samples", again, split))
    for part, name in zip(cfg.teachers, run.teachers, strict=True):
        dtype, who = run.teacher.stored_dtype(part.dtype), f"the {teacher_title(name)}"
        change = f"{split}, or set --config.teacher.offload=True"
        teacher = memory.Need(
            who, memory.weights(part, dtype, mesh), split if run.teacher.offload else change
        )
        if is_resting:
            head = memory.weights(part, dtype, mesh, part=resting.head)
            teacher = memory.Need(f"{who}'s head", head, split)
        found.append(teacher)
    rows, width = run.train.prompts * run.rollout.samples, parts.prompt_widths[-1]
    fewer = "lower --config.rollout.samples, .max_new, --config.train.prompts or data.max_prompt"
    cells = [memory.Need(CELLS, 0.0, fewer)]
    held = functools.partial(refill.cells, width=width, on=mesh, wanted=run.rollout.slots)
    if is_answering and run.train.stage != "off_policy":  # else the answers are those of a file
        prompts, samples, most = run.train.prompts, run.rollout.samples, run.rollout.max_new
        cells.append(memory.Need(CELLS, held(cfg.student, prompts, samples, max_new=most), fewer))
    if run.eval.every:
        asked, most = run.eval.batch or rows, run.eval.max_new or run.rollout.max_new
        fewer = "lower --config.eval.batch, .samples or .max_new"
        both = [cfg.student] * is_answering
        if run.eval.teacher and not is_resting:
            both += cfg.teachers
        cells += [
            memory.Need(CELLS, held(c, asked, run.eval.samples, max_new=most), fewer) for c in both
        ]
    return [*found, max(cells, key=lambda need: need.num_bytes)]


def _fitting(
    spec: ModelSpec, path: str, who: str, mesh: Mesh, say: Callable[[str], None]
) -> ModelConfig:
    """The config of a model that the mesh divides."""
    cfg = model_config(spec, path)
    if whole := hf_config.composite(path):
        say(f"the {who} is a {whole.architecture}: its text part is read, and no other")
    architecture.check_mesh(cfg, mesh, f"the {who}")
    return cfg


def model_config(spec: ModelSpec, path: str) -> ModelConfig:
    """Read a model's config and give it the run's compute dtype, remat policy and attention."""
    cfg = hf_config.read_config(path, dtype=pairs.compute_dtype(spec.dtype))
    return dataclasses.replace(cfg, remat=spec.remat, attention=spec.attention)


def programs() -> dict[str, int]:
    """How often each program of the loop has been compiled in this process."""
    return steps.programs() | {"sample": decode.compiles()}


def adapter_specs(run: RunConfig, student: ModelConfig) -> params.Specs | None:
    """Declarations of the student's adapters; None where the whole student is trained.

    Raises:
      ConfigError: the model cannot have them.
    """
    if not run.lora.rank:
        return None
    try:
        return lora.specs(student, run.lora)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _eval_plan(
    run: RunConfig,
    policy: Sampler,
    heldout: Sequence[Example],
    mesh: Mesh,
    bias_V: jax.Array | None,
    known: tuple[Sequence[int], Sequence[int]],
) -> EvalPlan:
    shards = meshlib.batch_shards(mesh)
    size = run.eval.batch or run.train.prompts * run.rollout.samples
    if size % (shards * run.train.microbatches):
        raise ConfigError(
            f"eval.batch {size}: expected a multiple of batch shards x micro-batches "
            f"({shards} x {run.train.microbatches}); set --config.eval.batch"
        )
    longest = max((len(row.ids) for row in heldout), default=1)
    own = max((len(row.teacher_ids) for row in heldout), default=0)
    max_new = run.eval.max_new or run.rollout.max_new
    return EvalPlan(
        policy=policy,
        max_new=max_new,
        width=_width(longest, known[0], run.data.max_prompt),
        teacher_width=_width(own, known[1], run.data.teacher_limit) if own else 0,
        widths=run.rollout.buckets * (max_new == run.rollout.max_new) or widths.ladder(max_new),
        size=size,
        num_graded=run.eval.prompts,
        num_kl=run.eval.kl_prompts,
        temperature=run.eval.temperature,
        samples=run.eval.samples,
        slots=run.rollout.slots,
        grader=run.eval.grader,
        bias_V=bias_V,
        on=meshlib.regrouped(mesh, run.mesh.rollout_model),
    )


def _width(longest: int, known: Sequence[int], limit: int) -> int:
    """For held-out prompts, of which one may be longer than any of training."""
    if longest > known[-1]:
        known = widths.of_prompts([longest], batch=1, limit=limit)
    return widths.bucket(longest, known)


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
