"""A run in words, for who sits before the terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from opd_jax import optim
from opd_jax.data import tokenizer as tokenizers
from opd_jax.models import params, transformer
from opd_jax.optim import OptimSpec
from opd_jax.rock import RockConfig
from opd_jax.run.assemble import Assembly
from opd_jax.spec import RunConfig


def introduction(parts: Assembly) -> list[str]:
    """What is about to be optimised, on what, in a few lines."""
    run, cfg = parts.run, parts.cfg
    assert cfg.teacher is not None
    lines = []
    for name, spec, part in (
        ("student", run.student, cfg.student),
        ("teacher", run.teacher, cfg.teacher),
    ):
        size = params.count(transformer.specs(part))
        lines.append(
            f"{name}: {spec.path}, {part.model_type}, {size / 1e6:.3g} M parameters, "
            f"{part.num_layers} layers, compute {part.dtype}"
        )
    lines.append(f"objective: {objective_text(run)}")
    stops = ", ".join(f"{i} {tokenizers.token_text(parts.tokenizer, i)!r}" for i in parts.stop_ids)
    shape = " x ".join(f"{axis} {size}" for axis, size in parts.mesh.shape.items())
    lines.append(f"stop ids: {stops}; mesh: {shape} ({jax.devices()[0].device_kind})")
    return lines


def conclusion(result: dict[str, Any]) -> list[str]:
    """The content of ``summary.json`` for a reader."""
    lines = []
    if result["rocks"]:
        lines.append("types that carry most of the KL (recent steps, decayed):")
        lines.append(f"  {'id':>7}  {'token':<16} {'of KL':>7} {'of tokens':>10} {'mean KL':>8}")
        lines += [
            f"  {row['token_id']:>7}  {row['token']!r:<16} {row['share']:>7.1%} "
            f"{row['token_share']:>10.1%} {row['kl_mean']:>8.3f}"
            for row in result["rocks"]
        ]
    lines += [f"{when:>6}: {evaluation_text(result[when])}" for when in ("before", "after")]
    minutes, seconds = divmod(round(result["seconds"]), 60)
    if result["phase_share"]:
        lines.append(time_text(result))
    lines.append(
        f"{result['steps']} steps in {minutes}m{seconds:02d}s, "
        f"{result['compiles']} programs compiled"
    )
    return lines


def objective_text(run: RunConfig) -> str:
    """The trained divergence and gate as a formula, in one line."""
    tau = "" if run.kl.temperature == 1.0 else f" at temperature {run.kl.temperature:g}"
    formula = {
        "reverse": "KL(student || teacher)",
        "forward": "KL(teacher || student)",
        "jsd": f"JSD(student, teacher; student weight {run.kl.beta:g})",
        "skew_reverse": f"KL(student || {run.kl.skew:g} student + {1 - run.kl.skew:g} teacher)",
        "skew_forward": f"KL(teacher || {run.kl.skew:g} teacher + {1 - run.kl.skew:g} student)",
    }[run.kl.direction]
    over = {
        "tokens": " / number of scored tokens",
        "weight": " / sum of weights",
        "per_sequence": " / sum of weights, by sequence, averaged over sequences",
    }[run.train.normaliser]
    return f"sum of weight x {formula}{tau}{over}; {gate_text(run.rock)}"


def gate_text(cfg: RockConfig) -> str:
    """Which positions weigh what, and when, in one line."""
    if cfg.mode == "off":
        return "no gate (rock state measured)"
    share = f" {cfg.share:.1%} of positions" if cfg.mode == "random" else ""
    parts = [f"rock gate {cfg.mode}{share}, weight {cfg.inside:g} inside"]
    if cfg.key == "input" and cfg.mode != "random":
        parts.append("looked up by the token before the predicted one")
    if cfg.start or cfg.ramp:
        parts.append(f"from step {cfg.start}")
    if cfg.ramp:
        parts.append(f"over {cfg.ramp} steps")
    if cfg.until:
        parts.append(f"until step {cfg.until}")
    return ", ".join(parts)


def schedule_text(spec: OptimSpec, before: int | None, step: int) -> str:
    """What a schedule of another length does to the learning rate of the next step; else empty."""
    if before is None or before == spec.steps:
        return ""
    then, now = (
        float(np.asarray(optim.schedule(dataclasses.replace(spec, steps=n))(step)))
        for n in (before, spec.steps)
    )
    return (
        f"the learning rate now follows a schedule of {spec.steps} steps and not of {before}: from "
        f"step {step} it goes on at {now:.3g}, where the old one had {then:.3g}"
    )


def moves_text(line: Mapping[str, Any] | None) -> str:
    """The last change of the members, from a line of ``rocks.jsonl``; empty without one."""
    if not line:
        return ""
    return f", rocks {line['members']} (+{line['entered']} -{line['left']} at step {line['step']})"


def evaluation_text(result: dict[str, float | None]) -> str:
    """An evaluation in one line; what was not measured is left out."""
    formats = {
        "accuracy": "accuracy {:.1%}",
        "unparsed_share": "unparsed {:.1%}",
        "kl_nats": "KL {:.4f} nats",
        "kl_gated": "gated {:.4f}",
        "kl_ungated": "ungated {:.4f}",
        "stop_kl_share": "stops {:.1%} of it",
        "mean_length": "length {:.1f}",
        "truncated_share": "truncated {:.1%}",
    }
    shown = [
        text.format(result[name]) for name, text in formats.items() if result.get(name) is not None
    ]
    return ", ".join(shown) or "not measured"


def sample_text(sample: dict[str, Any], tokenizer: Any) -> str:
    """One of :func:`samples` for a reader: prompt, answer, and the token of the largest KL."""
    worst = int(np.argmax(sample["kl_nats"]))
    token = tokenizers.token_text(tokenizer, sample["ids"][worst])
    return (
        f"{sample['prompt'][-160:]!r}\n  -> {sample['answer']!r}\n"
        f"  mean KL {np.mean(sample['kl_nats']):.3f} nats, most at {token!r} "
        f"({sample['kl_nats'][worst]:.2f})"
    )


def time_text(result: dict[str, Any]) -> str:
    """Where the time went, in one line."""
    shares = ", ".join(f"{name} {share:.0%}" for name, share in result["phase_share"].items())
    return (
        f"time: {shares}; median step {result['median_s']['step']:.2f}s, "
        f"first step after {result['first_step_s']:.1f}s"
    )
