"""Time the same on-policy step in several libraries, each in a process and environment of its own.

    scripts/bench {step,update,rollout} [--libraries=opd_jax,trl,..] [--out=FILE.json]

Every library loads the same random weights and the same ids. `loss_fixed` is the loss of each at
those weights, so a library that computes something else is seen before it is compared. A library
that cannot run becomes a row that says why.

The worker of a library is ``worker_NAME.py``: it calls :func:`serve`, and this module is all that
it shares with the others. Nothing outside the standard library is imported here at the top, since
each environment has other packages.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opd_jax.models import hf
from opd_jax.models.params import init
from opd_jax.models.rope import Rope
from opd_jax.models.transformer import ModelConfig, specs

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KINDS = ("step", "update", "rollout")
LIBRARIES = ("opd_jax", "trl", "easydel", "tunix")
DISTRIBUTIONS = {"opd_jax": "opd-jax", "trl": "trl", "easydel": "easydel", "tunix": "google-tunix"}
RELEVANT = (
    *DISTRIBUTIONS.values(),
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "torch",
    "transformers",
    "numpy",
)
PAD, EOS, UNKNOWN = 0, 1, 2  # special ids of the made-up tokenizer; nothing stops at EOS here
SHARPER = {"student": 3.0, "teacher": 5.0}  # times the usual initial embedding and head
DEEPER = 8.0  # times the usual initial weights of what a layer adds
TOLERANCE = 1e-4  # relative; fp32 forward passes of two libraries differ by about 1e-6


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a llama-family model.

    Attributes:
      layers, width, ffn, heads, kv_heads, head_dim, vocab: as in ``config.json``; tied embeddings.
    """

    layers: int
    width: int = 576
    ffn: int = 1536
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    vocab: int = 49_152

    @property
    def body_params(self) -> int:
        """Weights of all matrix multiplications but the head's."""
        attention = 2 * self.width * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.ffn)

    @property
    def head_params(self) -> int:
        """Weights of the head, which is the embedding."""
        return self.vocab * self.width


@dataclasses.dataclass(frozen=True)
class Job:
    """What one worker process has to do; crosses to it as JSON.

    Attributes:
      kind: ``step``, ``update`` or ``rollout``.
      student, teacher: Hugging Face folders.
      fixed: an ``.npz`` file with ``prompt`` [B, P] and ``completion`` [B, N], both i32 ids.
      prompt, new: P and N: ids per prompt, ids sampled after each.
      lr: peak learning rate of AdamW.
      warmup, steps: calls that are not timed, and that are.
    """

    kind: str
    student: str
    teacher: str
    fixed: str
    prompt: int
    new: int
    lr: float
    warmup: int
    steps: int


def needed_flops(student: Shape, teacher: Shape, *, batch: int, prompt: int, new: int) -> float:
    """FLOPs that an exact update on given ids cannot do without.

    Two per weight and token forward, four more where gradients flow; the head only at the ``new``
    scored positions of each row: both projections and the student's two gradients, 4 passes;
    attention over causal pairs only, two matmuls forward and four backward.
    """
    length = prompt + new - 1  # positions that predict something
    body = batch * length * (2 * teacher.body_params + 6 * student.body_params)
    head = batch * new * 2 * (teacher.head_params + 3 * student.head_params)
    pairs = batch * length * (length + 1) / 2

    def attention(shape: Shape) -> float:
        return 4 * pairs * shape.layers * shape.heads * shape.head_dim

    return body + head + attention(teacher) + 3 * attention(student)


def spread(seconds: Sequence[float]) -> float:
    """(largest - smallest) / median."""
    return (max(seconds) - min(seconds)) / statistics.median(seconds)


def measure(once: Callable[[], dict[str, float]], job: Job) -> dict[str, Any]:
    """Call ``once`` for warm-up and then timed.

    Args:
      once: does one step, waits for it, and returns the seconds of the phases it can tell apart.

    Returns:
      ``seconds``, one per timed step, and ``phases``, the same for each phase.
    """
    seconds: list[float] = []
    phases: dict[str, list[float]] = {}
    for index in range(job.warmup + job.steps):
        begun = time.perf_counter()
        parts = once()
        if index >= job.warmup:
            seconds.append(time.perf_counter() - begun)
            for name, value in parts.items():
                phases.setdefault(name, []).append(value)
    return {"seconds": seconds, "phases": phases}


