"""``opd-jax knockout``: answers without a ban, then of every arm, then what the bans did.

Everything that is drawn follows from the seed, and everything that is decoded is written as it
comes, so that the same command goes on where it was stopped and comes to the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from opd_jax import mesh as meshlib
from opd_jax import processes
from opd_jax.evaluate import asked, growth, results, tasks
from opd_jax.files import path_of
from opd_jax.instrument.knockout import arms, checks, costs, outlook, targets, verdicts
from opd_jax.instrument.knockout.answered import BASELINE, Answer, Arm, Baseline, Job
from opd_jax.instrument.knockout.ledger import Key, Ledger, Line, load_record
from opd_jax.instrument.knockout.request import PAPER, KnockoutError, Request
from opd_jax.instrument.knockout.targets import Targets
from opd_jax.instrument.knockout.trials import Prefix, Trials
from opd_jax.rollout import answers as drawing
from opd_jax.store import pair as pairs
from opd_jax.store import workdir
from opd_jax.store.pair import Model

Batch = tuple[list[int], list[list[Job]]]  # places of problems that are read, and calls of jobs
_PLAIN = Arm(BASELINE, BASELINE, ())
# Change no answer, or are told in another way.
_FREE = (
    *("out", "slots", "dtype", "model", "tasks", "limit", "form", "settings", "types", "groups"),
    *("margin", "effect", "power", "teacher"),
)


def run(
    request: Request,
    *,
    mesh: Mesh | None = None,
    plan: bool = False,
    say: Callable[[str], None] = processes.say,
) -> dict[str, Any] | None:
    """Do what is asked for, or what is left of it.

    Args:
      request: what.
      mesh: default: all devices along ``data``.
      plan: stop when the baseline is there and what the arms cost is said.
      say: receives lines.

    Returns:
      What ``summary.json`` holds; None of a plan.

    Raises:
      KnockoutError: it cannot be done, or cannot be trusted.
      ValueError, OSError: something that was named cannot be used.
    """
    model = pairs.open_model(request.model, mesh=mesh, dtype=request.dtype)
    drawing.check_slots(request.slots, request.batch, 1, model.mesh)
    if request.teacher:
        pairs.resolve(request.teacher)  # raises before anything is decoded
    given = tasks.read_all(request.tasks, grader=request.grader, limit=request.limit)
    out = Path(path_of(request.out))
    begun = asked.begun(load_record(out))
    rows = asked.rows(model, given, request.settings.max_new, request.form, begun=begun)
    found = targets.read(request.types, request.groups, model.tokenizer, model.num_ids)
    for line in _told(found, request):
        say(line)
    room = arms.width(request, found)
    trials = Trials(model, request, room, max(row.width for row in rows))
    with Ledger(out, _record(model, given, request, found, begun)) as ledger:
        if ledger.done:
            say(f"{request.out} has {ledger.done:,} answers: going on")
        work = _Work(trials, ledger, rows, say)
        baseline, steps_per_s = work.baseline()
        count_V = baseline.counts(model.cfg.vocab_size)
        chosen = arms.first(request, found, baseline, count_V, model.stop_ids)
        if request.has("group") and (unseen := arms.unseen(found, count_V)):
            say(f"lists of which nothing occurs in the answers, left out: {', '.join(unseen)}")
        for line in outlook.lines(chosen, baseline, request):
            say(line)
        null = arms.null(baseline, model.num_ids, model.cfg.vocab_size, room, model.stop_ids)
        jobs = baseline.everywhere(null)
        alone = [arm for arm in chosen if len(arm.ids) == 1 and arm.window is None]
        jobs += baseline.without(alone, trials.size)
        jobs += [job for arm in chosen for job in baseline.jobs(arm)]
        batches = work.batches(baseline, jobs)
        calls = ledger.missing([call for _, part in batches for call in part])
        for line in costs.lines(
            costs.of_calls(calls, baseline, trials.rounds), len(calls), steps_per_s
        ):
            say(line)
        if plan:
            return None
        outlook.check(chosen, baseline, request)
        done = work.all(batches, baseline)
        told = checks.trusted(done)  # before anything is chosen by what was decoded
        change = verdicts.on_first_half(done, baseline)
        seed, stops = request.settings.seed, model.stop_ids
        further = arms.second(request, change, count_V, seed, stops) if change else []
        if further:
            jobs = [job for arm in further for job in baseline.jobs(arm)]
            done += work.all(work.batches(baseline, jobs), baseline)
            told = checks.trusted(done)
        result = verdicts.of(
            [*chosen, *further], done, baseline, found, request, model.tokenizer, mesh, say
        )
        result |= {"checks": told, "model": model.reference.name, "time": workdir.timestamp()}
        verdicts.write(ledger, result)
    return result


def _record(
    model: Model, given: Sequence[tasks.Task], request: Request, found: Targets, begun: str
) -> results.EvalRecord:
    told = dataclasses.asdict(request)
    for name in _FREE:
        told.pop(name)
    told |= dataclasses.asdict(request.settings) | {"ks": [], "families": list(request.families)}
    told |= {
        "ids": hashlib.sha256(str([found.ids, [*found.groups.items()]]).encode()).hexdigest()[:16],
        "batch": meshlib.batch_rows(request.batch, model.mesh),
    }
    return asked.record(model, given, request.form, told, begun=begun)


def _told(found: Targets, request: Request) -> Iterator[str]:
    if request.has("group") and not found.groups and request.groups != PAPER:
        lacking = f"the family group has no lists in {request.types}"
        if request.families == ("group",):
            raise KnockoutError(f"{lacking}: expected some; give a file of them by --groups")
        yield f"{lacking} and no arms; --groups gives it some"
    if found.missing:
        yield (
            f"no token of this model, left out of the published groups: {', '.join(found.missing)}"
        )


class _Work:
    """Decodes, grades and writes what the ledger does not have yet."""

    def __init__(
        self,
        trials: Trials,
        ledger: Ledger,
        rows: Sequence[asked.Row],
        say: Callable[[str], None],
    ):
        self._trials, self._ledger, self._rows, self._say = trials, ledger, rows, say
        self._settings = trials.request.settings

    def baseline(self) -> tuple[Baseline, float | None]:
        """The answers without a ban, and the steps/s that decoding them took."""
        samples, end = range(self._settings.samples), self._settings.max_new
        calls: list[Batch] = []
        for places in self._read_together(range(len(self._rows))):
            jobs = [Job(_PLAIN, row, sample, 0, end, 0) for row in places for sample in samples]
            calls.append((places, self._cut(jobs)))
        began, old = time.monotonic(), self._ledger.done
        answers: list[list[Answer]] = [[] for _ in self._rows]
        steps, begins = 0, []
        for call, lines in self._run(calls, None):
            begins.append(time.monotonic())
            lengths = [line["tokens"] for line in lines]
            steps += self._trials.rounds(lengths) if len(begins) > 1 else 0
            for job, line in zip(call, lines, strict=True):
                ids = np.array(line["ids"], np.int32)
                answers[job.row].append(Answer(ids, line["correct"], line["found"]))
        # The first batch compiles, and what was there already took no time.
        is_measured = not old and len(begins) > 1
        took = time.monotonic() - (begins[0] if begins else began)
        baseline = Baseline(self._rows, answers, end, self._settings.seed)
        return baseline, steps / took if is_measured and took else None

    def batches(self, baseline: Baseline, jobs: Sequence[Job]) -> list[Batch]:
        """Jobs by the problems that are read together, the longest answers first."""

        def length(job: Job) -> int:
            return len(baseline.answers[job.row][job.sample].ids)

        of_row: dict[int, list[Job]] = {}
        for job in jobs:
            of_row.setdefault(job.row, []).append(job)
        longest = {row: max(map(length, some)) for row, some in of_row.items()}
        order = sorted(of_row, key=lambda row: (-longest[row], row))
        found = []
        for places in self._read_together(order):
            some = [job for row in places for job in of_row[row]]
            some.sort(key=lambda job: -length(job))  # stable: rows end together
            found.append((places, self._cut(some)))
        return found

    def all(self, batches: Sequence[Batch], baseline: Baseline) -> list[tuple[Job, Line]]:
        """Every job with its line."""
        found = []
        for call, lines in self._run(batches, baseline):
            found += zip(call, lines, strict=True)
        return found

    def _read_together(self, order: Sequence[int]) -> list[list[int]]:
        """Places of problems of one task and width, up to the trials' size, in the given order."""
        found: list[list[int]] = []
        kinds: dict[tuple[str, int], list[int]] = {}
        for place in order:
            row = self._rows[place]
            kinds.setdefault((row.task.name, row.width), []).append(place)
        for places in kinds.values():
            found += _parts(places, self._trials.size)
        return found

    def _cut(self, jobs: list[Job]) -> list[list[Job]]:
        return _parts(jobs, self._trials.size)

    def _run(
        self, batches: Sequence[Batch], baseline: Baseline | None
    ) -> Iterator[tuple[list[Job], list[Line]]]:
        """Calls with their lines, one call being decoded while the one before is graded."""
        total = sum(len(call) for _, calls in batches for call in calls)
        progress = growth.Progress("answers", total, 0, self._say)
        decoding: tuple[list[Job], Any] | None = None
        is_fresh = False
        for places, calls in batches:
            prefix: Prefix | None = None
            for call in calls:
                # Nothing is decoded ahead of what is still read: those come first in the file.
                lines = self._ledger.take([self._key(job) for job in call])
                if lines is not None:
                    progress.done += len(call)
                    yield call, lines
                    continue
                is_fresh = True
                if prefix is None:
                    prefix = self._trials.read([self._rows[place] for place in places], places)
                next_ = (call, self._trials.answer(prefix, self._rows, call))
                if decoding is not None:
                    yield self._graded(*decoding, baseline, progress)
                decoding = next_
        if decoding is not None:
            yield self._graded(*decoding, baseline, progress)
        if is_fresh:
            progress.tell()

    def _graded(
        self, call: list[Job], answers: Any, baseline: Baseline | None, progress: growth.Progress
    ) -> tuple[list[Job], list[Line]]:
        texts = self._trials.texts(answers, len(call))
        host = meshlib.to_host(answers)
        lines = []
        for place, (job, text) in enumerate(zip(call, texts, strict=True)):
            ids = host.ids_BT[place][host.mask_BT[place]]
            truncated = bool(host.truncated_B[place])
            row = self._rows[job.row]
            verdict = row.verdict(text, truncated=truncated)
            start = 0
            if baseline is not None:
                start = checks.difference(ids, baseline.answers[job.row][job.sample].ids)
            arm, task, index, sample = self._key(job)
            line: Line = {
                "arm": arm,
                "task": task,
                "index": index,
                "sample": sample,
                "start": start,
                "ids": ids[start:].tolist(),
                "correct": verdict.correct,
                "reason": verdict.reason,
                "found": verdict.found,
                "tokens": len(ids),
                "truncated": truncated,
            }
            if baseline is None:
                line["response"], line["gold"] = text, row.problem.answer
            lines.append(line)
        self._ledger.put(lines)
        progress.add(len(call), lines, call[-1].arm.family)
        return call, lines

    def _key(self, job: Job) -> Key:
        row = self._rows[job.row]
        return job.arm.name, row.task.name, row.problem.index, job.sample


def _parts(items: list, size: int) -> list[list]:
    return [items[first : first + size] for first in range(0, len(items), size)]
