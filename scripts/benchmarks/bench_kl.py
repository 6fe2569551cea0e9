#!/usr/bin/env python3
"""The fused KL of ``opd_jax.kl`` against the dense two-logit loss: memory, time, gradients, sums.

    scripts/bench kl --out=runs/bench/kl.json

Four questions, at Qwen3's vocabulary and the widths of a 4B teacher and a 1.7B student:

1. How much temporary memory do loss and gradient need? From the compiled program, nothing runs. (On
   CPU XLA widens bf16 heads to f32 first, so that the bf16 rows tell little about accelerators.)
2. How long do they take? Medians of calls that alternate.
3. By how much do the gradients differ, relative to the largest entry?
4. What is the mean over 65,536 rows worth with bf16 inputs, against float64 on the same inputs, and
   what would adding up in bf16 give?

``--rows`` sets the rows of 2 and 3: 256 take minutes on two cores, 1,024 four times as long; the
dense loss holds several f32 arrays of rows x 151,936.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import toolkit
from workloads import draw, fused_loss, gradient, shapes

VOCAB, TEACHER_WIDTH, STUDENT_WIDTH = 151_936, 2560, 2048  # Qwen3 4B and 1.7B
MEMORY_ROWS = 4096
SUM_ROWS, SUM_VOCAB, SUM_WIDTH = 65_536, 512, 64


def dense_loss(hs_RD, ws_VD, ht_RE, wt_VE, weight_R):
    """The same from two whole arrays of logits, differentiated by jax."""

    def log_softmax(h, w):
        z_RV = jnp.matmul(h, w.T, preferred_element_type=jnp.float32)
        return jax.nn.log_softmax(z_RV, axis=-1)

    logp_RV = log_softmax(hs_RD, ws_VD)
    logq_RV = jax.lax.stop_gradient(log_softmax(ht_RE, wt_VE))
    return jnp.sum(weight_R * jnp.sum(jnp.exp(logp_RV) * (logp_RV - logq_RV), axis=-1))


LOSSES = {
    "opd_jax": fused_loss,
    "dense": dense_loss,
    "dense_remat": jax.checkpoint(dense_loss),
}

TIMED = ("opd_jax", "dense")


def relative_difference(ours, theirs) -> float:
    """Largest absolute difference over the largest absolute entry of ``theirs``."""
    return float(jnp.max(jnp.abs(ours - theirs)) / jnp.max(jnp.abs(theirs)))


def running_sum(values: Iterable[float], dtype) -> float:
    """Add one value after the other in ``dtype``, rounding each time."""
    total = np.zeros((), dtype)
    for value in np.asarray(values).astype(dtype):
        total = (total + value).astype(dtype)
    return float(total)


def paired_sum(values: Iterable[float], dtype) -> float:
    """Add neighbours, then neighbouring sums, and so on, in ``dtype``, rounding each time."""
    sums = np.asarray(values).astype(dtype)
    while sums.size > 1:
        if sums.size % 2:
            sums = np.append(sums, np.zeros(1, dtype))
        sums = (sums[::2] + sums[1::2]).astype(dtype)
    return float(sums[0])


def exact_kl(hs_RD, ws_VD, ht_RE, wt_VE) -> np.ndarray:
    """Reverse KL of every row in float64, by numpy; nats."""

    def log_softmax(h, w):
        z_RV = np.asarray(h, np.float64) @ np.asarray(w, np.float64).T
        z_RV -= z_RV.max(axis=-1, keepdims=True)
        return z_RV - np.log(np.exp(z_RV).sum(axis=-1, keepdims=True))

    logp_RV, logq_RV = log_softmax(hs_RD, ws_VD), log_softmax(ht_RE, wt_VE)
    return (np.exp(logp_RV) * (logp_RV - logq_RV)).sum(axis=-1)


def measure_memory(rows: int) -> list[dict[str, Any]]:
    """Scratch of every loss, in f32 and bf16."""
    results = []
    for dtype in ("float32", "bfloat16"):
        inputs = shapes(rows, dtype, VOCAB, STUDENT_WIDTH, TEACHER_WIDTH)
        needed = {
            name: toolkit.temporary_bytes(gradient(loss), inputs) for name, loss in LOSSES.items()
        }
        for name, size in needed.items():
            ratio = needed["opd_jax"] / size
            print(
                f"memory  {dtype:8}  {rows} rows  {name:12} {size / 2**30:7.3f} GiB"
                f"  opd_jax / this: {ratio:.4f}",
                flush=True,
            )
            results.append(
                {
                    "measure": "memory",
                    "loss": name,
                    "dtype": dtype,
                    "rows": rows,
                    "temporary_bytes": size,
                    "opd_jax_over_this": ratio,
                }
            )
    return results


def measure_time(rows: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds of ours and the dense loss in f32, and how far their gradients lie apart."""
    inputs = draw(shapes(rows, jnp.float32, VOCAB, STUDENT_WIDTH, TEACHER_WIDTH))
    compiled = {name: gradient(loss) for name, loss in LOSSES.items() if name in TIMED}
    (loss, ours), (dense, theirs) = compiled["opd_jax"](*inputs), compiled["dense"](*inputs)
    gaps = {
        "states": relative_difference(ours[0], theirs[0]),
        "head": relative_difference(ours[1], theirs[1]),
        "loss": relative_difference(loss, dense),
    }
    del ours, theirs  # as large as the head; the timed calls need the room
    print(f"agreement  {rows} rows  float32  " + "  ".join(f"{k} {v:.1e}" for k, v in gaps.items()))
    calls = {name: lambda call=call: call(*inputs) for name, call in compiled.items()}
    results: list[dict[str, Any]] = [{"measure": "agreement", "rows": rows, **gaps}]
    for name, times in toolkit.interleaved(calls, repeats, is_warm=True).items():
        print(
            f"time  {rows} rows  {name:12} {times['seconds']:7.2f} s  spread {times['spread']:.0%}",
            flush=True,
        )
        results.append({"measure": "time", "loss": name, "rows": rows, **times})
    return results