def peak_rss_gb() -> float:
    """Largest resident set of this process so far, in 1e9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def serve(run: Callable[[Job], dict[str, Any]]) -> None:
    """The main function of a worker: ``python worker_NAME.py JOB.json RESULT.json``.

    ``run`` returns ``seconds``, ``phases``, ``objective``, ``loss_fixed``, ``peak_rss_gb`` and
    whatever else is worth keeping. What it raises is written as the result, then raised.
    """
    job_file, result_file = sys.argv[1:]
    job = Job(**json.loads(Path(job_file).read_text()))
    try:
        result = run(job)
    except BaseException as error:
        reason = traceback.format_exception_only(error)[-1].strip()
        Path(result_file).write_text(json.dumps({"failed": reason}))
        raise
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    result["versions"] = {name: installed[name] for name in RELEVANT if name in installed}
    Path(result_file).write_text(json.dumps(result))


def machine() -> dict[str, Any]:
    """CPU model, cores that this process may use, memory in GB, system."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
    }


def write_model(folder: str, shape: Shape, seed: int, sharper: float, max_positions: int) -> None:
    """Write a Hugging Face folder of random weights with a tokenizer of one word per id."""
    import jax
    import jax.numpy as jnp
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    cfg = ModelConfig(
        model_type="llama",
        vocab_size=shape.vocab,
        width=shape.width,
        ffn=shape.ffn,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        norm_eps=1e-5,
        rope=Rope(theta=100_000.0),
        tied=True,
        max_positions=max_positions,
    )
    words = {word(i): i for i in range(shape.vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=word(UNKNOWN)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=word(PAD),
        eos_token=word(EOS),
        unk_token=word(UNKNOWN),
    )
    tree = init(specs(cfg), jax.random.key(seed), jnp.float32)
    # With the usual initial values both models would copy the last id, or be uniform, and every
    # direction of KL would be one number. Depth must count, and the teacher be the surer one.
    tree["embed"] = tree["embed"] * sharper
    for name in ("o", "down"):
        tree["layers"][name] = tree["layers"][name] * DEEPER
    hf.save(folder, cfg, tree, tokenizer=fast)


def word(token_id: int) -> str:
    """How the made-up tokenizer spells an id."""
    # Special words are found inside of others, too, so none may begin like them.
    return {PAD: "<pad>", EOS: "<eos>", UNKNOWN: "<unk>"}.get(token_id, f"t{token_id}")


def write_inputs(work: dict[str, Any], folder: Path) -> tuple[str, str, str]:
    """Make both models and the fixed ids; a folder per content, so that a change makes it anew.

    Returns:
      The student's folder, the teacher's, and the file of ids.
    """
    paths = []
    for seed, role in enumerate(("student", "teacher")):
        shape = Shape(**work[role])
        about = json.dumps(
            [work[role], seed, work["max_positions"], SHARPER[role], DEEPER], sort_keys=True
        )
        path = folder / f"{role}-{hashlib.sha256(about.encode()).hexdigest()[:12]}"
        if not path.exists():
            # A process of its own: this one would keep jax's threads and memory while others run.
            child = multiprocessing.get_context("spawn").Process(
                target=write_model,
                args=(str(path), shape, seed, SHARPER[role], work["max_positions"]),
            )
            child.start()
            child.join()
            if child.exitcode:
                raise SystemExit(f"writing {path} failed with status {child.exitcode}; see above")
        paths.append(str(path))
    import numpy as np

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
    folder.mkdir(parents=True, exist_ok=True)
    job_file, result_file, log_file = (folder / f"{library}.{s}" for s in ("job", "json", "log"))
    job_file.write_text(json.dumps(dataclasses.asdict(job)))
    result_file.unlink(missing_ok=True)
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
    }
    command = [python, HERE / f"worker_{library}.py", job_file, result_file]
    with log_file.open("w") as log:
        try:
            status = subprocess.run(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=folder,
                timeout=timeout,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return {"failed": f"took longer than --timeout={timeout:g} s (log: {log_file})"}
    if not result_file.exists():
        return {"failed": f"ended with status {status} and no result (log: {log_file})"}
    result = json.loads(result_file.read_text())
    if "failed" in result:
        result["failed"] += f" (log: {log_file})"
    return result


def summarise(library: str, batch: int, raw: dict[str, Any]) -> dict[str, Any]:
    """A worker's raw result as a row: medians instead of lists; a failed one keeps its reason."""
    row: dict[str, Any] = {"library": library, "batch": batch}
    if "failed" in raw:
        return row | {"failed": raw["failed"]}
    raw = dict(raw)
    seconds, phases = raw.pop("seconds"), raw.pop("phases")
    medians = {f"{name}_seconds": statistics.median(v) for name, v in phases.items()}
    row |= {
        "version": raw["versions"].get(DISTRIBUTIONS[library], "unknown"),
        "seconds_per_step": statistics.median(seconds),
        "rollout_seconds": medians.pop("rollout_seconds", None),
        "spread": spread(seconds),
        "steps": len(seconds),
    }
    return row | medians | raw


def agreement(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Compare each library's loss at the initial weights with ours of the same direction.

    Returns:
      A sentence for each library that gave a loss; one that differs by more than ``TOLERANCE``
      says DIFFERS and repeats the worker's own note on what it computes.
    """
    ours = {row["library"]: row for row in rows}.get("opd_jax", {}).get("losses_fixed", {})
    lines = []
    for row in rows:
        loss, objective = row.get("loss_fixed"), row.get("objective", "")
        if row["library"] == "opd_jax" or loss is None:
            continue
        direction = objective.split()[0]
        expected = ours.get(direction)
        if expected is None:
            lines.append(f"{row['library']}: {objective} loss {loss:.6f}; ours was not measured")
            continue
        gap = abs(loss - expected) / max(abs(expected), 1e-12)
        numbers = f"{objective} loss {loss:.6f}, ours {expected:.6f}, relative gap {gap:.1e}"
        if math.isfinite(gap) and gap <= TOLERANCE:
            lines.append(f"{row['library']}: agrees: {numbers}")
        else:
            note = row.get("note") or "the reason is not known"
            lines.append(f"{row['library']}: DIFFERS: {numbers}: {note}")
    return lines


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as aligned text; ratios are to our row of the same batch."""
    ours = {
        r["batch"]: r["seconds_per_step"]
        for r in rows
        if r["library"] == "opd_jax" and "seconds_per_step" in r
    }
    heads = ("library", "version", "objective", "batch", "s/step", "rollout s", "spread", "peak GB")
    lines: list[tuple[str, ...]] = [(*heads, "time / ours")]
    reasons = []
    for row in rows:
        name, batch = row["library"], str(row["batch"])
        if "failed" in row:
            lines.append((name, "", "", batch, "FAILED", "", "", "", ""))
            reasons.append(f"{name}, batch {batch}: FAILED: {row['failed']}")
            continue
        rollout, base = row["rollout_seconds"], ours.get(row["batch"])
        lines.append(
            (
                name,
                row["version"],
                row["objective"],
                batch,
                f"{row['seconds_per_step']:.3f}",
                "-" if rollout is None else f"{rollout:.3f}",
                f"{row['spread']:.0%}",
                f"{row['peak_rss_gb']:.2f}",
                "-" if base is None else f"{row['seconds_per_step'] / base:.2f}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines
    ]
    return "\n".join(line.rstrip() for line in [*text, *reasons])


def remarks(rows: Sequence[dict[str, Any]], work: dict[str, Any], kind: str) -> list[str]:
    """What the hardware allows: share of GEMM peak (update), weight traffic (rollout).

    Adds the numbers to the rows. Peaks are those that our worker measured in its own process.
    """
    lines = []
    wanted = {"update": "gemm_gflops", "rollout": "memory_gb_s"}.get(kind)
    peaks = [row for row in rows if wanted in row]
    student, teacher = Shape(**work["student"]), Shape(**work["teacher"])
    for row in rows:
        if "failed" in row or not peaks:
            continue
        batch, seconds = row["batch"], row["seconds_per_step"]
        peak = {p["batch"]: p for p in peaks}.get(batch, peaks[0])
        if kind == "update":
            flops = needed_flops(
                student, teacher, batch=batch, prompt=work["prompt"], new=work["new"]
            )
            row["gemm_share"] = flops / seconds / (peak["gemm_gflops"] * 1e9)
            lines.append(
                f"{row['library']}: {flops / 1e9:.0f} GFLOP needed, {flops / seconds / 1e9:.1f} "
                f"GFLOP/s, {row['gemm_share']:.0%} of the GEMM peak {peak['gemm_gflops']:.1f}"
            )
        elif kind == "rollout":
            weights = 4 * (student.body_params + student.head_params)
            if "prefill_seconds" in row:  # which gives the first id, too
                decode, num_ids = seconds - row["prefill_seconds"], max(work["new"] - 1, 1)
            else:
                decode, num_ids = seconds, work["new"]
            row["seconds_per_token"] = decode / num_ids
            row["bound_seconds_per_token"] = weights / (peak["memory_gb_s"] * 1e9)
            lines.append(
                f"{row['library']}, batch {batch}: {row['seconds_per_token'] * 1e3:.1f} ms a token"
                f"{'' if 'prefill_seconds' in row else ' (prefill included)'}; reading "
                f"{weights / 1e9:.2f} GB of weights at {peak['memory_gb_s']:.1f} GB/s takes "
                f"{row['bound_seconds_per_token'] * 1e3:.1f} ms"
            )
    return lines


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
    where = machine()
    print(f"{where['cpu']}, {where['cores']} cores, {where['memory_gb']} GB")
    notes = remarks(rows, work, flags.kind)
    for line in [table(rows), *agreement(rows), *notes]:
        print(line)
    if flags.out:
        result = {"machine": where, "work": work, "results": rows}
        Path(flags.out).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
