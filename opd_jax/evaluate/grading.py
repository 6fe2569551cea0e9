r"""Answer extraction and checking, on the host.

A response is correct when the answer it marks equals the gold answer. The mark is looked for in a
fixed order, and a response without one is wrong: the last number of a text is not an answer.

1. The last complete, non-empty ``\boxed{...}`` or ``\fbox{...}``.
2. The last line ``#### x`` where x is a plain number, or where nothing follows it (as GSM8K writes
   it; other such lines are headings).
3. What follows the last ``answer is`` or ``answer:``, up to the end of the sentence or line.

Two answers are equal when they are the same plain number (exactly: 0.5, 1/2, ``\frac{1}{2}``), or
the same string after normalisation, or, for a gold that is neither a number nor a word, when
math-verify finds them equal. A gold that is a plain number or a word is never handed to
math-verify, so those grades are the same with and without it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import threading
from fractions import Fraction

_TOKENS = re.compile(r"\\{1,4}(?:boxed|fbox)\s{0,3}\{|\\[{}\\]|[{}]")
_HASHES = re.compile(r"^[ \t]{0,8}####[ \t]{1,8}(\S.*)$", re.MULTILINE)
_ANSWER = re.compile(
    r"\banswer(?:\s{1,3}is\b|[*_]{0,3}\s{0,3}[:=])[*_:\s]{0,8}(?=[^\s*_:])", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"[.?](?=\s|[*_]+(?:\s|$)|$)")

_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_NUMBER = re.compile(rf"({_DECIMAL})(?:[eE]([+-]?[0-9]{{1,3}}))?")
_RATIO = re.compile(rf"({_DECIMAL})/({_DECIMAL})")
_LATEX_RATIO = re.compile(rf"([0-9]*)\\frac(?:\{{({_DECIMAL})\}}\{{({_DECIMAL})\}}|([0-9])([0-9]))")
_MIXED = re.compile(r"([0-9]+) +([0-9]+)/([0-9]+)")
_UNIT = re.compile(r"\\(?:text|mathrm|textrm|mbox)\{[^{}]*\}$")
_MAGNITUDE = re.compile(r"hundred|thousand|million|billion|trillion|dozen", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*")
_VARIABLE = re.compile(r"^\\?[A-Za-z]\w? ?= ?(?=[^=])")

_DIGITS = 400  # longer strings are no plain numbers, and nothing math-verify should be given
_HEAVY = re.compile(r"\^[^a-zA-Z+*=,]{0,40}\^|\^\{?-?\s*[0-9]{4,}|[0-9]{4,}\s*!|!\s*!|\\uparrow")
_SECONDS = 5


def is_correct(text: str, gold: str) -> bool:
    """Whether a response marks the gold answer as its answer.

    Any response text is graded; without a marked answer it is wrong. A gold may itself be a worked
    solution that marks its answer.

    Raises:
      ValueError: the gold answer is empty.
      RuntimeError: the gold is an expression, the strings differ, and math-verify is missing.
    """
    marked = extract(gold)
    gold = gold if marked is None else marked
    if not gold.strip():
        raise ValueError(
            "the gold answer is empty: expected a number, a word or an expression; fill `answer`"
        )
    found = extract(text)
    return found is not None and is_equal(found, gold)


def extract(text: str) -> str | None:
    """The answer that a text marks, by the order in the module's docstring; None without a mark."""
    boxed = _last_box(text)
    if boxed is not None:
        return boxed
    end = len(text.rstrip())
    for match in reversed(list(_HASHES.finditer(text))):
        if number(match[1]) is not None or match.end() >= end:
            return match[1].strip()
    start = max((match.end() for match in _ANSWER.finditer(text)), default=None)
    if start is None:
        return None
    line = text[start:].split("\n", maxsplit=1)[0]
    return _SENTENCE_END.split(line, maxsplit=1)[0].strip(" \t\r*_") or None


def is_equal(answer: str, gold: str) -> bool:
    """Whether two answers are equal, as numbers, as strings, or as expressions.

    Raises:
      RuntimeError: the gold is an expression, the strings differ, and math-verify is missing.
    """
    if len(answer) > max(_DIGITS, 4 * len(gold)):
        return False  # rambling, not an answer; and what follows need not be fast on long text
    expected, found = number(gold), number(answer)
    if found is None and "=" not in gold:
        found = number(_VARIABLE.sub("", _strip(answer)))
    if expected is not None:
        return found == expected
    left, right = _normalise(answer), _normalise(gold)
    if left == right:
        return True
    if _WORD.fullmatch(_strip(gold)):
        return len(right) > 1 and left.casefold() == right.casefold()
    return _verify(answer, gold)


def number(text: str) -> Fraction | None:
    r"""Exact value of a plain number; None for anything else.

    Plain: a sign, thousands separators, decimals, ``3/4``, ``\frac{3}{4}``, ``1 3/4``, ``1e-3``; a
    currency or percent sign (50% reads 50), a final period and a ``\text{unit}`` are left out.
    """
    if len(text) > _DIGITS:
        return None
    body = _strip(text)
    unit = _UNIT.search(body)
    if unit and unit.start() and not _MAGNITUDE.search(unit[0]):
        body = body[: unit.start()]
    body = re.sub(r"\^\s?\{?\s?\\circ\s?\}?$", "", body.replace("°", "").strip())
    body = body.replace("\\$", "").replace("\\%", "").strip("$%€£ ")
    sign = 1
    if body[:1] in ("-", "+"):
        sign = -1 if body[0] == "-" else 1
        body = body[1:].lstrip(" $")
    try:
        value = _magnitude(body.strip())
    except ZeroDivisionError:
        return None
    return None if value is None else sign * value


