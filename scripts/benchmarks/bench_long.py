#!/usr/bin/env python3
r"""How speed and memory of a step go with the length of the answers.

    scripts/bench long --out=runs/bench/long.json [--lengths=256,512,1024,2048,4096] [--rows=2]

Each length is a process of its own, so that its peak of memory is its own: sampling, the teacher's
pass and the update, each answer as long as it may be. Fits seconds = a n^k and, above what the
models take, GB = b n^m, by least squares of logarithms. Sampling and attention make k more than 1;
what does not grow, such as the optimizer's, less.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import toolkit
import workloads

from opd_jax import steps
from opd_jax.objective import ObjectiveConfig
from opd_jax.pytrees import Prompt
from opd_jax.rollout import decode
from opd_jax.rollout.sampling import Sampler

HERE = Path(__file__).resolve().parent
PROMPT = 64


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The steps of one length, in a process of its own."""
    vocab = job["vocab"]
    model = workloads.llama(vocab, job["width"], job["layers"])
    model = dataclasses.replace(model, max_positions=PROMPT + job["length"])
    cfg = ObjectiveConfig(model, model, microbatches=job["microbatches"])
    run = workloads.Training(cfg)
    ids = np.random.default_rng(0).integers(3, vocab, (job["rows"], PROMPT))
    prompt = Prompt(jnp.asarray(ids, jnp.int32), jnp.zeros(job["rows"], jnp.int32))
    sampler = Sampler(vocab_size=vocab, pad_id=0)  # nothing stops an answer
    jax.block_until_ready((run.state, run.teacher))
    models_gb = toolkit.peak_rss_gb()
    keys = iter(jax.random.split(jax.random.key(3), 1 + job["steps"]))

    def once() -> dict[str, float]:
        phases = workloads.Phases()
        asked = (run.state.params, prompt, next(keys))
        answers = phases.done(
            decode.sample(*asked, cfg=model, sampler=sampler, max_new=job["length"])
        )
        states_BTE = phases.done(steps.teacher_states(run.teacher, answers, cfg=cfg))
        given = (run.state, run.teacher, answers)
        run.state, _ = phases.done(
            steps.distill_step(*given, cfg=cfg, tx=run.tx, states_BTE=states_BTE)
        )
        return phases.seconds("rollout", "teacher", "update")

    found = toolkit.measure(once, warmup=1, steps=job["steps"])
    return found | {"models_gb": models_gb, "peak_rss_gb": toolkit.peak_rss_gb()}


def row(raw: dict[str, Any], length: int, rows: int) -> dict[str, Any]:
    """Medians of what a process found."""
    if "failed" in raw:
        return {"length": length, "failed": raw["failed"]}
    seconds = statistics.median(raw["seconds"])
    return {
        "length": length,
        "seconds_per_step": seconds,
        "spread": toolkit.spread(raw["seconds"]),
        "tokens_per_s": rows * length / seconds,
        **{f"{name}_seconds": statistics.median(x) for name, x in raw["phases"].items()},
        "peak_rss_gb": raw["peak_rss_gb"],
        "models_gb": raw["models_gb"],
    }


def main(argv: list[str] | None = None) -> int:
    """Measure every length, print a line of each and the fits."""
    parser = toolkit.arguments(__doc__)
    parser.add_argument("--lengths", default="256,512,1024,2048,4096", help="ids of an answer")
    parser.add_argument("--rows", type=toolkit.whole, default=2)
    parser.add_argument("--layers", type=toolkit.whole, default=2, help="of both models")
    parser.add_argument("--width", type=toolkit.whole, default=128, help="of both; 64 to a head")
    parser.add_argument("--vocab", type=toolkit.whole, default=4096)
    parser.add_argument("--microbatches", type=toolkit.whole, default=1)
    parser.add_argument("--folder", type=Path, default=HERE.parent.parent / ".bench" / "work")
    args = parser.parse_args(argv)
    try:
        lengths = sorted({toolkit.whole(text) for text in args.lengths.split(",")})
    except Exception as error:
        parser.error(f"{error}; change --lengths")
    if len(lengths) < 2:
        parser.error(f"lengths {lengths}: expected two or more to fit; change --lengths")
    same = {k: getattr(args, k) for k in ("rows", "layers", "width", "vocab", "microbatches")}
    results = []
    for length in lengths:
        job = same | {"length": length, "steps": args.repeats}
        raw = toolkit.run_child(
            Path(sys.executable), Path(__file__).resolve(), job,
            folder=args.folder.resolve(), name=f"long-{length}", environment={},
        )  # fmt: skip
        results.append(found := row(raw, length, args.rows))
        if "failed" in found:
            print(f"{length:6}  FAILED: {found['failed']}", flush=True)
            continue
        print(
            f"{length:6} ids  {found['seconds_per_step']:8.3f} s/step (rollout "
            f"{found['rollout_seconds']:.3f}, teacher {found['teacher_seconds']:.3f}, update "
            f"{found['update_seconds']:.3f})  {found['tokens_per_s']:8.1f} tokens/s  "
            f"peak {found['peak_rss_gb']:.2f} GB  spread {found['spread']:.0%}",
            flush=True,
        )
    good = [found for found in results if "failed" not in found]
    fits = {}
    if len(good) >= 2:
        sizes = [found["length"] for found in good]
        names = [name for name in good[0] if name.endswith("seconds") or name == "seconds_per_step"]
        for name in names:
            fits[name] = workloads.fit(sizes, [found[name] for found in good])
        above = [found["peak_rss_gb"] - found["models_gb"] for found in good]
        if min(above) > 0:  # else too little to see
            fits["gb_above_models"] = workloads.fit(sizes, above)
        for name, (exponent, r_squared) in fits.items():
            print(f"{name:18} exponent {exponent:.2f}  R^2 {r_squared:.4f}")
    work = same | {"prompt": PROMPT, "exponents": fits}
    toolkit.write(args.out, toolkit.machine_and_device(), work, results)
    return 0 if len(good) == len(results) else 1


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].endswith(".job"):
        toolkit.serve(run)
    else:
        raise SystemExit(main())
