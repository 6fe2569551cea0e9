r"""math-verify, in a process of its own that is ended when it takes too long or too much memory.

sympy can stay inside one C call where no alarm reaches it, and can eat a machine; the process that
asks cannot be hurt by that. It is started with the first expression and serves all that follow.

Beside math-verify's verdict stands a check of exactness: math-verify rounds floats to six places
and compares chains of relations by their ends, so what it parses is compared number by number at
60 digits (variables at random values), and relation by relation. Decimals arrive here as fractions.

The protocol: one JSON list ``[answer, gold]`` a line in, one JSON string out, a word below.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from typing import Any

EQUAL, DIFFERENT, UNREADABLE, GAVE_UP = "equal", "different", "unreadable", "gave up"
SECONDS = 6.0  # for one verdict
_START_SECONDS = 120.0  # to import sympy on a busy machine
_NUM_BYTES = 2 << 30
_DIGITS = 60
_POINTS = 8


class JudgeError(RuntimeError):
    """math-verify cannot be asked at all."""


def is_installed() -> bool:
    """Whether math-verify is there to be asked."""
    return importlib.util.find_spec("math_verify") is not None


@functools.lru_cache(maxsize=4096)
def ask(answer: str, gold: str) -> str:
    """Whether two expressions are equal: one of the four words above.

    Raises:
      JudgeError: math-verify is not installed, or its process does not start.
    """
    if not is_installed():
        raise JudgeError(
            f"the gold answer {gold!r} is an expression, the response says {answer!r}, and "
            "math-verify is not installed: expected it for comparing expressions; "
            "pip install 'opd-jax[eval]'"
        )
    return _judge.ask(answer, gold)


class _Judge:
    """The process, started when first needed and again after it was ended."""

    def __init__(self):
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask(self, answer: str, gold: str) -> str:
        try:
            line = json.dumps([answer, gold]) + "\n"
            line.encode()
        except UnicodeEncodeError:
            return UNREADABLE
        with self._lock:
            child = self._started()
            assert child.stdin is not None
            try:
                child.stdin.write(line)
                child.stdin.flush()
                told = self._lines.get(timeout=SECONDS)
            except (OSError, queue.Empty):
                told = ""
            if not told:  # out of time, out of memory, or gone
                self.end()
                return GAVE_UP
            return json.loads(told)

    def _started(self) -> subprocess.Popen[str]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self.end()
        child = subprocess.Popen(
            [sys.executable, "-c", "from opd_jax.evaluate import judge; judge.serve()"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # an interrupt of the command is not its own
        )
        self._child, self._lines = child, queue.SimpleQueue()
        threading.Thread(target=_read, args=(child.stdout, self._lines), daemon=True).start()
        said: list[str] = []
        threading.Thread(target=_keep, args=(child.stderr, said), daemon=True).start()
        try:
            ready = self._lines.get(timeout=_START_SECONDS)
        except queue.Empty:
            ready = ""
        if not ready:
            code = child.poll()
            self.end()
            raise JudgeError(
                f"math-verify failed in a process of its own (exit {code}): expected it to start; "
                f"reinstall it with pip install 'opd-jax[eval]'. It said: {''.join(said)[-400:]}"
            )
        return child

    def end(self) -> None:
        """End the process."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout, child.stderr):
            if stream is not None:
                with contextlib.suppress(OSError, ValueError):
                    stream.close()


def _read(stream: Any, lines: queue.SimpleQueue[str]) -> None:
    with contextlib.suppress(ValueError, OSError):  # closed meanwhile
        for line in stream:
            lines.put(line)
    lines.put("")


def _keep(stream: Any, said: list[str]) -> None:
    with contextlib.suppress(ValueError, OSError):
        for line in stream:
            said.append(line)
            del said[:-20]


_judge = _Judge()
atexit.register(_judge.end)


# What runs in the process.


