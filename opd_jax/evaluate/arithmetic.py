r"""Exact values of written numbers: decimals, fractions, powers, products, whole roots.

Everything here is a ``Fraction``, so two numbers are equal or they are not: nothing is rounded, and
a tiny number is not 0. What is irrational, or has a variable in it, has no value here.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

MAX_LENGTH = 400  # of a text that is read as a number
_MAX_BITS = 100_000  # of a numerator or denominator; a power tower ends here
_MAX_DEPTH = 40  # of nested groups

_TOKEN = re.compile(
    r"(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
    r"(?P<repeat>\\(?:overline|bar|dot)\s?\{?[0-9]{1,40}\}?)?"
    r"(?P<power>[eE][+-]?[0-9]{1,4}(?![0-9.]))?"
    r"|(?P<command>\\[a-zA-Z]+)|(?P<name>sqrt(?=\s?[({])|[xX](?= ?[0-9.(]))"
    r"|(?P<sign>[-+*/^!(){}\[\]])|(?P<space>\s+)"
)
_MIXED = re.compile(
    r"([-+]?) ?([0-9]+) ?(?:and )?(?:(?<=\s)([0-9]+) ?/ ?([0-9]+)|\\frac ?\{? ?"
    r"([0-9]+?) ?\}? ?\{? ?([0-9]+) ?\}?)"
)
_TIMES = {r"\cdot", r"\times", "*", "x", "X"}
_OVER = {"/", r"\div"}
_OPEN = {"(": ")", "{": "}", "[": "]"}


class TooLargeError(ArithmeticError):
    """A number too large to be written out, and so to be anybody's answer."""


class _NoValueError(ArithmeticError):
    """No rational number, or not only numbers."""


def value(text: str) -> Fraction | None:
    r"""Exact value of a cleaned text; None for what is no rational number.

    A mixed number ``2\frac{1}{3}`` is 2 + 1/3, ``0.\overline{3}`` is 1/3; without brackets ``-2^2``
    is -4, as everywhere in mathematics.

    Raises:
      TooLargeError: a power or factorial beyond any use.
    """
    if not text or len(text) > MAX_LENGTH:
        return None
    if match := _MIXED.fullmatch(text.strip()):
        top, bottom = int(match[3] or match[5]), int(match[4] or match[6])
        if not bottom:
            return None
        found = int(match[2]) + Fraction(top, bottom)
        return -found if match[1] == "-" else found
    try:
        return _Reader(_tokens(text)).whole()
    except (_NoValueError, ZeroDivisionError, RecursionError):
        return None


def _tokens(text: str) -> list[tuple[str, str]]:
    """Kinds and texts; a kind is number, name, command or sign."""
    found, place = [], 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise _NoValueError
        place = match.end()
        if match["space"]:
            continue
        if match["number"]:
            found.append(("number", match[0]))
        else:
            kind = str(match.lastgroup)
            found.append((kind, match[0]))
    return found


def _decimal(text: str) -> Fraction:
    match = _TOKEN.fullmatch(text)
    if match is None:
        raise _NoValueError
    digits = match["number"].replace(",", "").rstrip(".")
    found = Fraction(digits or "0")
    if match["repeat"]:
        cycle = re.sub(r"[^0-9]", "", match["repeat"])
        places = len(digits.partition(".")[2])
        if "." not in match["number"]:
            raise _NoValueError
        found += Fraction(int(cycle), (10 ** len(cycle) - 1) * 10**places)
    if match["power"]:
        found *= Fraction(10) ** int(match["power"][1:])
    return found


