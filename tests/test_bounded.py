"""Work within bounds: what takes too long, too much memory or fails is an error that names it."""

import resource
import time

import pytest

from opd_jax import bounded
from opd_jax.bounded import BoundError


def refused(work, **bounds) -> str:
    with pytest.raises(BoundError) as caught:
        bounded.run(work, change="mend it", **bounds)
    message = str(caught.value)
    assert message.endswith("mend it")
    return message


def test_a_result_comes_back_and_errors_are_the_works_own():
    assert bounded.run(lambda begin: 3, change="") == 3

    def fails(begin):
        raise KeyError("own")

    with pytest.raises(KeyError, match="own"):
        bounded.run(fails, change="")


def test_time_is_counted_per_item():
    def slow(begin):
        for i in range(6):
            begin(f"line {i}")
            time.sleep(0.1)
        return "done"

    assert bounded.run(slow, change="", seconds=0.4) == "done"


def test_a_loop_for_ever_is_given_up_and_its_thread_ends():
    seen = []

    def loops(begin):
        begin("line 7")
        while True:
            seen.append(time.monotonic())

    assert refused(loops, seconds=0.2).startswith("line 7 took longer than 0.2 s")
    time.sleep(0.3)
    last = seen[-1]
    time.sleep(0.2)
    assert seen[-1] == last


@pytest.mark.skipif(bounded._address_space() is None, reason="only Linux tells a process's size")
def test_memory_is_bounded_and_the_limit_put_back():
    before = resource.getrlimit(resource.RLIMIT_AS)

    def grows(begin):
        begin("line 3")
        return len(b"x" * (1 << 31))

    assert refused(grows).startswith("line 3 needs more than 1 GiB")
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert len(b"x" * (1 << 31)) == 1 << 31


def test_a_panic_is_an_error():
    class Panic(BaseException):
        pass

    def panics(begin):
        begin("line 1")
        raise Panic("index out of range")

    assert "line 1 failed (index out of range)" in refused(panics)
