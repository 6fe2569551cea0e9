"""The host loop: sample, run the teacher, step, log, evaluate, save; resume where a run stopped.

Everything random is a function of (seed, step): rollouts and probes are drawn with keys folded by
the step, the data order by grain. A restored state and iterator therefore continue bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from opd_jax import files, optim, processes, pytrees, steps
from opd_jax import mesh as meshlib
from opd_jax.data import batches
from opd_jax.data.batches import Batch
from opd_jax.evaluate import heldout
from opd_jax.files import path_of
from opd_jax.models import memory, resting
from opd_jax.processes import say
from opd_jax.pytrees import Rollout, Teacher, TrainState
from opd_jax.run import (
    answering,
    assemble,
    ceiling,
    digest,
    entry,
    guards,
    initial,
    iteration,
    journal,
    narrate,
    progress,
)
from opd_jax.run.assemble import Assembly
from opd_jax.spec import RunConfig
from opd_jax.store import checkpoint, hub, run_files

_BEST = {"accuracy": "max", "kl_nats": "min"}


def train(
    run: RunConfig,
    workdir: str,
    *,
    command: Sequence[str] = (),
    started: float | None = None,
    stop: processes.Stop | None = None,
    on_step: Callable[[int, Mapping[str, float]], None] | None = None,
    pins: Mapping[str, str] | None = None,
    others: Sequence[Path] = (),
) -> dict[str, Any]:
    """Run (or resume) a distillation and return what ``summary.json`` holds.

    Args:
      run: a resolved config.
      workdir: a new folder, or that of the run to go on with.
      command: goes into ``run.json``.
      started: ``time.monotonic()`` at which the process began, for ``first_step_s``; default: now.
      stop: the wish to stop, where the caller wants to know of it; default: one of this run's own.
      on_step: called with the number of finished steps and their metrics, on every process.
      pins: Hub names of models with their commits, see ``hub.pins``; default: those that the run
        was started on, else the newest.
      others: workdirs of further runs, from which the teacher's own accuracy is taken over where it
        was measured there.

    Raises:
      ConfigError, ValueError, FileNotFoundError: something does not fit; nothing has been written.
      WorkdirError: the workdir belongs to another run.
      CheckpointError: saving or restoring failed.
      guards.NonFiniteError: loss or gradients are not finite.
      guards.RunawayError: more answers are cut by length than ``train.max_truncated`` allows.
    """
    started = time.monotonic() if started is None else started
    folder = Path(path_of(workdir))
    now = entry.start_time(folder)
    if pins is None:
        pins = hub.pins(run.models, [folder], say=say)
    run = hub.pinned_run(run, pins)
    parts = assemble.assemble(run, now=now, say=say)
    best = (run.checkpoint.best, _BEST[run.checkpoint.best]) if run.checkpoint.best else None
    with (
        checkpoint.open(folder, keep=run.checkpoint.keep, best=best, say=say) as saves,
        jax.set_mesh(parts.mesh),
        stop or processes.Stop() as stop,
    ):
        entry.enter(folder, parts, saves, command=command, now=now, pins=pins, say=say)
        loop = _Loop(parts, folder, saves, stop, started, on_step, others)
        try:
            return loop.run()
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            if not memory.is_exhausted(error):
                raise
            raise memory.FitError(guards.memory_advice(parts, loop.timer.running, error)) from error


class _Loop:
    """One process's side of a run: :func:`iteration.one_step`, watched, written down and saved."""

    def __init__(
        self,
        parts: Assembly,
        folder: Path,
        saves: checkpoint.Checkpoints,
        stop: processes.Stop,
        started: float,
        on_step: Callable[[int, Mapping[str, float]], None] | None = None,
        others: Sequence[Path] = (),
    ):
        run = parts.run
        self.parts, self.run_cfg, self.folder = parts, run, folder
        self.saves, self.stop, self.on_step, self.others = saves, stop, on_step, others
        self.timer = progress.Timer()
        self.profile = progress.Profile(folder / "profile", run.profiled, say)
        self.took: list[dict[str, float]] = []  # seconds by phase of every step of this process
        self.between: dict[str, float] = {}
        self.begun = time.perf_counter()
        self.first_step_s: float | None = None
        self.schedule = jax.jit(optim.schedule(run.optim))  # one program instead of six
        self.batches = batches.pipeline(
            parts.rows,
            batch=run.rows_read,
            seed=run.seed,
            shuffle=run.data.shuffle,
            epochs=run.data.epochs or None,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self.before: dict[str, float | None] = dict(heldout.EMPTY)
        self.latest: dict[str, float | None] = dict(heldout.EMPTY)
        self.evaluated: int | None = None  # step of ``latest``
        self.seconds_before = 0.0  # of earlier processes of this run
        self.process_started, self.started = started, time.monotonic()
        self.truncation = guards.Truncation(run, say)
        self.shown = progress.Progress(
            parts.last_step, every=run.log.every, shown=narrate.columns(parts)
        )
        self.ceiling: dict[str, float | None] | None = None  # what the teacher itself reaches
        self.padding: list[float] = []  # share of every step of this process
        self.compiled: set[str] = set()  # programs of this process, by name
        # Loaded once it is known that there is something left to do.
        self.teacher: Teacher | None = None
        self._journal: journal.Journal | None = None  # open while the loop runs

    @property
    def journal(self) -> journal.Journal:
        """The files that the run writes as it goes."""
        assert self._journal is not None
        return self._journal

    def run(self) -> dict[str, Any]:
        run, last = self.run_cfg, self.parts.last_step
        is_resumed = bool(processes.agreed(len(self.saves.steps())))
        state, first = self._restored() if is_resumed else (initial.state(self.parts), 0)
        if is_resumed and (done := self._finished(first)) is not None:
            return done
        self.teacher = initial.teacher_params(self.parts)
        for line in narrate.introduction(self.parts):
            say(line)
        say(f"steps {first} to {last}, in {self.folder}")
        restored = first if is_resumed else None
        with journal.open(
            self.folder, run, self.parts.tokenizer, restored, say, self.parts.cfg.rock.never
        ) as self._journal:
            if run.eval.every:
                asked = heldout.graded_rows(self.parts.heldout, self.parts.plan)
                journal.write_questions(self.folder, asked)
                self._measure_teacher()
            if not is_resumed and run.eval.every:
                self.before = self._evaluate(state, 0)
            self.shown.begin(first)
            step = first
            while step < last and not self.stop.everywhere():
                self.between, self.begun = self.timer.take(), time.perf_counter()
                with self.profile.step(step + 1):
                    with self.timer.phase("data"):
                        batch = next(self.batches)
                    state, values, seconds = self._step(state, batch, step)
                step += 1
                self.shown.update(step, values, seconds)
                if self.on_step is not None:
                    self.on_step(step, values)
                if run.eval.every and step % run.eval.every == 0 and step < last:
                    self._evaluate(state, step)
                if self.truncation.is_too_much:
                    self._save(state, step)
                    self.saves.wait()
                    raise self.truncation.error(step)
                is_due = run.checkpoint.every and step % run.checkpoint.every == 0
                if is_due and step < last:  # the last one waits for its evaluation
                    self._save(state, step)
            self.profile.close()
            if self.stop.everywhere():
                self._save(state, step)
                self.saves.wait()
                say(
                    f"stopped by {self.stop.signal} at step {step}, saved; the same command resumes"
                )
                return self._summary(state, step, is_finished=False)
            # A run that was stopped after its last step has saved it without an evaluation.
            is_due = bool(run.eval.every) and self.evaluated != step
            if is_due:
                self._evaluate(state, step)
            self._save(state, step, force=is_due)
            self.saves.wait()
            return self._summary(state, step, is_finished=True)

    def _restored(self) -> tuple[TrainState, int]:
        """The newest good checkpoint, the iterator set to it."""
        base = entry.base_of(self.folder, self.run_cfg)
        state, saved, step = initial.restored(self.parts, self.saves, base)
        beside = entry.Beside.read(saved, step)
        self.batches.set_state(beside.data)
        self.before, self.latest = beside.before, beside.latest
        self.evaluated, self.seconds_before = beside.evaluated, beside.seconds
        say(f"resuming {self.folder} at step {step}")
        if line := narrate.schedule_text(self.run_cfg.optim, beside.schedule, step):
            say(line)
        return state, step

    def _finished(self, first: int) -> dict[str, Any] | None:
        """Say again what came out, where there is nothing left to do; else None."""
        if first < self.parts.last_step or not (self.folder / "summary.json").exists():
            return None
        result = dict(run_files.summary(self.folder))
        if not result["is_finished"] or result["steps"] != first:
            return None
        if first >= self.run_cfg.train.steps:
            say(f"{self.folder} is finished; raise --config.train.steps to go on")
        else:
            say(f"{self.folder} is finished: its prompts are used up")
        for line in narrate.conclusion(result):
            say(line)
        return result

    def _step(
        self, state: TrainState, batch: Batch, step: int
    ) -> tuple[TrainState, dict[str, float], dict[str, float]]:
        def noted(answers: Rollout) -> Rollout:
            every = self.run_cfg.log.samples_every
            if every and step % every == 0:
                with self.timer.phase("samples"):
                    self._write_samples(state, answers, batch, step)
            return answers

        sampled = self._watched("rollout", answering.sample)
        awake = resting.awake  # nothing to watch where all is on the devices
        if self.run_cfg.teacher.offload:
            awake = self._watched("teacher", awake)
        programs = iteration.Programs(
            lambda *args: noted(sampled(*args)),
            awake,
            self._watched("teacher", steps.teacher_states),
            self._watched("update", steps.distill_step),
            lambda *args: noted(answering.given(*args)),
        )
        state, means = iteration.one_step(self.parts, self.teacher, state, batch, step, programs)
        with jax.profiler.TraceAnnotation("metrics"):
            num_tokens = float(means["length_tokens"].total)
            values = pytrees.reduce(means)
        guards.check_finite(values, step, lambda: steps.leaf_names(state.params), self.saves.steps)
        values["mean_length"] = values.pop("length_tokens")
        self.padding.append(values["padding_share"])
        values["lr"] = float(np.asarray(self.schedule(step)))
        del values["nonfinite"]
        if is_on_policy := self.run_cfg.train.is_on_policy(step):
            self.truncation.see(values["truncated_share"])
        if self.run_cfg.train.stage != "on_policy":
            values["on_policy"] = float(is_on_policy)
        self.journal.rocks(step + 1, values, state.rock)
        seconds = self._step_seconds()
        values["tokens_per_s"] = num_tokens / seconds["step"]
        self.journal.step(step + 1, values | {f"{name}_s": x for name, x in seconds.items()})
        return state, values, seconds

    def _watched(self, phase: str, program: Callable[..., Any]) -> Callable[..., Any]:
        """The program, as a phase of the step, which ends when its last result is there."""

        def watched(*args, **kwargs) -> Any:
            given = (*args, kwargs.get("packing"))
            with self.timer.phase(phase) as done, self._announced(phase, given):
                result = program(*args, **kwargs)
                done(result[1] if phase == "update" else result)
            return result

        return watched

    def _announced(self, phase: str, given: Sequence[Any]) -> contextlib.AbstractContextManager:
        """Say that a program is compiled, where one is that takes its time."""
        name = narrate.program(phase, given, self.parts.prompt_widths)
        if not name or name in self.compiled:  # a phase without a batch compiles nothing
            return contextlib.nullcontext()
        self.compiled.add(name)
        return progress.announced(f"compiling {name} (program {len(self.compiled)}) ...", say)

    def _step_seconds(self) -> dict[str, float]:
        """Seconds of the step that ends now: its phases and ``host``, the rest, add up to ``step``.

        Evaluating and saving before it are named too, and are no part of ``step``.
        """
        seconds = self.timer.take()
        whole = time.perf_counter() - self.begun
        seconds |= {"host": whole - sum(seconds.values()), "step": whole}
        if self.first_step_s is None:
            self.first_step_s = time.monotonic() - self.process_started
        self.took += [self.between, seconds]
        return seconds | self.between

    def _measure_teacher(self) -> None:
        key = heldout.evaluation_key(self.run_cfg.seed)
        with self.timer.phase("eval"), progress.announced("the teacher answers ...", say):
            self.ceiling = ceiling.measured(self.parts, self.teacher, self.folder, key, self.others)
        if self.ceiling is not None:
            say(f"teacher, held out: {narrate.evaluation_text(self.ceiling)}")

    def _evaluate(self, state: TrainState, step: int) -> dict[str, float | None]:
        begun, last = time.perf_counter(), self.latest
        with self.timer.phase("eval"), progress.announced("evaluating ...", say):
            result, graded = heldout.evaluate(
                state.params,
                self.teacher,
                state.rock,
                self.parts.heldout,
                self.parts.tokenizer,
                heldout.evaluation_key(self.run_cfg.seed),
                self.parts.mesh,
                cfg=self.parts.cfg,
                plan=self.parts.plan,
            )
        self.evaluated = step
        self.journal.evaluation(step, result, graded)
        moves = narrate.moves_text(self.journal.last_rocks) if self.run_cfg.rock.has_members else ""
        say(f"held out, step {step}: {narrate.evaluation_text(result, last)}{moves}")
        self.latest = result
        self.shown.paused("eval", self.run_cfg.eval.every, time.perf_counter() - begun)
        return result

    def _save(self, state: TrainState, step: int, *, force: bool = False) -> None:
        beside = entry.Beside(
            data=self.batches.get_state(),
            before=self.before,
            latest=self.latest,
            evaluated=self.evaluated,
            seconds=self._seconds(),
            schedule=self.run_cfg.optim.steps,
        )
        with self.timer.phase("save"):
            numbers = {name: value for name, value in self.latest.items() if value is not None}
            whole = dataclasses.asdict(beside)
            self.saves.save(step, initial.saved(state), whole, numbers, force=force)

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def _write_samples(self, state: TrainState, answers: Rollout, batch: Batch, step: int) -> None:
        """Decode the first answers of this batch with the KL of every token; print one."""
        kl_BT = None
        if self.teacher is not None:
            teacher = resting.awake(self.teacher)
            seen = answering.seen(self.parts, batch, answers, step)
            _, tokens = steps.eval_step(
                state.params, teacher, answers, state.rock, seen, cfg=self.parts.cfg
            )
            kl_BT = tokens.reverse_BT
        host, kl_BT = meshlib.to_host((answers, kl_BT))
        chosen = digest.of_step(self.run_cfg, host, kl_BT, self.parts.tokenizer, batch, step)
        self.journal.samples(step, chosen)
        if chosen:
            say(f"sample, step {step}: {narrate.sample_text(chosen[0], self.parts.tokenizer)}")

    def _summary(self, state: TrainState, step: int, *, is_finished: bool) -> dict[str, Any]:
        """Write ``summary.json``: before, after, and the types that carry most of the KL now."""
        result = {
            "before": self.before,
            "after": self.latest,
            "steps": step,
            "seconds": self._seconds(),
            "compiles": sum(assemble.programs().values()),
            "compiles_by_program": assemble.programs(),
            "first_step_s": self.first_step_s,
            **digest.phase_seconds([*self.took, self.timer.take()]),
            "is_finished": is_finished,
            "stopped_by": None if is_finished else self.stop.signal,
            "teacher": self.ceiling,
            "padding_share": statistics.fmean(self.padding) if self.padding else None,
            "rocks": digest.rock_table(
                state.rock,
                self.parts.tokenizer,
                self.run_cfg.log.rocks,
                self.parts.cfg.rock.never,
                is_fast=True,
            ),
            "rocks_steps": self.run_cfg.rock.fast_span,
        }
        text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False)
        processes.on_first(lambda: files.write_atomic(self.folder / "summary.json", text + "\n"))
        if is_finished:
            for line in narrate.conclusion(result):
                say(line)
            say(f"more in {self.folder / 'summary.json'}")
        return result
