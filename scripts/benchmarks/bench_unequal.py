#!/usr/bin/env python3
r"""Answers of unequal length: sampled in step and in slots, trained on padded and packed.

    scripts/bench unequal --out=runs/bench/unequal.json [--rows=32] [--layers=4] [--width=256]

Prompts of 16 to 128 ids, log-normal answers of at most 512, drawn by step from one seed, so that
every layout computes the same steps from the same weights. Both are timed in turns, step by step,
each as ``opd-jax train`` would run it: rows cropped to the longest answer's width of the ladder,
and packed on the host where they are. The first step of each shape compiles and is not counted.

Sampling has lengths of its own, geometric ones with the mean of those answers and the same limit:
so many of the ids stop an answer of a random model. All ways of sampling draw the same ids.
"""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import lengths
import numpy as np
import toolkit
import workloads
from lengths import LONGEST_ANSWER, LONGEST_PROMPT, MEDIAN, SIGMA

from opd_jax import objective, steps
from opd_jax.data import packing, widths
from opd_jax.models import params, transformer
from opd_jax.models.transformer import ModelConfig
from opd_jax.objective import ObjectiveConfig
from opd_jax.pytrees import Prompt, Rollout
from opd_jax.rollout import decode
from opd_jax.rollout.sampling import Sampler

LAYOUTS = ("padded", "packed")


def draw(step: int, rows: int, vocab_size: int) -> Rollout:
    """The batch of a step: the same whatever is measured."""
    rng = np.random.default_rng((17, step))
    prompts, answers = lengths.draw(rng, rows)
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


class Layout(workloads.Training):
    """A run of its own in one layout."""

    def __init__(self, name: str, cfg: ObjectiveConfig):
        super().__init__(cfg)
        self.name, self.ends = name, jax.jit(objective.ends)

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


def rollouts(
    cfg: ModelConfig, rows: int, slots: int, segments: int, repeats: int
) -> list[dict[str, Any]]:
    """Sampling of the same ids in several ways, in turns; a row for each."""
    mean = MEDIAN * float(np.exp(SIGMA**2 / 2))
    num_stops = max(round(cfg.vocab_size / mean), 1)
    sampler = Sampler(vocab_size=cfg.vocab_size, stop_ids=tuple(range(3, 3 + num_stops)), pad_id=0)
    params_ = params.init(transformer.specs(cfg), jax.random.key(0))
    rng = np.random.default_rng(5)
    ids = jnp.asarray(rng.integers(3, cfg.vocab_size, (rows, LONGEST_PROMPT)), jnp.int32)
    start = jnp.asarray(LONGEST_PROMPT - rng.integers(16, LONGEST_PROMPT + 1, rows), jnp.int32)

    def sampled(**way):
        return decode.sample(
            params_, Prompt(ids, start), jax.random.key(1), cfg=cfg, sampler=sampler,
            max_new=LONGEST_ANSWER, **way,
        )  # fmt: skip

    ways = {"in step": {}, f"{slots} slots": {"slots": slots}}
    ways[f"in step, {segments} segments"] = {"segments": segments}
    calls = {name: functools.partial(sampled, **way) for name, way in ways.items()}
    answers = {name: np.asarray(call().mask_BT).sum(axis=1) for name, call in calls.items()}
    first, *others = answers.values()
    assert all(np.array_equal(first, other) for other in others)
    taken = toolkit.interleaved(calls, repeats, is_warm=True)
    return [
        {
            "library": "opd_jax",
            "sampling": name,
            "seconds_per_step": found["seconds"],
            "spread": found["spread"],
            "mean_length": float(first.mean()),
            "longest": int(first.max()),
        }
        for name, found in taken.items()
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure, and print a line of each layout and way of sampling."""
    parser = toolkit.arguments(__doc__)
    parser.add_argument("--rows", type=toolkit.whole, default=32, help="of a step (default 32)")
    parser.add_argument("--layers", type=toolkit.whole, default=4, help="of both models")
    parser.add_argument("--width", type=toolkit.whole, default=256, help="of both; 64 to a head")
    parser.add_argument("--vocab", type=toolkit.whole, default=4096)
    parser.add_argument("--microbatches", type=toolkit.whole, default=1)
    parser.add_argument("--steps", type=toolkit.whole, default=16, help="of each layout")
    parser.add_argument("--slots", type=toolkit.whole, help="rows decoded at a time (rows / 4)")
    parser.add_argument("--segments", type=toolkit.whole, default=4, help="of a cache that grows")
    args = parser.parse_args(argv)
    model = workloads.llama(args.vocab, args.width, args.layers)
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
    slots = args.slots or max(args.rows // 4, 1)
    sampled = rollouts(model, args.rows, slots, args.segments, args.repeats)
    for row in sampled:
        print(
            f"{row['sampling']:20} {row['seconds_per_step']:.3f} s to sample "
            f"{row['mean_length']:.0f} ids a row, at most {row['longest']}; "
            f"in step / this: {sampled[0]['seconds_per_step'] / row['seconds_per_step']:.2f}"
        )
    results += sampled
    work = (
        f"sampling; teacher pass and update; {args.rows} rows, prompts of 16 to {LONGEST_PROMPT}, "
        f"answers log-normal (median {MEDIAN}, sigma {SIGMA}) where they are given, geometric "
        f"where they are sampled, of at most {LONGEST_ANSWER}; both models "
        f"{args.layers} layers, {args.width} wide, vocabulary {args.vocab}, {args.microbatches} "
        "micro-batches"
    )
    toolkit.write(args.out, toolkit.machine_and_device(), work, results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
