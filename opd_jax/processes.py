"""The processes of one run: how they find one another, agree and wait, and what a lost one means.

A run is started once on every host, with the same command. On a TPU pod, under SLURM and under Open
MPI jax finds the others itself; elsewhere three flags (or variables) say where they are.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

T = TypeVar("T")
# A process that sends no sign of life for so long counts as lost, and the others end.
LOST_AFTER_S = 60
# How long the last process of a run waits for the others to end as well.
_END_WITHIN_S = 60
# How long the first one stays after a failure, so that the others can say why they end.
_LINGER_S = 1.0
FLAGS = {  # flag -> the variable that says the same
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num-processes": "JAX_NUM_PROCESSES",
    "process-index": "JAX_PROCESS_ID",
}
AUTO = "auto"
# Jobs whose processes jax can find: the variable that tells, and when it tells of several.
_CLUSTERS: dict[str, Callable[[str], bool]] = {
    "TPU_WORKER_HOSTNAMES": lambda value: "," in value,
    "TPU_PROCESS_ADDRESSES": lambda value: "," in value,
    "SLURM_NTASKS": lambda value: value not in ("", "1"),
    "OMPI_COMM_WORLD_SIZE": lambda value: value not in ("", "1"),
}
# What the runtimes say when a collective lost its partner.
_LOST = (
    "gloo",
    "connection reset",
    "connection closed",
    "broken pipe",
    "coordination",
    "heartbeat",
    "unavailable",
    "nccl",
    "barrier",
)


class ProcessesError(ValueError):
    """The processes of a run cannot find one another; the message says what to change."""


def take_flags(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Split a command line into the rest and the values of ``FLAGS``, variables filled in.

    Raises:
      ProcessesError: a flag without its value.
    """
    given = {flag: os.environ[name] for flag, name in FLAGS.items() if os.environ.get(name)}
    rest, items = [], list(argv)
    while items:
        item = items.pop(0)
        name, equals, value = item.removeprefix("--").partition("=")
        if not item.startswith("--") or name not in FLAGS:
            rest.append(item)
            continue
        if not equals:
            value = items.pop(0) if items else ""
        if not value or value.startswith("--"):
            raise ProcessesError(f"--{name} has no value: expected one; give --{name}=...")
        given[name] = value
    return rest, given


def join(given: Mapping[str, str], environ: Mapping[str, str] | None = None) -> None:
    """Join the other processes where this is one of several; else do nothing.

    Args:
      given: values of ``FLAGS``.
      environ: where a cluster is looked for; default: ``os.environ``.

    Raises:
      ProcessesError: some flags are missing and no cluster supplies them, a value is out of range,
        or the others were not found in time.
    """
    environ = os.environ if environ is None else environ
    is_cluster = any(several(environ.get(name, "")) for name, several in _CLUSTERS.items())
    if jax.distributed.is_initialized() or not (given or is_cluster):
        return
    if given.get("coordinator") == AUTO:
        given, is_cluster = {name: v for name, v in given.items() if name != "coordinator"}, True
    address, count, index = _checked(given, is_cluster)
    if count == 1:
        return
    # Where it is told all, jax need not look around: it would also decide that a process has one
    # device, the one of its number on its host, whatever its job gave it.
    is_told = None not in (address, count, index)
    try:
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=count,
            process_id=index,
            cluster_detection_method="deactivate" if is_told else None,
            heartbeat_timeout_seconds=LOST_AFTER_S,
            shutdown_timeout_seconds=_END_WITHIN_S,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise ProcessesError(
            f"this process could not join the others ({_short(error)}): expected {count or 'all'} "
            f"processes of the same command that reach {address or 'the coordinator'}; start them "
            "together, and check --coordinator, --num-processes and --process-index"
        ) from error


def _checked(
    given: Mapping[str, str], is_cluster: bool
) -> tuple[str | None, int | None, int | None]:
    missing = [flag for flag in FLAGS if flag not in given]
    if missing and not is_cluster:
        named = ", ".join(f"--{flag} (or {FLAGS[flag]})" for flag in missing)
        found = ", ".join(f"{flag} {value}" for flag, value in given.items())
        raise ProcessesError(
            f"got {found} and no {named}: expected all three, as no cluster was detected that "
            "supplies the rest; give them, or none for a run of one process"
        )
    numbers: dict[str, int | None] = {}
    for flag in ("num-processes", "process-index"):
        text = given.get(flag)
        if text is not None and not text.isdecimal():
            raise ProcessesError(f"--{flag} is {text!r}: expected a whole number; correct it")
        numbers[flag] = None if text is None else int(text)
    count, index = numbers["num-processes"], numbers["process-index"]
    if count is not None and not (count >= 1 and (index is None or index < count)):
        raise ProcessesError(
            f"--process-index is {index} of --num-processes {count}: expected 0 to {count - 1}; "
            "number the processes from 0"
        )
    address = given.get("coordinator")
    if address is not None and not address.rpartition(":")[2].isdecimal():
        raise ProcessesError(
            f"--coordinator is {address!r}: expected HOST:PORT, the address of process 0 and a "
            "free port there; add the port"
        )
    return address, count, index


