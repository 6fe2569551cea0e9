"""The ``opd-jax`` command: each command is a thin shell around one function of the library."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

_TRAIN_HELP = """usage: opd-jax train --config=FILE[:args] --workdir=DIR [--config.group.key=value]

Distil on-policy. The same command resumes a run that was stopped or killed.

  --config   a Python file with get_config(arg), for example configs/demo.py:steps=20
  --workdir  folder of the run: run.json, metrics.jsonl, samples.jsonl, checkpoints/, summary.json
  --help     this text

Groups and keys, with their default values:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status; an error a user can act on is one message."""
    started = time.monotonic()
    argv = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, tuple[Callable[[list[str]], int], str]] = {
        "train": (functools.partial(_train, started=started), "distil on-policy, or resume"),
        "export": (_export, "write a checkpoint as a Hugging Face folder"),
        "generate": (_generate, "sample answers to a file of prompts"),
        "rocks": (_rocks, "find the tokens that carry most of the KL"),
        "table": (_table, "write a checkpoint's rock state, type by type"),
        "sweep": (_sweep, "train arms x seeds and compare them"),
        "report": (_report, "one page of runs, rocks and a sweep, to look at in a browser"),
        "figure": (_figure, "draw a run's training curves and rock tokens"),
    }
    if not argv or argv[0] in ("-h", "--help", "help"):
        from opd_jax import processes

        print("usage: opd-jax COMMAND ...\n")
        for name, (_, purpose) in commands.items():
            print(f"  {name:<10} {purpose}")
        print(f"\nopd-jax COMMAND --help says more. Every command takes\n{processes.HELP}")
        return 0 if argv else 2
    if argv[0] not in commands:
        print(
            f"opd-jax: unknown command {argv[0]!r}; expected one of {', '.join(commands)}",
            file=sys.stderr,
        )
        return 2
    status = _run(argv[0], commands[argv[0]][0], argv[1:])
    if status:
        from opd_jax import processes

        sys.stdout.flush()
        sys.stderr.flush()
        processes.leave(status)
    return status


def _run(name: str, command: Callable[[list[str]], int], argv: list[str]) -> int:
    try:
        with _sigterm_unwinds():
            return command(_prepare_jax(argv))
    except _Terminated:
        print(f"opd-jax {name}: stopped by SIGTERM", file=sys.stderr)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print(f"opd-jax {name}: stopped by SIGINT", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        message = _message(error)
        if message is None or os.environ.get("OPD_JAX_TRACE"):
            raise
        print(f"opd-jax {name}: {message}", file=sys.stderr)
        print("(OPD_JAX_TRACE=1 shows where it was raised)", file=sys.stderr)
        return 1


class _Terminated(BaseException):
    """SIGTERM, as an exception that no handler of errors takes for its own."""


@contextlib.contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM end a block as an exception does, so that what is half written is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def unwind(number: int, frame: Any) -> None:
        raise _Terminated

    old = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def _message(error: Exception) -> str | None:
    """What to tell a user of an error; None for a defect, which keeps its trace."""
    import jax

    from opd_jax import processes
    from opd_jax.models import memory

    if memory.is_exhausted(error):
        change = "lower --batch, --max-new or --samples, or use more devices"
        return memory.advice("running this command", error, (), change)
    if isinstance(error, jax.errors.JaxRuntimeError):
        return processes.explain(error)
    return str(error) if isinstance(error, _user_errors()) else None


def _user_errors() -> tuple[type[Exception], ...]:
    """Errors whose message says what to change; anything else is a defect and keeps its trace."""
    from opd_jax.run.train import NonFiniteError
    from opd_jax.store.checkpoint import CheckpointError
    from opd_jax.store.workdir import WorkdirError

    return (ValueError, OSError, ImportError, CheckpointError, WorkdirError, NonFiniteError)


def _prepare_jax(argv: list[str]) -> list[str]:
    """Join the other processes and keep compiled programs between runs; returns the other flags."""
    import jax

    from opd_jax import processes

    rest, given = processes.take_flags(argv)
    processes.join(given)
    config: Any = jax.config  # its options are not declared for type checkers
    if config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "opd_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return rest


def _train(argv: list[str], *, started: float) -> int:
    from opd_jax import config

    if {"-h", "--help"} & set(argv):
        print(_TRAIN_HELP + str(config.defaults()))
        return 0
    given, flags = config.load(argv, workdir=None)
    if not flags["workdir"]:
        raise config.ConfigError("no --workdir given: expected --workdir=DIR, a new or resumed run")
    from opd_jax import processes
    from opd_jax.run import train

    stop = processes.Stop()
    result = train.train(
        config.resolve(given),
        flags["workdir"],
        command=["opd-jax", "train", *argv],
        started=started,
        stop=stop,
    )
    return 0 if result["is_finished"] else stop.status


def _export(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("opd-jax export", description="Write a checkpoint for others.")
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--step", type=int, default=None, help="default: the newest good one")
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--dtype", default=None, help="of the weights; default: as trained")
    flags = parser.parse_args(argv)

    from opd_jax import processes
    from opd_jax.store import export

    step = export.export(flags.workdir, flags.out, step=flags.step, dtype=flags.dtype)
    processes.say(f"step {step} of {flags.workdir} is now the Hugging Face folder {flags.out}")
    return 0


def _generate(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("opd-jax generate", description="Answer a file of prompts.")
    parser.add_argument("--model", required=True, help="Hugging Face folder, or embedded:teacher")
    parser.add_argument("--prompts", required=True, help="JSONL with messages or prompt")
    parser.add_argument("--out", required=True, help="JSONL to write; must not exist")
    parser.add_argument("--max-new", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--samples", type=int, default=1, help="answers per prompt")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--limit", type=int, default=0, help="only the first prompts; 0: all")
    parser.add_argument("--batch", type=int, default=16, help="prompts at a time")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(argv)

    from opd_jax.evaluate import generate

    result = generate.generate(**vars(flags))
    print(result)
    return 0


def _rocks(argv: list[str]) -> int:

    from opd_jax.instrument import stages

    return stages.main(argv)


def _table(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("opd-jax table", description="Rock state of a checkpoint.")
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--step", type=int, default=None, help="default: the newest good one")
    parser.add_argument("--out", required=True, help="a new .csv file")
    flags = parser.parse_args(argv)

    from opd_jax.store import table

    step = table.table(flags.workdir, flags.out, step=flags.step)
    print(f"wrote the rock state of step {step} to {flags.out}")
    return 0


def _sweep(argv: list[str]) -> int:

    from opd_jax.run import sweep

    return sweep.main(argv)


def _report(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("opd-jax report", description="One self-contained HTML page.")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="workdirs of opd-jax train")
    parser.add_argument("--rocks", help="folder that opd-jax rocks wrote")
    parser.add_argument("--sweep", help="workdir of opd-jax sweep")
    parser.add_argument("--out", required=True, help="the .html file; replaces an older report")
    flags = parser.parse_args(argv)

    from opd_jax.report import build

    build.report(flags.runs, flags.out, rocks=flags.rocks, sweep=flags.sweep)
    print(f"wrote {flags.out}")
    return 0


def _figure(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("opd-jax figure", description="Draw a run.")
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--out", required=True, help="a .png, .svg or .pdf file")
    flags = parser.parse_args(argv)

    from opd_jax.report import run_figure

    run_figure.training(flags.workdir, flags.out)
    print(f"wrote {flags.out}")
    return 0
