"""Time the same on-policy step in several libraries, each in a process and environment of its own.

    scripts/bench {step,update,rollout} [--libraries=opd_jax,trl,..] [--out=FILE.json]
    scripts/bench step --workload=unequal [--slots=8] [--pack=yes] ...

Every library loads the same random weights and the same ids. Rows are of one length, or of unequal
ones: then prompts and answers are spread as :func:`lengths.spread` says, alike for all libraries
and in every step, so that none compiles anew in a timed one. Each library forces the stop id at the
end of each row by its own means, and its worker refuses rows of other lengths.

`loss_fixed` is the loss of each at those weights, so a library that computes something else is seen
before it is compared. A library that cannot run becomes a row that says why.

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

import lengths
import peer_batch
import toolkit
from peer_job import Job, Shape
from peer_rows import agreement, remarks, summarise, table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KINDS = ("step", "update", "rollout")
WORKLOADS: dict[str, dict[str, Any]] = {  # what is measured where the command does not say
    "fixed": {
        "layers": "15,30",
        "batch": "8",
        "prompt": 64,
        "new": 64,
        "vocab": 49_152,
        "warmup": 2,
        "steps": 5,
    },
    "unequal": {
        "layers": "4,8",
        "batch": "16",
        "prompt": lengths.LONGEST_PROMPT,
        "new": lengths.LONGEST_ANSWER,
        "vocab": 16_384,
        "warmup": 1,
        "steps": 3,
    },
}
LIBRARIES = ("opd_jax", "trl", "easydel", "tunix")
SHARPER = {"student": 3.0, "teacher": 5.0}  # times the usual initial embedding and head
DEEPER = 8.0  # times the usual initial weights of what a layer adds
SETTINGS = {  # of this library, with rows of unequal length; with its default, what a run calls it
    "slots": (6, "rollout.slots; as many as rows: all in step"),
    "segments": (1, "rollout.segments"),
    "microbatches": (1, "train.microbatches"),
}


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
    is_unequal = work["workload"] == "unequal"
    sizes = work["batch"], work["prompt"], work["new"]
    batch = peer_batch.draw(*sizes, work["student"]["vocab"], is_unequal=is_unequal)
    fixed = folder / f"rows-{work['workload']}-{'-'.join(map(str, sizes))}.npz"
    batch.save(fixed)
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
    parser.add_argument("--workload", choices=WORKLOADS, default="fixed")
    for name, meaning in {
        "layers": "of student,teacher",
        "batch": "prompts; several sizes for rollout",
        "prompt": "ids of a prompt, or of the longest that may be",
        "new": "ids sampled after it, at most where answers are unequal",
        "vocab": "ids of the models",
        "steps": "timed",
        "warmup": "steps before those",
    }.items():
        values = [work[name] for work in WORKLOADS.values()]
        also = f"{meaning}; {' / '.join(map(str, values))}"
        parser.add_argument(f"--{name}", type=type(values[0]), help=also)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one worker")
    parser.add_argument("--out", default="", help="JSON file to write")
    ours = parser.add_argument_group("settings of opd_jax with rows of unequal length")
    for name, (value, key) in SETTINGS.items():
        ours.add_argument(f"--{name}", type=toolkit.whole, default=value, help=f"{key}; {value}")
    ours.add_argument("--pack", choices=("yes", "no"), default="yes", help="train.pack; yes")
    flags = parser.parse_args(argv)
    both = ("opd_jax", "trl") if flags.kind == "rollout" else LIBRARIES
    flags.libraries = flags.libraries.split(",") if flags.libraries else list(both)
    for library in flags.libraries:
        if library not in both:
            parser.error(
                f"library {library!r} for {flags.kind}: expected some of {','.join(both)}; "
                "change --libraries"
            )
    if flags.kind != "step" and flags.workload != "fixed":
        parser.error(f"{flags.kind} of --workload={flags.workload}: expected step; change one")
    defaults = WORKLOADS[flags.workload] | ({"batch": "8,32"} if flags.kind == "rollout" else {})
    for name, value in defaults.items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)
    try:
        flags.batch = [int(b) for b in flags.batch.split(",")]
        flags.layers = [int(n) for n in flags.layers.split(",")]
    except ValueError as error:
        parser.error(f"{error}: expected whole numbers and commas; change --batch or --layers")
    flags.settings = {}
    if flags.workload == "unequal":
        flags.settings = {name: getattr(flags, name) for name in SETTINGS}
        flags.settings["pack"] = flags.pack == "yes"
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
        "workload": flags.workload,
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
            is_unequal=flags.workload == "unequal",
            prompt=flags.prompt,
            new=flags.new,
            lr=1e-6,
            warmup=flags.warmup,
            steps=flags.steps,
        )
        runs = folder / f"{flags.kind}-{flags.workload}-{batch}"
        for library in flags.libraries:
            print(f"== {flags.kind}, batch {batch}: {library}", flush=True)
            own = flags.settings if library == "opd_jax" else {}
            given = dataclasses.replace(job, settings=own)
            row = summarise(library, batch, run_worker(library, given, runs, flags.timeout))
            rows.append(row | ({"settings": own} if own else {}))
    where = toolkit.machine()
    print(f"{where['cpu']}, {where['cores']} cores, {where['memory_gb']} GB")
    notes = remarks(rows, work, flags.kind)
    for line in [table(rows), *agreement(rows), *notes]:
        print(line)
    toolkit.write(Path(flags.out) if flags.out else None, where, work, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
