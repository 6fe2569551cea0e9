"""The host loop: sample, run the teacher, step, log, evaluate, save; resume where a run stopped.

Everything random is a function of (seed, step): rollouts and probes are drawn with keys folded by
the step, the data order by grain. A restored state and iterator therefore continue bit for bit.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import config, files, optim, processes, pytrees
from opd_jax import mesh as meshlib
from opd_jax import steps as step_programs
from opd_jax.data import batches
from opd_jax.data import prompts as prompt_files
from opd_jax.evaluate import heldout
from opd_jax.processes import say
from opd_jax.pytrees import Params, Rollout, TrainState
from opd_jax.rollout import decode
from opd_jax.run import assemble, journal, narrate, progress
from opd_jax.run.assemble import Assembly
from opd_jax.spec import RunConfig
from opd_jax.store import checkpoint
from opd_jax.store import workdir as workdirs

# The schedule's horizon follows from train.steps, which may change.
_MAY_CHANGE = (*workdirs.MAY_CHANGE, "optim.steps", "profile")
_BEST = {"accuracy": "max", "kl_nats": "min"}
# Share of answers cut by length from which they seldom have an end to learn (arXiv 2604.08527).
_MANY_TRUNCATED = 0.5


class NonFiniteError(RuntimeError):
    """Loss or gradients are NaN or infinite; nothing of this step has been saved."""


def train(
    run: RunConfig,
    workdir: str,
    *,
    command: Sequence[str] = (),
    started: float | None = None,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Run (or resume) a distillation and return what ``summary.json`` holds.

    Args:
      run: a resolved config.
      workdir: a new folder, or that of the run to go on with.
      command: goes into ``run.json``.
      started: ``time.monotonic()`` at which the process began, for ``first_step_s``; default: now.
      stop: the wish to stop, where the caller wants to know of it; default: one of this run's own.

    Raises:
      ConfigError, ValueError, FileNotFoundError: something does not fit; nothing has been written.
      WorkdirError: the workdir belongs to another run.
      CheckpointError: saving or restoring failed.
      NonFiniteError: loss or gradients are not finite.
    """
    started = time.monotonic() if started is None else started
    parts = assemble.assemble(run, say=say)
    folder = Path(workdir)
    record = workdirs.describe(config.describe(run), seed=run.seed, command=command)
    record |= {"data": prompt_files.digest(parts.rows), "stop_ids": list(parts.stop_ids)}
    try:
        old = workdirs.read_run(folder)
        if old and old.get("data", record["data"]) != record["data"]:
            raise workdirs.WorkdirError(
                f"{folder} was started on other prompts (digest {old['data']}) than "
                f"{run.data.prompts} holds now ({record['data']}): expected the same, as their "
                "order is gone on with; put the file back or give another --workdir"
            )
        workdirs.enter_workdir(folder, record, _MAY_CHANGE)
    except OSError as error:  # a file in its place, no right to read
        raise workdirs.WorkdirError(
            f"{folder} cannot be the workdir ({error}): expected a folder that can be read and "
            "written; make it one or give another --workdir"
        ) from error
    best = (run.checkpoint.best, _BEST[run.checkpoint.best]) if run.checkpoint.best else None
    with (
        checkpoint.open(folder, keep=run.checkpoint.keep, best=best, say=say) as saves,
        jax.set_mesh(parts.mesh),
        stop or Stop() as stop,
    ):
        saves.claim()
        return _Loop(parts, folder, saves, stop, started).run()


class Stop:
    """Turns SIGTERM and SIGINT, while entered, into a wish to stop; a second one is obeyed.

    Entered again inside, by one of many runs, it stays the same wish.
    """

    def __init__(self):
        self.number = 0  # of the signal that came; 0: none
        self._old: dict[int, Any] = {}
        self._depth = 0

    @property
    def signal(self) -> str | None:
        """Name of the signal that came."""
        return signal.Signals(self.number).name if self.number else None

    @property
    def status(self) -> int:
        """Exit status of a command that the signal stopped, as a shell has it; 0 without one."""
        return 128 + self.number if self.number else 0

    def __enter__(self) -> Stop:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, old in self._old.items():
                signal.signal(number, old)

    def _note(self, number: int, frame: Any) -> None:
        self.number = number
        signal.signal(number, self._old[number])

    def everywhere(self) -> bool:
        """Whether any process was told to stop; the same answer on all of them."""
        self.number = processes.largest(self.number)
        return self.number > 0


