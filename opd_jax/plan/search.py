"""Other micro-batches, remat and meshes for a run, and which of those that fit is fastest."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from opd_jax.models.transformer import REMAT
from opd_jax.plan import estimate, printout, programs
from opd_jax.plan.chips import Machine
from opd_jax.plan.estimate import Plan
from opd_jax.run import assemble
from opd_jax.spec import RunConfig

_MOST = 16  # configurations that are compiled: each takes as long as a plan


@dataclasses.dataclass(frozen=True)
class Tried:
    """One configuration.

    Attributes:
      keys: those that were set, by name.
      plan: None where it cannot be, or was not compiled.
      problem: why not.
    """

    keys: dict[str, Any]
    plan: Plan | None = None
    problem: str = ""


def search(
    run: RunConfig,
    machine: Machine,
    *,
    student: str = "",
    teacher: str = "",
    say: Callable[[str], None] = print,
    most: int = _MOST,
) -> list[Tried]:
    """Plan a run in several configurations.

    Meshes come in the order of what they hold of the models on a chip; on each, micro-batches are
    doubled and remat raised only as long as the run does not fit: beyond, both only take longer.
    For the best of them the arrangement in which the student samples is chosen last.

    Args:
      run: its config; its own keys come first.
      machine: the devices.
      student, teacher: as :func:`programs.assembly` takes them.
      say: receives what is done.
      most: configurations that are compiled.
    """
    models = {"student": student, "teacher": teacher}
    tried = list(_updates(run, machine, models, say, most))
    return [*tried, *_sampling(run, machine, models, best(tried), say)]


def _updates(
    run: RunConfig,
    machine: Machine,
    models: dict[str, str],
    say: Callable[[str], None],
    most: int,
) -> Iterator[Tried]:
    """The run on other meshes, in other micro-batches and with other remat."""
    compiled = 0
    for mesh in meshes(len(machine.devices), run):
        for remat, pieces in itertools.product(_remats(run), _pieces(run, mesh)):
            keys = {
                "mesh.data": mesh[0],
                "mesh.fsdp": mesh[1],
                "mesh.model": mesh[2],
                "train.microbatches": pieces,
                "student.remat": remat,
            }
            if compiled == most:
                return
            try:
                parts = programs.assembly(with_keys(run, keys), machine, **models, say=_silent)
                needed = max(
                    sum(need.num_bytes for need in assemble.needs(parts, is_scoring=is_scoring))
                    for is_scoring in (False, True)
                )
                if machine.chip.memory and needed > machine.chip.memory:
                    yield Tried(keys, problem="models and cache alone do not fit")
                    break  # nor with other pieces
                say(f"trying {_text(keys)}")
                compiled += 1
                plan = estimate.plan(parts, machine, say=_silent)
            except ValueError as error:
                yield Tried(keys, problem=_short(error))
                break
            yield Tried(keys, plan)
            if plan.fits:
                break


def _sampling(
    run: RunConfig,
    machine: Machine,
    models: dict[str, str],
    found: Tried | None,
    say: Callable[[str], None],
) -> Iterator[Tried]:
    """The best that was found, with its student sampling in other arrangements.

    Only what samples is compiled again, with twice the devices along ``model`` each time, as long
    as that is faster.
    """
    is_sampled = run.train.stage != "off_policy" and not run.mesh.rollout_model  # not set already
    if found is None or found.plan is None or not is_sampled:
        return
    fastest, only = _step_seconds(found), (programs.SWITCH, programs.SAMPLE)
    for doubled in range(1, len(machine.devices).bit_length()):
        keys = found.keys | {"mesh.rollout_model": found.keys["mesh.model"] << doubled}
        try:
            parts = programs.assembly(with_keys(run, keys), machine, **models, say=_silent)
            say(f"trying {_text(keys)}")
            part = estimate.plan(parts, machine, say=_silent, only=only)
        except ValueError as error:
            yield Tried(keys, problem=_short(error))
            return
        known = found.plan.programs | part.programs
        tried = Tried(keys, dataclasses.replace(part, programs=known, is_whole=True))
        yield tried
        seconds = _step_seconds(tried)
        if not all(each.fits for each in known.values()) or seconds >= fastest:
            return
        fastest = seconds


def _short(error: ValueError) -> str:
    return str(error).partition(":")[0][:120]


def best(tried: list[Tried]) -> Tried | None:
    """The fastest that fits; None where none does."""
    fitting = [each for each in tried if each.plan is not None and each.plan.fits]
    return min(fitting, key=_step_seconds, default=None)


def _step_seconds(tried: Tried) -> float:
    return (tried.plan.seconds_per_step if tried.plan else None) or float("inf")


def meshes(devices: int, run: RunConfig) -> Iterator[tuple[int, int, int]]:
    """``data x fsdp x model`` of all devices: the run's own first, then by copies of the models."""
    given = (run.mesh.data, run.mesh.fsdp, run.mesh.model)
    free = devices // math.prod(size for size in given if size > 0)
    data, fsdp, model = (size if size > 0 else free for size in given)
    own = data, fsdp, model
    if math.prod(own) == devices:
        yield own
    sides = [n for n in range(1, devices + 1) if devices % n == 0]
    every = [
        (devices // (fsdp * model), fsdp, model)
        for fsdp, model in itertools.product(sides, sides)
        if devices % (fsdp * model) == 0
    ]
    # Few copies hold least; sharing by fsdp moves less than by model, which splits every product.
    yield from (mesh for mesh in sorted(every, key=lambda m: (m[0], m[2])) if mesh != own)


def _remats(run: RunConfig) -> list[str]:
    order = [name for name in ("none", "dots", "full") if name in REMAT]
    return order[order.index(run.student.remat) :]


def _pieces(run: RunConfig, mesh: tuple[int, int, int]) -> list[int]:
    """Micro-batches that divide the rows, from the run's own on, doubled."""
    rows = run.train.prompts * run.rollout.samples // (mesh[0] * mesh[1])
    found, pieces = [], run.train.microbatches
    while pieces <= max(rows, 1):
        found.append(pieces)
        pieces *= 2
    return found or [run.train.microbatches]


def with_keys(run: RunConfig, keys: dict[str, Any]) -> RunConfig:
    """The run with some keys set."""
    for name, value in keys.items():
        group, _, field = name.partition(".")
        part = dataclasses.replace(getattr(run, group), **{field: value})
        run = dataclasses.replace(run, **{group: part})
    return run


def _silent(line: str) -> None:
    pass


def _text(keys: dict[str, Any]) -> str:
    return " ".join(f"--config.{name}={value}" for name, value in keys.items())


def as_json(tried: Tried) -> dict[str, Any]:
    """One configuration, as ``--out`` writes it."""
    plan = tried.plan
    return {
        "keys": tried.keys,
        "fits": plan is not None and plan.fits,
        "seconds_per_step": None if plan is None else plan.seconds_per_step,
        "problem": tried.problem or None,
    }


def lines(tried: list[Tried]) -> list[str]:
    """All that were tried, and the best."""
    found = []
    for each in tried:
        plan = each.plan
        said = each.problem
        if plan is not None:
            step = plan.seconds_per_step
            wrong = [name for name, program in plan.programs.items() if not program.fits]
            said = f"{step:.3g} s a step" if step else ""
            said += f"{', ' * bool(said)}{', '.join(wrong)} does not fit" if wrong else ""
        found.append(f"{_text(each.keys)}: {said}")
    chosen = best(tried)
    if chosen is not None:
        return [*found, f"best: {_text(chosen.keys)}"]
    problems = [p for each in tried if each.plan for p in each.plan.programs.values() if not p.fits]
    hint = f"; {printout.advice(problems[-1])}" if problems else ""
    return [*found, f"nothing that was tried fits{hint}"]
