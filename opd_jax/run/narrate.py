"""A run in words, for who sits before the terminal."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from opd_jax import mesh as meshlib
from opd_jax import optim
from opd_jax.data import tokenizer as tokenizers
from opd_jax.data import widths
from opd_jax.data.batches import Batch
from opd_jax.models import kernels, lora, memory, params, resting, transformer
from opd_jax.models.lora import LoraSpec
from opd_jax.models.transformer import ModelConfig
from opd_jax.optim import OptimSpec
from opd_jax.pytrees import Packing, Rollout
from opd_jax.report import accuracy
from opd_jax.rock import RockConfig
from opd_jax.run import assemble
from opd_jax.run.assemble import Assembly
from opd_jax.spec import RunConfig, teacher_title


def _kernel_text(cfg: ModelConfig, mesh: Mesh, *, is_packed: bool) -> str:
    """By what kernel a model's attention is computed, where it is not by our own blocks."""
    fewest, platform = kernels.FEWEST_TOKENS, mesh.devices.flat[0].platform
    chosen = functools.partial(kernels.chosen, platform, fewest, cfg.head_dim, cfg.dtype)
    name, packed = chosen(), chosen(is_packed=is_packed)
    if name == "blocks" or cfg.attention == "blocks":
        return ""
    rest = f", of packed rows by {packed}" if packed != name else ""
    return f", attention by {name} from {fewest} tokens on{rest}"


def introduction(parts: Assembly) -> list[str]:
    """What is about to be optimised, on what, in a few lines."""
    run, cfg = parts.run, parts.cfg
    lines = []
    models = [("student", run.student, cfg.student)]
    models += [
        (teacher_title(name), spec, part)
        for (name, spec), part in zip(run.teachers.items(), cfg.teachers, strict=True)
    ]
    for name, spec, part in models:
        size = params.count(transformer.specs(part))
        lines.append(
            f"{name}: {spec.path}, {part.model_type}, {size / 1e6:.3g} M parameters, "
            f"{part.num_layers} layers, compute {part.dtype}"
            f"{_kernel_text(part, parts.mesh, is_packed=run.train.pack)}"
        )
    if cfg.teacher is None:
        lines.append("teacher: none, as nothing compares with one (kl.ce is 1)")
    lines += routes_text(parts)
    if adapters := assemble.adapter_specs(run, cfg.student):
        lines.append(adapters_text(run.lora, cfg.student, params.count(adapters)))
    if run.teacher.offload and cfg.teacher is not None:
        moved = 0.0
        for part in cfg.teachers:
            dtype = run.teacher.stored_dtype(part.dtype)
            head = memory.weights(part, dtype, parts.mesh, part=resting.head)
            moved += memory.weights(part, dtype, parts.mesh) - head
        lines.append(
            f"teacher: rests in host memory ({resting.HOST}) between its passes, each brings "
            f"{memory.text(moved)} to every device; its head stays"
        )
    if run.data.frames:
        lines.append(
            "the teacher reads prompts of its own (data.teacher_prompt, data.teacher_system): "
            f"{_span(len(row.teacher_ids) for row in parts.rows)} ids, the student's "
            f"{_span(len(row.ids) for row in parts.rows)}"
        )
    lines.append(f"objective: {objective_text(run)}")
    stops = ", ".join(f"{i} {tokenizers.token_text(parts.tokenizer, i)!r}" for i in parts.stop_ids)
    lines.append(widths_text(parts))
    shape = meshlib.text(parts.mesh.shape)
    if parts.rollout_mesh != parts.mesh:
        shape += f", {meshlib.text(parts.rollout_mesh.shape)} while the student samples"
    lines.append(f"stop ids: {stops}; mesh: {shape} ({jax.devices()[0].device_kind})")
    return lines


def routes_text(parts: Assembly) -> list[str]:
    """How many prompts each of several teachers has; nothing where there is one."""
    lines = []
    for what, rows in (("prompts", parts.rows), ("held out", parts.heldout)):
        number = collections.Counter(row.taught_by for row in rows)
        if rows and number.keys() != {""}:
            told = ", ".join(f"{number[name]} by {name}" for name in parts.run.teachers)
            lines.append(f"{what}, each taught by the teacher that its row names: {told}")
    number = collections.Counter(row.taught_by for row in parts.rows)
    for name in filter(None, parts.run.teachers):
        if not number[name]:
            lines.append(
                f"warning: no prompt of {parts.run.data.prompts} has the teacher {name}, which is "
                "loaded all the same; leave it out of teacher.paths, or name it in some rows"
            )
    return lines


