"""The real command on several devices and processes, as a user starts it."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

DEADLINE_S = 600.0  # of one command on a busy machine, compiling included


@dataclasses.dataclass(frozen=True)
class Layout:
    """Devices and processes that a command is started on, and the mesh it is told to make."""

    name: str
    devices: int  # of each process
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    processes: int = 1

    @property
    def flags(self) -> list[str]:
        """The mesh as flags of ``opd-jax train``."""
        return [f"--config.mesh.{axis}={size}" for axis, size in self.mesh.items()]


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("one", 1),
        Layout("data4", 4),
        Layout("fsdp2-model2", 4, {"fsdp": 2, "model": 2}),
        Layout("2x2x2", 8, {"data": 2, "fsdp": 2, "model": 2}),
        Layout("two-by-four", 4, {"data": 2, "fsdp": 2, "model": 2}, processes=2),
        Layout("two-processes", 2, {"fsdp": 2}, processes=2),
    )
}


# jax writes into its cache what process 0 compiled, and no more. The others have programs of their
# own, by keys of their own: without this they compile each time what process 0 finds there, which
# then waits for them in a collective, but not for long (gloo gives up after 30 s).
EACH_KEEPS = """
from unittest import mock
from jax._src import compiler, distributed
def keep(*args, write=compiler._cache_write):
    with mock.patch.object(distributed.global_state, "process_id", 0):
        write(*args)
compiler._cache_write = keep
"""
# One process writes what is one: where another opens a file to write it, or makes, moves or removes
# one, two of them may do so at the same time, and one finds its half gone. Its own are programs it
# has compiled, and its part of a checkpoint.
ONE_WRITES = """
import os, sys
def refuse(event, args):
    if event == "open":
        path, _, flags = args
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"):
        path = args[0]
    else:
        return
    path = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
    if not path or path.startswith(("/dev/", "/proc/", OF_EACH)) or "/checkpoints/" in path:
        return
    raise RuntimeError(f"a process that is not the first one changes a file: {event} {path}")
if "--process-index=0" not in sys.argv:
    OF_EACH = os.environ["JAX_COMPILATION_CACHE_DIR"]
    sys.addaudithook(refuse)
"""
# Where nothing lies that process 0 has and the others have not.
CACHE_OF_EACH = {
    "JAX_COMPILATION_CACHE_DIR": os.path.join(os.environ["JAX_COMPILATION_CACHE_DIR"], "each")
}


def start(
    layout: Layout, argv: Sequence[str], code: str = "", variables: dict[str, str] | None = None
) -> list[subprocess.Popen]:
    """Start one command on a layout, in as many processes as it has.

    Args:
      layout: where.
      argv: command line after ``opd-jax``.
      code: statements before the command, to patch it.
      variables: of the environment.
    """
    code = (EACH_KEEPS + ONE_WRITES) * (layout.processes > 1) + code
    program = f"import sys\n{code}\nfrom opd_jax import cli\nsys.exit(cli.main(sys.argv[1:]))"
    flags = os.environ.get("XLA_FLAGS", "")
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={layout.devices}",
        "PYTHONUNBUFFERED": "1",
    }
    if layout.processes > 1:
        env |= CACHE_OF_EACH
    found = []
    address = f"127.0.0.1:{free_port()}"
    for index in range(layout.processes):
        several = [
            f"--coordinator={address}",
            f"--num-processes={layout.processes}",
            f"--process-index={index}",
        ]
        found.append(
            subprocess.Popen(
                [sys.executable, "-c", program, *argv, *several * (layout.processes > 1)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=env | (variables or {}),
            )
        )
    return found


def finish(started: Sequence[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit status and output of every process; kills what does not end in time."""
    results = []
    deadline = time.monotonic() + DEADLINE_S
    for process in started:
        try:
            text, _ = process.communicate(timeout=max(deadline - time.monotonic(), 1.0))
        except subprocess.TimeoutExpired:
            process.kill()
            text = f"{process.communicate()[0]}\nkilled after {DEADLINE_S} s"
        results.append((process.returncode, text))
    return results


def run(layout: Layout, argv: Sequence[str], status: int = 0, **kwargs) -> str:
    """Run one command on a layout; the output of process 0."""
    results = finish(start(layout, argv, **kwargs))
    assert [code for code, _ in results] == [status] * layout.processes, "\n".join(
        text[-3000:] for _, text in results
    )
    return results[0][1]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
