"""The commands ``opd-jax report`` and ``opd-jax figure``."""

from __future__ import annotations

from collections.abc import Sequence

from opd_jax import command
from opd_jax.report import build, run_figure


def report(argv: Sequence[str]) -> int:
    """Write the page and return the exit status."""
    parser = command.Parser(
        "report", "One self-contained HTML page.", "runs/demo --rocks=rocks --out=report.html"
    )
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="workdirs of opd-jax train")
    add("--rocks", help="folder that opd-jax rocks wrote")
    add("--sweep", help="workdir of opd-jax sweep")
    add("--knockout", help="folder that opd-jax knockout wrote")
    add("--out", required=True, help="the .html file; replaces an older report")
    flags = parser.parse_args(argv)
    build.report(
        flags.runs, flags.out, rocks=flags.rocks, sweep=flags.sweep, knockout=flags.knockout
    )
    print(f"wrote {flags.out}")
    return 0


def figure(argv: Sequence[str]) -> int:
    """Draw a run and return the exit status."""
    parser = command.Parser("figure", "Draw a run.", "--workdir=runs/demo --out=demo.png")
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--out", required=True, help="a .png, .svg or .pdf file")
    flags = parser.parse_args(argv)
    run_figure.training(flags.workdir, flags.out)
    print(f"wrote {flags.out}")
    return 0
