"""A checkpoint of a run as a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from opd_jax import command, processes
from opd_jax import mesh as meshlib
from opd_jax.data import tokenizer as tokenizers
from opd_jax.files import path_of
from opd_jax.models import hf, hf_config, lora, peft, transformer
from opd_jax.models.params import ParamSpec, Specs
from opd_jax.pytrees import Params
from opd_jax.spec import ModelSpec
from opd_jax.store import checkpoint, hub, model_card
from opd_jax.store import pair as pairs
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
    add("--adapter", action="store_true", help="of a run with LoRA its adapters alone, as PEFT's")
    flags = parser.parse_args(argv)
    step = export(
        flags.workdir, flags.out, step=flags.step, dtype=flags.dtype, adapter=flags.adapter
    )
    what = "PEFT adapter" if flags.adapter else "Hugging Face folder"
    processes.say(f"step {step} of {flags.workdir} is now the {what} {flags.out}")
    return 0


def export(
    workdir: str,
    out: str,
    *,
    step: int | None = None,
    dtype: str | None = None,
    adapter: bool = False,
) -> int:
    """Write the student of ``workdir`` at ``step`` (the newest good one by default) to ``out``.

    The folder holds weights, configs with the stop ids of the run, the tokenizer files of the
    student that the run was started on, and a model card; ``transformers`` and :func:`hf.load` read
    it to the same logits. Adapters are merged into their base, or, with ``adapter``, written alone
    in the layout that ``peft`` reads, beside tokenizer and card. In a run of several processes
    every one must call this; the first one writes.

    **Sharding**: every parameter is split over all devices and fetched layer by layer, so that no
    device, and no process that does not write, holds the whole model.

    Args:
      workdir: folder of the run.
      out: a new or empty folder.
      step: of the checkpoint.
      dtype: of the written weights; None: as trained, a base of LoRA in float32.
      adapter: write the adapters of a run with LoRA, which are float32.

    Returns:
      The step that was written.

    Raises:
      WorkdirError, CheckpointError: there is no run, no good checkpoint, or another student where
        the run's was.
      FileExistsError: ``out`` holds something, or another process is writing it.
      ValueError: an unknown dtype, or adapters of a run that has none, or none of its student's.
    """
    folder, target = Path(path_of(workdir)), Path(out).expanduser()
    record = workdirs.require_run(folder)
    try:
        written = None if dtype is None else jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(
            f"dtype {dtype!r}: expected float32, bfloat16 or float16; set --dtype"
        ) from error
    setting = functools.partial(workdirs.setting, record)
    source = hub.folder(setting("student.path"), "tokenizer")
    workdirs.check_model(folder, record, "student", source, weights=False)
    if adapter:
        _check_adapter(folder, record, dtype)
    cfg = hf_config.read_config(source)
    kept_as = ModelSpec(param_dtype=setting("student.param_dtype")).stored_dtype("float32")
    stored, spec = jnp.dtype(kept_as), pairs.adapters_of(record)
    if spec is None:
        template = _spread(transformer.specs(cfg), stored)
    else:
        template = _spread(lora.specs(cfg, spec), jnp.float32)
    with checkpoint.open(folder) as saves:
        kept, _, found = saves.restore({"params": template}, step, partial=True)
    tree = kept["params"]
    name = target.absolute().name
    card = model_card.text(folder, record, found, name, is_adapter=adapter)
    if spec and adapter:
        base = model_card.public_name(setting("student.path"))
        peft.save(target, cfg, spec, tree, base, source=source, card=card)
        return found
    if spec:
        base = pairs.base_of(folder, record)
        num_ids = tokenizers.num_ids(tokenizers.load(source), cfg.vocab_size, "student")
        base = dataclasses.replace(base, param_dtype=stored.name)
        tree = lora.attached(pairs.apart(base, cfg, _spread, num_ids), tree, spec)
    hf.save(
        target,
        cfg,
        tree,
        source=source,
        dtype=written or stored,
        eos_ids=record["stop_ids"],
        card=card,
    )
    return found


def _check_adapter(folder: Path, record: Mapping[str, Any], dtype: str | None) -> None:
    if pairs.adapters_of(record) is None:
        raise ValueError(
            f"{folder} has no adapters (lora.rank is 0): expected a run with LoRA; leave --adapter "
            "out, and all its weights are written"
        )
    if origin := record.get("init_from"):
        raise ValueError(
            f"the adapters of {folder} belong to {origin['name']}, from which it began, and not to "
            f"its student.path {record['config']['student.path']}: expected adapters of a model "
            "that others have; leave --adapter out, and they are merged"
        )
    if dtype is not None:
        raise ValueError(
            f"--dtype={dtype} and --adapter are given: expected one of them, as adapters are "
            "float32; leave --dtype out"
        )


def _spread(specs: Specs, dtype) -> Params:
    """Abstract parameters, each split over as many devices as one of its dimensions divides over.

    Not the first one, of layers or of the vocabulary: layers are fetched one by one. Where there is
    one, it is a dimension that meshes split, which a reader of folders can cut.
    """
    num = meshlib.make().size

    def place(spec: ParamSpec) -> jax.ShapeDtypeStruct:
        may_split = [axis is not None for axis in spec.axes]
        parts = [
            math.gcd(size, num) if ok or not any(may_split) else 1
            for size, ok in zip(spec.shape, may_split, strict=True)
        ]
        best = max(range(1, len(parts)), key=parts.__getitem__, default=0)
        grid = meshlib.make(data=num // parts[best], fsdp=parts[best])
        axes = [None] * best + ["fsdp"]
        return jax.ShapeDtypeStruct(spec.shape, dtype, sharding=NamedSharding(grid, P(*axes)))

    return jax.tree.map(place, specs)
