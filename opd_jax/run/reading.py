"""The prompts of a run, read and rendered as its tokenizers do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opd_jax.data import prompts as prompt_files
from opd_jax.data.completions import Limits
from opd_jax.data.prompts import Example
from opd_jax.files import path_of
from opd_jax.spec import RunConfig


def prompts(
    run: RunConfig,
    tokenizer: Any,
    others: Mapping[str, Any],
    stop_ids: tuple[int, ...],
    now: str | None,
    say: Callable[[str], None],
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Read the prompts of a run, those to train on and those held out.

    Args:
      run: its config.
      tokenizer: the student's.
      others: the teachers' by name, which must render alike; of one teacher the name is empty.
      stop_ids: that end an answer, of which one ends a completion.
      now: the date that chat templates write.
      say: receives what was read.

    Raises:
      ValueError, FileNotFoundError: they cannot be used.
    """
    read = functools.partial(
        prompt_files.examples,
        spec=run.data,
        tokenizer=tokenizer,
        teachers=[name for name in others if name] if others else None,
        now=now,
    )
    rendering = list(others.values())
    limits = None
    if run.train.stage != "on_policy":
        limits = Limits(run.rollout.max_new, stop_ids)
    rows, counts = read(path_of(run.data.prompts), limits=limits, others=rendering, say=say)
    say(f"prompts: {counts} ({run.data.prompts})")
    heldout: Sequence[Example] = ()
    if run.eval.every:
        heldout, counts = read(path_of(run.data.heldout), say=say)
        say(f"held out: {counts} ({run.data.heldout})")
    return rows, heldout
