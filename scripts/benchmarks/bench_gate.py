#!/usr/bin/env python3
r"""What skipping gated positions saves: half of the positions frozen, against none.

    scripts/bench gate --out=runs/bench/gate.json

1. The stage that skips: heads, KL and their gradient, at weight 0 for every other row.
2. The whole training step (student, teacher, optimizer), at three depths of the body. Only the
   heads are skipped, so with f their share of the step's FLOPs the gain cannot pass 1 / (1 - f/2).
   A step also measures ``rock.probe`` of the frozen positions, by default a tenth; the second
   prediction counts those: 1 / (1 - f (1 - kept)).

Every position is scored here. A prompt lowers f: it passes through the body, never the heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import toolkit
from workloads import FROZEN, Step, draw, fused_loss, gradient, half_frozen, shapes

from opd_jax.kl import KLSpec
from opd_jax.models import params, transformer
from opd_jax.models.transformer import ModelConfig
from opd_jax.objective import ObjectiveConfig
from opd_jax.rock import RockConfig

# Vocabulary, width and rows: the head of SmolLM2-135M, and that of Qwen2.5-0.5B.
HEADS = ((49_152, 576, 1024), (151_936, 896, 512))
# SmolLM2-135M, whose 30 layers are cut to each of these.
LAYERS = (2, 8, 15)
BODY = ModelConfig("llama", 49_152, 576, 1536, 30, 9, 3, 64, tied=True)
# Rows per chunk in the step: a whole number of chunks runs, and with large ones the last, mostly
# empty one would hide what 512 positions save.
STEP_CHUNK = 64


def body_flops(cfg: ModelConfig, length: int) -> int:
    """FLOPs per token of a forward pass through the layers, at rows of ``length`` tokens.

    Two per weight, and two products with all positions of the row per attention head.
    """
    weights = 2 * params.count(transformer.specs(cfg)["layers"])
    return weights + cfg.num_layers * 4 * length * cfg.num_heads * cfg.head_dim


def head_share(student: ModelConfig, teacher: ModelConfig, length: int) -> float:
    """Share of a step's FLOPs in the vocabulary: f.

    The student's head is multiplied three times (logits, gradient to states, gradient to head), the
    teacher's once; the student's body counts three forward passes, the teacher's one.
    """
    heads = 2 * student.vocab_size * (3 * student.width + teacher.width)
    body = 3 * body_flops(student, length) + body_flops(teacher, length)
    return heads / (heads + body)


def predicted_gain(share: float, kept: float) -> float:
    """Ungated over gated time where ``kept`` of the positions still pay for their ``share``."""
    return 1.0 / (1.0 - share * (1.0 - kept))


def head_stage(vocab: int, width: int, rows: int) -> dict[str, Callable[[], Any]]:
    """The KL with its gradient, every position weighted, and every other one frozen."""
    *inputs, weight_R = draw(shapes(rows, jnp.float32, vocab, width, width))
    compiled = gradient(fused_loss)
    gated_R = weight_R * (jnp.arange(rows) % 2)
    return {
        "ungated": lambda: compiled(*inputs, weight_R),
        "gated": lambda: compiled(*inputs, gated_R),
    }


def measure_head(vocab: int, width: int, rows: int, repeats: int) -> dict[str, Any]:
    """Gain of the stage that skips."""
    times = toolkit.interleaved(head_stage(vocab, width, rows), repeats)
    gain = times["ungated"]["seconds"] / times["gated"]["seconds"]
    print(
        f"head + KL  V {vocab}  D {width}  {rows} rows  ungated {times['ungated']['seconds']:.3f} s"
        f" (spread {times['ungated']['spread']:.0%})  gated {times['gated']['seconds']:.3f} s"
        f" (spread {times['gated']['spread']:.0%})  gain {gain:.2f}",
        flush=True,
    )
    return {
        "measure": "head",
        "vocabulary": vocab,
        "width": width,
        "rows": rows,
        "gain": gain,
        **times,
    }


def measure_step(layers: int, batch: int, length: int, repeats: int) -> dict[str, Any]:
    """Gain of the whole step beside what its FLOPs predict."""
    student = dataclasses.replace(BODY, num_layers=layers)
    rollout = half_frozen(np.random.default_rng(0), batch, length, student.vocab_size)
    plain = ObjectiveConfig(student, student, KLSpec(chunk=STEP_CHUNK))
    gate = RockConfig("static", ids=FROZEN)
    calls = {
        "ungated": Step(plain, rollout),
        "gated": Step(dataclasses.replace(plain, rock=gate), rollout),
    }
    kept = calls["gated"]()[1]["projected_share"].value()
    times = toolkit.interleaved({**calls}, repeats)
    share = head_share(student, student, length)
    result = {
        "measure": "step",
        "layers": layers,
        "tokens": batch * length,
        "chunk": STEP_CHUNK,
        "probe": gate.probe,
        "head_share": share,
        "kept": kept,
        "gain": times["ungated"]["seconds"] / times["gated"]["seconds"],
        "predicted_without_probe": predicted_gain(share, 0.5),
        "predicted": predicted_gain(share, kept),
        **times,
    }
    print(
        f"step  {layers:2} layers  {batch * length} tokens"
        f"  ungated {times['ungated']['seconds']:.3f} s (spread {times['ungated']['spread']:.0%})"
        f"  gated {times['gated']['seconds']:.3f} s (spread {times['gated']['spread']:.0%})"
        f"  gain {result['gain']:.2f}  f {share:.2f}"
        f"  1/(1-f/2) {result['predicted_without_probe']:.2f}"
        f"  with probe (kept {kept:.1%}) {result['predicted']:.2f}",
        flush=True,
    )
    return result


def main(argv: list[str] | None = None) -> int:
    """Measure stage and step and print them."""
    parser = toolkit.arguments(__doc__)
    parser.add_argument("--batch", type=toolkit.whole, default=4, help="rows of a step (default 4)")
    parser.add_argument(
        "--length", type=toolkit.whole, default=128, help="tokens of a row (default 128)"
    )
    args = parser.parse_args(argv)
    results = [measure_head(*head, args.repeats) for head in HEADS]
    results += [measure_step(n, args.batch, args.length, args.repeats) for n in LAYERS]
    work = (
        "half of the positions frozen (weight 0) against none: head and KL alone, and whole steps "
        f"of SmolLM2-135M cut to {LAYERS} layers, teacher of the same size"
    )
    toolkit.write(args.out, toolkit.machine_and_device(), work, results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
