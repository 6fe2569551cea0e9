"""Answers of one model to a file of prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from opd_jax import command, files
from opd_jax import mesh as meshlib
from opd_jax.data import prompts as prompt_files
from opd_jax.evaluate import finding, grading
from opd_jax.files import path_of
from opd_jax.models import memory
from opd_jax.rollout import answers as drawing
from opd_jax.store import pair as pairs


def main(argv: Sequence[str]) -> int:
    """The command ``opd-jax generate``; returns the exit status."""
    parser = command.Parser(
        "generate",
        "Answer a file of prompts.",
        "--model=runs/demo@60 --prompts=prompts.jsonl --out=answers.jsonl",
    )
    add = parser.add_argument
    add("--model", required=True, help=command.MODEL)
    add("--prompts", required=True, help="prompts or messages: JSON lines or array, parquet, ...")
    add("--out", required=True, help="JSONL to write; must not exist")
    add("--max-new", type=int, default=256, help="most tokens of an answer")
    add("--samples", type=int, default=1, help="answers per prompt")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--limit", type=int, default=0, help="only the first prompts; 0: all")
    add("--batch", type=int, default=16, help="prompts at a time")
    add("--seed", type=int, default=0, help="of the draws")
    add("--dtype", help="that is computed in; default: float32 on CPU, bfloat16 elsewhere")
    command.add_mesh(parser)
    flags = vars(parser.parse_args(argv))
    mesh = command.mesh(flags.pop("mesh_fsdp"), flags.pop("mesh_model"))
    print(generate(**flags, mesh=mesh))
    return 0


def generate(
    model: str,
    prompts: str,
    out: str,
    *,
    max_new: int = 256,
    samples: int = 1,
    temperature: float = 0.0,
    limit: int = 0,
    batch: int = 16,
    seed: int = 0,
    mesh: Mesh | None = None,
    dtype: str | None = None,
) -> str:
    """Sample answers and write one JSON object per answer: prompt, answer, tokens, truncated, ...

    Args:
      model: a reference: Hugging Face folder, ``embedded:teacher``, ``RUN[@STEP]``.
      prompts: file that ``data.rows`` reads; ``answer`` in it is what is graded against.
      out: JSONL file that does not exist yet; it appears whole or not at all.
      max_new: most tokens of an answer.
      samples: answers per prompt.
      temperature: 0 is greedy.
      limit: only the first prompts; 0: all.
      batch: prompts at a time.
      seed: of the draws.
      mesh: default: all devices along ``data``.
      dtype: compute dtype; default: float32 on CPU, bfloat16 elsewhere.

    Returns:
      One line that says how many answers were written, and the accuracy where answers are given.

    Raises:
      FileExistsError: ``out`` exists.
      ValueError, FileNotFoundError: the model or the prompts cannot be used.
    """
    target = Path(out)
    if target.exists():
        raise FileExistsError(f"{out} exists: expected a new file; give another --out or remove it")
    for name, value, least in (
        ("max-new", max_new, 1),
        ("samples", samples, 1),
        ("batch", batch, 1),
        ("limit", limit, 0),
    ):
        if not least <= value < 2**31:
            raise ValueError(f"{name} is {value}: expected {least} to 2^31 - 1; set --{name}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}: expected 0 to 2^32 - 1; set --seed")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}: expected at least 0; set --temperature")
    opened = pairs.open_model(model, mesh=mesh, dtype=dtype)
    cfg, mesh, tokenizer = opened.cfg, opened.mesh, opened.tokenizer
    if max_new >= cfg.max_positions:
        raise ValueError(
            f"max-new is {max_new}: expected below the {cfg.max_positions} positions of {model}, "
            "which hold prompt and answer; lower --max-new"
        )
    spec = prompt_files.DataSpec(max_prompt=cfg.max_positions - max_new)
    rows, counts = prompt_files.examples(path_of(prompts), spec, tokenizer, now=opened.started)
    rows = rows[:limit] if limit else rows
    width = max(len(row.ids) for row in rows)
    size = meshlib.batch_rows(min(batch, len(rows)), mesh)
    memory.check(
        [
            memory.Need("the model", memory.weights(cfg, opened.stored, mesh), "use more devices"),
            memory.Need(
                "keys and values",
                memory.cache(cfg, size * samples, width + max_new, mesh),
                "lower --batch, --samples or --max-new",
            ),
        ],
        mesh,
    )
    params, sampler = opened.load(), opened.sampler(temperature=temperature)
    lines, correct, graded, unparsed = [], 0, 0, 0
    with jax.set_mesh(mesh):
        drawn = drawing.sample(
            params,
            rows,
            jax.random.key(seed),
            mesh,
            cfg=cfg,
            sampler=sampler,
            max_new=max_new,
            width=width,
            size=size,
            samples=samples,
        )
        for rollouts, real in drawn:
            answers = drawing.texts(rollouts, real, tokenizer)
            host = meshlib.to_host(rollouts)
            for index, text in enumerate(answers):
                row = rows[len(lines) // samples]
                line = {
                    "index": row.index,
                    "prompt": row.text,
                    "answer": text,
                    "tokens": int(host.mask_BT[index].sum()),
                    "truncated": bool(host.truncated_B[index]),
                }
                if row.answer is not None:
                    verdict = grading.any_of(
                        grading.math,
                        text,
                        row.answer,
                        truncated=line["truncated"],
                        in_thought=finding.opens_thought(row.text),
                    )
                    line |= {
                        "gold": row.answer,
                        "correct": verdict.correct,
                        "found": verdict.found,
                        "reason": verdict.reason,
                    }
                    graded += 1
                    correct += verdict.correct
                    unparsed += verdict.is_unparsed
                lines.append(json.dumps(line, ensure_ascii=False))
    if jax.process_index() == 0:
        target.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(target, "\n".join(lines) + "\n")
    score = ""
    if graded:
        score = f", accuracy {correct / graded:.1%} of {graded}, unparsed {unparsed / graded:.1%}"
    return f"wrote {len(lines)} answers to {out}{score} ({counts})"
