"""The prompts of a run, read and rendered as its tokenizers do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from opd_jax.data import prompts as prompt_files
from opd_jax.data.completions import Limits
from opd_jax.data.prompts import Example
from opd_jax.files import path_of
from opd_jax.spec import RunConfig


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
      tokenizer, other: the student's and the teacher's, which must render alike; None without one.
      stop_ids: that end an answer, of which one ends a completion.
      now: the date that chat templates write.
      say: receives what was read.

    Raises:
      ValueError, FileNotFoundError: they cannot be used.
    """
    read = functools.partial(prompt_files.examples, spec=run.data, tokenizer=tokenizer, now=now)
    limits = None
    if run.train.stage != "on_policy":
        limits = Limits(run.rollout.max_new, stop_ids)
    rows, counts = read(path_of(run.data.prompts), limits=limits, other=other, say=say)
    say(f"prompts: {counts} ({run.data.prompts})")
    heldout: Sequence[Example] = ()
    if run.eval.every:
        heldout, counts = read(path_of(run.data.heldout), say=say)
        say(f"held out: {counts} ({run.data.heldout})")
    return rows, heldout
