"""Several runs at once on one machine: a process each, on its own part of the devices.

A process, and not a thread, since a run that fails or is killed then takes no other with it, and
since jax gives each its own memory. GPUs are dealt out by number, CPU cores by affinity.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from opd_jax import processes

_POLL_S = 0.2
_CLI = "import sys; from opd_jax import cli; sys.exit(cli.main())"
_TOLD_LINES = 5  # of the console of a run that failed


class CrewError(ValueError):
    """The machine cannot be dealt out so, or a run failed; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A part of the machine.

    Attributes:
      environ: variables of the process that has it.
      cores: CPU cores that the process may use; None: all.
    """

    environ: Mapping[str, str]
    cores: frozenset[int] | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """A command to be run.

    Attributes:
      name: to be told by.
      argv: of a process.
      console: file that what it prints is appended to.
    """

    name: str
    argv: tuple[str, ...]
    console: Path


def places(count: int, environ: Mapping[str, str] | None = None) -> list[Place]:
    """The machine in ``count`` equal parts, without starting jax on any of it.

    Args:
      count: of processes at once.
      environ: default: ``os.environ``.

    Raises:
      CrewError: there are fewer GPUs or cores than that, or a TPU, whose chips one process has.
    """
    environ = os.environ if environ is None else environ
    asked = environ.get("JAX_PLATFORMS", "")
    if asked in ("", "cuda", "gpu") and (gpus := _gpus(environ)):
        if count > len(gpus):
            raise CrewError(
                f"{count} runs at once on {len(gpus)} GPUs: expected at most one a GPU; lower "
                "--at-once"
            )
        size = len(gpus) // count
        parts = [gpus[i * size : (i + 1) * size] for i in range(count)]
        return [Place({"CUDA_VISIBLE_DEVICES": ",".join(part)}) for part in parts]
    if asked.startswith("tpu") or (not asked and Path("/dev/accel0").exists()):
        raise CrewError(
            f"{count} runs at once on a TPU: expected 1, since one process has all chips of a "
            "host; leave --at-once out, or start single runs with --only on other hosts"
        )
    if not hasattr(os, "sched_getaffinity"):  # macOS: the processes share the cores
        return [Place({})] * count
    cores = sorted(os.sched_getaffinity(0))
    if count > len(cores):
        raise CrewError(
            f"{count} runs at once on {len(cores)} CPU cores: expected at most one a core; lower "
            "--at-once"
        )
    return [Place({}, frozenset(cores[i::count])) for i in range(count)]


def run(
    tasks: Sequence[Task],
    parts: Sequence[Place],
    stop: processes.Stop,
    *,
    say: Callable[[str], None],
    ended: Callable[[Task], str] = lambda task: "",
) -> bool:
    """Run tasks, as many at once as there are places, in their order.

    A wish to stop is passed on to the processes, which save and end. After a task has failed no
    other is started, and those that run are let finish.

    Args:
      tasks: what to run.
      parts: of the machine.
      stop: the wish to stop.
      say: receives a line where a task starts and ends.
      ended: what more there is to say of a task that has ended well.

    Returns:
      Whether all are done; False: a signal stopped them.

    Raises:
      CrewError: one failed; the end of what it printed is in the message.
    """
    waiting, free = collections.deque(enumerate(tasks, 1)), collections.deque(parts)
    running: dict[subprocess.Popen, tuple[Task, Place, float]] = {}
    failed: list[tuple[Task, int]] = []
    is_told = False
    try:
        while running or (waiting and not stop.number and not failed):
            while waiting and free and not stop.number and not failed:
                number, task = waiting.popleft()
                place = free.popleft()
                say(f"== {number}/{len(tasks)}: {task.name}; its console: {task.console}")
                running[_start(task, place)] = (task, place, time.monotonic())
            if stop.number and not is_told:
                is_told = True
                _signal(running, signal.SIGTERM)
            for process in _ended(running):
                task, place, begun = running.pop(process)
                free.append(place)
                if process.returncode == 0:
                    more = ended(task)
                    took = time.monotonic() - begun
                    say(f"{task.name} done in {took:.0f} s{': ' * bool(more)}{more}")
                elif not stop.number:
                    failed.append((task, process.returncode))
                    say(f"{task.name} failed; {len(running)} others are let finish")
    finally:
        _signal(running, signal.SIGTERM)  # an error of this process: nothing goes on unseen
    if failed:
        task, status = failed[0]
        raise CrewError(
            f"{task.name} failed with status {status}; {task.console} ends:\n"
            + "\n".join(f"  {line}" for line in _last_lines(task.console))
            + "\nexpected status 0; mend what it says, and the same command goes on"
        )
    return not waiting and not stop.number


def _start(task: Task, place: Place) -> subprocess.Popen:
    task.console.parent.mkdir(parents=True, exist_ok=True)
    with task.console.open("ab") as console:
        # A session of its own: Ctrl-C reaches this process alone, which passes it on once.
        process = subprocess.Popen(
            task.argv,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(place.environ),
            start_new_session=True,
        )
    if place.cores is not None:
        # From here, since a function run between fork and exec is unsafe beside jax's threads; what
        # the process starts later inherits it.
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.sched_setaffinity(process.pid, place.cores)
    return process


def _ended(running: Mapping[subprocess.Popen, object]) -> Iterator[subprocess.Popen]:
    time.sleep(_POLL_S)
    yield from [process for process in running if process.poll() is not None]


def _signal(running: Mapping[subprocess.Popen, object], number: int) -> None:
    for process in running:
        if process.poll() is None:
            process.send_signal(number)


def _gpus(environ: Mapping[str, str]) -> list[str]:
    """Names of the NVIDIA GPUs that processes may use; none where there is no driver."""
    if (given := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return found.stdout.split()


def _last_lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if line.strip()][-_TOLD_LINES:]


def command(*flags: str) -> tuple[str, ...]:
    """The ``opd-jax`` command in a process of its own."""
    return (sys.executable, "-c", _CLI, *flags)