class Printer:
    """Prints lines, on the first process only: ``say(line)``.

    Args:
      before: stands before each line.
    """

    def __init__(self, before: str = ""):
        self._before = before

    @property
    def is_live(self) -> bool:
        """Whether lines go to a terminal, where one can take the place of another."""
        return sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb")

    def __call__(self, line: str) -> None:
        """Print a line, in the place of a passing one."""
        if jax.process_index() == 0:
            print(f"{_WIPE * self.is_live}{self._before}{line}", flush=True)

    def passing(self, line: str) -> None:
        """Show a line until the next one; nothing without a terminal."""
        if jax.process_index() == 0 and self.is_live:
            # Wrapped, it would leave its first half behind; at its start, all who print wipe it.
            text = f"{self._before}{line}"[: shutil.get_terminal_size().columns - 1]
            print(f"{_WIPE}{text}", end="\r", flush=True)

    def wipe(self) -> None:
        """Remove the passing line where one is shown."""
        if jax.process_index() == 0 and self.is_live:
            print(_WIPE, end="", flush=True)

    def indented(self, before: str) -> Printer:
        """The same with more before each line."""
        return Printer(self._before + before)


_WIPE = "\x1b[K"  # ECMA-48: erase from here to the end of the line
say = Printer()


def indented(say: Callable[[str], None], before: str) -> Callable[[str], None]:
    """Say lines with something before each."""
    if isinstance(say, Printer):
        return say.indented(before)
    return lambda line: say(f"{before}{line}")


def meet(what: str) -> None:
    """Wait for all processes: the others read what process 0 has written."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def agreed(number: int) -> int:
    """The number that process 0 has, on every process: one looks, so that all see the same."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int64(number)))


def largest(number: int) -> int:
    """The largest number that any process has, on every process."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int64(number)).max())


def agreed_text(text: str) -> str:
    """The text that process 0 has, on every process."""
    if jax.process_count() == 1:
        return text
    from jax.experimental import multihost_utils

    data = np.frombuffer(text.encode(), np.uint8)
    size = agreed(data.size)
    if not size:
        return ""
    data = np.resize(data, size) if data.size else np.zeros(size, np.uint8)  # others' is dropped
    return bytes(multihost_utils.broadcast_one_to_all(data)).decode()


def on_first(action: Callable[[], object]) -> None:
    """Run something on process 0 alone, the others wait; where it fails there, it fails everywhere.

    Raises:
      ProcessesError: on the other processes, where process 0 raised; its message says why.
    """
    error = None
    agreed(0)  # once connected, the others wait as long as it takes; to connect, gloo has 30 s
    if jax.process_index() == 0:
        try:
            action()
        except (Exception, SystemExit) as caught:  # a command line that is refused exits
            error = caught
    if agreed(int(error is not None)):
        raise error or ProcessesError("process 0 refused to go on; its message says why")


def of_first(look: Callable[[], T]) -> T:
    """What process 0 finds, on every process; where it fails there, it fails everywhere.

    One looks into the files that one writes: the others may not see yet what has just been written.

    Args:
      look: runs on process 0; the others get its value by way of JSON.

    Raises:
      ProcessesError: as :func:`on_first`.
    """
    if jax.process_count() == 1:
        return look()
    told: list[str] = []
    on_first(lambda: told.append(json.dumps(look())))
    return json.loads(agreed_text("".join(told)))


def check_same(what: Mapping[str, object], change: str) -> None:
    """Check that all processes were started with the same values as process 0.

    Args:
      what: values by name, JSON-able.
      change: what to do about a difference.

    Raises:
      ProcessesError: they differ; names the first differences with both values.
    """
    own = json.loads(json.dumps(what))
    first = json.loads(agreed_text(json.dumps(what)))
    differs = [name for name in sorted({*own, *first}) if own.get(name) != first.get(name)]
    if largest(int(bool(differs))):
        named = "; ".join(f"{n} is {own.get(n)!r}, {first.get(n)!r} there" for n in differs[:3])
        raise ProcessesError(
            f"process {jax.process_index()} of {jax.process_count()} was started otherwise than "
            f"process 0 ({named or 'another process differs'}): expected the same; {change}"
        )


class Stop:
    """Turns SIGTERM and SIGINT, while entered, into a wish to stop; a second one is obeyed.

    Entered again inside, by one of many runs, it stays the same wish.
    """

    def __init__(self):
        self.number = 0  # of the signal that came; 0: none
        self._old: dict[int, Any] = {}
        self._depth = 0

    @property
    def signal(self) -> str | None:
        """Name of the signal that came."""
        return signal.Signals(self.number).name if self.number else None

    @property
    def status(self) -> int:
        """Exit status of a command that the signal stopped, as a shell has it; 0 without one."""
        return 128 + self.number if self.number else 0

    def __enter__(self) -> Stop:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, old in self._old.items():
                signal.signal(number, old)

    def _note(self, number: int, frame: Any) -> None:
        self.number = number
        signal.signal(number, self._old[number])

    def everywhere(self) -> bool:
        """Whether any process was told to stop; the same answer on all of them."""
        self.number = largest(self.number)
        return self.number > 0


def explain(error: BaseException) -> str | None:
    """What a failed collective means for this process; None for any other error."""
    text = str(error).lower()
    if jax.process_count() == 1 or not any(word in text for word in _LOST):
        return None
    return (
        f"process {jax.process_index()} of {jax.process_count()} lost another process "
        f"({_short(error)}): expected all of them until the end; look there for the cause, then "
        "start the same command on all again, which goes on from the last checkpoint"
    )


def leave(status: int) -> None:
    """End this process at once where it is one of several; else do nothing.

    The orderly way out waits for processes that may themselves be waiting for this one.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        if jax.process_index() == 0:  # its end aborts the others
            time.sleep(_LINGER_S)
        os._exit(status)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
