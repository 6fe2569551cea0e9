#!/usr/bin/env python3
r"""How time grows: the KL with rows and vocabulary, the training step with batch and length.

    scripts/bench scaling --out=runs/bench/scaling.json

Fits seconds = a n^k by least squares of logarithms and prints k with R^2. Rows, vocabulary and
batch should be near 1 (work that must be done once for each), below it where a cost that does not
grow, such as the optimizer's, still counts; length lies between 1 and 2, the more attention the
higher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import toolkit
from workloads import Step, draw, fit, fused_loss, gradient, half_frozen, shapes

from opd_jax.models.transformer import ModelConfig
from opd_jax.objective import ObjectiveConfig

KL_WIDTH = 256
ROWS, AT_VOCAB = (256, 512, 1024, 2048), 16_384
VOCABS, AT_ROWS = (8192, 16_384, 32_768, 65_536), 512
MODEL = ModelConfig("llama", 4096, 256, 768, 4, 4, 2, 64, tied=True)
BATCHES, AT_LENGTH = (4, 8, 16, 32), 64
LENGTHS, AT_BATCH = (64, 128, 256, 512), 4


def kl_call(rows: int, vocab: int) -> Callable[[], Any]:
    """Value and gradient of the KL on random inputs."""
    inputs = draw(shapes(rows, jnp.float32, vocab, KL_WIDTH, KL_WIDTH))
    call = gradient(fused_loss)
    return lambda: call(*inputs)


def step_call(batch: int, length: int) -> Callable[[], Any]:
    """A training step, nothing gated."""
    rollout = half_frozen(np.random.default_rng(0), batch, length, MODEL.vocab_size)
    return Step(ObjectiveConfig(MODEL, MODEL), rollout)


def measure(name: str, calls: dict[int, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """Time the calls by size, in turns, and print them with their fit."""
    times = toolkit.interleaved({str(size): call for size, call in calls.items()}, repeats)
    sizes = list(calls)
    seconds = [times[str(size)]["seconds"] for size in sizes]
    exponent, r_squared = fit(sizes, seconds)
    for size in sizes:
        at = times[str(size)]
        print(
            f"{name:22} {size:8}  {at['seconds']:8.3f} s  spread {at['spread']:4.0%}"
            f"  {1e6 * at['seconds'] / size:10.1f} us each"
        )
    print(f"{name:22} exponent {exponent:.2f}  R^2 {r_squared:.4f}\n", flush=True)
    return {"measure": name, "exponent": exponent, "r_squared": r_squared, "times": times}


def main(argv: list[str] | None = None) -> int:
    """Measure all four and print a table of each."""
    args = toolkit.arguments(__doc__).parse_args(argv)
    series = {
        "kl by rows": {n: kl_call(n, AT_VOCAB) for n in ROWS},
        "kl by vocabulary": {n: kl_call(AT_ROWS, n) for n in VOCABS},
        "step by batch": {n: step_call(n, AT_LENGTH) for n in BATCHES},
        "step by length": {n: step_call(AT_BATCH, n) for n in LENGTHS},
    }
    results = [measure(name, calls, args.repeats) for name, calls in series.items()]
    work = (
        f"KL and gradient, {KL_WIDTH} wide, at vocabulary {AT_VOCAB} or {AT_ROWS} rows; training "
        f"step of {MODEL.num_layers} layers, {MODEL.width} wide, vocabulary {MODEL.vocab_size}, "
        f"rows of {AT_LENGTH} tokens or batches of {AT_BATCH}"
    )
    toolkit.write(args.out, toolkit.machine_and_device(), work, results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
