"""The files that a run writes as it goes; each is cut back to where a resumed run goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from opd_jax import config, files
from opd_jax.data.prompts import Example
from opd_jax.evaluate.heldout import Graded
from opd_jax.pytrees import RockState
from opd_jax.run import digest, writers
from opd_jax.spec import RunConfig
from opd_jax.store import run_files

_TOP = 10  # types named in a line of rocks.jsonl


@dataclasses.dataclass
class Journal:
    """What a run has to say in files; made by :func:`open`.

    ======================  =================================================================
    ``metrics.jsonl``       every step and evaluation, also for TensorBoard and W&B
    ``samples.jsonl``       decoded answers with the KL of every token
    ``rocks.jsonl``         members, what they carry and the types with the highest Rock Score
    ``graded.jsonl``        the held-out answers: which were right, and why
    ``questions.json``      the prompts they answer, and what was expected
    ======================  =================================================================
    """

    run: RunConfig
    tokenizer: Any
    _writers: Sequence[writers.Writer]
    _samples: writers.Writer
    _rocks: writers.Writer
    _graded: writers.Writer
    never: tuple[int, ...] = ()  # ids that are no rocks
    last_rocks: dict[str, Any] | None = None  # the latest line of rocks.jsonl by this process

    def step(self, step: int, values: Mapping[str, Any]) -> None:
        """Record the metrics of a step."""
        for writer in self._writers:
            writer.write(step, values)

    def samples(self, step: int, chosen: Sequence[Mapping[str, Any]]) -> None:
        """Record what :func:`digest.samples` decoded."""
        self._samples.write(step, {"samples": chosen})

    def evaluation(self, step: int, result: Mapping[str, float | None], graded: Graded) -> None:
        """Record an evaluation, and which answers were right and why."""
        self.step(step, {f"eval/{name}": value for name, value in result.items()})
        self._graded.write(
            step,
            {
                "index": graded.index,
                "correct": graded.correct,
                "reason": graded.reason,
                "text": graded.text,
            },
        )

    def rocks(self, step: int, values: Mapping[str, float], state: RockState) -> None:
        """Record the members if they were refreshed in this step (the fixed ones: now and then).

        ``gated_share`` and ``gated_kl_share`` are of this step, which the members before it gated.

        Args:
          step: finished updates.
          values: reduced metrics of the step.
          state: after the step.
        """
        if not self._has_rocks(step):
            return
        top = digest.rock_table(state, self.tokenizer, _TOP, self.never)
        names = ("token_id", "token", "share", "member")
        self.last_rocks = {
            "step": step,
            "members": int(values["rock_members"]),
            "entered": int(values["rock_entries"]),
            "left": int(values["rock_exits"]),
            "jaccard": values["rock_jaccard"],
            "gated_share": values["gated_share"],
            "gated_kl_share": values.get("gated_kl_share", math.nan),  # without a teacher
            "top": [{name: row[name] for name in names} for row in top],
        }
        self._rocks.write(step, self.last_rocks)

    def _has_rocks(self, step: int) -> bool:
        run = self.run
        if run.rock.is_refreshed:
            return step % run.rock.every == 0
        cadences = (run.eval.every, run.checkpoint.every)
        return step == run.train.steps or any(n and step % n == 0 for n in cadences)


def write_questions(folder: Path, rows: Sequence[Example]) -> None:
    """Write ``questions.json``: the graded prompts that the lines of ``graded.jsonl`` answer."""
    if jax.process_index() or not rows:
        return
    told = [{"index": row.index, "prompt": row.text, "gold": row.answer} for row in rows]
    text = json.dumps(told, ensure_ascii=False, allow_nan=False)
    files.write_atomic(folder / run_files.QUESTIONS, text + "\n")


@contextlib.contextmanager
def open(
    folder: Path,
    run: RunConfig,
    tokenizer: Any,
    restored: int | None,
    say: Callable[[str], None] = lambda line: None,
    never: tuple[int, ...] = (),
) -> Iterator[Journal]:
    """Open the files of a run in ``folder`` and close them at the end of the block.

    Args:
      folder: workdir of the run.
      run: its config.
      tokenizer: decodes ids.
      restored: step of the checkpoint that the run goes on from; None for a start from nothing.
      say: receives what a user should know of lines that are lost.
      never: ids that are no rocks.

    Raises:
      ImportError: the logger of an extra is asked for and not installed.
      OSError: a file cannot be written.
    """
    with contextlib.ExitStack() as stack:

        def opened(writer: writers.Writer) -> writers.Writer:
            stack.callback(writer.close)
            return writer

        def lines(name: str, restored: int | None) -> writers.Writer:
            return opened(writers.JsonlWriter(folder / name, restored=restored, say=say))

        metrics = [lines("metrics.jsonl", restored)]
        if restored and (lost := _lost_steps(folder / "metrics.jsonl", restored)):
            say(f"{folder / 'metrics.jsonl'} has lost {lost}: what is drawn of them is missing")
        if run.log.tensorboard:
            metrics.append(
                opened(writers.TensorBoardWriter(folder / "tensorboard", restored=restored))
            )
        if run.log.wandb:
            metrics.append(
                opened(
                    writers.WandbWriter(
                        run.log.wandb,
                        name=folder.name,
                        folder=folder,
                        config=config.describe(run),
                    )
                )
            )
        # A step's samples are written before its update: those of the restored step come again.
        again = None if restored is None else restored - 1
        yield Journal(
            run,
            tokenizer,
            metrics,
            lines("samples.jsonl", again),
            lines("rocks.jsonl", restored),
            lines("graded.jsonl", restored),
            never,
        )


def _lost_steps(path: Path, restored: int) -> str:
    """Which of the steps up to ``restored`` have no line of their own, in words; empty if none."""
    found = {line["step"] for line in run_files.metrics(path.parent) if "loss" in line}
    lost = [step for step in range(1, restored + 1) if step not in found]
    if not lost:
        return ""
    shown = ", ".join(map(str, lost[:5])) + (", ..." if len(lost) > 5 else "")
    return f"the lines of {len(lost)} of the {restored} steps until here ({shown})"
