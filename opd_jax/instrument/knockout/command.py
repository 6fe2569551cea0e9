"""The command ``opd-jax knockout``."""

from __future__ import annotations

from collections.abc import Sequence

from opd_jax import command, processes
from opd_jax.evaluate import command as evaluating
from opd_jax.evaluate.benchmark import Settings
from opd_jax.instrument.knockout import census, console, ledger
from opd_jax.instrument.knockout.request import FAMILIES, Request, families


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit status."""
    parser = command.Parser(
        "knockout",
        "Forbid a model to say certain tokens and see which answers flip: one program for all "
        "arms, common random numbers, and a null arm that must change nothing. The same command "
        "goes on with one that was stopped.",
        "--model=runs/demo --tasks=math500.jsonl --types=rocks/types.csv --out=knockout",
    )
    add = parser.add_argument
    add("--model", required=True, help=command.MODEL)
    add("--types", required=True, help="types.csv of opd-jax rocks, lists.json, or ids: 19,22")
    add("--out", required=True, help="folder of the results; the same command goes on in it")
    evaluating.add_tasks(parser, is_required=True)
    add("--teacher", help="model that substitutions are compared with; default: none")
    add("--arms", default=",".join(FAMILIES[:3]), help=f"of {', '.join(FAMILIES)}, or all")
    add("--groups", default="", help="file of named lists, or paper; default: those of --types")
    add("--top", type=int, default=50, help="types banned one by one: the first that occur (50)")
    add("--local", type=int, default=10, help="of these, types also banned at one place (10)")
    add("--window", type=int, default=1, help="positions of a local ban (1)")
    add("--pairs", type=int, default=5, help="of these, types banned two by two (5)")
    add("--orders", type=int, default=3, help="random orders of cumulative bans (3)")
    add("--samples", type=int, default=1, help="answers per problem; above 1 with --temperature")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--max-new", type=int, default=1024, help="most tokens of an answer")
    add("--batch", type=int, default=64, help="answers decoded at a time, of any arms")
    command.add_slots(parser)
    add("--margin", type=float, default=0.01, help="smallest change of accuracy that counts (0.01)")
    add("--effect", type=float, default=0.1, help="change among the problems that hold a type, to "
        "be seen with --power (0.1)")  # fmt: skip
    add("--power", type=float, default=0.8, help="probability to see it (0.8)")
    add("--seed", type=int, default=0, help="of all draws")
    add("--dtype", help="that is computed in; default: float32 on CPU, bfloat16 elsewhere")
    add("--plan", action="store_true", help="answer without a ban, say what the rest costs, stop")
    command.add_mesh(parser)
    flags = parser.parse_args(argv)
    request = Request(
        model=flags.model,
        tasks=flags.tasks,
        types=flags.types,
        out=flags.out,
        teacher=flags.teacher,
        families=families(flags.arms),
        groups=flags.groups,
        top=flags.top,
        local=flags.local,
        window=flags.window,
        pairs=flags.pairs,
        orders=flags.orders,
        settings=Settings(
            samples=flags.samples,
            max_new=flags.max_new,
            temperature=flags.temperature,
            seed=flags.seed,
        ),
        form=evaluating.form(flags),
        grader=flags.grader,
        limit=flags.limit,
        batch=flags.batch,
        slots=flags.slots,
        margin=flags.margin,
        effect=flags.effect,
        power=flags.power,
        dtype=flags.dtype,
    )
    result = census.run(
        request, mesh=command.mesh(flags.mesh_fsdp, flags.mesh_model), plan=flags.plan
    )
    if result is not None:
        for line in console.lines(result):
            processes.say(line)
        for name in (ledger.CENSUS, ledger.SUMMARY, ledger.LINES):
            processes.say(f"{name:<14} {request.out}/{name}")
    return 0