def _span(lengths: Iterable[int]) -> str:
    found = sorted({*lengths})
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def adapters_text(spec: LoraSpec, student: ModelConfig, number: int) -> str:
    """What is trained of a student whose own weights are frozen."""
    names = ", ".join(lora.targets(student, spec))
    share = number / params.count(transformer.specs(student))
    return (
        f"the student is frozen but for adapters of rank {spec.rank} (times {spec.scale:g}) on "
        f"{names}: {number / 1e6:.3g} M parameters, {share:.1%} of its own"
    )


def columns(parts: Assembly) -> tuple[str, ...]:
    """Which columns of the progress line say something in this run, see ``progress``."""
    run, kl = parts.run, parts.cfg.kl
    is_gated = run.rock.mode != "off" or run.position.mode != "off"
    is_plain = kl.direction == "reverse" and kl.temperature == 1 and not (kl.stop_ids or kl.ce)
    is_loss = is_gated or not is_plain or run.train.normaliser == "per_sequence"
    return ("loss",) * is_loss + ("gated",) * is_gated


def conclusion(result: dict[str, Any]) -> list[str]:
    """The content of ``summary.json`` for a reader."""
    lines = []
    if result["rocks"]:
        span = result.get("rocks_steps")
        when = f"in about the last {span} steps" if span else "in all steps"
        lines.append(f"types that carry most of the KL {when}:")
        lines.append(f"  {'id':>7}  {'token':<16} {'of KL':>7} {'of tokens':>10} {'mean KL':>8}")
        lines += [
            f"  {row['token_id']:>7}  {row['token']!r:<16} {row['share']:>7.1%} "
            f"{row['token_share']:>10.1%} {row['kl_mean']:>z8.3f}"
            for row in result["rocks"]
        ]
    sides = ["before", "after", *(["teacher"] if result.get("teacher") else [])]
    lines += [f"{side:>7}: {evaluation_text(result[side])}" for side in sides]
    if text := way_text(result):
        lines.append(f"{'':>7}  {text}")
    minutes, seconds = divmod(round(result["seconds"]), 60)
    if result["phase_share"]:
        lines.append(time_text(result))
    if result.get("padding_share") is not None:
        lines.append(f"padding: {result['padding_share']:.0%} of the columns of the updates")
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
    formula += tau
    if run.kl.ce:
        rest = f"{1 - run.kl.ce:g} {formula} + " if run.kl.ce < 1 else ""
        formula = f"({rest}{run.kl.ce:g} cross-entropy)"
    over = {
        "tokens": " / number of scored tokens",
        "weight": " / sum of weights",
        "per_sequence": " / sum of weights, by sequence, averaged over sequences",
    }[run.train.normaliser]
    return f"sum of weight x {formula}{over}; {source_text(run)}{gate_text(run.rock)}"


def source_text(run: RunConfig) -> str:
    """Whose answers are trained on, where they are not the student's own."""
    return {
        "on_policy": "",
        "off_policy": "on the completions of data.prompts; ",
        "mixed": "on the completions of data.prompts, in a share of "
        f"{run.train.on_policy_share:g} of the steps on the student's own answers; ",
    }[run.train.stage]


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


# Of an evaluation: how a value and its change are written, and whether 0 is worth a word.
_TOLD = {
    "accuracy": ("accuracy {:.1%}", "{:+z.1f} points", True),
    "unparsed_share": ("unparsed {:.1%}", "", False),
    "kl_nats": ("KL {:z.4f} nats", "{:+z.4f}", True),
    "kl_gated": ("gated {:z.4f}", "", True),
    "kl_ungated": ("ungated {:z.4f}", "", True),
    "stop_kl_share": ("stops {:.1%} of it", "", False),
    "mean_length": ("length {:.1f}", "", True),
    "truncated_share": ("truncated {:.1%}", "", False),
}


