"""What the workers of the peer benchmark found, as rows: medians, agreement, a table, bounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from peer_job import DISTRIBUTIONS, Shape
from toolkit import aligned, spread

TOLERANCE = 1e-4  # relative; fp32 forward passes of two libraries differ by about 1e-6


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


def summarise(library: str, batch: int, raw: dict[str, Any]) -> dict[str, Any]:
    """A worker's raw result as a row: medians instead of lists; a failed one keeps its reason."""
    row: dict[str, Any] = {"library": library, "batch": batch}
    if "failed" in raw:
        return row | {"failed": raw["failed"]}
    raw = dict(raw)
    seconds, phases, sampled = raw.pop("seconds"), raw.pop("phases"), raw.pop("sampled", [])
    medians = {f"{name}_seconds": statistics.median(v) for name, v in phases.items()}
    row |= {
        "version": raw["versions"].get(DISTRIBUTIONS[library], "unknown"),
        "seconds_per_step": statistics.median(seconds),
        "rollout_seconds": medians.pop("rollout_seconds", None),
        "spread": spread(seconds),
        "steps": len(seconds),
    }
    if sampled:
        row["sampled_tokens"] = sum(sampled[-1])
        row["tokens_per_s"] = row["sampled_tokens"] / row["seconds_per_step"]
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
    return "\n".join([*aligned(lines), *reasons])


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
