"""A plan in words and as JSON."""

from __future__ import annotations

from typing import Any

from opd_jax import mesh as meshlib
from opd_jax.models import memory
from opd_jax.plan.estimate import Plan, ProgramPlan

# What lowers what a chip holds, by what it holds.
_KEYS = {
    "student": "raise --config.mesh.fsdp or .model, which split it",
    "optimizer": "raise --config.mesh.fsdp or .model, which split it",
    "teacher": "raise --config.mesh.fsdp or .model, which split it, or set "
    "--config.teacher.offload=True",
    "policy": "raise --config.mesh.fsdp or .model, which split it",
    "batch": "lower --config.train.prompts or --config.rollout.samples",
    "cache": "lower --config.rollout.samples, .max_new or --config.train.prompts, or raise "
    "--config.mesh.model",
    "temporaries": "raise --config.train.microbatches, or set --config.student.remat=full",
}
_SAMPLING = "lower --config.rollout.samples, .max_new or --config.train.prompts"
_SHOWN = 4  # collectives of a program


def as_json(plan: Plan) -> dict[str, Any]:
    """What ``--out`` writes; bytes are of one chip, FLOPs of all, seconds estimates."""
    return {
        "topology": plan.topology,
        "chips": plan.num_chips,
        "mesh": plan.mesh,
        "rollout_mesh": plan.rollout_mesh,
        "fits": plan.fits,
        "seconds_per_step": plan.seconds_per_step,
        "tokens_per_step": plan.rows * plan.max_new,
        "chip_hours": plan.chip_hours,
        "programs": {name: _program(plan, each) for name, each in plan.programs.items()},
    }


def _program(plan: Plan, each: ProgramPlan) -> dict[str, Any]:
    cost = each.cost
    found: dict[str, Any] = {
        "fits": each.fits,
        "bytes_per_chip": round(each.bytes_per_chip),
        "memory": {name: round(value) for name, value in each.memory.items()},
        "flops": each.flops,
        "peak_share": None,
        "seconds": None,
        "bound": None,
        "bound_seconds": None,
        "cycles_seconds": None,
        "kernel_seconds": None,
        "bytes_moved": None,
        "compile_seconds": each.compile_seconds,
        "collectives": [],
        "problem": each.problem or None,
    }
    if cost is None:
        return found
    return found | {
        "peak_share": _share(plan, each),
        "seconds": cost.seconds,
        "bound": cost.bound,
        "bound_seconds": cost.bound_seconds,
        "cycles_seconds": cost.cycles_seconds,
        "kernel_seconds": cost.kernel_seconds,
        "bytes_moved": cost.bytes_moved,
        "collectives": [
            {
                "kind": c.kind,
                "axes": c.axes,
                "bytes": c.num_bytes,
                "count": c.count,
                "bytes_sent": c.moved,
            }
            for c in cost.collectives
        ],
    }


def _share(plan: Plan, each: ProgramPlan) -> float:
    """Of the peak of all chips."""
    assert each.cost is not None
    return each.flops / max(each.cost.seconds * plan.num_chips * plan.chip.flops, 1e-30)


def lines(plan: Plan) -> list[str]:
    """The plan as a table, what does not fit, and what a step takes."""
    axes = meshlib.text(plan.mesh)
    if plan.rollout_mesh != plan.mesh:
        axes += f"; {meshlib.text(plan.rollout_mesh)} while the student samples"
    found = [
        f"{plan.topology}: {plan.num_chips} chips ({axes}), {memory.text(plan.chip.memory)} each; "
        "compiled for and estimated, not run",
        f"{'program':<15}{'fits':<6}{'GiB/chip':>9}{'weights':>9}{'optim.':>8}{'cache':>8}{'temp.':>8}"
        f"{'PFLOP':>9}{'of peak':>9}{'GB moved':>10}{'GB sent':>9}{'bound':>9}{'s':>9}"
        f"{'s cycles':>10}{'s compile':>10}",
    ]
    found += [_row(plan, each) for each in plan.programs.values()]
    for each in plan.programs.values():
        for c in each.cost.collectives[:_SHOWN] if each.cost else ():
            found.append(
                f"  {each.name}: {c.count} x {c.kind} over {c.axes} of {c.num_bytes / 1e6:,.3g} MB"
            )
        if each.cost and each.cost.silent:
            found.append(
                f"  {each.name}: {each.cost.silent} runs of kernels without cycles: "
                f"{each.cost.kernel_seconds:.3g} s at the peak rate, and longer in truth"
            )
        if each.uncounted:
            found.append(f"  {each.name}: {each.uncounted} loops of unknown rounds count as one")
    found += [advice(each) for each in plan.programs.values() if not each.fits]
    step = plan.seconds_per_step
    if step:
        tokens, hours = plan.rows * plan.max_new, plan.chip_hours
        found.append(
            f"a step: {step:.3g} s, {tokens / step:,.0f} tokens/s with {plan.rows} answers of "
            f"{plan.max_new} tokens; {plan.steps} steps and evaluations: "
            f"{'?' if hours is None else f'{hours:,.3g}'} chip-hours"
        )
    return found


def _row(plan: Plan, each: ProgramPlan) -> str:
    gib = {name: value / 2**30 for name, value in each.memory.items()}
    weights = gib["student"] + gib["teacher"] + gib["policy"]
    row = (
        f"{each.name:<15}{'yes' if each.fits else 'NO':<6}{each.bytes_per_chip / 2**30:>9.3g}"
        f"{weights:>9.3g}{gib['optimizer']:>8.3g}{gib['cache']:>8.3g}{gib['temporaries']:>8.3g}"
        f"{each.flops / 1e15:>9.3g}"
    )
    if each.cost is None:
        return row
    cost = each.cost
    sent = sum(c.moved for c in cost.collectives)
    cycles = "" if cost.cycles_seconds is None else f"{cost.cycles_seconds:.3g}"
    return (
        f"{row}{_share(plan, each):>9.1%}{cost.bytes_moved / 1e9:>10.3g}{sent / 1e9:>9.3g}"
        f"{cost.bound:>9}{cost.bound_seconds:>9.3g}{cycles:>10}{each.compile_seconds:>10.1f}"
    )


def advice(each: ProgramPlan) -> str:
    """What of a program does not fit, and which key helps."""
    largest = max(each.memory, key=lambda name: each.memory[name])
    change = _KEYS[largest]
    if largest == "temporaries" and each.name not in ("train", "teacher", "evaluation"):
        change = _SAMPLING
    why = f" ({each.problem})" if each.problem else ""
    return (
        f"{each.name} does not fit: {memory.text(each.bytes_per_chip)} of {memory.text(each.limit)}"
        f"{why}; most of it: {largest}, {memory.text(each.memory[largest])}: {change}"
    )