def evaluation_text(
    result: Mapping[str, float | None], last: Mapping[str, float | None] | None = None
) -> str:
    """An evaluation in one line; what was not measured, is 0 or says nothing new is left out.

    Args:
      result: ``heldout.FIELDS``.
      last: the evaluation before it: accuracy and KL are told with what has changed since.
    """
    told = []
    for name, (form, change, tells_zero) in _TOLD.items():
        value = result.get(name)
        text = "" if value is None else form.format(value)
        if value is None or not (tells_zero or text != form.format(0.0)):
            continue
        if name == "kl_ungated" and result.get("kl_gated") is None:
            continue  # it is the KL of all
        if name == "accuracy" and result.get("accuracy_low") is not None:
            text += " [{accuracy_low:.1%}, {accuracy_high:.1%}]".format(**result)
        before = (last or {}).get(name)
        if change and before is not None:
            scale = 100 if name == "accuracy" else 1
            text += f" ({change.format(scale * (value - before))})"
        told.append(text)
    return ", ".join(told) or "not measured"


def way_text(result: Mapping[str, Any]) -> str:
    """How far the student has come towards its teacher; empty where there is nothing to come to."""
    ends = [(result.get(when) or {}).get("accuracy") for when in ("before", "after", "teacher")]
    before, after, teacher = ends
    if before is None or after is None or teacher is None or not before <= after <= teacher:
        return ""
    way = accuracy.way(before, after, teacher)
    if way is None:
        return ""
    return f"{way:.0%} of the way from {before:.1%} to the teacher's {teacher:.1%}"


def widths_text(parts: Assembly) -> str:
    """What batches are padded to, in one line."""
    longest = max(len(row.ids) for row in parts.rows)
    prompts, answers = (
        " or ".join(map(str, widths)) for widths in (parts.prompt_widths, parts.answer_widths)
    )
    return (
        f"widths: prompts of up to {longest} ids in {prompts} columns, answers cut back to "
        f"{answers}; each is compiled when a batch first needs it"
    )


def sample_text(sample: Mapping[str, Any], tokenizer: Any) -> str:
    """One of :func:`digest.samples` for a reader, with its token of the largest KL."""
    lines = [_indented(sample["prompt"][-400:], "  | "), _indented(sample["answer"], "  > ")]
    if sample.get("gold") is not None:
        verdict = "right" if sample["correct"] else f"wrong ({sample['reason']})"
        lines.append(f"  {verdict}; expected {sample['gold']!r}")
    if "kl_nats" in sample:
        worst = int(np.argmax(sample["kl_nats"]))
        token = tokenizers.token_text(tokenizer, sample["ids"][worst])
        lines.append(
            f"  mean KL {np.mean(sample['kl_nats']):z.3f} nats, most at {token!r} "
            f"({sample['kl_nats'][worst]:.2f})"
        )
    return "\n" + "\n".join(lines)


def _indented(text: str, sign: str) -> str:
    return "\n".join(f"{sign}{line}" for line in text.strip().splitlines()) or sign


def time_text(result: dict[str, Any]) -> str:
    """Where the time went, in one line."""
    shares = ", ".join(f"{name} {share:.0%}" for name, share in result["phase_share"].items())
    return (
        f"time: {shares}; median step {result['median_s']['step']:.2f}s, "
        f"first step after {result['first_step_s']:.1f}s"
    )


def program(phase: str, given: Sequence[Any], prompt_widths: Sequence[int]) -> str:
    """The program that a phase of a step runs, named by what it is compiled for.

    Empty for a phase without a batch.
    """
    prompts = [widths.bucket(x.longest, prompt_widths) for x in given if isinstance(x, Batch)]
    rows = [x.ids_BT.shape[1] for x in given if isinstance(x, Rollout)]
    columns = dict.fromkeys(prompts or rows)  # two where the teacher reads prompts of its own
    if not columns:
        return ""
    name = f"{phase} of {' and '.join(map(str, columns))} columns"
    for layout in given:
        if isinstance(layout, Packing):
            num_rows, _, width = layout.source_RPL.shape
            name += f" packed into {num_rows} rows of {width}"
    return name
