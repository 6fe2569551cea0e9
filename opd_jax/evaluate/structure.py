r"""What kind of thing an answer is: a list, tuple, interval, union, set, matrix, or one expression.

Brackets, separators and relations are read here, outside of any expression; what stands between
them is left to :mod:`equality`.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence

from opd_jax.evaluate import arithmetic, cleaning, quantities

INTERVALS = ("()", "[)", "(]", "[]")
_MAX_LENGTH = 20 * arithmetic.MAX_LENGTH  # of a text that is read for its structure
_OPEN = {"(", "[", "{", "\\{", "\\langle", "\\lfloor", "\\lceil", "\\begin"}
_CLOSE = {")", "]", "}", "\\}", "\\rangle", "\\rfloor", "\\rceil", "\\end"}
_LEXEME = re.compile(r"\\\\|\\[a-zA-Z]+|\\.|\b(?:and|or)\b|.", re.DOTALL)
_THOUSANDS = re.compile(r"(?<![0-9.,])([0-9]{1,3})((?:,[0-9]{3})+)(?![0-9])")
_ENVIRONMENT = re.compile(
    r"\\begin\{(?P<name>[pbB]?matrix|smallmatrix|array)\}(?:\{[lcr| ]*\})?(?P<body>.*)"
    r"\\end\{(?P=name)\}",
    re.DOTALL,
)
_TRANSPOSED = re.compile(r"\s?\^ ?\{? ?(?:T|\\top|\\intercal) ?\}?$")
_RELATIONS = ("<", ">", "\\le", "\\ge", "=", "\\ne", "\\approx", "\\in")
_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
NAME = re.compile(
    r"(?:\\?[A-Za-z]+'?(?: ?_ ?(?:\{[^{}]{1,12}\}|\w))?)(?: ?\([A-Za-z0-9, \\]{1,20}\))?"
    r"|\([A-Za-z](?:, ?[A-Za-z])+\)"
)
WORDS = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*")


@dataclasses.dataclass(frozen=True)
class Node:
    """A cleaned answer, read one level deep or more.

    Attributes:
      kind: ``leaf``, ``list`` (no brackets), ``set``, ``union``, ``matrix`` (items are rows of kind
        ``row``), or the two brackets of a tuple or an interval, such as ``(]``.
      text: all of it.
      items: its entries.
    """

    kind: str
    text: str
    items: tuple[Node, ...] = ()


def split(text: str, separators: set[str]) -> list[str]:
    """Cut a text at separators outside of all brackets."""
    parts, depth, start = [], 0, 0
    for match in _LEXEME.finditer(text):
        token = match[0]
        if token in _OPEN:
            depth += 1
        elif token in _CLOSE:
            depth -= 1
        elif depth <= 0 and token in separators:
            if token == "=" and text[match.start() - 1 : match.start()] in ("<", ">", "!", ":"):
                continue
            parts.append(text[start : match.start()])
            start = match.end()
    parts.append(text[start:])
    return [part.strip() for part in parts]


def split_list(text: str) -> list[str]:
    """Entries of a list without brackets; a thousands separator is none of its commas."""
    if re.search(r", |;|\b(?:and|or)\b", text) or _THOUSANDS.fullmatch(text.lstrip("+-")):
        text = _THOUSANDS.sub(lambda m: m[1] + m[2].replace(",", "\0"), text)
    parts = [part for part in split(text, {",", ";", "and", "or"}) if part]
    return [part.replace("\0", ",") for part in parts]


def read(text: str) -> Node:
    """Read a cleaned answer."""
    text = cleaning.peel(text)
    if len(text) > _MAX_LENGTH or quantities.read(text) is not None:
        return Node("leaf", text)
    if text.startswith("]") or (text.endswith("[") and text[:1] in "[]"):  # ]1, 2[
        text = ("(" if text[0] == "]" else "[") + text[1:-1] + (")" if text[-1] == "[" else "]")
    unions = split(text, {"\\cup"})
    if len(unions) > 1:
        return Node("union", text, tuple(map(read, unions)))
    if (rows := _rows(text)) is not None:
        return Node("matrix", text, rows)
    if (line := _real_line(text)) is not None:
        return line
    ways = split(text, {"or", ";"})
    if len(ways) > 1 and all("," in way and "=" in way for way in ways):  # x=1, y=2 or x=3, y=4
        return Node("list", text, tuple(map(read, ways)))
    if len(parts := split_list(text)) > 1 and not _is_prose(text):
        return _list(text, parts)
    if (bracketed := _bracketed(text)) is not None:
        return bracketed
    row = _bracketed(_TRANSPOSED.sub("", text)) if _TRANSPOSED.search(text) else None
    if row is not None and row.kind in ("()", "[]"):  # (1, 2)^T is a column
        return Node("matrix", text, tuple(Node("row", x.text, (x,)) for x in row.items))
    if (interval := _interval(text)) is not None:
        return interval
    if (both := _both_signs(text)) is not None:
        return Node("list", text, both)
    return Node("leaf", text)


def _list(text: str, parts: Sequence[str]) -> Node:
    items = list(
        itertools.chain.from_iterable(
            node.items if node.kind == "list" else (node,) for node in map(read, parts)
        )
    )
    intervals = [node for node in items if node.kind in INTERVALS]
    if len(intervals) == len(items) and re.search(r"\bor\b", text):
        return Node("union", text, tuple(items))
    if len(intervals) == len(items) == 2 and (both := _overlap(text, *intervals)) is not None:
        return both
    names = [split(item.text, {"="}) for item in items]
    if all(len(name) == 2 and NAME.fullmatch(name[0]) for name in names):
        labels = [cleaning.key(name[0]) for name in names]
        values = [read(name[1]) for name in names]
        if len(set(labels)) == 1:  # x = 1 or x = 2
            return Node("list", text, tuple(values))
        if len(set(labels)) == len(labels):  # x = 1, y = 2: by name
            order = sorted(range(len(labels)), key=lambda i: labels[i])
            return Node("named", " ".join(sorted(labels)), tuple(values[i] for i in order))
    first = names[0]
    if len(first) == 2 and NAME.fullmatch(first[0]) and all(len(n) == 1 for n in names[1:]):
        items[0] = read(first[1])  # x = 1, 2
    return Node("list", text, tuple(items))


def _overlap(text: str, first: Node, second: Node) -> Node | None:
    """Two half-lines joined by "and" as the interval where both hold."""
    if first.items[0].text == "-\\infty":
        first, second = second, first
    ends = first.items[1].text, second.items[0].text
    if ends != ("\\infty", "-\\infty") or not re.search(r"\band\b", text):
        return None
    kind = first.kind[0] + second.kind[1]
    return Node(kind, text, (first.items[0], second.items[1]))


def _is_prose(text: str) -> bool:
    return bool(WORDS.fullmatch(text)) and not re.fullmatch(
        r"[A-Z]{1,4}(?: (?:and|or) [A-Z]{1,4})+", text
    )


def _bracketed(text: str) -> Node | None:
    """A tuple, an interval or a set; None if no pair of brackets holds all of the text."""
    tokens = [match for match in _LEXEME.finditer(text) if match[0].strip()]
    if not tokens or tokens[0][0] not in _OPEN or tokens[-1][0] not in _CLOSE:
        return None
    depth = 0
    for token in tokens:
        depth += (token[0] in _OPEN) - (token[0] in _CLOSE)
        if depth == 0 and token is not tokens[-1]:
            return None
    left, right = tokens[0][0], tokens[-1][0]
    inner = text[tokens[0].end() : tokens[-1].start()].strip()
    parts = split_list(inner) if left in ("\\{", "(", "[", "\\langle") else []
    if (left, right) == ("\\{", "\\}"):
        if "|" in inner or ":" in inner:  # { x | x > 1 }
            return read(re.split(r"[|:]", inner, maxsplit=1)[1])
        return Node("set", text, tuple(map(read, parts)))
    kind = {"(": "(", "[": "[", "\\langle": "("}.get(left, "?") + {
        ")": ")", "]": "]", "\\rangle": ")"
    }.get(right, "?")  # fmt: skip
    if "?" in kind or (len(parts) < 2 and kind != "()"):
        return None
    if len(parts) < 2:
        return read(inner) if inner else None
    items = tuple(map(read, parts))
    if kind == "[]" and all(item.kind == "[]" for item in items) and len(items) > 1:
        rows = tuple(dataclasses.replace(item, kind="row") for item in items)
        if len({len(row.items) for row in rows}) == 1:
            return Node("matrix", text, rows)
    return Node(kind, text, items)


def _rows(text: str) -> tuple[Node, ...] | None:
    """Rows of a matrix that is all of the text."""
    body = text
    is_transposed = bool(_TRANSPOSED.search(body))
    body = _TRANSPOSED.sub("", body).strip()
    if body[:1] in ("(", "[") and body[-1:] in (")", "]"):
        body = body[1:-1].strip()
    match = _ENVIRONMENT.fullmatch(body)
    if match is None or "\\begin" in match["body"]:
        return None
    rows = [row for row in re.split(r"\\\\(?:\\hline)?", match["body"]) if row.strip()]
    cells = [[cell.strip() for cell in split(row, {"&"})] for row in rows]
    if is_transposed and len({len(row) for row in cells}) == 1:
        cells = [list(column) for column in zip(*cells, strict=True)]
    return tuple(Node("row", " & ".join(row), tuple(map(read, row))) for row in cells)


def relation(text: str) -> tuple[str, ...]:
    """Sides and signs of a chain of relations, in turn; one side without any."""
    tokens, start, depth = [], 0, 0
    text = re.sub(r"<\s?=", r"\\le ", re.sub(r">\s?=", r"\\ge ", text))
    for match in _LEXEME.finditer(text):
        depth += (match[0] in _OPEN) - (match[0] in _CLOSE)
        if depth == 0 and match[0] in _RELATIONS:
            tokens += [text[start : match.start()].strip(), match[0]]
            start = match.end()
    return (*tokens, text[start:].strip())


def _interval(text: str) -> Node | None:
    r"""``x < 2``, ``1 < x \le 2`` or ``x \in (1, 2]`` as an interval of one variable."""
    chain = relation(text)
    if len(chain) == 3 and chain[1] == "\\in" and NAME.fullmatch(chain[0]):
        return read(chain[2])
    if len(chain) not in (3, 5) or any(sign not in _FLIPPED for sign in chain[1::2]):
        return None
    is_name = [bool(re.fullmatch(r"\\?[A-Za-z]+", side)) for side in chain[::2]]
    if len(chain) == 3:
        left, sign, right = chain
        if is_name[1] and not is_name[0]:
            left, sign, right = right, _FLIPPED[sign], left
        elif not is_name[0] or is_name[1]:
            return None
        is_below = sign in ("<", "\\le")
        low, high = ("-\\infty", right) if is_below else (right, "\\infty")
        signs = ("<", sign) if is_below else (_FLIPPED[sign], "<")
    else:
        low, first, _, second, high = chain
        if not is_name[1] or is_name[0] or is_name[2]:
            return None
        if first in (">", "\\ge") and second in (">", "\\ge"):
            low, first, second, high = high, _FLIPPED[second], _FLIPPED[first], low
        signs = (first, second)
        if not {*signs} <= {"<", "\\le"}:
            return None
    kind = ("[" if signs[0] == "\\le" else "(") + ("]" if signs[1] == "\\le" else ")")
    return Node(kind, text, (read(low), read(high)))


_REALS = r"(?:\\mathbb ?\{? ?R ?\}?|[Aa]ll real numbers?|[Rr]eals?)"
_WITHOUT = re.compile(
    rf"{_REALS} ?(?:\\setminus|\\backslash|-) ?\\\{{(.*)\\\}}|\\?[A-Za-z]+ ?\\ne ?([^<>=]+)",
    re.DOTALL,
)


def _real_line(text: str) -> Node | None:
    r"""All real numbers, or all but a few (also as ``x \ne 2``), as intervals."""
    if re.fullmatch(_REALS, text):
        points: list[Node] = []
    elif match := _WITHOUT.fullmatch(text):
        points = [read(part) for part in split_list(match[1] or match[2])]
        values = [quantities.read(point.text) for point in points]
        if len(points) > 1 and None in values:
            return None
        if len(points) > 1:
            points.sort(key=lambda point: getattr(quantities.read(point.text), "value", 0))
    else:
        return None
    ends = [Node("leaf", "-\\infty"), *points, Node("leaf", "\\infty")]
    parts = tuple(Node("()", text, pair) for pair in itertools.pairwise(ends))
    return parts[0] if len(parts) == 1 else Node("union", text, parts)


def _both_signs(text: str) -> tuple[Node, ...] | None:
    """Both values of an expression with plus-minus signs."""
    if "\\pm" not in text:
        return None
    forms = [("+", "-"), ("-", "+")]
    found = [
        re.sub(r"^ ?\+ ?", "", text.replace("\\pm", plus).replace("\\mp", minus)).strip()
        for plus, minus in forms
    ]
    return tuple(Node("leaf", form) for form in found)
