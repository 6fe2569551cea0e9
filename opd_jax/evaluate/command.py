"""The command ``opd-jax eval``: models on tasks, and one evaluation against another."""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_jax import command, files, processes, stats
from opd_jax.evaluate import benchmark, metrics, results, tasks

_MARGIN = 0.02  # shares; two points
_COLUMNS = 100


def main(argv: Sequence[str]) -> int:
    """The command ``opd-jax eval``; returns the exit status."""
    flags = _parser().parse_args(argv)
    if flags.compare:
        lines = compare(
            Path(flags.compare[0]), Path(flags.compare[1]), margin=flags.margin, out=flags.out
        )
    else:
        lines = _evaluate(flags)
    for line in lines:
        processes.say(line)
    return 0


def _parser() -> command.Parser:
    parser = command.Parser(
        "eval",
        "Answer tasks and grade the answers; the same command goes on with one that was stopped. "
        "Several models are training seeds of one method: their mean has an interval over both. "
        "With --compare two finished evaluations are compared, problem by problem.",
        "runs/demo@60 --tasks=math500.jsonl,gsm8k.jsonl --out=evals/demo",
    )
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help=command.MODEL)
    add_tasks(parser)
    add("--out", help="folder of the evaluation; of --compare: a .json file to write")
    add("--compare", nargs=2, metavar=("BASE", "ARM"), help="folders of two evaluations")
    add("--margin", type=float, default=_MARGIN, help="smallest difference that counts (0.02)")
    add("--samples", type=int, default=1, help="responses per problem")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    command.add_filters(parser)
    add("--max-new", type=int, default=1024, help="most tokens of a response")
    add("--k", default="", help="of pass@k, such as 1,4,16; default: powers of 2 up to --samples")
    add("--batch", type=int, default=16, help="problems at a time; changes no response")
    command.add_slots(parser)
    add("--seed", type=int, default=0, help="of the draws")
    add("--dtype", help="that is computed in; default: float32 on CPU, bfloat16 elsewhere")
    command.add_mesh(parser)
    return parser


def add_tasks(parser: command.Parser, *, is_required: bool = False) -> None:
    """The flags that say which problems are asked, and how; :func:`form` reads the latter."""
    add = parser.add_argument
    told = "JSON lines with question and answer; several with commas between"
    add("--tasks", required=is_required, help=told)
    add("--grader", default="math", help="math, numeric, choice, exact, or module:function")
    add("--format", default="auto", help="auto, chat (the chat template) or raw")
    add("--instruction", default="", help="put behind every question")
    add("--system", default="", help="system message of a chat")
    add("--template", default="{}", help="variables of the chat template, as a JSON object")
    add("--limit", type=int, default=0, help="only the first problems of each task; 0: all")


def form(flags: Any) -> tasks.Form:
    """How problems are asked, by the flags of :func:`add_tasks`."""
    given = command.pairs("template", flags.template)
    return tasks.Form(flags.format, flags.instruction, flags.system, given)


def _evaluate(flags: Any) -> list[str]:
    for name in ("tasks", "out"):
        if not getattr(flags, name):
            raise ValueError(f"no --{name} given: expected --{name}=...; see opd-jax eval --help")
    if not flags.models:
        raise ValueError(f"no model given: expected {command.MODEL}; see opd-jax eval --help")
    settings = benchmark.Settings(
        samples=flags.samples,
        max_new=flags.max_new,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        min_p=flags.min_p,
        seed=flags.seed,
        ks=_numbers(flags.k),
    )
    given = tasks.read_all(flags.tasks, grader=flags.grader, limit=flags.limit)
    mesh = command.mesh(flags.mesh_fsdp, flags.mesh_model)
    out = Path(flags.out)
    folders = [out] if len(flags.models) == 1 else _folders(out, flags.models)
    lines = []
    for ref, folder in zip(flags.models, folders, strict=True):
        if len(folders) > 1:
            processes.say(f"== {ref}")
        measures = benchmark.evaluate(
            ref,
            given,
            folder,
            settings=settings,
            form=form(flags),
            batch=flags.batch,
            slots=flags.slots,
            mesh=mesh,
            dtype=flags.dtype,
        )
        lines += [f"{ref}:", *metrics.table(measures)]
    if len(folders) > 1:
        lines += _over_seeds(results.read(out))
    note = f"intervals: {stats.LEVEL:.0%} over problems; responses and verdicts: {out}"
    return [*lines, *textwrap.wrap(note, _COLUMNS)]


def _folders(out: Path, models: Sequence[str]) -> list[Path]:
    """A folder for each of several models, named after it."""
    if (out / results.RECORD).exists():
        raise results.ResultError(
            f"{out} holds the evaluation of one model: expected a new folder for several; give "
            "another --out"
        )
    names = [re.sub(r"[^\w.@-]+", "-", ref).strip("-.") or "model" for ref in models]
    if len({*names}) < len(names):
        raise ValueError(
            f"models {', '.join(models)}: expected another one each; name every model once"
        )
    return [out / name for name in names]


