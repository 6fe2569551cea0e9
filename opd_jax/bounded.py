"""Work that files decide the size of, within bounds of time and memory.

A chat template is a program, and a tokenizer's patterns may search for ever: what a model folder
brings must not be able to hang a command, or eat a machine. The work runs in a thread of its own,
which is given up when it stays too long with one item.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

with contextlib.suppress(ImportError):  # not on Windows
    import resource

T = TypeVar("T")
SECONDS = 30.0  # for one item; a prompt of a million characters takes a few
NUM_BYTES = 1 << 30  # that one item may add to the process
_LOOK_S = 0.05


class BoundError(ValueError):
    """Something took longer, or more memory, than it may; the message names it."""


class _GivenUp(BaseException):
    """Ends the thread of work that is given up, where it is in Python code."""


def run(
    work: Callable[[Callable[[str], None]], T],
    *,
    change: str,
    seconds: float | None = None,
    num_bytes: int | None = None,
) -> T:
    """Do work item by item, each within bounds, and return its result.

    Args:
      work: is given a function to call with the name of each item before it begins.
      change: what to do about an item out of bounds, for the message.
      seconds: for one item; default: ``SECONDS``.
      num_bytes: that the process may grow by during one item (on Linux); default: ``NUM_BYTES``.

    Raises:
      BoundError: an item was out of bounds. Code outside Python cannot be interrupted: it goes on
        in the background until the process ends.
    """
    seconds = SECONDS if seconds is None else seconds
    state = _State(NUM_BYTES if num_bytes is None else num_bytes)
    outcome: list[T] = []
    failed: list[BaseException] = []

    def body() -> None:
        with contextlib.suppress(_GivenUp):  # wherever it comes
            try:
                outcome.append(work(state.begin))
            except _GivenUp:
                raise
            except BaseException as error:  # raised again where the caller can see it
                failed.append(error)

    thread = threading.Thread(target=body, name="bounded work", daemon=True)
    with state.limited():
        thread.start()
        while thread.is_alive():
            thread.join(_LOOK_S)
            if thread.is_alive() and time.monotonic() - state.since > seconds:
                _give_up(thread)
                raise BoundError(
                    f"{state.item} took longer than {seconds:g} s: expected far less; {change}"
                )
    if failed and isinstance(failed[0], MemoryError):
        raise BoundError(
            f"{state.item} needs more than {state.num_bytes / 2**30:.3g} GiB of memory: expected "
            f"far less; {change}"
        ) from failed[0]
    if failed and not isinstance(failed[0], Exception):  # such as a panic of Rust's
        raise BoundError(f"{state.item} failed ({failed[0]}); {change}") from failed[0]
    if failed:
        raise failed[0]
    return outcome[0]


class _State:
    """The item that is worked on, since when, and how large the process may get by it."""

    def __init__(self, num_bytes: int):
        self.item, self.since, self.num_bytes = "the first item", time.monotonic(), num_bytes
        self.most = -1  # what the process may have anyway

    def begin(self, item: str) -> None:
        self.item, self.since = item, time.monotonic()
        self._limit()

    def _limit(self) -> None:
        size = _address_space()
        if size is None:
            return
        soft, hard = size + self.num_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]
        if self.most != -1:
            soft = min(soft, self.most)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    @contextlib.contextmanager
    def limited(self) -> Iterator[None]:
        if _address_space() is None:
            yield
            return
        self.most, hard = resource.getrlimit(resource.RLIMIT_AS)
        self._limit()
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (self.most, hard))


def _address_space() -> int | None:
    """Bytes of the process's address space; None where nothing tells."""
    try:
        with open("/proc/self/statm", "rb") as stream:
            return int(stream.read().split()[0]) * resource.getpagesize()
    except (OSError, NameError):
        return None


def _give_up(thread: threading.Thread) -> None:
    ident = ctypes.c_ulong(thread.ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(_GivenUp))
