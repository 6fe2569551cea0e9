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
from opd_jax.evaluate import heldout
from opd_jax.models import resting
from opd_jax.pytrees import Params
from opd_jax.run.assemble import Assembly
from opd_jax.store import run_files
from opd_jax.store import workdir as workdirs

FILE = run_files.TEACHER


def measured(
    parts: Assembly,
    teacher: Params | None,
    folder: Path,
    key: jax.Array,
    others: Sequence[Path] = (),
) -> dict[str, float | None] | None:
    """The teacher's evaluation: read where it was measured in the same way, else measured now.

    Args:
      parts: of the run.
      teacher: its parameters.
      folder: workdir of the run.
      key: that of the student's evaluations.
      others: workdirs of further runs: what one measured of the same teacher, on the same problems
        and in the same way, is taken over.

    Returns:
      ``heldout.FIELDS``, without what compares with a teacher; None where nothing is graded.

    Raises:
      WorkdirError: ``teacher.json`` is damaged.
    """
    plan, cfg = parts.plan, parts.cfg.teacher
    is_graded = bool(heldout.graded_rows(parts.heldout, plan))
    if (
        not (parts.run.eval.every and parts.run.eval.teacher and is_graded)
        or cfg is None
        or teacher is None
    ):
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
    told: list[str] = []
    processes.on_first(lambda: told.append(json.dumps(_known(folder, how, others))))
    known = json.loads(processes.agreed_text("".join(told)))
    if known is not None:
        return known
    result, graded = heldout.answered(
        resting.awake(teacher),
        rows,
        parts.tokenizer,
        jax.random.split(key)[0],  # as an evaluation draws answers
        parts.mesh,
        cfg=cfg,
        plan=plan,
    )
    if jax.process_index() == 0:
        value = {"how": how, "result": result, **dataclasses.asdict(graded)}
        files.write_atomic(path, json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
    processes.meet("teacher")
    return result


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
    return {name: known[name]["files"] for name in ("teacher", "heldout") if name in known}
