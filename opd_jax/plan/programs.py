"""The programs of a run on a machine that is not there: traced by its own loop, on shapes alone.

``iteration.one_step`` runs here as it does in training. What it is given in place of programs notes
each call, and answers with the shapes that the program would return.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from opd_jax import mesh as meshlib
from opd_jax import steps
from opd_jax.data import packing
from opd_jax.data.batches import Batch
from opd_jax.data.prompts import Example
from opd_jax.models import architecture, resting
from opd_jax.plan import known_models
from opd_jax.plan.chips import Machine
from opd_jax.pytrees import Packing, Prompt, Rollout
from opd_jax.rollout import decode, refill, regrouped
from opd_jax.rollout.sampling import Sampler
from opd_jax.run import assemble, initial, iteration, portions
from opd_jax.run.assemble import Assembly, Words
from opd_jax.spec import ConfigError, RunConfig, teacher_title

TRAIN, TEACHER, SAMPLE, EVALUATION, ANSWERS = "train", "teacher", "sample", "evaluation", "answers"
SWITCH = "switch"  # to the arrangement in which the student samples, where that is another
ALL = (SWITCH, SAMPLE, TEACHER, TRAIN, ANSWERS, EVALUATION)
# The names under which ``iteration.Programs`` has them.
_NAMES = {"sample": SAMPLE, "teacher_states": TEACHER}


@dataclasses.dataclass(frozen=True)
class Traced:
    """One program of a run.

    Attributes:
      name: ``sample``, ``teacher``, ``train``, ``evaluation`` (KL) or ``answers`` (graded ones).
      traced: to be compiled.
      alive: bytes on each device of what is there while it runs, by what it is.
      cache: bytes on each device of the keys and values that it makes; 0: none.
      scored_share: of the positions of a batch.
      mesh: the devices in the arrangement that it runs in.
    """

    name: str
    traced: Any
    alive: dict[str, float]
    mesh: Mesh
    cache: float = 0.0
    scored_share: float = 1.0


def assembly(
    run: RunConfig,
    machine: Machine,
    *,
    student: str = "",
    teacher: str = "",
    say: Callable[[str], None] = print,
) -> Assembly:
    """The static parts of a run on a machine: of its models the shapes, of its prompts the longest.

    Args:
      run: its config.
      machine: the devices.
      student, teacher: where shapes are taken from; default: the models of the run.
      say: receives where they were found.

    Raises:
      ConfigError, ValueError: something does not fit.
    """
    mesh = meshlib.make(run.mesh.data, run.mesh.fsdp, run.mesh.model, machine.devices)
    portions.check_batches(run, meshlib.batch_shards(mesh))
    auto = "float32" if machine.chip.name == "cpu" else "bfloat16"
    if teacher and run.teacher.paths:
        raise ConfigError(
            f"--teacher-config is {teacher!r}, and the run has several teachers: expected the "
            "shapes of each; give them by --config.teacher.paths.NAME=MODEL"
        )
    models = [("student", "student", run.student, student)]
    for name, spec in run.teachers.items():
        models.append((teacher_title(name), "teacher", spec, teacher))
    found = []
    for who, group, spec, given in models:
        dtype = jnp.dtype(auto if spec.dtype == "auto" else spec.dtype)
        shapes = known_models.shapes(given or spec.path, dtype, f"--{group}-config")
        say(f"{who}: {shapes.source}")
        architecture.check_mesh(shapes.cfg, mesh, f"the {who}")
        cfg = dataclasses.replace(shapes.cfg, remat=spec.remat, attention=spec.attention)
        found.append(dataclasses.replace(shapes, cfg=cfg))
    own, *others = found
    vocab_size = min(shapes.cfg.vocab_size for shapes in found)
    are_equal = all(shapes.eos_ids == own.eos_ids for shapes in others)
    words = Words(vocab_size, own.eos_ids or (0,), are_equal, 0)
    longest = Example(ids=(0,) * run.data.max_prompt, answer=None, text="", index=0)
    if run.data.frames:
        longest = dataclasses.replace(longest, teacher_ids=(0,) * run.data.teacher_limit)
    teachers = [dataclasses.replace(x.cfg, vocab_size=own.cfg.vocab_size) for x in others]
    rows = [longest] * run.train.prompts
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, epochs=0))
    return assemble.composed(run, mesh, own.cfg, teachers, words, rows, rows, say=say)


def of_run(parts: Assembly) -> list[Traced]:
    """All programs of a run, in the order in which they run; under ``jax.set_mesh(parts.mesh)``.

    Raises:
      ValueError: shapes that do not fit the mesh.
    """
    return _Recorder(parts).programs()


class _Recorder:
    """Stands in for the programs of a step, and notes what they are called with."""

    def __init__(self, parts: Assembly):
        self.parts, self.found, self.mesh = parts, [], parts.mesh
        self.policy: Any = None  # the student's parameters as it samples
        self.state = initial.state_template(parts)
        self.teacher = initial.teacher_template(parts)
        self.awake: Any = resting.awake(self.teacher)
        self.base = {"student": self.state.params, "optimizer": self.state.opt}

    def programs(self) -> list[Traced]:
        parts = self.parts
        known = {
            f.name: getattr(iteration.Programs(), f.name)
            for f in dataclasses.fields(iteration.Programs)
        }
        stands: dict[str, Callable[..., Any]] = {
            name: functools.partial(self.call, _NAMES.get(name, TRAIN), program)
            for name, program in known.items()
            if hasattr(program, "trace")
        }
        stands |= {"sample": self.sample, "given": self.given, "seen": self.seen}
        stands |= {"awake": lambda _: self.awake, "pack": self.packed}
        spec = parts.run.train
        steps_on_policy = (n for n in range(spec.steps) if spec.is_on_policy(n))
        step, batch = next(steps_on_policy, 0), Batch((), 0)  # neither stand looks into it
        iteration.one_step(
            parts, self.teacher, self.state, batch, step, iteration.Programs(**stands)
        )
        if parts.run.eval.every:
            self.evaluation()
        return self.found

    def given(self, parts: Assembly, batch: Batch) -> Rollout:
        """Stands for the completions of a file, at their longest."""
        run = parts.run
        return self.rollout(run.rows_read, parts.prompt_widths[-1] + run.rollout.max_new)

    def seen(self, parts: Assembly, batch: Batch, answers: Rollout, step: int) -> Rollout | None:
        """Stands for the same answers behind the teacher's prompts, at their longest."""
        if not parts.teacher_widths:
            return None
        rows, columns = answers.ids_BT.shape
        return self.rollout(rows, columns + parts.teacher_widths[-1] - parts.prompt_widths[-1])

    def packed(self, parts: Assembly, answers: Rollout) -> Packing | None:
        """Stands for the layout of rows of which none leaves room for another."""
        if not parts.run.train.pack:
            return None
        rows, columns = answers.ids_BT.shape
        shards, pieces = meshlib.batch_shards(parts.mesh), parts.run.train.microbatches
        full = packing.plan(
            [0] * rows, [columns] * rows, columns=columns, shards=shards, pieces=pieces
        )

        def shape(x):
            spec = [meshlib.BATCH, *[None] * x.ndim][: x.ndim]
            return self.array(x.shape, x.dtype, *spec)

        return jax.tree.map(shape, full)

    def sample(self, parts: Assembly, params: Any, batch: Batch, step: int) -> Any:
        """Stands for the student's answers, at the widest prompts and the longest answers."""
        spec = parts.run.rollout
        answers = self.answers(
            SAMPLE, params, parts.run.train.prompts, parts.prompt_widths[-1], sampler=parts.policy,
            max_new=spec.max_new, samples=spec.samples, slots=spec.slots, segments=spec.segments,
        )  # fmt: skip
        return answers.replace(teacher_B=self.teachers_of(answers.ids_BT.shape[0]))

    def evaluation(self) -> None:
        plan = self.parts.plan
        self.answers(
            ANSWERS, self.state.params, plan.size, plan.width, sampler=plan.graded_sampler,
            max_new=plan.max_new, samples=plan.samples, slots=plan.slots,
        )  # fmt: skip
        seen = None
        if plan.teacher_width:
            seen = self.rollout(plan.size, plan.teacher_width + plan.max_new)
        self.call(
            EVALUATION, steps.eval_step, self.state.params, self.awake,
            self.rollout(plan.size, plan.width + plan.max_new), self.state.rock, seen,
            cfg=self.parts.cfg,
        )  # fmt: skip

    def rollout(self, rows: int, columns: int) -> Rollout:
        """As ``decode.sample`` gives them."""

        def of_rows(dtype: Any, *rest: int) -> Any:
            return self.array((rows, *rest), dtype, meshlib.BATCH, *[None] * len(rest))

        return Rollout(
            ids_BT=of_rows(jnp.int32, columns),
            start_B=of_rows(jnp.int32),
            mask_BT=of_rows(bool, columns),
            logp_BT=of_rows(jnp.float32, columns),
            truncated_B=of_rows(bool),
            policy_step=self.array((), jnp.int32),  # pyright: ignore[reportArgumentType]
            teacher_B=self.teachers_of(rows),
        )

    def teachers_of(self, rows: int) -> Any:
        """As ``answers.routed`` gives them."""
        is_routed = bool(self.parts.cfg.names)
        return self.array((rows,), jnp.int32, meshlib.BATCH) if is_routed else None

    def answers(
        self,
        name: str,
        params: Any,
        rows: int,
        width: int,
        *,
        sampler: Sampler,
        max_new: int,
        samples: int,
        slots: int = 0,
        segments: int = 1,
    ) -> Any:
        """The rollout of prompts of one width, in the arrangement of sampling."""
        parts, home = self.parts, self.mesh
        self.mesh = parts.rollout_mesh
        if self.policy is None:
            self.policy = regrouped.policy(
                params,
                cfg=parts.cfg.student,
                on=self.mesh,
                run=functools.partial(self.call, SWITCH),
            )
        ids_BP: Any = self.array((rows, width), jnp.int32, meshlib.BATCH, None)
        start_B: Any = self.array((rows,), jnp.int32, meshlib.BATCH)
        prompt = Prompt(ids_BP, start_B)
        program = jax.jit(
            functools.partial(
                decode.sample,
                cfg=parts.cfg.student,
                sampler=sampler,
                max_new=max_new,
                samples=samples,
                slots=slots,
                segments=segments,
            )
        )
        key = jax.eval_shape(lambda: jax.random.key(0))
        more = (
            {} if parts.bias_V is None else {"bias_V": self.array(parts.bias_V.shape, jnp.float32)}
        )
        cache = refill.cells(
            parts.cfg.student, rows, samples, width, max_new, self.mesh, wanted=slots
        )
        with jax.set_mesh(self.mesh):
            answers = self.call(
                name,
                program,
                self.policy,
                prompt,
                key,
                policy_step=self.array((), jnp.int32),
                cache=cache,
                **more,
            )
        self.mesh = home
        return meshlib.placed(answers, home)

    def call(self, name: str, program: Any, *args: Any, cache: float = 0.0, **kwargs: Any) -> Any:
        """Trace a program, note it, and return the shapes of its results."""
        traced = program.trace(*args, **kwargs)
        self.found.append(
            Traced(name, traced, self.alive((args, kwargs)), self.mesh, cache, self.scored(args))
        )
        results = [
            jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding)
            for a in traced.jaxpr.out_avals
        ]
        tree = jax.tree.structure(traced.out_info)
        return meshlib.placed(tree.unflatten(results), self.mesh)

    def alive(self, given: Any) -> dict[str, float]:
        """Bytes on each device of the models and of whatever else a program is given."""
        found, seen = {}, set()
        here = [leaf for leaf in jax.tree.leaves(self.teacher) if not resting.is_resting(leaf)]
        brought = {id(leaf) for leaf in jax.tree.leaves(self.awake)} - {id(leaf) for leaf in here}
        used = {id(leaf) for leaf in jax.tree.leaves(given)}
        if brought & used:
            here = self.awake
        policy = [leaf for leaf in jax.tree.leaves(self.policy) if id(leaf) in used]
        known = (*self.base.items(), ("teacher", here), ("policy", policy))
        for name, tree in (*known, ("batch", (self.state, given))):
            leaves = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.ShapeDtypeStruct)]
            new = [x for x in leaves if id(x) not in seen]
            seen |= {id(x) for x in new}
            found[name] = float(sum(map(on_device, {id(x): x for x in new}.values())))
        return found

    def scored(self, args: Any) -> float:
        """Share of the positions of the batch that a program is given which are of answers."""
        columns = [x.ids_BT.shape[1] for x in args if isinstance(x, Rollout)]
        if not columns:
            return 1.0
        return (columns[0] - self.parts.prompt_widths[-1]) / (columns[0] - 1)

    def array(self, shape: tuple[int, ...], dtype: Any, *spec: Any) -> jax.ShapeDtypeStruct:
        place = NamedSharding(self.mesh, P(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def on_device(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of a placed array on each device."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 8
    size = jnp.dtype(leaf.dtype).itemsize
    for side in shape:
        size *= side
    return size