def measure_sums(rows: int = SUM_ROWS) -> dict[str, Any]:
    """Mean KL of bf16 inputs: float64, ours (summed in f32), and summed in bf16."""
    inputs = draw(shapes(rows, jnp.bfloat16, SUM_VOCAB, SUM_WIDTH, SUM_WIDTH))
    ones_R = jnp.ones((rows,), jnp.float32)
    exact_R = exact_kl(*inputs[:4])
    exact = float(exact_R.mean())
    sums = {
        "opd_jax": float(jax.jit(fused_loss)(*inputs[:4], ones_R)),
        "bfloat16_one_by_one": running_sum(exact_R, jnp.bfloat16),
        "bfloat16_in_pairs": paired_sum(exact_R, jnp.bfloat16),
    }
    result: dict[str, Any] = {"measure": "sums", "rows": rows, "float64": exact}
    for name, total in sums.items():
        mean = total / rows
        result |= {name: mean, f"{name}_error": abs(mean - exact) / exact}
        print(
            f"sums  {rows} rows of bf16  float64 {exact:.7f}  {name} {mean:.7f}"
            f"  off by {result[f'{name}_error']:.1e}"
        )
    return result


def main(argv: list[str] | None = None) -> int:
    """Run all four and print them."""
    parser = toolkit.arguments(__doc__)
    parser.add_argument("--rows", type=toolkit.whole, default=256, help="rows timed (default 256)")
    args = parser.parse_args(argv)
    results = [measure_sums(), *measure_memory(MEMORY_ROWS)]
    results += measure_time(args.rows, args.repeats)
    work = (
        f"reverse KL and its gradient: vocabulary {VOCAB}, teacher {TEACHER_WIDTH}, student "
        f"{STUDENT_WIDTH} wide; memory of {MEMORY_ROWS} rows, time of {args.rows}, sums of "
        f"{SUM_ROWS} (vocabulary {SUM_VOCAB}, width {SUM_WIDTH})"
    )
    toolkit.write(args.out, toolkit.machine_and_device(), work, results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
