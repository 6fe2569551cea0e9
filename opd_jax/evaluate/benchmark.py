"""One model on tasks: samples, graded as they come, in a folder that a killed evaluation resumes.

A response follows from the model, its problem, its number and the seed alone: not from the batch,
the slots, the mesh, the other problems or tasks, nor from where an evaluation was interrupted.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from opd_jax import files, processes
from opd_jax import mesh as meshlib
from opd_jax.evaluate import asked, growth, metrics, results
from opd_jax.evaluate.tasks import Form, Task
from opd_jax.models import memory
from opd_jax.pytrees import Params
from opd_jax.rollout import answers as drawing
from opd_jax.rollout import refill
from opd_jax.rollout.sampling import Sampler
from opd_jax.store import pair as pairs
from opd_jax.store.pair import Model


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a model is evaluated.

    Attributes:
      samples: responses per problem.
      max_new: most ids of a response.
      temperature: 0 is greedy.
      top_k, top_p, min_p: filters of sampling; 0, 1 and 0 are off.
      seed: of the draws.
      ks: of pass@k; (): the powers of 2.
    """

    samples: int = 1
    max_new: int = 1024
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    ks: tuple[int, ...] = ()

    def __post_init__(self):
        checks = (
            ("samples", 1 <= self.samples < 2**16, "1 to 65535"),
            ("max-new", 1 <= self.max_new < 2**31, "1 to 2^31 - 1"),
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "0 or more"),
            ("top-k", 0 <= self.top_k < 2**31, "0 (off) or a number of ids"),
            ("top-p", 0 < self.top_p <= 1, "above 0, up to 1 (off)"),
            ("min-p", 0 <= self.min_p <= 1, "0 (off) to 1"),
            ("seed", 0 <= self.seed < 2**32, "0 to 2^32 - 1"),
            ("k", all(1 <= k <= self.samples for k in self.ks), f"1 to --samples {self.samples}"),
        )
        for name, is_right, expected in checks:
            if not is_right:
                found = getattr(self, {"k": "ks"}.get(name, name.replace("-", "_")))
                raise ValueError(f"{name} is {found}: expected {expected}; set --{name}")
        if self.samples > 1 and not self.temperature:
            raise ValueError(
                f"samples is {self.samples} and temperature 0, at which all are the same: expected "
                "one greedy sample, or a temperature; set --temperature or --samples=1"
            )

    @property
    def filters(self) -> dict[str, Any]:
        """What a sampler is told."""
        return {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p")}


def evaluate(
    ref: str,
    given: Sequence[Task],
    out: Path,
    *,
    settings: Settings,
    form: Form,
    batch: int = 16,
    slots: int = 0,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    say: Callable[[str], None] = processes.say,
) -> dict[str, dict[str, metrics.Value]]:
    """Evaluate a model, or go on where it was interrupted.

    Args:
      ref: a model reference.
      given: tasks.
      out: folder of the evaluation.
      settings, form: how.
      batch: problems at a time; changes no response.
      slots: responses decoded at a time, see ``rollout.refill``; 0: all of a batch.
      mesh: default: all devices along ``data``.
      dtype: compute dtype; default: float32 on CPU, bfloat16 elsewhere.
      say: receives progress.

    Returns:
      ``metrics.summarise`` of every task, by name.

    Raises:
      ValueError, OSError: something cannot be used; the message says what to change.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}: expected at least 1; set --batch")
    model = pairs.open_model(ref, mesh=mesh, dtype=dtype)
    drawing.check_slots(slots, batch, settings.samples, model.mesh)
    begun = asked.begun(results.load_record(out))
    rows = asked.rows(model, given, settings.max_new, form, begun=begun)
    told = dataclasses.asdict(settings)
    del told["ks"]  # of the summary, not of the responses
    record = asked.record(model, given, form, told, begun=begun)
    order = [(row.task.name, row.problem.index) for row in rows]
    done = _enter(out, record, order, settings.samples)
    if done < len(rows):
        if done:
            say(f"{out} has {done} of {len(rows)} problems: going on")
        for task in given:
            if task.num_repeated:
                say(
                    f"note: {task.num_repeated} of {len(task.problems)} problems of {task.name} "
                    "were there before; each counts, and intervals are too narrow for that"
                )
        with growth.Writing(out, results.LINES) as stream:
            for lines in _graded(model, rows[done:], settings, batch, slots, len(rows), say):
                if stream is not None:
                    files.append(stream, lines)
        processes.meet("evaluated")
    return _summarise(out, settings)


def evaluate_seeds(
    refs: Sequence[str],
    given: Sequence[Task],
    out: Path,
    *,
    settings: Settings,
    form: Form,
    say: Callable[[str], None] = processes.say,
    **more: Any,
) -> tuple[dict[str, dict[str, dict[str, metrics.Value]]], dict[str, dict[str, metrics.Value]]]:
    """Evaluate models that differ by their training seed, each in a folder of its own.

    Args:
      refs: model references, at least two.
      out: folder of their folders, and of ``seeds.json``.
      given, settings, form, say, more: as :func:`evaluate`.

    Returns:
      By model what :func:`evaluate` returns, and by task the means, see ``metrics.over_seeds``.

    Raises:
      ValueError, OSError: as :func:`evaluate`; a model twice, or others in ``out``.
    """
    folders = results.folders(out, refs)
    found = {}
    for ref, folder in zip(refs, folders, strict=True):
        say(f"== {ref}")
        found[ref] = evaluate(ref, given, folder, settings=settings, form=form, say=say, **more)
    read = [result for folder in folders for result in results.read(folder)]
    means = {
        task.name: metrics.over_seeds([each.in_order(task.name) for each in read], settings.ks)
        for task in given
    }
    processes.on_first(lambda: results.write_seeds(out, refs, means))
    return found, means


def _enter(out: Path, record: results.EvalRecord, order: list[tuple[str, int]], n: int) -> int:
    def enter() -> int:
        with files.only_writer(out):
            return results.enter(out, record, order, n)

    return processes.of_first(enter)


def _graded(
    model: Model,
    rows: Sequence[asked.Row],
    settings: Settings,
    batch: int,
    slots: int,
    total: int,
    say: Callable[[str], None],
) -> Iterator[list[results.Line]]:
    """Sample and grade what is left, batch by batch."""
    size = meshlib.batch_rows(min(batch, len(rows)), model.mesh)
    widest = max(row.width for row in rows)
    needs = [
        memory.Need(
            "the model", memory.weights(model.cfg, model.stored, model.mesh), "raise --mesh-fsdp"
        ),
        memory.Need(
            "keys and values",
            refill.cells(
                model.cfg,
                size,
                settings.samples,
                widest,
                settings.max_new,
                model.mesh,
                wanted=slots,
            ),
            f"lower {refill.FLAGS}",
        ),
    ]
    memory.check(needs, model.mesh)
    params = model.load()
    sampler = model.sampler(**settings.filters)
    progress = growth.Progress("problems", total, total - len(rows), say)
    with jax.set_mesh(model.mesh):
        for group in asked.groups(rows):
            for part, lines in _group(
                model, params, group, settings=settings, sampler=sampler, size=size, slots=slots
            ):
                progress.add(part, lines, lines[-1]["task"])
                yield lines
    progress.tell()


def _group(
    model: Model,
    params: Params,
    rows: Sequence[asked.Row],
    *,
    settings: Settings,
    sampler: Sampler,
    size: int,
    slots: int,
) -> Iterator[tuple[int, list[results.Line]]]:
    """Number of problems and lines of each batch."""
    name = rows[0].task.name
    key = asked.key_of(name, settings.seed)
    drawn = drawing.sample(
        params,
        [row.example for row in rows],
        key,
        model.mesh,
        cfg=model.cfg,
        sampler=sampler,
        max_new=settings.max_new,
        width=rows[0].width,
        size=size,
        samples=settings.samples,
        numbers=[row.problem.index for row in rows],
        slots=slots,
    )
    first = 0
    for rollouts, real in drawn:
        texts = drawing.texts(rollouts, real, model.tokenizer)
        host = meshlib.to_host(rollouts)
        lengths = host.mask_BT.sum(axis=1)
        lines = [
            _line(
                rows[first + number // settings.samples],
                number % settings.samples,
                text,
                int(lengths[number]),
                bool(host.truncated_B[number]),
            )
            for number, text in enumerate(texts)
        ]
        yield real // settings.samples, lines
        first += real // settings.samples


def _line(row: asked.Row, sample: int, text: str, tokens: int, truncated: bool) -> results.Line:
    problem = row.problem
    verdict = row.verdict(text, truncated=truncated)
    line: results.Line = {
        "task": row.task.name,
        "index": problem.index,
        "id": problem.id,
        "sample": sample,
        "response": text,
        "gold": problem.answer,
        "grader": problem.grader,
        "correct": verdict.correct,
        "reason": verdict.reason,
        "found": verdict.found,
        "tokens": tokens,
        "truncated": truncated,
    }
    if sample == 0:
        line["prompt"] = row.example.text
    return line


def _summarise(out: Path, settings: Settings) -> dict[str, dict[str, metrics.Value]]:
    (found,) = results.read(out)
    measures = {
        name: metrics.summarise(list(problems.values()), settings.ks)
        for name, problems in found.problems.items()
    }
    reasons: dict[str, collections.Counter[str]] = {
        name: collections.Counter() for name in measures
    }
    for line in results.load_lines(out):
        reasons[line["task"]][line["reason"]] += 1
    processes.on_first(lambda: results.write_summary(out, measures, reasons))
    return measures
