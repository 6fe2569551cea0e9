#!/usr/bin/env python3
r"""Answers of unequal length: the teacher's pass and the update, rows padded and rows packed.

    scripts/bench unequal --out=runs/bench/unequal.json [--rows=32] [--layers=4] [--width=256]

Prompts of 16 to 128 ids, log-normal answers of at most 512, drawn by step from one seed, so that
every layout computes the same steps from the same weights. Both are timed in turns, step by step,
each as ``opd-jax train`` would run it: rows cropped to the longest answer's width of the ladder,
and packed on the host where they are. The first step of each shape compiles and is not counted.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import toolkit

from opd_jax import objective, optim, steps
from opd_jax.data import packing, widths
from opd_jax.models import params, transformer
from opd_jax.models.transformer import ModelConfig
from opd_jax.objective import ObjectiveConfig
from opd_jax.pytrees import Rollout

LONGEST_PROMPT, LONGEST_ANSWER, MEDIAN, SIGMA = 128, 512, 120, 0.7
LAYOUTS = ("padded", "packed")


def draw(step: int, rows: int, vocab_size: int) -> Rollout:
    """The batch of a step: the same whatever is measured."""
    rng = np.random.default_rng((17, step))
    prompts = rng.integers(16, LONGEST_PROMPT + 1, rows)
    answers = np.clip(rng.lognormal(np.log(MEDIAN), SIGMA, rows), 1, LONGEST_ANSWER).astype(int)
    wide = widths.bucket(int(prompts.max()), (64, 96, LONGEST_PROMPT))
    columns = wide + widths.bucket(int(answers.max()), widths.ladder(LONGEST_ANSWER))
    place = np.arange(columns)
    mask = (place >= wide) & (place < wide + answers[:, None])
    ids = rng.integers(3, vocab_size, (rows, columns))
    return Rollout(
        ids_BT=jnp.asarray(ids, jnp.int32),
        start_B=jnp.asarray(wide - prompts, jnp.int32),
        mask_BT=jnp.asarray(mask),
        logp_BT=jnp.zeros(ids.shape, jnp.float32),
        truncated_B=jnp.asarray(answers == LONGEST_ANSWER),
        policy_step=jnp.zeros((), jnp.int32),
    )


class Layout:
    """A run of its own in one layout."""

    def __init__(self, name: str, cfg: ObjectiveConfig):
        assert cfg.teacher is not None
        self.name, self.cfg, self.tx = name, cfg, optim.make(optim.OptimSpec())
        student = params.init(transformer.specs(cfg.student), jax.random.key(0))
        self.teacher = params.init(transformer.specs(cfg.teacher), jax.random.key(1))
        self.state = steps.init(student, jax.random.key(2), cfg=cfg, tx=self.tx)
        self.ends = jax.jit(objective.ends)

    def step(self, batch: Rollout) -> tuple[dict[str, float], tuple[int, ...]]:
        """One step; what it measured, and the shape that it was compiled for."""
        layout = None
        if self.name == "packed":
            layout = packing.plan(
                np.asarray(batch.start_B),
                np.asarray(self.ends(batch)),
                columns=batch.ids_BT.shape[1],
                pieces=self.cfg.microbatches,
            )
        states_BTE = steps.teacher_states(self.teacher, batch, cfg=self.cfg, packing=layout)
        self.state, metrics = steps.distill_step(
            self.state, self.teacher, batch, cfg=self.cfg, tx=self.tx, states_BTE=states_BTE,
            packing=layout,
        )  # fmt: skip
        found = {name: metrics[name].value() for name in ("loss", "grad_norm", "padding_share")}
        shape = batch.ids_BT.shape if layout is None else layout.source_RPL.shape
        return found, (batch.ids_BT.shape[1], *shape)


def measure(cfg: ObjectiveConfig, rows: int, num_steps: int) -> list[dict[str, Any]]:
    """Steps of all layouts in turns; a row for each layout."""
    runs = [Layout(name, cfg) for name in LAYOUTS]
    taken: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in LAYOUTS}
    seen: dict[str, set] = {name: set() for name in LAYOUTS}
    for step in range(num_steps):
        batch = draw(step, rows, cfg.student.vocab_size)
        for run in runs:
            begun = time.perf_counter()
            found, shape = run.step(batch)
            seconds = time.perf_counter() - begun
            measured[run.name].append(found)
            if shape in seen[run.name]:
                taken[run.name].append(seconds)
            seen[run.name].add(shape)
    results = []
    for name in LAYOUTS:
        losses = [found["loss"] for found in measured[name]]
        results.append(
            {
                "library": "opd_jax",
                "layout": name,
                "seconds_per_step": statistics.median(taken[name]) if taken[name] else None,
                "spread": toolkit.spread(taken[name]) if taken[name] else None,
                "steps": len(taken[name]),
                "programs": len(seen[name]),
                "padding_share": statistics.fmean(f["padding_share"] for f in measured[name]),
                "losses": losses,
            }
        )
    return results


def main(argv: list[str] | None = None) -> int:
    """Measure, and print a line of each layout."""
    parser = toolkit.arguments(__doc__)
    parser.add_argument("--rows", type=toolkit.whole, default=32, help="of a step (default 32)")
    parser.add_argument("--layers", type=toolkit.whole, default=4, help="of both models")
    parser.add_argument("--width", type=toolkit.whole, default=256, help="of both; 64 to a head")
    parser.add_argument("--vocab", type=toolkit.whole, default=4096)
    parser.add_argument("--microbatches", type=toolkit.whole, default=1)
    parser.add_argument("--steps", type=toolkit.whole, default=16, help="of each layout")
    args = parser.parse_args(argv)
    heads = max(args.width // 64, 1)
    model = ModelConfig(
        "llama", args.vocab, args.width, 3 * args.width, args.layers, heads, heads, 64, tied=True
    )
    cfg = ObjectiveConfig(model, model, microbatches=args.microbatches)
    results = measure(cfg, args.rows, args.steps)
    padded, packed = results
    gap = max(abs(a - b) / abs(a) for a, b in zip(padded["losses"], packed["losses"], strict=True))
    for row in results:
        seconds = row["seconds_per_step"]
        print(
            f"{row['layout']:8} {'-' if seconds is None else format(seconds, '.3f')} s/step  "
            f"{row['steps']} timed, {row['programs']} compiled  "
            f"padding {row['padding_share']:.1%}"
        )
    if padded["seconds_per_step"] and packed["seconds_per_step"]:
        ratio = padded["seconds_per_step"] / packed["seconds_per_step"]
        print(f"padded / packed: {ratio:.2f}; largest relative gap of a loss: {gap:.1e}")
    work = (
        f"teacher pass and update, {args.rows} rows, prompts of 16 to {LONGEST_PROMPT}, log-normal "
        f"answers (median {MEDIAN}, sigma {SIGMA}) of at most {LONGEST_ANSWER}; both models "
        f"{args.layers} layers, {args.width} wide, vocabulary {args.vocab}, {args.microbatches} "
        "micro-batches"
    )
    toolkit.write(args.out, toolkit.machine_and_device(), work, results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
