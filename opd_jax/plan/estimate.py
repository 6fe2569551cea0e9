"""What each program of a run needs and takes on a machine, and what a step takes: the plan.

A program takes as long as the slowest of four things that could each go on by itself: its products
at the chip's peak, its traffic through memory, its collectives along their links, and, where the
compiler estimates cycles, those. The first three are the roofline bound; a real run takes longer.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from opd_jax.models import memory
from opd_jax.plan import hlo, products, programs
from opd_jax.plan import traffic as moving
from opd_jax.plan.chips import Chip, Machine, afresh
from opd_jax.plan.programs import Traced
from opd_jax.plan.traffic import Collective
from opd_jax.run.assemble import Assembly

# What the compiler says of memory that does not do.
_USED = re.compile(r"(?:[Uu]sed |temporaries \(|hbm usage >= )([\d.]+)([KMGT]?)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# A program with a loop over tokens is told in two parts.
PARTS = {programs.SAMPLE: ("prefill", "decode"), programs.ANSWERS: ("answers", "answers_decode")}
STEP = (programs.SWITCH, *PARTS[programs.SAMPLE], programs.TEACHER, programs.TRAIN)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a part of a program takes.

    Attributes:
      flops: of its products, over all chips.
      bytes_moved: through the memory of a chip.
      cycles_seconds: that the compiler estimates; None: it does not.
      collectives: largest share first.
      limits: seconds that its products, its traffic and its collectives take by themselves.
      silent: kernels that run in it of whose cycles the compiler says nothing.
      kernel_seconds: that those take at the peak rate of products or of memory.
    """

    flops: float
    bytes_moved: float
    cycles_seconds: float | None
    collectives: tuple[Collective, ...]
    limits: dict[str, float]
    silent: int = 0
    kernel_seconds: float = 0.0

    @property
    def bound(self) -> str:
        """What it is bound by: ``compute``, ``memory`` or ``links``."""
        return max(self.limits, key=lambda name: self.limits[name])

    @property
    def bound_seconds(self) -> float:
        """The roofline bound."""
        return self.limits[self.bound]

    @property
    def seconds(self) -> float:
        """The estimate."""
        cycles = 0.0 if self.cycles_seconds is None else self.cycles_seconds + self.kernel_seconds
        return max(self.bound_seconds, cycles)


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """A program, or the part of one, on a machine.

    Attributes:
      name: ``prefill``, ``decode``, ``teacher``, ``train``, ``evaluation``, ...
      memory: bytes on each chip by what they hold, while it runs.
      limit: of them; 0: not known.
      compile_seconds: of the program that it is (a part of).
      flops: of its products, over all chips.
      cost: None where it does not compile.
      problem: why not; else empty.
      uncounted: loops whose rounds nothing tells, counted as one.
    """

    name: str
    memory: dict[str, float]
    limit: float
    compile_seconds: float
    flops: float
    cost: Cost | None
    problem: str = ""
    uncounted: int = 0

    @property
    def bytes_per_chip(self) -> float:
        """All that a chip holds while it runs."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether a chip has room for that."""
        return not self.problem and (not self.limit or self.bytes_per_chip <= self.limit)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a machine.

    Attributes:
      topology: the machine's name.
      chip: one of its.
      mesh: its axes.
      rollout_mesh: those in which the student samples.
      programs: by name, in the order in which they run.
      rows, max_new: answers of a step, and most ids of each.
      steps: of the run.
      evaluations: how often it evaluates, and batches of graded answers and of KL each time.
      is_whole: whether all programs of the run were compiled.
    """

    topology: str
    chip: Chip
    mesh: dict[str, int]
    rollout_mesh: dict[str, int]
    programs: dict[str, ProgramPlan]
    rows: int
    max_new: int
    steps: int
    evaluations: tuple[int, int, int]
    is_whole: bool = True

    @property
    def num_chips(self) -> int:
        """Chips of the machine."""
        number = 1
        for size in self.mesh.values():
            number *= size
        return number

    @property
    def fits(self) -> bool:
        """Whether every program does."""
        return all(program.fits for program in self.programs.values())

    def seconds(self, names: Sequence[str]) -> float | None:
        """Of some programs together; None where one of them does not compile."""
        found = [self.programs[name].cost for name in names if name in self.programs]
        return None if None in found else sum(cost.seconds for cost in found if cost)

    @property
    def seconds_per_step(self) -> float | None:
        """Of the programs of a step, with the longest answers."""
        return self.seconds(STEP) if self.is_whole else None

    @property
    def chip_hours(self) -> float | None:
        """Of the whole run, evaluations included."""
        step, (times, graded, kl) = self.seconds_per_step, self.evaluations
        answers, measured = (
            self.seconds(("answers", "answers_decode")),
            self.seconds(("evaluation",)),
        )
        if step is None or answers is None or measured is None:
            return None
        switched = (bool(graded) + bool(kl)) * (self.seconds((programs.SWITCH,)) or 0.0)
        evaluation = switched + (graded + kl) * answers + kl * measured
        return self.num_chips * (self.steps * step + times * evaluation) / 3600


def plan(
    parts: Assembly,
    machine: Machine,
    *,
    say: Callable[[str], None] = print,
    only: Sequence[str] = (),
) -> Plan:
    """Compile every program of a run for a machine, and add up what each takes.

    Args:
      parts: of :func:`programs.assembly`.
      machine: the same.
      say: receives a line before each program is compiled.
      only: names of ``programs.Traced``; default: all.

    Raises:
      ValueError: shapes that do not fit the mesh.
    """
    found: dict[str, ProgramPlan] = {}
    with jax.set_mesh(parts.mesh), afresh():
        for traced in programs.of_run(parts):
            if not only or traced.name in only:
                for each in compiled(traced, machine, traced.mesh, say):
                    found[each.name] = each
                    held, took = memory.text(each.bytes_per_chip), each.cost and each.cost.seconds
                    say(
                        f"  {each.name}: {held} a chip, "
                        f"{f'{took:.3g} s' if took else 'does not compile'} "
                        f"(compiled in {each.compile_seconds:.0f} s)"
                    )
    run, spec = parts.run, parts.plan
    every = run.eval.every
    return Plan(
        topology=machine.name,
        chip=machine.chip,
        mesh=dict(parts.mesh.shape),
        rollout_mesh=dict(parts.rollout_mesh.shape),
        programs=found,
        rows=run.rows_read
        if run.train.stage == "off_policy"
        else run.train.prompts * run.rollout.samples,
        max_new=run.rollout.max_new,
        steps=run.train.steps,
        evaluations=(
            1 + -(-run.train.steps // every) if every else 0,
            -(-spec.num_graded // spec.size),
            -(-spec.num_kl // spec.size),
        ),
        is_whole=not only,
    )


def compiled(
    traced: Traced, machine: Machine, mesh: Any, say: Callable[[str], None] = print
) -> list[ProgramPlan]:
    """Compile one program; two plans where it has a loop over tokens."""
    say(f"compiling {traced.name} ...")
    chip = machine.chip
    names = PARTS.get(traced.name, (traced.name,))
    flops_of = _flops(traced, names)
    in_kernels = _flops(traced, names, of_kernels=True)
    begun = time.perf_counter()
    try:
        program = traced.traced.lower().compile(compiler_options=dict(machine.options) or None)
    except jax.errors.JaxRuntimeError as error:
        if not memory.is_exhausted(error):
            raise
        seconds = time.perf_counter() - begun
        alive = traced.alive | {"cache": traced.cache, "temporaries": _beyond(traced, error)}
        problem = f"the compiler finds no room: {' '.join(str(error).split())[:160]}"
        return [
            ProgramPlan(name, alive, chip.memory, seconds, flops_of[name], None, problem)
            for name in names
        ]
    seconds = time.perf_counter() - begun
    needs = program.memory_analysis()
    fresh = needs.output_size_in_bytes - needs.alias_size_in_bytes
    held = needs.temp_size_in_bytes + fresh + needs.generated_code_size_in_bytes
    alive = traced.alive | {"cache": min(traced.cache, held)}
    alive["temporaries"] = float(held) - alive["cache"]
    read = hlo.read(program.as_text())
    runs = list(read.runs(traced.scored_share))
    costs = {}
    for name in names:
        own = runs if len(names) == 1 else [r for r in runs if r[3] == (name == names[1])]
        costs[name] = cost(own, read, flops_of[name], chip, mesh, in_kernels[name])
    return [
        ProgramPlan(
            name, alive, chip.memory, seconds, flops_of[name], costs[name],
            uncounted=read.uncounted(),
        )
        for name in names
    ]  # fmt: skip


def _flops(traced: Traced, names: Sequence[str], *, of_kernels: bool = False) -> dict[str, float]:
    """Operations of each part of a program."""
    jaxpr, share = traced.traced.jaxpr, traced.scored_share
    if len(names) == 1:
        return {names[0]: products.flops(jaxpr, share, of_kernels=of_kernels)}
    inside, outside = products.split(jaxpr, share, of_kernels=of_kernels)
    return {names[0]: outside, names[1]: inside}


def cost(
    runs: Any, program: hlo.Program, flops: float, chip: Chip, mesh: Any, in_kernels: float = 0.0
) -> Cost:
    """What a part of a compiled program takes on a chip, ``in_kernels`` of its FLOPs in those."""
    moved = moving.traffic(runs, program)
    collectives = moving.collectives(runs, program, mesh)
    devices = 1
    for size in mesh.shape.values():
        devices *= size
    limits = {
        "compute": flops / devices / chip.flops,
        "memory": moved.num_bytes / chip.bandwidth,
        "links": sum(each.moved for each in collectives) / chip.link,
    }
    cycles = moved.cycles / chip.clock if chip.clock and moved.cycles else None
    kernels = max(in_kernels / devices / chip.flops, moved.silent_bytes / chip.bandwidth)
    return Cost(flops, moved.num_bytes, cycles, tuple(collectives), limits, moved.silent, kernels)


def _beyond(traced: Traced, error: BaseException) -> float:
    """Bytes beyond what is alive and the cache, of a program that the compiler refused."""
    text = " ".join(str(error).split())
    found = _USED.search(text)
    used = float(found[1]) * _UNITS[found[2]] if found else 0.0
    is_all = "temporaries (" not in text
    known = traced.cache + (sum(traced.alive.values()) if is_all else 0.0)
    return max(used - known, 0.0)