def _over_seeds(found: Sequence[results.Results]) -> list[str]:
    lines = [f"mean over {len(found)} models (training seeds):"]
    for name in found[0].problems:
        problems = [list(result.problems[name].values()) for result in found]
        lines.append(f"{name}  pass@1 {metrics.show(metrics.over_seeds(problems), 'pass@1')}")
    return lines


def compare(base: Path, arm: Path, *, margin: float, out: str | None = None) -> list[str]:
    """Compare two evaluations task by task, and return the result for a reader.

    Args:
      base, arm: folders of evaluations, of one model or of as many training seeds.
      margin: the smallest difference that counts, in shares.
      out: a JSON file to write the result to.

    Raises:
      ResultError: a folder is no finished evaluation, or they hold other problems.
      ValueError: no margin, or other numbers of seeds.
    """
    if not 0 < margin < 1:
        raise ValueError(
            f"margin is {margin}: expected a share above 0, such as 0.02; set --margin"
        )
    ours, theirs = results.read(base), results.read(arm)
    names = _same_tasks([*ours, *theirs])
    found = {
        name: metrics.compare(
            *([_in_order(result, name) for result in side] for side in (ours, theirs)),
            margin=margin,
        )
        for name in names
    }
    adjusted = stats.bh_adjusted([contrast.p for contrast in found.values()])
    rows = [
        dataclasses.asdict(contrast) | {"task": name, "p_adjusted": float(p)}
        for (name, contrast), p in zip(found.items(), adjusted, strict=True)
    ]
    if out:
        content = {"base": str(base), "arm": str(arm), "margin": margin, "tasks": rows}
        processes.on_first(
            lambda: files.write_atomic(Path(out), json.dumps(content, indent=1) + "\n")
        )
    return [*_notes(ours[0], theirs[0]), *_contrasts(rows, margin)]


def _in_order(result: results.Results, name: str) -> list[Sequence[metrics.Sample]]:
    problems = result.problems[name]
    return [problems[index] for index in sorted(problems)]


def _same_tasks(found: Sequence[results.Results]) -> list[str]:
    """Names of the tasks that all evaluations share.

    Raises:
      ResultError: none, or one of other problems.
    """
    digests = [{t["name"]: t["digest"] for t in result.record["tasks"]} for result in found]
    names = [name for name in digests[0] if all(name in other for other in digests)]
    if not names:
        raise results.ResultError(
            f"{found[0].folder} and {found[-1].folder} share no task: expected evaluations of the "
            "same tasks; evaluate both on one"
        )
    for name in names:
        for result, other in zip(found, digests, strict=True):
            if other[name] != digests[0][name]:
                raise results.ResultError(
                    f"task {name} of {result.folder} holds other problems than that of "
                    f"{found[0].folder}: expected the same; evaluate both on one file"
                )
    return names


def _notes(base: results.Results, arm: results.Results) -> list[str]:
    """What else differs between two evaluations than their models."""
    told = [
        f"{name} {base.record['settings'].get(name)!r} and {arm.record['settings'].get(name)!r}"
        for name in sorted({*base.record["settings"], *arm.record["settings"]})
        if base.record["settings"].get(name) != arm.record["settings"].get(name)
    ]
    return [f"note: the evaluations also differ in {', '.join(told)}"] if told else []


def _contrasts(rows: Sequence[dict[str, Any]], margin: float) -> list[str]:
    width = max([4, *(len(row["task"]) for row in rows)])
    lines = [
        f"{'task':<{width}} {'base':>7} {'arm':>7} {'points':>22} {'p':>8} {'p adj.':>8} "
        f"{'p equiv.':>8}  verdict"
    ]
    for row in rows:
        ends = [row[name] for name in ("low", "high")]
        reach = "" if None in ends else f" [{100 * ends[0]:+.1f}, {100 * ends[1]:+.1f}]"
        points = f"{100 * row['delta']:+.1f}{reach}"
        lines.append(
            f"{row['task']:<{width}} {row['base']:>7.1%} {row['arm']:>7.1%} {points:>22} "
            f"{row['p']:>8.2g} {row['p_adjusted']:>8.2g} {row['p_equivalent']:>8.2g}  "
            f"{row['verdict']}"
        )
    tests = ", ".join(sorted({row["test"] for row in rows}))
    note = (
        f"points: arm minus base with {stats.LEVEL:.0%} intervals; p: {tests}; adjusted over tasks "
        f"(Benjamini-Hochberg); equivalent: within {100 * margin:g} points (two one-sided tests)"
    )
    return [*lines, *textwrap.wrap(note, _COLUMNS)]


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"k is {text!r}: expected numbers such as 1,4,16; set --k") from error
