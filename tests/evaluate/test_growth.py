"""How far a job is: one line that keeps up on a terminal, elsewhere a line per tenth."""

import io
import sys

import pytest

from opd_jax import processes
from opd_jax.evaluate import growth


class Terminal(io.StringIO):
    """What a terminal of 80 columns would show: a list of lines, the last of which grows."""

    def isatty(self) -> bool:
        return True

    def shown(self) -> list[str]:
        lines, column = [""], 0
        for part in self.getvalue().replace("\x1b[K", "\0"):
            if part == "\n":
                lines.append("")
                column = 0
            elif part == "\r":
                column = 0
            elif part == "\0":
                lines[-1] = lines[-1][:column]
            else:
                lines[-1] = lines[-1][:column] + part + lines[-1][column + 1 :]
                column += 1
        return lines


class Clock:
    """Seconds that pass when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_there_is_a_line_per_tenth(capsys):
    clock = Clock()
    progress = growth.Progress("answers", 1000, 0, processes.say, clock)
    for _ in range(250):
        clock.now += 0.5
        progress.add(4, [{"tokens": 8}])
    progress.tell()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" of ")[0] for line in lines] == [
        *(f"{number}" for number in range(100, 1000, 100)),
        "1,000",
    ]
    assert "\x1b" not in "".join(lines)


def test_a_quick_job_says_its_end_alone():
    said, clock = [], Clock()
    progress = growth.Progress("answers", 100, 0, said.append, clock)
    for _ in range(100):
        clock.now += 0.01
        progress.add(1, [])
    progress.tell()
    assert len(said) == 1
    assert said[0].endswith("took 1s")


def test_a_slow_job_does_not_look_dead():
    said, clock = [], Clock()
    progress = growth.Progress("answers", 1_000_000, 0, said.append, clock)
    for _ in range(12):
        clock.now += 200
        progress.add(1, [])
    assert len(said) == 3


def test_on_a_terminal_one_line_keeps_up(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    say = processes.indented(processes.say, "  ")
    processes.say("scores: a question")
    progress = growth.Progress("answers", 20, 0, say)
    for done in range(4, 20, 4):
        progress.add(4, [{"tokens": 8}], where="a task of a name that is longer than the line" * 2)
        assert terminal.shown()[:-1] == ["scores: a question"]
        assert terminal.shown()[-1].startswith(f"  {done} of 20 answers (a task")
        assert len(terminal.shown()[-1]) < 80
    progress.add(4, [{"tokens": 8}])
    progress.tell()
    processes.say("next")
    *_, last, next_, rest = terminal.shown()
    assert (last[:19], next_, rest) == ("  20 of 20 answers:", "next", "")
    assert len(terminal.shown()) == 4
    progress.add(1, [])
    processes.say.wipe()
    assert terminal.shown()[-1] == ""


def test_who_takes_lines_gets_no_passing_ones(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    said: list[str] = []
    clock = Clock()
    progress = growth.Progress("prompts", 30, 0, processes.indented(said.append, "> "), clock)
    for _ in range(30):
        clock.now += 5
        progress.add(1, [])
    progress.tell()
    assert len(said) == 10
    assert all(line.startswith("> ") for line in said)


def test_the_time_left_leaves_the_first_part_out():
    """It compiles: 50 s for the first 10 of 100, then 1 s each, of which 70 are left."""
    said, clock = [], Clock()
    progress = growth.Progress("prompts", 100, 0, said.append, clock)
    for seconds in (50.0, 10.0, 10.0):
        clock.now += seconds
        progress.add(10, [{"tokens": 70, "correct": True}] * 10)
    assert "~7m30s left" in said[0]
    assert said[2] == "30 of 100 prompts: right 100.0% of 30 new responses, 30 tokens/s, 1m10s left"


def test_what_an_earlier_process_did_is_no_pace_of_this_one():
    said, clock = [], Clock()
    progress = growth.Progress("prompts", 100, 80, said.append, clock)
    for _ in range(2):
        clock.now += 5.0
        progress.add(5, [])
    assert said == ["90 of 100 prompts: 10s left"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m00s"), (3599, "59m59s"), (7860, "2h11m"), (183600, "2d03h"),
     (float("nan"), "-")],
)  # fmt: skip
def test_durations_in_words(seconds, text):
    assert growth.duration(seconds) == text
