"""Numbers as answers give them: with a unit or words behind, a currency, a percent sign, a base.

A unit or words behind a number do not change it, so ``5``, ``5 cm`` and ``5 apples`` are one
answer where the gold is 5. Where both name a known unit it must be the same one. Words that do
change a number (million, percent, squared, half, or) are read as what they say, or not at all.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from fractions import Fraction

from opd_jax.evaluate import arithmetic

_SPACED = re.compile(r"([-+]? ?[0-9]{1,3})((?: [0-9]{3})+)(\.[0-9]+)?")
_FRONT = re.compile(
    r"(?:approximately|approx\.?|about|roughly|around|exactly|nearly|only|just|equals?|equal to|"
    r"is|are|an? total of|usd|us|eur|gbp|rs\.?|inr|\\approx|~|=) ?"
    r"(?=[-+.0-9\\(])",
    re.IGNORECASE,
)
_PERCENT = re.compile(r"\s?(?:%|per ?cent(?:age)?(?: points?)?|pct\.?)(?![A-Za-z])", re.IGNORECASE)
_TAIL = re.compile(r"(?<![\\A-Za-z])[A-Za-zµμΩ°\"'](?![A-Za-z]*\s?[({]\s?[0-9])")
# Letters, with dots, slashes and small powers between them; no digit that could be a second number.
_WORDS = re.compile(
    r"[A-Za-zµμΩ°\"'.][A-Za-zµμΩ°\"'.,()/·\- ]*(?:\s?\^ ?\{? ?-?[1-4] ?\}?[A-Za-z/·\- .]*){0,3}"
)
_UNIT_COMMANDS = tuple(
    (re.compile(pattern), form)
    for pattern, form in (
        (r"\\Omega(?![a-zA-Z])", " Ω"),
        (r"\\mu ?(?=[a-zA-Z]\b)", " µ"),
        (
            r"\\frac ?\{ ?([A-Za-zµΩ ]{1,12}) ?\} ?\{ ?([A-Za-zµΩ ]{1,12}(?:\^ ?\{? ?2 ?\}?)?) ?\}",
            r" \1/\2",
        ),
        (r"(?<=[A-Za-zµΩ]) ?\\cdot ?(?=[A-Za-zµΩ])", "·"),
    )
)
_ORDINAL = re.compile(r"(?<=[0-9]) ?(?:\^ ?)?\{? ?(?:st|nd|rd|th) ?\}?$")
_ASIDE = re.compile(r"(?<=[A-Za-z0-9}%°]) ?\(([A-Za-z][A-Za-z ,.'-]{2,60})\)$")
_SCALES = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
    "trillion": 10**12, "percent": None,
}  # fmt: skip
# After these a number is another one, or not the whole answer.
_CHANGING_WORDS = (
    "squared cubed plus minus times divided pi sqrt root factorial mod modulo choose "
    "half halves third thirds quarter quarters fourth fourths fifth fifths sixth sixths "
    "eighth eighths tenth tenths hundredth hundredths thousandth thousandths negative "
    "infinity inf repeating log ln sin cos tan exp base if unless not except"
)
_CHANGING = frozenset(_CHANGING_WORDS.split())
_ALTERNATIVE = re.compile(
    r"\bor (?:more|less|fewer|greater|higher|lower|so|another)\b|\bor$|\band$"
)

_SQUARE = ("square ", "sq ", "sq. ", "squared ")
_CUBIC = ("cubic ", "cu ", "cu. ")
_UNITS = {
    "m": "m meter meters metre metres", "cm": "cm centimeter centimeters centimetre centimetres",
    "mm": "mm millimeter millimeters millimetre millimetres",
    "km": "km kilometer kilometers kilometre kilometres", "in": "in inch inches \" ''",
    "ft": "ft foot feet '", "yd": "yd yard yards", "mi": "mi mile miles",
    "g": "g gram grams gm", "kg": "kg kilogram kilograms kgs", "mg": "mg milligram milligrams",
    "lb": "lb lbs pound pounds", "oz": "oz ounce ounces", "t": "ton tons tonne tonnes",
    "s": "s sec secs second seconds", "min": "min mins minute minutes",
    "h": "h hr hrs hour hours", "day": "day days", "week": "week weeks", "month": "month months",
    "year": "year years yr yrs", "l": "l L liter liters litre litres",
    "ml": "ml mL milliliter milliliters millilitre millilitres", "gal": "gal gallon gallons",
    "usd": "dollar dollars usd bucks", "cent": "cent cents", "euro": "euro euros",
    "deg": "degree degrees deg °", "rad": "rad radian radians", "mph": "mph",
    "km/h": "kmh kph", "j": "J joule joules", "n": "N newton newtons",
    "w": "W watt watts", "v": "V volt volts", "k": "K kelvin", "hz": "Hz hertz",
    "unit": "unit units", "mol": "mol mole moles", "c": "C coulomb coulombs", "a": "A amp amps",
    "ohm": "Ω ohm ohms", "pa": "Pa pascal pascals", "ev": "eV", "tesla": "T tesla", "nm": "nm",
    "um": "µm μm micron microns", "ms": "ms", "kj": "kJ", "kw": "kW", "mhz": "MHz", "kn": "kN",
}  # fmt: skip
_CANONICAL = {spelling: name for name, line in _UNITS.items() for spelling in line.split()}
_MONEY = frozenset({"usd", "cent", "euro"})


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A number with what stands behind it.

    Attributes:
      value: exact; of 50 % it is 50.
      unit: canonical name of a known unit, with its power (``cm^2``); empty for none or words.
      is_percent: whether it has a percent sign or word.
    """

    value: Fraction
    unit: str = ""
    is_percent: bool = False

    def equals(self, gold: Quantity) -> bool:
        """Whether this answer is the gold.

        A percent sign may be left out where the other side has one, and 50 % is also 1/2.
        """
        if self.unit and gold.unit and self.unit != gold.unit:
            return False
        if self.value == gold.value:
            return True
        if self.is_percent == gold.is_percent:
            return False
        percent, share = (self, gold) if self.is_percent else (gold, self)
        return abs(share.value) <= 1 and percent.value == 100 * share.value