class _Loop:
    """One process's side of a run; the numerics are in ``steps`` and ``rollout``."""

    def __init__(
        self,
        parts: Assembly,
        folder: Path,
        saves: checkpoint.Checkpoints,
        stop: Stop,
        started: float,
    ):
        self.parts, self.run_cfg, self.folder = parts, parts.run, folder
        self.saves, self.stop = saves, stop
        self.timer = progress.Timer()
        self.profile = progress.Profile(folder / "profile", parts.run.profiled, say)
        self.took: list[dict[str, float]] = []  # seconds by phase of every step of this process
        self.between: dict[str, float] = {}
        self.begun = time.perf_counter()
        self.first_step_s: float | None = None
        self.schedule = jax.jit(optim.schedule(parts.run.optim))  # one program instead of six
        self.base_key = jax.random.key(self.run_cfg.seed)
        self.before: dict[str, float | None] = dict(heldout.EMPTY)
        self.latest: dict[str, float | None] = dict(heldout.EMPTY)
        self.evaluated: int | None = None  # step of ``latest``
        self.seconds_before = 0.0  # of earlier processes of this run
        self.process_started, self.started = started, time.monotonic()
        self.has_warned = False

    def run(self) -> dict[str, Any]:
        run = self.run_cfg
        self.batches = batches.pipeline(
            self.parts.rows,
            batch=run.train.prompts,
            seed=run.seed,
            shuffle=run.data.shuffle,
            epochs=run.data.epochs or None,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        state, first = self._start()
        if (done := self._finished(first)) is not None:
            return done
        self.teacher = assemble.teacher_params(self.parts)
        for line in narrate.introduction(self.parts):
            say(line)
        say(f"steps {first} to {run.train.steps}, in {self.folder}")
        restored = first if self.saves.steps() else None
        with journal.open(self.folder, run, self.parts.tokenizer, restored) as self.journal:
            if restored is None and run.eval.every:
                self.before = self.latest = self._evaluate(state, 0)
            shown = progress.Progress(run.train.steps, start=first, every=run.log.every)
            step, batch = first, ()
            while step < run.train.steps and not self.stop.everywhere():
                self.between, self.begun = self.timer.take(), time.perf_counter()
                with self.profile.step(step + 1):
                    with self.timer.phase("data"):
                        batch = next(self.batches, None)
                    if batch is None:
                        break
                    state, values, seconds = self._step(state, batch, step)
                step += 1
                shown.update(step, values, seconds)
                if run.eval.every and step % run.eval.every == 0 and step < run.train.steps:
                    self.latest = self._evaluate(state, step)
                is_due = run.checkpoint.every and step % run.checkpoint.every == 0
                if is_due and step < run.train.steps:  # the last one waits for its evaluation
                    self._save(state, step)
            self.profile.close()
            if batch is None:
                say(f"stopping at step {step}: {run.data.epochs} epochs of prompts are used up")
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
                self.latest = self._evaluate(state, step)
            self._save(state, step, force=is_due)
            self.saves.wait()
            return self._summary(state, step, is_finished=True)

    def _start(self) -> tuple[TrainState, int]:
        """A fresh state, or the newest good checkpoint with the iterator set to it."""
        if not self.saves.steps():
            return assemble.state(self.parts), 0
        state, rest, step = self.saves.restore(assemble.state_template(self.parts))
        self.batches.set_state(rest["data"])
        self.before, self.latest = rest["before"], rest["latest"]
        self.evaluated = rest.get("evaluated", step)  # older checkpoints do not say
        self.seconds_before = rest["seconds"]
        say(f"resuming {self.folder} at step {step}")
        return state, step

    def _finished(self, first: int) -> dict[str, Any] | None:
        """Say again what came out, where there is nothing left to do; else None."""
        path = self.folder / "summary.json"
        if not self.saves.steps() or not path.exists():
            return None
        result = json.loads(path.read_text(encoding="utf-8"))
        if not result["is_finished"] or result["steps"] != first:
            return None
        if first >= self.run_cfg.train.steps:
            say(f"{self.folder} is finished; raise --config.train.steps to go on")
        elif self._is_used_up():
            say(f"{self.folder} is finished: its prompts are used up")
        else:
            return None
        for line in narrate.conclusion(result):
            say(line)
        return result

    def _is_used_up(self) -> bool:
        """Whether there is no further batch; leaves the iterator where it is."""
        if not self.run_cfg.data.epochs:
            return False
        here = self.batches.get_state()
        has_more = next(self.batches, None) is not None
        self.batches.set_state(here)
        return not has_more

    def _step(
        self, state: TrainState, batch: batches.Batch, step: int
    ) -> tuple[TrainState, dict[str, float], dict[str, float]]:
        run, parts = self.run_cfg, self.parts
        with self.timer.phase("rollout") as done:
            answers = done(self._sample(state.params, batch, step))
        with jax.profiler.TraceAnnotation("crop"):
            answers = self._crop(answers)
        every = run.log.samples_every
        if every and step % every == 0:
            with self.timer.phase("samples"):
                self._write_samples(state, answers, step)
        with self.timer.phase("teacher") as done:
            states_BTE = done(step_programs.teacher_states(self.teacher, answers, cfg=parts.cfg))
        with self.timer.phase("update") as done:
            state, means = step_programs.distill_step(
                state, self.teacher, answers, cfg=parts.cfg, tx=parts.tx, states_BTE=states_BTE
            )
            done(means)
        with jax.profiler.TraceAnnotation("metrics"):
            num_tokens = float(means["length_tokens"].total)
            values = pytrees.reduce(means)
        self._check_finite(values, step)
        values["mean_length"] = values.pop("length_tokens")
        values["lr"] = float(np.asarray(self.schedule(step)))
        del values["nonfinite"]
        self._warn_of_truncation(values["truncated_share"])
        self.journal.rocks(step + 1, values, state.rock)
        seconds = self._step_seconds()
        values["tokens_per_s"] = num_tokens / seconds["step"]
        self.journal.step(step + 1, values | {f"{name}_s": x for name, x in seconds.items()})
        return state, values, seconds

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

    def _sample(self, tree: Params, batch: batches.Batch, step: int) -> Rollout:
        run, parts = self.run_cfg, self.parts
        width = batches.bucket(batch.longest, run.data.widths)
        prompt = batches.pad([row.ids for row in batch.examples], width, parts.policy.pad_id)
        return decode.sample(
            tree,
            meshlib.to_global(prompt, parts.mesh),
            jax.random.fold_in(self.base_key, step),
            cfg=parts.cfg.student,
            sampler=parts.policy,
            max_new=run.rollout.max_new,
            samples=run.rollout.samples,
            bias_V=parts.bias_V,
            policy_step=step,
        )

    def _crop(self, answers: Rollout) -> Rollout:
        """Cut what nobody sampled, to the smallest answer width that is compiled anyway."""
        if len(self.run_cfg.rollout.widths) == 1:
            return answers
        width = answers.ids_BT.shape[1] - self.run_cfg.rollout.max_new
        longest = int(jnp.max(jnp.sum(answers.mask_BT, axis=1)))
        total = width + batches.bucket(longest, self.run_cfg.rollout.widths)
        if total >= answers.ids_BT.shape[1]:
            return answers
        return answers.replace(
            ids_BT=answers.ids_BT[:, :total],
            mask_BT=answers.mask_BT[:, :total],
            logp_BT=answers.logp_BT[:, :total],
        )

    def _check_finite(self, values: dict[str, float], step: int) -> None:
        index = int(values["nonfinite"])
        if index == -1:
            return
        what = "the loss"
        if index >= 0:
            template = assemble.state_template(self.parts).params
            what = f"the gradient of {step_programs.leaf_names(template)[index]}"
        steps = self.saves.steps()
        kept = f"step {steps[-1]} is the newest checkpoint" if steps else "there is no checkpoint"
        raise NonFiniteError(
            f"step {step}: {what} is not finite (loss {values['loss']:.4g}, gradient norm "
            f"{values['grad_norm']:.4g}); stopped before saving, {kept}; lower --config.optim.lr, "
            "or compute in float32 (--config.student.dtype=float32)"
        )

    def _warn_of_truncation(self, share: float) -> None:
        if share > _MANY_TRUNCATED and not self.has_warned:
            self.has_warned = True
            say(
                f"warning: {share:.0%} of the answers are cut at rollout.max_new "
                f"({self.run_cfg.rollout.max_new} tokens), so the student seldom learns to end; "
                "raise --config.rollout.max_new if answers should be shorter than that"
            )

    def _evaluate(self, state: TrainState, step: int) -> dict[str, float | None]:
        with self.timer.phase("eval"):
            result, graded = heldout.evaluate(
                state.params,
                self.teacher,
                state.rock,
                self.parts.heldout,
                self.parts.tokenizer,
                jax.random.fold_in(self.base_key, 2**32 - 1),
                self.parts.mesh,
                cfg=self.parts.cfg,
                plan=self.parts.plan,
            )
        self.evaluated = step
        self.journal.evaluation(step, result, graded)
        moves = narrate.moves_text(self.journal.last_rocks) if self.run_cfg.rock.has_members else ""
        say(f"held out, step {step}: {narrate.evaluation_text(result)}{moves}")
        return result

    def _save(self, state: TrainState, step: int, *, force: bool = False) -> None:
        rest = {
            "data": self.batches.get_state(),
            "before": self.before,
            "latest": self.latest,
            "evaluated": self.evaluated,
            "seconds": self._seconds(),
        }
        with self.timer.phase("save"):
            numbers = {name: value for name, value in self.latest.items() if value is not None}
            self.saves.save(step, state, rest, numbers, force=force)

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def _write_samples(self, state: TrainState, answers: Rollout, step: int) -> None:
        """Decode the first answers of this batch with the KL of every token; print one."""
        _, tokens = step_programs.eval_step(
            state.params, self.teacher, answers, state.rock, cfg=self.parts.cfg
        )
        host, kl_BT = meshlib.to_host((answers, tokens.reverse_BT))
        chosen = narrate.samples(host, kl_BT, self.parts.tokenizer, self.run_cfg.log.samples)
        self.journal.samples(step, chosen)
        if chosen:
            say(f"sample, step {step}: {narrate.sample_text(chosen[0], self.parts.tokenizer)}")

    def _summary(self, state: TrainState, step: int, *, is_finished: bool) -> dict[str, Any]:
        """Write ``summary.json``: before, after, and the types that carry most of the KL."""
        result = {
            "before": self.before,
            "after": self.latest,
            "steps": step,
            "seconds": self._seconds(),
            "compiles": sum(assemble.programs().values()),
            "compiles_by_program": assemble.programs(),
            "first_step_s": self.first_step_s,
            **narrate.phase_seconds([*self.took, self.timer.take()]),
            "is_finished": is_finished,
            "stopped_by": None if is_finished else self.stop.signal,
            "rocks": narrate.rock_table(state.rock, self.parts.tokenizer, self.run_cfg.log.rocks),
        }
        if jax.process_index() == 0:
            text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False)
            files.write_atomic(self.folder / "summary.json", text + "\n")
        if is_finished:
            for line in narrate.conclusion(result):
                say(line)
            say(f"more in {self.folder / 'summary.json'}")
        return result