class _Reader:
    """Recursive descent over tokens; an unexpected one means that there is no value."""

    def __init__(self, tokens: list[tuple[str, str]]):
        self.tokens, self.at, self.depth = tokens, 0, 0

    def whole(self) -> Fraction:
        found = self.sum()
        if self.at < len(self.tokens):
            raise _NoValueError
        return found

    @property
    def next(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    @property
    def kind(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    def take(self, *expected: str) -> str:
        token = self.next
        if not token or (expected and token not in expected):
            raise _NoValueError
        self.at += 1
        return token

    def sum(self) -> Fraction:
        found = self.product()
        while self.next in ("+", "-"):
            is_minus = self.take() == "-"
            part = self.product()
            found = _checked(found - part if is_minus else found + part)
        return found

    def product(self) -> Fraction:
        found = self.signed()
        while True:
            if self.next in _TIMES:
                self.take()
                found = _checked(found * self.signed())
            elif self.next in _OVER:
                is_slash = self.take() == "/"
                found = _checked(found / self.signed())
                if is_slash and self.next == "/":
                    raise _NoValueError  # 3/4/2026 is a date
            elif self.starts_factor():
                found = _checked(found * self.power())
            else:
                return found

    def starts_factor(self) -> bool:
        """Whether a factor follows without a sign; two numbers in a row are no product."""
        before = self.tokens[self.at - 1]
        if self.kind == "number":
            return before[1] in (")", "]", "}")
        return self.next in ("(", "[", "{", r"\frac", r"\sqrt", "sqrt", r"\binom")

    def signed(self) -> Fraction:
        if self.next in ("+", "-"):
            is_minus = self.take() == "-"
            if self.next in ("+", "-"):
                raise _NoValueError  # --5 is a slip
            found = self.power()
            return -found if is_minus else found
        return self.power()

    def power(self) -> Fraction:
        base = self.atom()
        while self.next == "!":
            self.take()
            base = _factorial(base)
        if self.next != "^":
            return base
        self.take()
        is_minus = self.next == "-" and bool(self.take())
        self.deeper()
        exponent = self.power()
        self.depth -= 1
        return _power(base, -exponent if is_minus else exponent)

    def atom(self) -> Fraction:
        if self.kind == "number":
            return _decimal(self.take())
        if self.next in _OPEN:
            return self.group()
        if self.next in (r"\frac", r"\binom"):
            name = self.take()
            top, bottom = self.argument(), self.argument()
            return top / bottom if name == r"\frac" else _binomial(top, bottom)
        if self.next in (r"\sqrt", "sqrt"):
            self.take()
            degree = self.group() if self.next == "[" else Fraction(2)
            return _root(self.argument(), degree)
        raise _NoValueError

    def group(self) -> Fraction:
        end = _OPEN[self.take()]
        self.deeper()
        found = self.sum()
        self.depth -= 1
        self.take(end)
        return found

    def argument(self) -> Fraction:
        r"""A group, or as in ``\frac12`` one digit, or the digits that a space ends."""
        if self.next in ("{", "("):
            return self.group()
        if self.kind != "number":
            return self.atom()
        digits = self.take()
        following = self.next
        is_first = self.tokens[self.at - 2][1] in (r"\frac", r"\binom")
        if is_first and len(digits) == 2 and following not in ("{", "(") and self.kind != "number":
            self.tokens.insert(self.at, ("number", digits[1]))  # \frac12
            digits = digits[0]
        return _decimal(digits)

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise _NoValueError


def _checked(found: Fraction) -> Fraction:
    if max(found.numerator.bit_length(), found.denominator.bit_length()) > _MAX_BITS:
        raise TooLargeError
    return found


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        root = _root(base, Fraction(exponent.denominator))
        return _power(root, Fraction(exponent.numerator))
    if base in (0, 1, -1):
        if not base and exponent < 0:
            raise ZeroDivisionError
        return base ** (exponent.numerator % 2 + 2 if exponent else 0)
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent.numerator) * bits > _MAX_BITS:
        raise TooLargeError
    return base**exponent.numerator


def _root(base: Fraction, degree: Fraction) -> Fraction:
    if degree.denominator != 1 or not 1 <= degree.numerator <= 1000:
        raise _NoValueError
    n = degree.numerator
    if base < 0:
        if n % 2 == 0:
            raise _NoValueError
        return -_root(-base, degree)
    return Fraction(_whole_root(base.numerator, n), _whole_root(base.denominator, n))


def _whole_root(number: int, n: int) -> int:
    if n == 2:
        found = math.isqrt(number)
    else:
        low, high = 0, 1 << (number.bit_length() // n + 1)
        while low < high:  # the largest whole number whose power is not above
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle**n <= number else (low, middle - 1)
        found = low
    if found**n != number:
        raise _NoValueError
    return found


def _factorial(base: Fraction) -> Fraction:
    if base.denominator != 1 or base < 0:
        raise _NoValueError
    if base > 5000:
        raise TooLargeError
    return Fraction(math.factorial(base.numerator))


def _binomial(top: Fraction, bottom: Fraction) -> Fraction:
    if top.denominator != 1 or bottom.denominator != 1 or top < 0 or bottom < 0:
        raise _NoValueError
    if top > 5000:
        raise TooLargeError
    return Fraction(math.comb(top.numerator, bottom.numerator))