def read(text: str) -> Quantity | None:
    """Read a cleaned answer as a number; None for anything else.

    Raises:
      TooLargeError: of :mod:`arithmetic`.
    """
    if not text or len(text) > arithmetic.MAX_LENGTH:
        return None
    text = _FRONT.sub("", text.strip(), count=1).strip()
    text = _ORDINAL.sub("", text)
    for pattern, form in _UNIT_COMMANDS:
        text = pattern.sub(form, text)
    found = _number(text)
    if found is not None:
        return Quantity(found)
    if (match := _ASIDE.search(text)) and _is_harmless(match[1]):  # 5 (five)
        return read(text[: match.start()])
    if match := _PERCENT.search(text):
        return _percent(text[: match.start()], text[match.end() :])
    for match in _TAIL.finditer(text):
        front, tail = text[: match.start()].rstrip(" /"), text[match.start() :]
        if tail[0] in "xXeE" and len(tail) > 1 and not tail[1].isalpha():
            continue  # times, or a power of ten
        number = _number(re.sub(r" ?- ?$", "", front)) if front else None
        if number is None:
            return None
        return _with_words(number, tail.strip(), is_apart=text[match.start() - 1].isspace())
    return None


def based(text: str) -> tuple[str, int] | None:
    """Digits and base of a number of another base, ``101_2`` or ``101 (base two)``."""
    match = _SUBSCRIPT.fullmatch(text) or _IN_BASE.fullmatch(text)
    if match is None:
        return None
    name = match[2].strip().lower()
    base = _BASES.get(name) or (int(name) if name.isdecimal() else 0)
    if not 2 <= base <= 36:
        return None
    digits = match[1].replace(" ", "").upper().lstrip("0") or "0"
    return digits, base


def same_units(given: str, wanted: str) -> tuple[str, str] | None:
    """Two expressions without known units behind them; None where the units differ."""
    bodies, units = [], []
    for text, other in ((given, wanted), (wanted, given)):
        match = _BEHIND.fullmatch(text)
        unit = _unit(match["unit"]) if match else None
        if match and unit and (len(unit) > 1 or not re.search(rf"\b{match['unit'][0]}\b", other)):
            bodies.append(match["body"])
            units.append(unit)
        else:
            bodies.append(text)
    return None if len({*units}) > 1 else (bodies[0], bodies[1])


