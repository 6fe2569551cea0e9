"""Answers of one model to a file of prompts, as JSON lines that an off-policy run trains on.

========================  ==================================================================
``index``, ``sample``     line of the prompt in its file, from 0; number of its answer
``prompt``                as the model sees it, and ``prompt_ids``: the ids that it was given
``completion``            its answer, and ``completion_ids``: as they were sampled, a stop id last
``tokens``, ``truncated`` number of those ids; whether the length limit cut the answer
``answer``                the right one, where the prompts have it, with what the grader says of the
                          completion: ``correct``, ``found``, ``reason``
========================  ==================================================================

The lines grow in ``OUT.partial/`` and become ``OUT`` when all are there: a command that was stopped
goes on when it is started again, and writes what it would have written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NotRequired

import jax
import pydantic
from jax.sharding import Mesh
from typing_extensions import TypedDict

from opd_jax import command, files, processes, records
from opd_jax import mesh as meshlib
from opd_jax.data import prompts as prompt_files
from opd_jax.data.prompts import DataSpec, Example
from opd_jax.evaluate import finding, grading, growth
from opd_jax.evaluate.benchmark import Settings
from opd_jax.files import path_of
from opd_jax.models import memory
from opd_jax.rollout import answers as drawing
from opd_jax.rollout import refill
from opd_jax.store import fingerprint, workdir
from opd_jax.store import pair as pairs
from opd_jax.store.pair import Model

_RECORD, _LINES = "command.json", "answers.jsonl"


@pydantic.with_config(records.OPEN)
class Command(TypedDict):
    """What the answers follow from, ``command.json``: a command that goes on has the same."""

    model: str
    files: dict[str, str]
    prompts: str
    digest: str  # of the prompts that are answered
    settings: dict[str, Any]
    time: str  # that chat templates write, unless the model is of a run


@pydantic.with_config(records.OPEN)
class Line(TypedDict):
    """A line of the answers: see the module."""

    index: int
    sample: int
    prompt: str
    prompt_ids: list[int]
    completion: str
    completion_ids: list[int]
    tokens: int
    truncated: bool
    answer: NotRequired[str | list[str]]
    correct: NotRequired[bool]
    found: NotRequired[str | None]
    reason: NotRequired[str]


def main(argv: Sequence[str]) -> int:
    """The command ``opd-jax generate``; returns the exit status."""
    parser = command.Parser(
        "generate",
        "Answer a file of prompts, each once whatever stands there twice; the same command goes on "
        "with one that was stopped. What it writes is what train.stage=off_policy trains on.",
        "--model=runs/demo@60 --prompts=prompts.jsonl --out=answers.jsonl",
    )
    add = parser.add_argument
    add("--model", required=True, help=command.MODEL)
    add("--prompts", required=True, help="prompts or messages: JSON lines or array, parquet, ...")
    add("--out", required=True, help="JSONL to write; the same command goes on with it")
    add("--max-new", type=int, default=256, help="most tokens of an answer")
    add("--samples", type=int, default=1, help="answers per prompt")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    command.add_filters(parser)
    add("--columns", default="{}", help='other names of columns, {"prompt": "question"}')
    add("--system", default="", help="system prompt of rows without one; makes text a chat")
    add("--template", default="{}", help="variables of the chat template, as a JSON object")
    add("--limit", type=int, default=0, help="only the first prompts; 0: all")
    add("--batch", type=int, default=16, help="prompts at a time; changes no answer")
    command.add_slots(parser)
    add("--seed", type=int, default=0, help="of the draws")
    add("--dtype", help="that is computed in; default: float32 on CPU, bfloat16 elsewhere")
    command.add_mesh(parser)
    flags = vars(parser.parse_args(argv))
    flags |= {name: command.pairs(name, flags[name]) for name in ("columns", "template")}
    mesh = command.mesh(flags.pop("mesh_fsdp"), flags.pop("mesh_model"))
    processes.say(generate(**flags, mesh=mesh, say=processes.say))
    return 0


def generate(
    model: str,
    prompts: str,
    out: str,
    *,
    max_new: int = 256,
    samples: int = 1,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    columns: Sequence[tuple[str, str]] = (),
    system: str = "",
    template: Sequence[tuple[str, Any]] = (),
    limit: int = 0,
    batch: int = 16,
    slots: int = 0,
    seed: int = 0,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Sample answers and write one JSON object per answer, or go on where it was stopped.

    An answer follows from the model, its prompt, that prompt's line and the seed: not from the
    batch, the slots, the mesh or the other prompts.

    Args:
      model: a reference, see ``store.pair``: Hugging Face folder, ``owner/name``, ``RUN[@STEP]``.
      prompts: file that ``data.rows`` reads; ``answer`` in it is what is graded against. What
        stands there twice is answered once.
      out: JSONL file that does not exist yet; it appears whole or not at all.
      max_new: most tokens of an answer.
      samples: answers per prompt.
      temperature: 0 is greedy.
      top_k, top_p, min_p: filters of sampling; 0, 1 and 0 are off.
      columns, system, template: of the prompts, as ``DataSpec`` has them.
      limit: only the first prompts; 0: all.
      batch: prompts at a time.
      slots: rows decoded at a time, see ``rollout.refill``; 0: all of a batch.
      seed: of the draws.
      mesh: default: all devices along ``data``.
      dtype: compute dtype; default: float32 on CPU, bfloat16 elsewhere.
      say: receives progress.

    Returns:
      One line that says how many answers were written, and the accuracy where answers are given.

    Raises:
      FileExistsError: ``out`` exists, or another process is writing it.
      ValueError, FileNotFoundError: the model or the prompts cannot be used, or answers of another
        command are there.
    """
    target = Path(path_of(out))
    if target.exists():
        raise FileExistsError(f"{out} exists: expected a new file; give another --out or remove it")
    for name, value, least in (("batch", batch, 1), ("limit", limit, 0)):
        if not least <= value < 2**31:
            raise ValueError(f"{name} is {value}: expected {least} to 2^31 - 1; set --{name}")
    settings = Settings(samples, max_new, temperature, top_k, top_p, min_p, seed)
    opened = pairs.open_model(model, mesh=mesh, dtype=dtype)
    drawing.check_slots(slots, batch, samples, opened.mesh)
    room = opened.cfg.max_positions - max_new
    if room < 1:
        raise ValueError(
            f"max-new is {max_new}: expected below the {opened.cfg.max_positions} positions of "
            f"{model}, which hold prompt and answer; lower --max-new"
        )
    partial = target.with_name(f"{target.name}.partial")
    old = _command(partial)
    now = opened.started or processes.agreed_text(old["time"] if old else workdir.timestamp())
    spec = DataSpec(columns=tuple(columns), system=system, template=tuple(template))
    spec = dataclasses.replace(spec, max_prompt=room)
    rows, counts = prompt_files.examples(path_of(prompts), spec, opened.tokenizer, now=now)
    rows, twice = _once(rows)
    rows = rows[:limit] if limit else rows
    record: Command = {
        "model": opened.reference.name,
        "files": pairs.identity(opened.reference),
        "prompts": prompts,
        "digest": prompt_files.digest(rows),
        "settings": {
            **{name: getattr(settings, name) for name in ("samples", "max_new", "seed")},
            **settings.filters,
            "dtype": str(opened.cfg.dtype),
        },
        "time": now,
    }
    done = _enter(partial, record, old, rows, samples)
    if done:
        say(f"{partial} has answers to {done} of {len(rows)} prompts: going on")
    if done < len(rows):
        with growth.Writing(partial, _LINES) as stream:
            progress = growth.Progress("prompts", len(rows), done, say)
            for lines in _answered(opened, rows, done, settings, batch, slots):
                if stream is not None:
                    files.append(stream, lines)
                progress.add(len(lines) // samples, lines)
            progress.tell()
    told = processes.of_first(lambda: _finish(partial, target))
    more = f"; {twice} prompts stood there more than once" if twice else ""
    return f"{told} ({counts}{more})"


def _once(rows: Sequence[Example]) -> tuple[list[Example], int]:
    """The first of all rows with the same prompt, and the number of the others."""
    first = {row.ids: row for row in reversed(rows)}
    kept = [row for row in rows if first[row.ids] is row]
    return kept, len(rows) - len(kept)


def _command(partial: Path) -> Command | None:
    """The command whose answers grow in a folder; None where there is none."""
    change = f"remove {partial}, and the answers are written anew"
    with contextlib.suppress(FileNotFoundError):
        return records.read(partial / _RECORD, Command, change=change)
    return None


def _enter(
    partial: Path, record: Command, old: Command | None, rows: Sequence[Example], samples: int
) -> int:
    """Begin in a folder, or go on with the same command; the number of prompts that are answered.

    Raises:
      ValueError: answers of another command are there.
      FileExistsError: another process is writing them.
    """

    def enter() -> int:
        with files.only_writer(partial):
            if old is None:
                files.write_atomic(partial / _RECORD, json.dumps(record, indent=1) + "\n")
            elif told := _differences(old, record):
                raise ValueError(
                    f"{partial} holds answers of another command: {'; '.join(told[:4])}: expected "
                    f"the same; give the old values, another --out, or remove {partial}"
                )
            done = _done(partial, rows, samples)
            files.cut(partial / _LINES, done * samples)
            return done

    return processes.of_first(enter)


def _differences(old: Command, new: Command) -> list[str]:
    """What two commands differ in, in words."""
    told = [f"model {name}" for name in fingerprint.changes(old["files"], new["files"])]
    for name in sorted({*old["settings"], *new["settings"]}):
        before, now = old["settings"].get(name), new["settings"].get(name)
        if before != now:
            told.append(f"{name} was {before!r} and is {now!r}")
    if old["digest"] != new["digest"]:
        told.append(f"the prompts of {old['prompts']} were others than those of {new['prompts']}")
    return told


def _done(partial: Path, rows: Sequence[Example], samples: int) -> int:
    """How many prompts have all their answers, which stand in order."""
    number = 0
    for number, line in enumerate(_lines(partial), 1):
        row, sample = divmod(number - 1, samples)
        place = (rows[row].index, sample) if row < len(rows) else None
        if place != (line["index"], line["sample"]):
            raise ValueError(
                f"{partial / _LINES} line {number} is sample {line['sample']} of prompt "
                f"{line['index']}: expected {place or 'no more'}; remove {partial}, and the "
                "answers are written anew"
            )
    return number // samples


def _lines(partial: Path) -> Iterator[Line]:
    change = f"remove {partial}, and the answers are written anew"
    with contextlib.suppress(FileNotFoundError):
        yield from records.lines(partial / _LINES, Line, change=change)


def _answered(
    model: Model, rows: Sequence[Example], done: int, settings: Settings, batch: int, slots: int
) -> Iterator[list[Line]]:
    """Sample what is left, batch by batch, each process its share of every batch."""
    width = max(len(row.ids) for row in rows)
    left = rows[done:]
    size = meshlib.batch_rows(min(batch, len(left)), model.mesh)
    cells = refill.cells(
        model.cfg, size, settings.samples, width, settings.max_new, model.mesh, wanted=slots
    )
    memory.check(
        [
            memory.Need(
                "the model", memory.weights(model.cfg, model.stored, model.mesh), "use more devices"
            ),
            memory.Need("keys and values", cells, f"lower {refill.FLAGS}"),
        ],
        model.mesh,
    )
    with jax.set_mesh(model.mesh):
        drawn = drawing.sample(
            model.load(),
            left,
            jax.random.key(settings.seed),
            model.mesh,
            cfg=model.cfg,
            sampler=model.sampler(**settings.filters),
            max_new=settings.max_new,
            width=width,
            size=size,
            samples=settings.samples,
            numbers=[row.index for row in left],
            slots=slots,
        )
        first = 0
        for rollouts, real in drawn:
            texts = drawing.texts(rollouts, real, model.tokenizer)
            host = meshlib.to_host(rollouts)
            yield [
                _line(
                    left[first + number // settings.samples],
                    number % settings.samples,
                    text,
                    host.ids_BT[number][host.mask_BT[number]].tolist(),
                    bool(host.truncated_B[number]),
                )
                for number, text in enumerate(texts)
            ]
            first += real // settings.samples


def _line(row: Example, sample: int, text: str, ids: list[int], truncated: bool) -> Line:
    line: Line = {
        "index": row.index,
        "sample": sample,
        "prompt": row.text,
        "prompt_ids": list(row.ids),
        "completion": text,
        "completion_ids": ids,
        "tokens": len(ids),
        "truncated": truncated,
    }
    if row.answer is None:
        return line
    verdict = grading.any_of(
        grading.math,
        text,
        row.answer,
        truncated=truncated,
        in_thought=finding.opens_thought(row.text),
    )
    answer = row.answer if isinstance(row.answer, str) else list(row.answer)
    said = {"correct": verdict.correct, "found": verdict.found, "reason": verdict.reason}
    return {**line, "answer": answer, **said}  # pyright: ignore[reportReturnType]


def _finish(partial: Path, target: Path) -> str:
    """Put the answers in their place, and say how many and how good they are."""
    number, verdicts, unparsed = 0, [], 0
    for line in _lines(partial):
        number += 1
        if "correct" in line:
            verdicts.append(line["correct"])
            unparsed += line.get("found") is None
    os.replace(partial / _LINES, target)
    shutil.rmtree(partial)
    score = ""
    if verdicts:
        score = f", accuracy {sum(verdicts) / len(verdicts):.1%} of {len(verdicts)}"
        score += f", unparsed {unparsed / len(verdicts):.1%}"
    return f"wrote {number} answers to {target}{score}"
