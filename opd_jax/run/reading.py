"""The prompts of a run, read and rendered as its tokenizers do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from opd_jax import bounded
from opd_jax.data import prompts as prompt_files
from opd_jax.data import tokenizer as tokenizers
from opd_jax.data.completions import Limits
from opd_jax.data.prompts import DataSpec, Example
from opd_jax.files import path_of
from opd_jax.spec import RunConfig

# Prompts rendered by both tokenizers before step 1; a template that differs shows in the first few.
_RENDERED = 64


def prompts(
    run: RunConfig,
    tokenizer: Any,
    other: Any,
    stop_ids: tuple[int, ...],
    now: str | None,
    say: Callable[[str], None],
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Read the prompts of a run, those to train on and those held out.

    Args:
      run: its config.
      tokenizer, other: the student's and the teacher's, which must render alike.
      stop_ids: that end an answer, of which one ends a completion.
      now: the date that chat templates write.
      say: receives what was read.

    Raises:
      ValueError, FileNotFoundError: they cannot be used.
    """
    read = functools.partial(prompt_files.examples, spec=run.data, tokenizer=tokenizer, now=now)
    _check_rendering(run.data, tokenizer, other, now)
    limits = None
    if run.train.stage != "on_policy":
        limits = Limits(run.rollout.max_new, stop_ids)
    rows, counts = read(path_of(run.data.prompts), limits=limits, say=say)
    say(f"prompts: {counts} ({run.data.prompts})")
    heldout: Sequence[Example] = ()
    if run.eval.every:
        heldout, counts = read(path_of(run.data.heldout), say=say)
        say(f"held out: {counts} ({run.data.heldout})")
    return rows, heldout


def _check_rendering(data: DataSpec, tokenizer: Any, other: Any, now: str | None) -> None:
    """Render the first prompts by both tokenizers, each within bounds."""
    path = path_of(data.prompts)
    records = prompt_files.read(path, data)[:_RENDERED]

    def work(begin: Callable[[str], None]) -> None:
        for record in records:
            if isinstance(record.prompt, tuple):
                continue  # ids, which both models take as they are
            begin(f"{path}:{record.line}: rendering and tokenising the prompt")
            arguments = dict(data.template)
            tokenizers.check_render(tokenizer, other, record.prompt, now=now, **arguments)

    bounded.run(work, change="mend the chat template or the tokenizer, or drop the line")