_BEHIND = re.compile(
    r"(?P<body>.*?[^\s+*/^=<>(-])\s+"
    r"(?P<unit>[A-Za-z°][A-Za-z°. /]{0,30}?(?:\s?\^ ?\{? ?[23] ?\}?)?)"
)
_BASES = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "sixteen": 16,
}  # fmt: skip
_SUBSCRIPT = re.compile(
    r"\(?([0-9A-Fa-f ]{1,60})\)? ?_ ?\{? ?(?:base )?\(?([0-9]{1,2}|[a-z]{3,7})\)? ?\}?"
)
_IN_BASE = re.compile(
    r"([0-9A-Fa-f ]{1,60}?),? ?\(?(?:in )?base[ -]?([0-9]{1,2}|[a-z]{3,7})\)?", re.IGNORECASE
)


def _number(text: str) -> Fraction | None:
    if match := _SPACED.fullmatch(text):
        text = match[1] + match[2].replace(" ", "") + (match[3] or "")
    return arithmetic.value(text)


def _percent(front: str, behind: str) -> Quantity | None:
    number = _number(front.strip())
    behind = behind.strip()
    if number is None or (behind and not _is_harmless(behind)):
        return None
    return Quantity(number, is_percent=True)


def _with_words(number: Fraction, tail: str, *, is_apart: bool) -> Quantity | None:
    """A number and the words behind it; None where they make it something else."""
    first, _, rest = tail.partition(" ")
    scale = _SCALES.get(first.lower().removesuffix("s").rstrip(".,"))
    if scale:
        number, tail, is_apart = number * scale, rest.strip(), True
        if not tail:
            return Quantity(number)
    unit = _unit(tail)
    if unit is None and not (is_apart and _is_harmless(tail)):
        return None
    is_letter = len(tail) == 1 and tail.isalpha()
    if unit is not None and is_letter and not is_apart:
        return None  # 5m is five times m
    return Quantity(number, unit or "")


def _unit(tail: str) -> str | None:
    """Canonical name of a known unit; None for other words."""
    tail = re.sub(r"\s+", " ", tail).strip(" .")
    power = 1
    if match := re.fullmatch(r"(.*?)\s?\^ ?\{? ?([23]) ?\}?", tail):
        tail, power = match[1], int(match[2])
    for prefixes, raised in ((_SQUARE, 2), (_CUBIC, 3)):
        for prefix in prefixes:
            if tail.lower().startswith(prefix):
                tail, power = tail[len(prefix) :], raised
    if tail.startswith("°"):
        tail = {"°C": "celsius", "°F": "fahrenheit", "° C": "celsius", "° F": "fahrenheit"}.get(
            tail, tail
        )
        if tail in ("celsius", "fahrenheit"):
            return tail
    name = _name(tail)
    if name is None:
        parts = [_name(part) for part in re.split(r"[/·]| per ", tail)]  # km per hour
        name = "/".join(part for part in parts if part) if len(parts) > 1 and all(parts) else None
    if name is None:
        return None
    return name if power == 1 else f"{name}^{power}"


def _name(word: str) -> str | None:
    word = word.strip()
    return _CANONICAL.get(word) or (_CANONICAL.get(word.lower()) if len(word) > 1 else None)


def _is_harmless(words: str) -> bool:
    """Whether words behind a number leave it what it is."""
    if not _WORDS.fullmatch(words) or _ALTERNATIVE.search(words):
        return False
    found = re.findall(r"[A-Za-zµμΩ]+", words)
    if not found:
        return set(words) <= set("°'\". ")
    if any(w.lower() in _CHANGING or w.lower().removesuffix("s") in _SCALES for w in found):
        return False
    if not all(w in _CANONICAL or w.lower() in _SHORT for w in found if len(w) < 3):
        return False
    first = found[0]
    return len(first) < 3 or first in _CANONICAL or not _is_product(first)


_SHORT_WORDS = "am pm in of to by at on we he it is as so up ft a i an my or us be do no if go me"
_SHORT = frozenset(_SHORT_WORDS.split())


def _is_product(word: str) -> bool:
    """Whether letters look like variables in a row: neighbours in the alphabet, or no vowel."""
    is_run = all(ord(b) - ord(a) == 1 for a, b in itertools.pairwise(word))
    return is_run or not re.search(r"[aeiouyAEIOUY]", word) or word.lower() in ("xyz", "wxyz")
