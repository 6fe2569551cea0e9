r"""Whether an answer is the gold answer, entry by entry.

Both are read as what they are: a number, a list (``1, 2`` or ``x = 1 or x = 2``, in any order), a
tuple or vector, an interval (also ``1 < x \le 2``), a union, a set (in any order), a matrix, or one
expression. Structures are equal when they are of one kind and their entries are, each by itself;
so no entry can be wrong in a right answer. An entry is equal to another

* as a number, exactly: :mod:`quantities` and :mod:`arithmetic`,
* as text, after :mod:`cleaning`; a word whatever its case; the letter of a choice also with the
  text of its option,
* as an expression, when :mod:`judge` says so. A number or a word never needs it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from opd_jax.evaluate import arithmetic, cleaning, judge, quantities
from opd_jax.evaluate.structure import (
    INTERVALS,
    NAME,
    WORDS,
    Node,
    read,
    relation,
    split,
    split_list,
)

SECONDS = 20.0  # for one comparison, whatever it asks the judge
_MAX_ENTRIES = 200

# Reasons, for right and for wrong.
NUMBER, TEXT, CHOICE, EXPRESSION, ENTRIES = (
    "same number", "same text", "same choice", "same expression", "same entries"
)  # fmt: skip
OTHER_NUMBER, OTHER_TEXT, OTHER_CHOICE, OTHER_EXPRESSION, OTHER_ENTRY, OTHER_KIND = (
    "another number", "another text", "another choice", "another expression", "another entry",
    "another kind of answer",
)  # fmt: skip
TOO_LONG, UNREADABLE, OUT_OF_TIME = "too long", "unreadable expression", "out of time"

_ARTICLE = re.compile(r"^(?:the|an?) (?=\w)", re.IGNORECASE)
_MARK = re.compile(
    r"(?:the )?(?:(?:final |correct )?answer|solution|result|value)s?(?: is| are|:| =)\s?",
    re.IGNORECASE,
)
_CHOICE = re.compile(
    r"(?:(?:option|choice|answer) )?(?:\(([A-Za-z])\)|"
    r"([A-Z])(?=$|[).:]|, ?[a-z]{2}| - | ?\([^)]{2}| is (?:the )?(?:correct|best))\)?)"
    r"\s?[.:)]?\s?(?P<text>.*)",
    re.DOTALL | re.IGNORECASE,
)
_OTHER_CHOICE = re.compile(r"\([A-Z]\)|^,? ?(?:and|or|&|/)\b|\b(?:and|or) \(?[A-Z]\)?$|^- [A-Z]$")
_RATIO = re.compile(r"[0-9]+(?: ?: ?[0-9]+)+")
_YES_NO = re.compile(r"(yes|no|true|false)(?=[,.;:!]|$)", re.IGNORECASE)
_TOWER = re.compile(r"[0-9][)}]* ?\^ ?[({]* ?[0-9]+[)}]* ?\^|!\s?!|\\uparrow|[0-9]{5,}\s?!")
_KNOWN_WORDS = (
    "frac sqrt cdot times div pi log ln lg sin cos tan cot sec csc arcsin arccos arctan sinh "
    "cosh tanh exp binom lfloor rfloor lceil rceil infty sum prod int circ max min gcd lcm "
    "det"
)
_KNOWN = frozenset(_KNOWN_WORDS.split())


class _Deadline:
    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.end


def compare(answer: str, gold: str) -> tuple[bool, str]:
    """Whether an answer equals the gold, and why, as one of the reasons above.

    Raises:
      JudgeError: an expression is to be compared and math-verify is missing.
    """
    if len(answer) > max(arithmetic.MAX_LENGTH, 4 * len(gold)):
        return False, TOO_LONG  # rambling, not an answer
    given, wanted = cleaning.clean(answer), cleaning.clean(gold)
    deadline = _Deadline(SECONDS)
    try:
        return _texts(given, wanted, deadline)
    except arithmetic.TooLargeError:
        return False, OTHER_NUMBER
    except RecursionError:
        return False, UNREADABLE


def _texts(given: str, wanted: str, deadline: _Deadline) -> tuple[bool, str]:
    if cleaning.key(given) == cleaning.key(wanted):
        return True, TEXT
    if match := _MARK.match(given):
        given = given[match.end() :]
    if _RATIO.fullmatch(wanted):
        given = given.replace(" to ", ":")
        is_same = cleaning.key(given) == cleaning.key(wanted)
        return is_same, TEXT if is_same else OTHER_TEXT
    if _is_word(wanted) or _gold_letter(wanted) is not None:
        return _leaves(given, wanted, deadline)
    verdict = (False, OTHER_TEXT)
    for text in _readings(given, wanted):
        verdict = _nodes(read(text), read(_without_name(wanted, text)), deadline)
        if verdict[0]:
            break
    return verdict


def _readings(given: str, wanted: str) -> list[str]:
    """What an answer may mean: all of it, or the side of its last equation."""
    if "=" in wanted or relation(given)[1:2] == ("\\in",):
        return [given]
    found = [given]
    for sign in ("\\approx", "="):
        parts = split(given, {sign}) if sign in given else []
        if len(parts) > 1 and not split_list(given)[1:]:
            last = parts[-1]
            is_swapped = NAME.fullmatch(last) and not NAME.fullmatch(parts[0])
            found = [parts[0], last] if sign == "\\approx" else [parts[0] if is_swapped else last]
            found = [split(text, {"="})[-1] for text in found]
            break
    return found


def _without_name(wanted: str, given: str) -> str:
    """The gold without ``x =`` in front, where the answer has no name either."""
    if "=" in given or split_list(wanted)[1:]:
        return wanted
    name, *rest = split(wanted, {"="})
    return rest[0] if len(rest) == 1 and NAME.fullmatch(name) else wanted


def _nodes(given: Node, wanted: Node, deadline: _Deadline) -> tuple[bool, str]:
    for node in (given, wanted):
        if len(node.items) > _MAX_ENTRIES:
            return False, TOO_LONG
    kinds = (given.kind, wanted.kind)
    if kinds == ("leaf", "leaf"):
        return _leaves(given.text, wanted.text, deadline)
    if kinds == ("named", "named") and given.text != wanted.text:
        return False, OTHER_ENTRY
    if wanted.kind in ("list", "set", "union") and given.kind in ("list", "set", "union"):
        return _in_any_order(given, wanted, deadline)
    if {*kinds} == {"leaf", "set"} and len(given.items + wanted.items) == 1:  # {5} is 5
        first, second = (node.items[0] if node.items else node for node in (given, wanted))
        return _nodes(first, second, deadline)
    if {*kinds} == {"leaf", "matrix"} and "\\begin" in given.text + wanted.text:
        return _judged(given.text, wanted.text, deadline)  # a multiple of a matrix
    left, right = _vector(given), _vector(wanted)
    if left is None or right is None or not _fits(left[0], right[0], len(right[1])):
        return False, OTHER_KIND
    return _in_order(left[1], right[1], deadline)


def _vector(node: Node) -> tuple[str, tuple[Node, ...]] | None:
    """Shape and entries, row by row, of what has an order."""
    if node.kind == "matrix":
        lengths = [len(row.items) for row in node.items]
        if len({*lengths}) != 1:
            return None
        entries = tuple(entry for row in node.items for entry in row.items)
        return f"{len(lengths)} x {lengths[0]}", entries
    if node.kind in (*INTERVALS, "named", "list"):
        return node.kind, node.items
    return None


def _fits(left: str, right: str, length: int) -> bool:
    """Whether two shapes may hold the same: a vector is a tuple, an open interval a pair."""
    if left == right:
        return True
    vectors = {f"1 x {length}", f"{length} x 1"}
    tuples = {"()", "named", "list"} | ({"[]"} if length > 2 else set())
    shapes = {left, right}
    if shapes <= tuples:
        return True
    return bool(shapes & vectors) and shapes <= vectors | tuples | {"[]"} and not shapes <= vectors


def _in_order(
    given: Sequence[Node], wanted: Sequence[Node], deadline: _Deadline
) -> tuple[bool, str]:
    if len(given) != len(wanted):
        return False, OTHER_ENTRY
    for left, right in zip(given, wanted, strict=True):
        is_same, why = _nodes(left, right, deadline)
        if not is_same:
            return False, why if why in (OUT_OF_TIME, UNREADABLE) else OTHER_ENTRY
    return True, ENTRIES


def _in_any_order(given: Node, wanted: Node, deadline: _Deadline) -> tuple[bool, str]:
    if "union" in (given.kind, wanted.kind) and given.kind != wanted.kind:
        return False, OTHER_KIND
    entries = list(given.items)
    # A set holds an entry once, however often it is written; if the gold does not repeat any.
    keys = [cleaning.key(node.text) for node in wanted.items]
    if "set" in (given.kind, wanted.kind) and len({*keys}) == len(keys):
        entries = list({cleaning.key(node.text): node for node in entries}.values())
    if len(entries) != len(wanted.items):
        return False, OTHER_ENTRY
    for expected in wanted.items:
        at = _place(entries, expected, deadline)
        if at is None:
            return False, OUT_OF_TIME if deadline.is_over else OTHER_ENTRY
        del entries[at]
    return True, ENTRIES


def _place(entries: Sequence[Node], expected: Node, deadline: _Deadline) -> int | None:
    """Where an entry stands; texts are looked at before any expression is judged."""
    for at, node in enumerate(entries):
        if cleaning.key(node.text) == cleaning.key(expected.text):
            return at
    for at, node in enumerate(entries):
        if _nodes(node, expected, deadline)[0]:
            return at
    return None


def _leaves(given: str, wanted: str, deadline: _Deadline) -> tuple[bool, str]:
    if cleaning.key(given) == cleaning.key(wanted):
        return True, TEXT
    bases = quantities.based(given), quantities.based(wanted)
    if bases != (None, None):
        digits = [
            base or (text.strip(), 10) for base, text in zip(bases, (given, wanted), strict=True)
        ]
        is_same = digits[0] == digits[1]
        return is_same, NUMBER if is_same else OTHER_NUMBER
    expected, found = quantities.read(wanted), quantities.read(given)
    if expected is not None and found is not None:
        is_same = found.equals(expected)
        return is_same, NUMBER if is_same else OTHER_NUMBER
    if (letter := _gold_letter(wanted)) is not None:
        return _same_choice(given, letter)
    if _is_word(wanted):
        is_same = _same_words(given, _ARTICLE.sub("", wanted))
        return is_same, TEXT if is_same else OTHER_TEXT
    if "..." in given + wanted:
        return False, OTHER_TEXT  # what is left out cannot be compared
    if (expected is not None and not _may_be_number(given)) or (
        found is not None and not _may_be_number(wanted)
    ):
        return False, OTHER_KIND
    if not (units := quantities.same_units(given, wanted)):
        return False, OTHER_EXPRESSION
    return _judged(*units, deadline)


def _gold_letter(wanted: str) -> str | None:
    match = re.fullmatch(r"(?:\(([A-Z])\)|([A-J]))[.)]?", wanted)
    return (match[1] or match[2]) if match else None


def _same_choice(given: str, letter: str) -> tuple[bool, str]:
    """The letter of a choice, alone or with the text of its option behind it."""
    match = _CHOICE.fullmatch(given)
    if match is None:
        return False, OTHER_TEXT
    named = match[1] or match[2]
    behind = match["text"]
    if behind and _OTHER_CHOICE.search(behind):
        return False, OTHER_CHOICE
    is_same = named == letter
    return is_same, CHOICE if is_same else OTHER_CHOICE


def _is_word(text: str) -> bool:
    """Whether a gold is words, and no product of variables."""
    words = _ARTICLE.sub("", text)
    is_product = len(words) <= 2 and words.islower() and words not in ("no", "up", "on", "in")
    return bool(WORDS.fullmatch(words)) and not is_product


def _same_words(given: str, words: str) -> bool:
    given = _ARTICLE.sub("", given.strip())
    if _YES_NO.fullmatch(words) and (match := _YES_NO.match(given)):
        given = match[0]
    if len(words) == 1:
        return given == words
    return _folded(given) == _folded(words)


def _folded(text: str) -> str:
    return re.sub(r"[\s'\"-]+", " ", text).strip().casefold()


def _may_be_number(text: str) -> bool:
    """Whether an expression has no variable: all its letters belong to known commands."""
    commands = re.findall(r"\\([a-zA-Z]+)", text)
    if any(name not in _KNOWN for name in commands):
        return False
    names = re.findall(r"[A-Za-z]+", re.sub(r"\\[a-zA-Z]+", " ", text))
    return bool(commands or names) and all(name in _KNOWN or name in ("e", "i") for name in names)


_DECIMAL = re.compile(r"(?<![\w.])([0-9]*)\.([0-9]+)")
_FUNCTION = re.compile(
    r"(?<![\\A-Za-z])(sqrt|log|ln|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|exp|pi|theta|infty)"
    r"(?![A-Za-z])"
)


def _judged(given: str, wanted: str, deadline: _Deadline) -> tuple[bool, str]:
    if deadline.is_over:
        return False, OUT_OF_TIME
    texts = [_latex(text) for text in (given, wanted)]
    if any(text is None for text in texts) or _TOWER.search(given):
        return False, UNREADABLE
    told = judge.ask(*(str(text) for text in texts))
    return {
        judge.EQUAL: (True, EXPRESSION),
        judge.DIFFERENT: (False, OTHER_EXPRESSION),
        judge.UNREADABLE: (False, UNREADABLE),
        judge.GAVE_UP: (False, OUT_OF_TIME),
    }[told]


def _latex(text: str) -> str | None:
    """A cleaned answer as LaTeX that says all of it; None for what a parser would misread."""
    if re.search(r"(?<![a-z])[0-9)] ?_|[\"@#;:?]", text) or re.search(
        r"[A-Za-z]{4,} [a-z]{3,}", text
    ):
        return None
    if not _is_balanced(text):
        return None
    text = re.sub(r"([A-Za-z])('+)", lambda m: f"{m[1]}_{{{'p' * len(m[2])}}}", text)
    text = _FUNCTION.sub(r"\\\1 ", text)
    text = re.sub(r"\\(frac) ?([0-9])([0-9])(?![0-9])", r"\\\1{\2}{\3}", text)
    text = re.sub(r"\\(frac) ?([0-9]) ?\{", r"\\\1{\2}{", text)
    text = re.sub(r"\\frac ?(\{[^{}]*\}) ?([0-9])", r"\\frac\1{\2}", text)
    text = re.sub(r"\\sqrt ?([0-9]+|[A-Za-z])", r"\\sqrt{\1}", text)
    text = _braced(text, r"\\sqrt ?\(")
    text = _braced(text, r"\^ ?\(")
    text = re.sub(r"\^ ?(-? ?[0-9]+)", r"^{\1}", text)
    text = text.replace("°", r"\cdot \frac{\pi}{180}") if "\\" in text else text
    text = re.sub(r"<\s?=", r"\\le ", re.sub(r">\s?=", r"\\ge ", text)).replace(
        "%", r"\cdot\frac{1}{100}"
    )
    return _DECIMAL.sub(_as_fraction, text.replace("*", r"\cdot "))


def _is_balanced(text: str) -> bool:
    """Whether parentheses and braces close in turn, and are no deeper than answers go."""
    depth = 0
    for token in re.findall(r"\\.|[(){}]", text):
        depth += (token in ("(", "{")) - (token in (")", "}"))
        if not 0 <= depth <= 30:
            return False
    return not depth


def _braced(text: str, head: str) -> str:
    """Braces instead of the parentheses behind a command."""
    while match := re.search(head, text):
        start = match.end() - 1
        depth = 0
        for at in range(start, len(text)):
            depth += (text[at] == "(") - (text[at] == ")")
            if not depth:
                break
        else:
            return text
        text = f"{text[:start]}{{{text[start + 1 : at]}}}{text[at + 1 :]}"
    return text


def _as_fraction(match: re.Match) -> str:
    digits = (match[1] + match[2]).lstrip("0") or "0"
    return rf"{{\frac{{{digits}}}{{1{'0' * len(match[2])}}}}}"
