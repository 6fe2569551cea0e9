"""A checkpoint of a run as a Hugging Face folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from opd_jax import command, processes
from opd_jax import mesh as meshlib
from opd_jax.files import path_of
from opd_jax.models import hf, hf_config, transformer
from opd_jax.models.params import ParamSpec, Specs
from opd_jax.pytrees import Params
from opd_jax.spec import ModelSpec
from opd_jax.store import checkpoint, hub, model_card
from opd_jax.store import workdir as workdirs


def main(argv: Sequence[str]) -> int:
    """The command ``opd-jax export``; returns the exit status."""
    parser = command.Parser(
        "export", "Write a checkpoint for others.", "--workdir=runs/demo --out=exported"
    )
    add = parser.add_argument
    add("--workdir", required=True, help="folder of the run")
    add("--step", type=int, default=None, help="default: the newest good one")
    add("--out", required=True, help="a new folder")
    add("--dtype", default=None, help="of the weights; default: as trained")
    flags = parser.parse_args(argv)
    step = export(flags.workdir, flags.out, step=flags.step, dtype=flags.dtype)
    processes.say(f"step {step} of {flags.workdir} is now the Hugging Face folder {flags.out}")
    return 0


def export(workdir: str, out: str, *, step: int | None = None, dtype: str | None = None) -> int:
    """Write the student of ``workdir`` at ``step`` (the newest good one by default) to ``out``.

    The folder holds weights, configs with the stop ids of the run, the tokenizer files of the
    student that the run was started on, and a model card; ``transformers`` and :func:`hf.load` read
    it to the same logits. In a run of several processes every one must call this; the first one
    writes.

    **Sharding**: every parameter is split over all devices and fetched layer by layer, so that no
    device, and no process that does not write, holds the whole model.

    Args:
      workdir: folder of the run.
      out: a new or empty folder.
      step: of the checkpoint.
      dtype: of the written weights; None: as trained.

    Returns:
      The step that was written.

    Raises:
      WorkdirError, CheckpointError: there is no run, no good checkpoint, or another student where
        the run's was.
      FileExistsError: ``out`` holds something, or another process is writing it.
      ValueError: an unknown dtype.
    """
    folder, target = Path(path_of(workdir)), Path(out).expanduser()
    record = workdirs.require_run(folder)
    try:
        written = None if dtype is None else jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(
            f"dtype {dtype!r}: expected float32, bfloat16 or float16; set --dtype"
        ) from error
    source = hub.folder(record["config"]["student.path"], "tokenizer")
    workdirs.check_model(folder, record, "student", source, weights=False)
    cfg = hf_config.read_config(source)
    spec = ModelSpec(param_dtype=record["config"]["student.param_dtype"])
    kept = jnp.dtype(spec.stored_dtype("float32"))
    template = {"params": _spread(transformer.specs(cfg), kept)}
    with checkpoint.open(folder) as saves:
        tree, _, found = saves.restore(template, step, partial=True)
    hf.save(
        target,
        cfg,
        tree["params"],
        source=source,
        dtype=written,
        eos_ids=record["stop_ids"],
        card=model_card.text(folder, record, found, target.absolute().name),
    )
    return found


def _spread(specs: Specs, dtype) -> Params:
    """Abstract parameters, each split over as many devices as one of its dimensions divides over.

    Not the first one, of layers or of the vocabulary: layers are fetched one by one.
    """
    num = meshlib.make().size

    def place(spec: ParamSpec) -> jax.ShapeDtypeStruct:
        parts = [math.gcd(size, num) for size in spec.shape]
        best = max(range(1, len(parts)), key=parts.__getitem__, default=0)
        grid = meshlib.make(data=num // parts[best], fsdp=parts[best])
        axes = [None] * best + ["fsdp"]
        return jax.ShapeDtypeStruct(spec.shape, dtype, sharding=NamedSharding(grid, P(*axes)))

    return jax.tree.map(place, specs)
