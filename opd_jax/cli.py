"""The ``opd-jax`` command: one table of commands, and what all of them do about errors."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from opd_jax import command


class Command(NamedTuple):
    """One command: the function that takes its flags, and what it is for."""

    function: str  # module:name
    purpose: str
    has_config: bool = False  # else a mesh is asked for by flags of its own
    is_of_one: bool = False  # does nothing on devices: of several processes the first one runs it


COMMANDS = {
    "train": Command("run.launch:main", "distil on-policy, or resume", True),
    "export": Command("store.export:main", "write a checkpoint as a Hugging Face folder"),
    "generate": Command("evaluate.generate:main", "sample answers to a file of prompts"),
    "eval": Command("evaluate.command:main", "grade models on tasks, and compare two of them"),
    "lm-eval": Command("evaluate.harness:main", "lm-evaluation-harness with our models"),
    "rocks": Command("instrument.stages:main", "find the tokens that carry most of the KL"),
    "knockout": Command("instrument.knockout.command:main", "ban tokens, see which answers flip"),
    "table": Command("store.table:main", "write a checkpoint's rock state, type by type"),
    "sweep": Command("run.sweep:main", "train arms x seeds and compare them", True),
    "report": Command(
        "report.command:report", "one page of runs, rocks and a sweep", is_of_one=True
    ),
    "figure": Command(
        "report.command:figure", "draw a run's training curves and rock tokens", is_of_one=True
    ),
    "plan": Command(
        "plan.command:main", "say what a run takes on a machine, without having it", True, True
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status; an error a user can act on is one message."""
    command.begun = time.monotonic()
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["help"] and argv[1:]:
        return _help_on(" ".join(argv[1:]))
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        known = command.nearest(argv[0], COMMANDS)
        print(
            f"opd-jax: unknown command {argv[0]!r}{known}; expected one of {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    try:
        status = _run(argv[0], argv[1:])
    except SystemExit as error:  # a command line that was refused, or asked for help
        _leave(error.code)
        raise
    _leave(status)
    return status


def _leave(status: object) -> None:
    """Where one of several processes failed, end it at once."""
    if isinstance(status, int) and status:
        from opd_jax import processes

        sys.stdout.flush()
        sys.stderr.flush()
        processes.leave(status)


def _help() -> str:
    lines = [f"  {name:<10} {given.purpose}" for name, given in COMMANDS.items()]
    return "\n".join(
        [
            "usage: opd-jax COMMAND ...\n",
            *lines,
            "\nopd-jax COMMAND --help says more, opd-jax help KEY what a key of train's --config "
            "means,\nopd-jax help --markdown what all of them do, as a page.\nEvery command takes",
            command.PROCESSES,
        ]
    )


def _help_on(named: str) -> int:
    """Describe a command, or a key or a group of the configuration."""
    if named in COMMANDS:
        return main([named, "--help"])
    from opd_jax import glossary

    try:
        print(glossary.page() if named == "--markdown" else glossary.text(named.lstrip("-")))
    except ValueError as error:
        print(f"opd-jax help: {error}", file=sys.stderr)
        return 2
    return 0


def _run(name: str, argv: list[str]) -> int:
    try:
        with _passing_line_ends(), _sigterm_unwinds():
            rest = _prepare_jax(argv)
            if COMMANDS[name].is_of_one:
                from opd_jax import processes

                return processes.of_first(lambda: _function(name)(rest))
            return _function(name)(rest)
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
        if not COMMANDS[name].has_config:
            message = message.replace("--config.mesh.", "--mesh-")
        print(f"opd-jax {name}: {command.shortened(message)}", file=sys.stderr)
        print("(OPD_JAX_TRACE=1 shows where it was raised)", file=sys.stderr)
        return 1


def _function(name: str) -> Callable[[list[str]], int]:
    module, _, function = COMMANDS[name].function.partition(":")
    return getattr(importlib.import_module(f"opd_jax.{module}"), function)


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


@contextlib.contextmanager
def _passing_line_ends() -> Iterator[None]:
    """Leave no line of progress behind a message on how a block ended."""
    try:
        yield
    finally:
        from opd_jax import processes

        processes.say.wipe()


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
    from opd_jax.evaluate.judge import JudgeError
    from opd_jax.run.guards import NonFiniteError, RunawayError
    from opd_jax.store.checkpoint import CheckpointError
    from opd_jax.store.workdir import WorkdirError

    errors = (ValueError, OSError, ImportError, CheckpointError, WorkdirError, NonFiniteError)
    return (*errors, RunawayError, JudgeError)


def _prepare_jax(argv: list[str]) -> list[str]:
    """Join the other processes and keep compiled programs between runs; returns the other flags."""
    from opd_jax import processes

    rest, given = processes.take_flags(argv)
    processes.join(given)
    command.keep_programs()
    return rest
