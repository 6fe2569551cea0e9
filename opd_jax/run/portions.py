"""How many prompts a step has: whether the devices share them, and how long they last."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import jax

from opd_jax.spec import ConfigError, RunConfig


def steps_of_epochs(run: RunConfig, num_rows: int) -> int:
    """Steps that the epochs of prompts are enough for; endless where they are not limited."""
    full = num_rows // run.rows_read
    return run.data.epochs * full if run.data.epochs else sys.maxsize


def check_batches(run: RunConfig, shards: int) -> None:
    """Check that a step's rows divide over the mesh.

    Raises:
      ConfigError: they do not.
    """
    rows = run.train.prompts * run.rollout.samples
    if run.train.prompts % shards or rows % (run.train.microbatches * shards):
        raise ConfigError(
            f"{run.train.prompts} prompts x {run.rollout.samples} samples in "
            f"{run.train.microbatches} micro-batches do not divide over {shards} batch shards "
            "(mesh data x fsdp): change --config.train.prompts, --config.train.microbatches or "
            "the mesh"
        )
    if run.rollout.slots % shards:
        raise ConfigError(
            f"rollout.slots is {run.rollout.slots}: expected a multiple of the {shards} batch "
            "shards (mesh data x fsdp), or 0; set --config.rollout.slots"
        )
    if run.train.prompts % jax.process_count():
        raise ConfigError(
            f"{run.train.prompts} prompts do not divide over {jax.process_count()} processes: "
            "change --config.train.prompts"
        )


def ended(run: RunConfig, num_rows: int, say: Callable[[str], None]) -> RunConfig:
    """The run with a schedule that ends where its prompts are used up."""
    limit = steps_of_epochs(run, num_rows)
    if limit >= run.train.steps:
        return run
    say(
        f"data.epochs: {run.data.epochs} x {num_rows} prompts are used up after {limit} steps, "
        f"before train.steps ({run.train.steps}): there the run ends, and its schedule"
    )
    return dataclasses.replace(run, optim=dataclasses.replace(run.optim, steps=max(limit, 1)))
