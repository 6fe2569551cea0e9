"""A checkpoint of a run as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp

from opd_jax.data import tokenizer as tokenizers
from opd_jax.files import path_of
from opd_jax.models import hf, hf_config, params, transformer
from opd_jax.spec import ModelSpec
from opd_jax.store import checkpoint
from opd_jax.store import workdir as workdirs


def export(workdir: str, out: str, *, step: int | None = None, dtype: str | None = None) -> int:
    """Write the student of ``workdir`` at ``step`` (the newest good one by default) to ``out``.

    The folder holds weights, config, generation config with the stop ids of the run, and tokenizer;
    ``transformers`` and :func:`hf.load` read it to the same logits. The parameters are gathered on
    one device: for a model larger than an accelerator's memory set ``JAX_PLATFORMS=cpu``.

    Args:
      workdir: folder of the run.
      out: a new or empty folder.
      step: of the checkpoint.
      dtype: of the written weights; None: as trained.

    Returns:
      The step that was written.

    Raises:
      WorkdirError, CheckpointError: there is no run, or no good checkpoint.
      FileExistsError: ``out`` holds something.
      ValueError: an unknown dtype.
    """
    folder = Path(workdir)
    record = workdirs.require_run(folder)
    try:
        written = None if dtype is None else jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(
            f"dtype {dtype!r}: expected float32, bfloat16 or float16; set --dtype"
        ) from error
    source = path_of(record["config"]["student.path"])
    cfg = hf_config.read_config(source)
    spec = ModelSpec(param_dtype=record["config"]["student.param_dtype"])
    kept = jnp.dtype(spec.stored_dtype("float32"))
    template = {"params": params.abstract(transformer.specs(cfg), kept)}
    with checkpoint.open(folder) as saves:
        tree, _, found = saves.restore(template, step, partial=True)
    hf.save(
        out,
        cfg,
        tree["params"],
        tokenizer=tokenizers.load(source),
        dtype=written,
        eos_ids=record["stop_ids"],
    )
    return found