def _magnitude(body: str) -> Fraction | None:
    """Value of an unsigned number."""
    if match := _NUMBER.fullmatch(body):
        return _decimal(match[1]) * Fraction(10) ** int(match[2] or 0)
    if match := _RATIO.fullmatch(re.sub(r" ?/ ?", "/", body)):
        return _decimal(match[1]) / _decimal(match[2])
    if match := _MIXED.fullmatch(re.sub(r" ?/ ?", "/", body)):
        return int(match[1]) + Fraction(int(match[2]), int(match[3]))
    if match := _LATEX_RATIO.fullmatch(body.replace(" ", "")):
        top, bottom = match[2] or match[4], match[3] or match[5]
        return int(match[1] or 0) + _decimal(top) / _decimal(bottom)
    return None


def _decimal(digits: str) -> Fraction:
    digits = digits.replace(",", "").rstrip(".")
    return Fraction(digits)


def _last_box(text: str) -> str | None:
    r"""Content of the box that opens last among the complete, non-empty ones."""
    opened: list[int | None] = []  # where each open brace's content starts, None for plain braces
    best, answer = -1, None
    for match in _TOKENS.finditer(text):
        token = match[0]
        if token == "{":
            opened.append(None)
        elif token == "}":
            start = opened.pop() if opened else None
            if start is not None and start > best and text[start : match.start()].strip():
                best, answer = start, text[start : match.start()].strip()
        elif token.endswith("{") and len(token) > 2:
            opened.append(match.end())
    return answer


def _strip(text: str) -> str:
    """Take off what carries no meaning: maths delimiters, emphasis, spacing, a final period."""
    text = text.replace("−", "-").replace("{,}", ",").replace("\\dfrac", "\\frac")
    text = text.replace("\\tfrac", "\\frac").replace("\\left", "").replace("\\right", "")
    text = re.sub(r"\\[,!;: ]|[\u2009\u202f]", "", text)
    text = re.sub(r"[\s~]+", " ", text).strip()
    previous = None
    while previous != text:
        previous = text
        text = text.strip().removesuffix(".").strip("*`").strip()
        for left, right in (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("{", "}")):
            inner = text[len(left) : len(text) - len(right)]
            is_wrapped = len(text) > len(left) + len(right)
            if is_wrapped and text.startswith(left) and text.endswith(right):
                if left in inner or right in inner:
                    continue
                text = inner
        if match := re.fullmatch(r"\\(?:text|mathrm|textbf|mbox|textrm)\{([^{}]*)\}", text):
            text = match[1]
    return text


def _normalise(text: str) -> str:
    """String form in which equal answers are equal strings."""
    text = _strip(text)
    if match := re.fullmatch(r"\(([A-Za-z])\)", text):
        return match[1]  # the letter of a choice
    if _WORD.fullmatch(text):
        return text
    text = re.sub(r"\\(?:text|mathrm|textbf|mbox|textrm)\{([^{}]*)\}", r"\1", text)
    return re.sub(r"[\s$]", "", text)


def _verify(answer: str, gold: str) -> bool:
    """Ask math-verify whether two expressions are equal; False for what it cannot read."""
    if importlib.util.find_spec("math_verify") is None:
        raise RuntimeError(
            f"the gold answer {gold!r} is an expression, the response says {answer!r}, and "
            "math-verify is not installed: expected it for comparing expressions; "
            "pip install 'opd-jax[eval]'"
        )
    if len(answer) > 2 * _DIGITS or _HEAVY.search(answer):
        return False  # a power tower keeps sympy busy inside one C call, where no alarm reaches it
    if threading.current_thread() is threading.main_thread():
        return _is_equal_expression(answer, gold)
    # math-verify's time limit is an alarm signal, which only a main thread may set: lend it one.
    code = "import sys, opd_jax.evaluate.grading as g; print(g._is_equal_expression(*sys.argv[1:]))"
    try:
        child = subprocess.run(
            [sys.executable, "-c", code, answer, gold],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)},
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (ValueError, subprocess.TimeoutExpired):  # ValueError: a NUL or half a surrogate pair
        return False
    if child.returncode:
        raise RuntimeError(
            f"math-verify failed in a process of its own (exit {child.returncode}): expected a "
            f"verdict on {answer!r}; grade from the main thread. It said: {child.stderr[-400:]}"
        )
    return child.stdout.strip().endswith("True")


def _is_equal_expression(answer: str, gold: str) -> bool:
    import math_verify

    try:
        expected, found = (
            math_verify.parse(f"${_strip(side)}$", parsing_timeout=_SECONDS)
            for side in (gold, answer)
        )
        return bool(math_verify.verify(expected, found, timeout_seconds=_SECONDS))
    except Exception:  # sympy raises whatever it likes on text that is not mathematics
        return False