def serve() -> None:
    """Answer questions from standard input until it ends."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_NUM_BYTES, _NUM_BYTES))
    import math_verify  # noqa: F401  # loaded before the first question

    out = sys.stdout
    sys.stdout = sys.stderr
    out.write("ready\n")
    out.flush()
    for line in sys.stdin:
        # Should its asker be gone, the process ends by itself, wherever it is.
        signal.setitimer(signal.ITIMER_VIRTUAL, 2 * SECONDS)
        try:
            told = compare(*json.loads(line))
        except MemoryError:
            told = GAVE_UP
        except Exception:  # sympy raises whatever it likes on text that is not mathematics
            told = UNREADABLE
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        out.write(json.dumps(told) + "\n")
        out.flush()


def compare(answer: str, gold: str) -> str:
    """The verdict on two LaTeX expressions, in this process and without a limit of time."""
    import math_verify
    from latex2sympy2_extended.logic import And
    from sympy import Basic, MatrixBase
    from sympy.core.relational import Relational

    left, right = _parsed(answer), _parsed(gold)
    if left is None or right is None:
        return UNREADABLE

    def parts(relation: Any) -> list[Any]:
        return list(getattr(relation, "_unsorted_args", [relation]))

    if isinstance(left, Relational | And) and isinstance(right, Relational | And):
        pairs = list(zip(parts(left), parts(right), strict=False))
        is_equal = len(parts(left)) == len(parts(right)) and all(
            _same_relation(a, b) for a, b in pairs
        )
        return EQUAL if is_equal else DIFFERENT
    if isinstance(left, Relational | And) or isinstance(right, Relational | And):
        return DIFFERENT
    if isinstance(left, MatrixBase) or isinstance(right, MatrixBase):
        is_equal = (
            isinstance(left, MatrixBase)
            and isinstance(right, MatrixBase)
            and left.shape == right.shape
            and all(_same_value(a, b) for a, b in zip(left.flat(), right.flat(), strict=True))
        )
        return EQUAL if is_equal else DIFFERENT
    same = _same_value(left, right)
    if same is None:
        same = isinstance(left, Basic) and math_verify.verify(
            right, left, float_rounding=_DIGITS, numeric_precision=_DIGITS, timeout_seconds=None
        )
    return EQUAL if same else DIFFERENT


def _parsed(text: str) -> Any:
    """The expression as math-verify parses it, without its own cleaning; None if it cannot."""
    import math_verify
    from latex2sympy2_extended import NormalizationConfig
    from sympy import I, Symbol

    config = math_verify.LatexExtractionConfig(
        normalization_config=NormalizationConfig(basic_latex=False, boxed="none")
    )
    found = math_verify.parse(f"${text}$", [config], parsing_timeout=None)  # pyright: ignore
    found = next((x for x in found if not isinstance(x, str)), None)
    if found is None:
        return None
    units = {s: I for s in found.free_symbols if s.name == "i"}
    found = found.subs(units) if units else found
    with contextlib.suppress(Exception):
        found = found.doit()
    return Symbol(str(found)) if found is True or found is False else found


def _same_value(a: Any, b: Any) -> bool | None:
    """Whether two expressions have the same value wherever both have one; None if none can tell."""
    from sympy import Expr

    if not (isinstance(a, Expr) and isinstance(b, Expr)):
        return None
    if a == b:
        return True
    told = 0
    for values in _points(a.free_symbols | b.free_symbols):
        first, second = _number(a, values), _number(b, values)
        if first is None and second is None:
            continue
        if first is None or second is None or not _is_close(first, second):
            return False
        told += 1
    return True if told >= min(3, _POINTS if a.free_symbols | b.free_symbols else 1) else None


def _same_relation(a: Any, b: Any) -> bool:
    import math_verify
    from sympy import Eq, Expr, Ne

    sides = (a.lhs, a.rhs, b.lhs, b.rhs)
    if all(isinstance(side, Expr) for side in sides):
        if type(a) is type(b) and _same_value(a.lhs, b.lhs) and _same_value(a.rhs, b.rhs):
            return True
        signs = _ratio_sign(a.lhs - a.rhs, b.lhs - b.rhs)
        if signs and isinstance(a, Eq | Ne):
            return type(a) is type(b)
        if signs:
            return type(a) is (type(b) if signs > 0 else type(b.reversed))
    return math_verify.verify(
        b, a, float_rounding=_DIGITS, numeric_precision=_DIGITS, timeout_seconds=None
    )


def _ratio_sign(a: Any, b: Any) -> int:
    """Sign of a / b where that is one number for all values of the variables; 0 if it is not."""
    ratios = []
    for values in _points(a.free_symbols | b.free_symbols):
        top, bottom = _number(a, values), _number(b, values)
        if top is None or bottom is None or not bottom:
            continue
        ratios.append(top / bottom)
    if len(ratios) < 3 or not all(_is_close(x, ratios[0]) for x in ratios):
        return 0
    ratio = complex(ratios[0])
    return 0 if abs(ratio.imag) > 1e-12 or not ratio.real else (1 if ratio.real > 0 else -1)


def _points(symbols: Any) -> list[dict[Any, Any]]:
    """Values for variables, of both signs, the same for the same names."""
    import random

    from sympy import Rational

    names = sorted(symbols, key=str)
    draws = random.Random(0)
    if not names:
        return [{}]
    return [
        {
            name: Rational(draws.randint(101, 2999), 997) * (1 if k % 2 or k < 2 else -1)
            for name in names
        }
        for k in range(_POINTS)
    ]


def _number(expression: Any, values: dict[Any, Any]) -> Any:
    """Value at a point as a complex number of mpmath's; None where there is none."""
    from mpmath import mp

    mp.dps = _DIGITS
    try:
        found = expression.subs(values).evalf(_DIGITS)
        real, imaginary = found.as_real_imag()
        number = mp.mpc(real, imaginary)
    except Exception:  # a sum that has no value, a function that nobody defined
        return None
    return number if mp.isfinite(number) else None


def _is_close(a: Any, b: Any) -> bool:
    """Whether two values agree to nearly all digits, relative to their size."""
    from mpmath import mp

    size = max(abs(a), abs(b))
    if not a or not b:  # a value that cancels leaves rounding errors
        return size < mp.mpf(10) ** -(_DIGITS - 15)
    return abs(a - b) <= size * mp.mpf(10) ** -(_DIGITS - 20)
