"""The command ``opd-jax plan``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from opd_jax import command, config, files
from opd_jax.plan import chips, estimate, printout, programs, search


def main(argv: Sequence[str]) -> int:
    """Plan a run on a machine that need not be here; 1 where it does not fit."""
    parser = command.Parser(
        "plan",
        "Compile every program of a run for a machine that need not be here, and say what each "
        "takes. Models need no weights, prompts are taken to be as long as they may be. Further "
        "--config.group.key=value flags set keys of the run. Exit status: 0 where the run fits, "
        "1 where it does not.",
        "--config=configs/demo.py --topology=v5e:4x4",
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE[:args]", help="the run, as for train")
    add("--topology", required=True, metavar="NAME", help=", ".join(chips.TOPOLOGIES))
    add("--search", action="store_true", help="try micro-batches, remat and meshes; name the best")
    add("--out", default="", metavar="FILE.json", help="also write the plan there")
    add(
        "--only",
        default="",
        metavar="A,B",
        help=f"programs to compile, some of {', '.join(programs.ALL)}; default: all",
    )
    for who in ("student", "teacher"):
        add(
            f"--{who}-config",
            default="",
            metavar="MODEL",
            help=f"a folder with config.json, or a known model; default: {who}.path of the run",
        )
    flags, overrides = parser.parse_known_args(list(argv))
    only = [name for name in flags.only.split(",") if name]
    if unknown := {*only} - {*programs.ALL}:
        raise ValueError(
            f"no program {min(unknown)!r}: expected some of {', '.join(programs.ALL)}; set --only"
        )
    given, _ = config.load([f"--config={flags.config}", *overrides])
    run = config.resolve(given)
    machine = chips.machine(flags.topology)
    shapes = {"student": flags.student_config, "teacher": flags.teacher_config}
    if flags.search:
        found = search.search(run, machine, **shapes)
        for line in search.lines(found):
            print(line)
        best = search.best(found)
        if best is None or best.plan is None:
            return 1
        plan, extra = best.plan, {"search": [search.as_json(each) for each in found]}
    else:
        parts = programs.assembly(run, machine, **shapes)
        plan, extra = estimate.plan(parts, machine, only=only), {}
    for line in printout.lines(plan):
        print(line)
    if flags.out:
        text = json.dumps(printout.as_json(plan) | extra, indent=2, allow_nan=False)
        files.write_atomic(Path(files.path_of(flags.out)), text + "\n")
        print(f"written to {flags.out}")
    return 0 if plan.fits else 1
