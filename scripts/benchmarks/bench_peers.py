"""Time the same on-policy step in several libraries, each in a process and environment of its own.

    scripts/bench {step,update,rollout} [--libraries=opd_jax,trl,..] [--out=FILE.json]

Every library loads the same random weights and the same ids. `loss_fixed` is the loss of each at
those weights, so a library that computes something else is seen before it is compared. A library
that cannot run becomes a row that says why.

The worker of a library is ``worker_NAME.py``; ``peer_job`` says what it is asked and answers.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import toolkit
from peer_job import UNKNOWN, Job, Shape
from peer_rows import agreement, remarks, summarise, table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KINDS = ("step", "update", "rollout")
LIBRARIES = ("opd_jax", "trl", "easydel", "tunix")
SHARPER = {"student": 3.0, "teacher": 5.0}  # times the usual initial embedding and head
DEEPER = 8.0  # times the usual initial weights of what a layer adds


def write_inputs(work: dict[str, Any], folder: Path) -> tuple[str, str, str]:
    """Make both models and the fixed ids; a folder per content, so that a change makes it anew.

    Returns:
      The student's folder, the teacher's, and the file of ids.
    """
    paths = []
    for seed, role in enumerate(("student", "teacher")):
        about = json.dumps(
            [work[role], seed, work["max_positions"], SHARPER[role], DEEPER], sort_keys=True
        )
        path = folder / f"{role}-{hashlib.sha256(about.encode()).hexdigest()[:12]}"
        if not path.exists():
            # A process of its own: this one would keep jax's threads and memory while others run.
            made = toolkit.run_child(
                Path(sys.executable),
                HERE / "peer_model.py",
                {
                    "folder": str(path),
                    "shape": work[role],
                    "seed": seed,
                    "sharper": SHARPER[role],
                    "deeper": DEEPER,
                    "max_positions": work["max_positions"],
                },
                folder=folder,
                name=f"make-{role}",
                environment={},
            )
            if "failed" in made:
                raise SystemExit(f"writing {path} failed: {made['failed']}")
        paths.append(str(path))
    rng = np.random.default_rng(0)
    shapes = {"prompt": work["prompt"], "completion": work["new"]}
    ids = {
        name: rng.integers(UNKNOWN + 1, work["student"]["vocab"], (work["batch"], size), np.int32)
        for name, size in shapes.items()
    }
    fixed = folder / f"ids-{work['batch']}-{work['prompt']}-{work['new']}.npz"
    np.savez(fixed, allow_pickle=False, **ids)
    return paths[0], paths[1], str(fixed)


def run_worker(library: str, job: Job, folder: Path, timeout: float) -> dict[str, Any]:
    """Install a library where needed and run its worker; a failure becomes ``{"failed": why}``."""
    if library == "opd_jax":
        python = Path(sys.executable)
    else:
        python = ROOT / ".bench" / library / "bin" / "python"
        made = subprocess.run([ROOT / "scripts" / "bench", "install", library], check=False)
        if made.returncode:
            return {"failed": f"its environment cannot be made: status {made.returncode}"}
    return toolkit.run_child(
        python,
        HERE / f"worker_{library}.py",
        dataclasses.asdict(job),
        folder=folder,
        name=library,
        environment={
            "HF_HUB_OFFLINE": "1",
            "JAX_PLATFORMS": "cpu",
            "TOKENIZERS_PARALLELISM": "false",
            "WANDB_MODE": "disabled",
        },
        timeout=timeout,
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
      SystemExit: a value that cannot be used, with what was expected.
    """
    parser = argparse.ArgumentParser(
        "scripts/bench", description="Time the same step in several libraries."
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--libraries", default="", help=f"default: {','.join(LIBRARIES)}")
    parser.add_argument("--layers", default="15,30", help="of student,teacher")
    parser.add_argument("--batch", default="", help="prompts; default 8, for rollout 8,32")
    parser.add_argument("--prompt", type=int, default=64, help="ids of a prompt")
    parser.add_argument("--new", type=int, default=64, help="ids sampled after it")
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--steps", type=int, default=5, help="timed")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one worker")
    parser.add_argument("--out", default="", help="JSON file to write")
    flags = parser.parse_args(argv)
    both = ("opd_jax", "trl") if flags.kind == "rollout" else LIBRARIES
    flags.libraries = flags.libraries.split(",") if flags.libraries else list(both)
    for library in flags.libraries:
        if library not in both:
            parser.error(
                f"library {library!r} for {flags.kind}: expected some of {','.join(both)}; "
                "change --libraries"
            )
    batches = flags.batch or ("8,32" if flags.kind == "rollout" else "8")
    try:
        flags.batch = [int(b) for b in batches.split(",")]
        flags.layers = [int(n) for n in flags.layers.split(",")]
    except ValueError as error:
        parser.error(f"{error}: expected whole numbers and commas; change --batch or --layers")
    numbers = [*flags.batch, *flags.layers, flags.prompt, flags.new, flags.steps]
    if len(flags.layers) != 2 or min(numbers) < 1 or flags.warmup < 0:
        parser.error(
            f"layers {flags.layers}, batch {flags.batch}, prompt {flags.prompt}, new {flags.new}, "
            f"steps {flags.steps}, warmup {flags.warmup}: expected two layer counts, all from 1 "
            "(warmup from 0); change what is not"
        )
    return flags


def main(argv: Sequence[str]) -> None:
    """Run the workers one after another; print and write what they found."""
    flags = parse(argv)
    shapes = [Shape(layers, vocab=flags.vocab) for layers in flags.layers]
    work: dict[str, Any] = {
        "kind": flags.kind,
        "dtype": "float32",
        "optimizer": "AdamW",
        "student": dataclasses.asdict(shapes[0]),
        "teacher": dataclasses.asdict(shapes[1]),
        "prompt": flags.prompt,
        "new": flags.new,
        "max_positions": max(512, flags.prompt + flags.new),
        "warmup": flags.warmup,
    }
    folder = ROOT / ".bench" / "work"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for batch in flags.batch:
        student, teacher, fixed = write_inputs(work | {"batch": batch}, folder)
        job = Job(
            kind=flags.kind,
            student=student,
            teacher=teacher,
            fixed=fixed,
            prompt=flags.prompt,
            new=flags.new,
            lr=1e-6,
            warmup=flags.warmup,
            steps=flags.steps,
        )
        for library in flags.libraries:
            print(f"== {flags.kind}, batch {batch}: {library}", flush=True)
            runs = folder / f"{flags.kind}-{batch}"
            rows.append(summarise(library, batch, run_worker(library, job, runs, flags.timeout)))
    where = toolkit.machine()
    print(f"{where['cpu']}, {where['cores']} cores, {where['memory_gb']} GB")
    notes = remarks(rows, work, flags.kind)
    for line in [table(rows), *agreement(rows), *notes]:
        print(line)
    toolkit.write(Path(flags.out) if flags.out else None, where, work, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
