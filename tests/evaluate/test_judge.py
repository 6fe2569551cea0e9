"""math-verify in its own process: verdicts, exactness, and what it does with hard cases."""

import os
import subprocess
import sys
import threading
import time

import pytest

from opd_jax.evaluate import judge


@pytest.mark.parametrize(
    ("answer", "gold", "verdict"),
    [
        ("1+x", "x+1", judge.EQUAL),
        (r"\sqrt{8}", r"2\sqrt{2}", judge.EQUAL),
        (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", judge.EQUAL),
        ("(1+i)^{2}", "2i", judge.EQUAL),
        ("y=2x+1", "2y-4x=2", judge.EQUAL),
        ("x<3", "3>x", judge.EQUAL),
        ("-2x>-6", "x<3", judge.EQUAL),
        (r"\sum_{k=1}^{3} k", "6", judge.EQUAL),
        ("f(x)+1", "1+f(x)", judge.EQUAL),
        (r"\begin{pmatrix}1+1\\2\end{pmatrix}", r"\begin{pmatrix}2\\2\end{pmatrix}", judge.EQUAL),
        ("x-1", "x+1", judge.DIFFERENT),
        (r"\sqrt{2}+10^{-20}", r"\sqrt{2}", judge.DIFFERENT),
        (r"10^{-30}x", r"2\cdot 10^{-30}x", judge.DIFFERENT),
        (r"\sqrt{x^{2}}", "x", judge.DIFFERENT),
        ("x<3", r"x\le 3", judge.DIFFERENT),
        ("x<3", "x>3", judge.DIFFERENT),
        ("a<b<c", "a<d<c", judge.DIFFERENT),
        ("f(x)", "g(x)", judge.DIFFERENT),
        (r"\begin{pmatrix}1\\3\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}",
         judge.DIFFERENT),
        (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}",
         judge.DIFFERENT),
        ("(((", "x+1", judge.UNREADABLE),
        ("\ud800", "x+1", judge.UNREADABLE),
    ],
)  # fmt: skip
def test_verdicts(answer, gold, verdict):
    assert judge.ask(answer, gold) == verdict


def test_it_is_ended_when_it_takes_too_long_and_serves_again(monkeypatch):
    assert judge.ask("x+2", "2+x") == judge.EQUAL
    monkeypatch.setattr(judge, "SECONDS", 0.5)
    start = time.monotonic()
    assert judge.ask("x^{9^{9^{9}}}", "x+1") == judge.GAVE_UP
    assert time.monotonic() - start < 3
    monkeypatch.undo()
    assert judge.ask("x+3", "3+x") == judge.EQUAL


def test_it_serves_every_thread():
    found = {}

    def ask(number):
        found[number] = judge.ask(f"x+{number}", f"{number}+x")

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(10, 14)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(10, 14), judge.EQUAL)


def test_a_process_that_does_not_start_is_an_error_and_not_a_wrong_answer(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no such module')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    broken = judge._Judge()
    with pytest.raises(judge.JudgeError, match=r"(?s)exit .*no such module"):
        broken.ask("x", "y")


def test_a_command_that_ends_leaves_no_process_behind():
    code = (
        "from opd_jax.evaluate import judge; judge.ask('x+1', '1+x');print(judge._judge._child.pid)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.stdout), 0)
