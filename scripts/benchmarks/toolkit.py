"""What every benchmark needs: time, memory, result files, child processes, printing.

Nothing here knows what is measured. Only the standard library is imported at the top, and this
package nowhere: the workers of other libraries import this module in environments of their own,
some without jax.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# ---------------------------------------------------------------------------------------- time


def spread(seconds: Sequence[float]) -> float:
    """(largest - smallest) / median."""
    return (max(seconds) - min(seconds)) / statistics.median(seconds)


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median of the times, and their range over the median."""
    return {"seconds": statistics.median(seconds), "spread": spread(seconds)}


def measure(once: Callable[[], dict[str, float]], *, warmup: int, steps: int) -> dict[str, Any]:
    """Call ``once`` for warm-up and then timed.

    Args:
      once: does one step, waits for it, and returns the seconds of the phases it can tell apart.
      warmup, steps: calls that are not timed, and that are.

    Returns:
      ``seconds``, one per timed step, and ``phases``, the same for each phase.
    """
    seconds: list[float] = []
    phases: dict[str, list[float]] = {}
    for index in range(warmup + steps):
        begun = time.perf_counter()
        parts = once()
        if index >= warmup:
            seconds.append(time.perf_counter() - begun)
            for name, value in parts.items():
                phases.setdefault(name, []).append(value)
    return {"seconds": seconds, "phases": phases}


def interleaved(
    calls: Mapping[str, Callable[[], Any]], repeats: int, *, is_warm: bool = False
) -> dict[str, dict[str, float]]:
    """Time calls of jax in turns (A, B, A, B, ...), after one untimed call each that compiles.

    Turns, so that a disturbance of the machine falls on all of them alike. ``is_warm``: they have
    been called before.

    Returns:
      Per call ``seconds``, the median, and ``spread``, slowest less fastest over the median.
    """
    import jax

    if not is_warm:
        for call in calls.values():
            jax.block_until_ready(call())
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            taken[name].append(time.perf_counter() - start)
    return {name: summary(seconds) for name, seconds in taken.items()}


def best_seconds(call: Callable[..., Any], *arguments, repeats: int = 7) -> float:
    """Fastest of several calls of jax, compiled before."""
    import jax

    jax.block_until_ready(call(*arguments))
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


# -------------------------------------------------------------------------------------- memory


def peak_rss_gb() -> float:
    """Largest resident set of this process so far, in 1e9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def temporary_bytes(jitted, inputs: Sequence[Any]) -> int:
    """Bytes of scratch that a jitted function needs beside its inputs and outputs; nothing runs.

    On CPU, XLA hands fused multiplications to a library that allocates whole results for itself,
    where the compiler's own account does not see them; for the account these fusions are switched
    off, and only there.
    """
    import jax

    is_cpu = jax.default_backend() == "cpu"
    options = {"xla_cpu_experimental_ynn_fusion_type": ""} if is_cpu else None
    compiled = jitted.lower(*inputs).compile(compiler_options=options)
    return compiled.memory_analysis().temp_size_in_bytes


# -------------------------------------------------------------------- command line, result files


def whole(text: str) -> int:
    """Read a command-line number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected a whole number of at least 1; give one, such as 256"
        )
    return int(text)


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark of this library takes: ``--out`` and ``--repeats``."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--repeats", type=whole, default=5, help="timed calls of each (default 5)")
    return parser


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


def machine_and_device() -> dict[str, Any]:
    """:func:`machine`, with the kind of jax's first device and jax's version."""
    import jax

    return machine() | {"device": jax.devices()[0].device_kind, "jax": jax.__version__}


def write(path: Path | None, where: dict[str, Any], work: Any, results: list[Any]) -> None:
    """Write ``{"machine", "work", "results"}`` as JSON where a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"machine": where, "work": work, "results": results}
        path.write_text(json.dumps(record, indent=2) + "\n")


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equally many cells as lines of text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines)
    return [line.rstrip() for line in text]


# ------------------------------------------------------------------------------ child processes


def run_child(
    python: Path,
    script: Path,
    job: dict[str, Any],
    *,
    folder: Path,
    name: str,
    environment: dict[str, str],
    timeout: float | None = None,
) -> dict[str, Any]:
    """Run ``python script JOB.json RESULT.json`` in ``folder``; the script calls :func:`serve`.

    Args:
      name: of the job, the result and the log, as files of ``folder``.
      environment: variables to set beside those of this process.
      timeout: seconds after which the child is killed; None: never.

    Returns:
      What the child found; of one that failed, ended without a result or took too long
      ``{"failed": why}``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job_file, result_file, log_file = (folder / f"{name}.{s}" for s in ("job", "json", "log"))
    job_file.write_text(json.dumps(job))
    result_file.unlink(missing_ok=True)
    with log_file.open("w") as log:
        try:
            status = subprocess.run(
                [python, script, job_file, result_file],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
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


def serve(run: Callable[[dict[str, Any]], dict[str, Any]], packages: Sequence[str] = ()) -> None:
    """The main function of a child: ``python SCRIPT JOB.json RESULT.json``.

    What ``run`` returns becomes the result, with the ``versions`` of those of ``packages`` that are
    installed. What it raises is written as the result, then raised.
    """
    job_file, result_file = sys.argv[1:]
    try:
        result = run(json.loads(Path(job_file).read_text()))
    except BaseException as error:
        reason = traceback.format_exception_only(error)[-1].strip()
        Path(result_file).write_text(json.dumps({"failed": reason}))
        raise
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    result["versions"] = {name: installed[name] for name in packages if name in installed}
    Path(result_file).write_text(json.dumps(result))
