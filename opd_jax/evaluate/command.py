"""The command ``opd-jax eval``: models on tasks, and one evaluation against another."""

from __future__ import annotations

import dataclasses
import json
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
        if flags.models or flags.tasks:
            raise ValueError(
                f"--compare and {'a model' if flags.models else '--tasks'}: expected the folders "
                "of two finished evaluations alone; evaluate first, then compare"
            )
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
    out = Path(flags.out)
    how = {
        "settings": settings,
        "form": form(flags),
        "batch": flags.batch,
        "slots": flags.slots,
        "mesh": command.mesh(flags.mesh_fsdp, flags.mesh_model),
        "dtype": flags.dtype,
    }
    if len(flags.models) == 1:
        found, means = {flags.models[0]: benchmark.evaluate(flags.models[0], given, out, **how)}, {}
    else:
        found, means = benchmark.evaluate_seeds(flags.models, given, out, **how)
    lines = [line for ref, of in found.items() for line in (f"{ref}:", *metrics.table(of))]
    over = "over problems"
    if means:
        lines += [f"mean over {len(found)} models (training seeds):", *metrics.table(means)]
        over += ", of means over problems and seeds"
    note = f"intervals: {stats.LEVEL:.0%} {over}; responses and verdicts: {out}"
    return [*lines, *textwrap.wrap(note, _COLUMNS)]


def compare(base: Path, arm: Path, *, margin: float, out: str | None = None) -> list[str]:
    """Compare two evaluations task by task, and return the result for a reader.

    Args:
      base, arm: folders of evaluations, of one model or of as many training seeds.
      margin: the smallest difference that counts, in shares.
      out: a JSON file to write the result to.

    Raises:
      ResultError: a folder is no finished evaluation, they hold other problems, or ``out`` holds
        something else than a comparison.
      ValueError: no margin, or other numbers of seeds.
    """
    if not 0 < margin < 1:
        raise ValueError(
            f"margin is {margin}: expected a share above 0, such as 0.02; set --margin"
        )
    if out:
        _check_own(Path(out))
    ours, theirs = results.read(base), results.read(arm)
    names = _same_tasks([*ours, *theirs])
    found = {
        name: metrics.compare(
            *([result.in_order(name) for result in side] for side in (ours, theirs)),
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
    return [*_notes(ours, theirs, names), *_contrasts(rows, margin)]


def _check_own(out: Path) -> None:
    """Check that a file to write is new, or a comparison of before."""
    told = "expected a new file for the comparison; give another --out, such as compared.json"
    if out.is_dir():
        raise results.ResultError(f"{out} is a folder: {told}")
    if out.exists():
        try:
            is_own = "margin" in json.loads(out.read_bytes())
        except (ValueError, TypeError):
            is_own = False
        if not is_own:
            raise results.ResultError(f"{out} holds something else: {told}")


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


def _notes(
    base: Sequence[results.Results], arm: Sequence[results.Results], names: Sequence[str]
) -> list[str]:
    """What a reader has to know beside the numbers: what was left out, who is paired, settings."""
    every = [*base, *arm]
    lines = []
    if left := sorted({t["name"] for each in every for t in each.record["tasks"]} - {*names}):
        lines.append(f"note: not in all of them, and left out: {', '.join(left)}")
    if len(base) > 1:
        pairs = (f"{a.folder.name} with {b.folder.name}" for a, b in zip(base, arm, strict=True))
        lines.append(f"note: training seeds are paired by their names: {', '.join(pairs)}")
    told = []
    for name in sorted({name for each in every for name in each.record["settings"]}):
        values = [repr(each.record["settings"].get(name)) for each in every]
        if len({*values}) > 1:
            told.append(f"{name} {' and '.join(dict.fromkeys(values))}")
    if told:
        lines.append(f"note: the evaluations also differ in {', '.join(told)}")
    return lines


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
