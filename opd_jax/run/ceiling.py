"""How well the teacher itself answers the held-out prompts: what its student can hope to reach.

Measured once a run, as the student's answers are, and kept in ``teacher.json``: a run that goes on,
or an evaluation long after, shows it beside before and after. Where the teacher reads prompts of
its own, it answers those.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from opd_jax import files, processes
from opd_jax.data.prompts import Example
from opd_jax.evaluate import heldout
from opd_jax.evaluate.heldout import EvalPlan
from opd_jax.models import resting
from opd_jax.pytrees import Teacher
from opd_jax.run.assemble import Assembly
from opd_jax.store import run_files
from opd_jax.store import workdir as workdirs

FILE = run_files.TEACHER


def measured(
    parts: Assembly,
    teacher: Teacher | None,
    folder: Path,
    key: jax.Array,
    others: Sequence[Path] = (),
) -> dict[str, float | None] | None:
    """The teacher's evaluation: read where it was measured in the same way, else measured now.

    Args:
      parts: of the run.
      teacher: its parameters; of several all: each answers the problems that name it.
      folder: workdir of the run.
      key: that of the student's evaluations.
      others: workdirs of further runs: what one measured of the same teacher, on the same problems
        and in the same way, is taken over.

    Returns:
      ``heldout.FIELDS``, without what compares with a teacher; None where nothing is graded.

    Raises:
      WorkdirError: ``teacher.json`` is damaged.
    """
    plan = dataclasses.replace(parts.plan, on=None)
    is_graded = bool(heldout.graded_rows(parts.heldout, plan))
    if not (parts.run.eval.every and parts.run.eval.teacher and is_graded) or teacher is None:
        return None
    path = folder / FILE
    how = {
        "prompts": plan.num_graded,
        "samples": plan.samples,
        "temperature": plan.temperature,
        "max_new": plan.max_new,
        "grader": plan.grader,
    }
    rows = parts.heldout
    if parts.run.data.frames:  # what the student imitates is the teacher behind its own prompts
        rows = [dataclasses.replace(row, ids=row.teacher_ids) for row in rows]
        plan = dataclasses.replace(plan, width=plan.teacher_width)
        how |= {"teacher_prompt": parts.run.data.teacher_prompt}
        how |= {"teacher_system": parts.run.data.teacher_system}
    known = processes.of_first(lambda: _known(folder, how, others))
    if known is not None:
        return known
    result, graded = _answered(parts, teacher, rows, key, plan)
    value = {"how": how, "result": result, **dataclasses.asdict(graded)}
    text = json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
    processes.on_first(lambda: files.write_atomic(path, text))
    return result


def _answered(
    parts: Assembly, teacher: Teacher, rows: Sequence[Example], key: jax.Array, plan: EvalPlan
) -> tuple[dict[str, float | None], heldout.Graded]:
    """The answers of the teacher; of several each one's to its own problems, put together."""
    several = teacher if isinstance(teacher, tuple) else (teacher,)
    chosen, found = heldout.graded_rows(rows, plan), []
    for params, cfg, name in zip(several, parts.cfg.teachers, parts.run.teachers, strict=True):
        own = [row for row in chosen if row.taught_by == name]
        if own:
            found.append(
                heldout.answered(
                    resting.awake(params),
                    own,
                    parts.tokenizer,
                    jax.random.split(jax.random.clone(key))[0],  # as an evaluation draws answers
                    parts.mesh,
                    cfg=cfg,
                    plan=plan,
                )
            )
    if len(found) == 1:
        return found[0]
    order = [row.index for row in chosen]
    rows_of = {f.name: [] for f in dataclasses.fields(heldout.Graded)}
    for _, graded in found:
        for name, values in rows_of.items():
            values.extend(getattr(graded, name))
    places = sorted(range(len(order)), key=lambda i: order.index(rows_of["index"][i]))
    whole = heldout.Graded(**{n: tuple(x[i] for i in places) for n, x in rows_of.items()})
    shares = [len(graded.index) / len(order) for _, graded in found]
    mean_length, cut = (
        sum(share * (result[name] or 0.0) for share, (result, _) in zip(shares, found, strict=True))
        for name in ("mean_length", "truncated_share")
    )
    return heldout.summed_up(whole, mean_length, cut), whole


def _known(
    folder: Path, how: Mapping[str, Any], others: Sequence[Path]
) -> run_files.Evaluation | None:
    """What this run, else another, measured in the same way; another's file is taken over."""
    own = _inputs(folder)
    for place in (folder, *others):
        path = place / FILE
        if not path.exists() or (place != folder and (not own or _inputs(place) != own)):
            continue
        known = run_files.load(path, run_files.TeacherFile)
        if known["how"] == how:
            if place != folder:
                files.write_atomic(folder / FILE, path.read_text(encoding="utf-8"))
            return known["result"]
    return None


def _inputs(folder: Path) -> dict[str, Any]:
    """Fingerprints of what answers and of what is asked, as far as they are known."""
    known = (workdirs.read_run(folder) or {}).get("inputs") or {}
    asked = [n for n in known if n == "heldout" or n.partition(" ")[0] == workdirs.TEACHER]
    return {name: known[name]["files"] for name in asked}
