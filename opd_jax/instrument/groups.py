"""What kind of token a type is, decided by its text and by where it stands.

The published clusters (arXiv 2605.09253) are delimiters of mathematics, whitespace and Markdown,
words that open a sentence, and digits; its controls are said to be content words. These rules make
such statements countable.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from opd_jax.instrument import shares
from opd_jax.instrument.corpus import Occurrences, TypeStats

GROUPS = (
    "math_delimiter",
    "whitespace_markup",
    "discourse_marker",
    "digit",
    "punctuation",
    "function_word",
    "content",
    "special",
)
_MOSTLY = 0.5  # share of occurrences that open a line or sentence, from which a word is a marker

# How tokenizer.token_text shows whitespace.
_WHITESPACE = str.maketrans({"␣": " ", "⏎": "\n", "␍": "\r", "⇥": "\t"})
_SPECIAL = re.compile(
    r"<[|｜].*[|｜]>|<(s|/s|pad|unk|bos|eos|unused ?\d*|0x[0-9A-F]{2})>|\[[A-Z]+\]"
)
_MARKUP = re.compile(r"#+|\*{2,}|_{2,}|`+|~{2,}|-{3,}|\|[-|:]+")
_BULLET = re.compile(r"[-+*>|]")  # markup where it opens a line, else an operator or a dash
_DELIMITER = re.compile(r"[\W_]*[$\\{}^][\W_]*|\\[^\W\d_]+")  # no letters, or one LaTeX command
_DIGIT = re.compile(r"\d[\d.,]*")
_WORD = re.compile(r"[^\W\d_]+(['’][^\W\d_]+)*")
_CARRIES = re.compile(r"[\s#*_`>~-]*")  # may stand between the start of a line and its first word
_ENDS = re.compile(r".*(\n|[.!?]['\")\]]*)\s*[#*_`>\s-]*", re.DOTALL)
_FUNCTION_WORDS = """
a an the this that these those each every some any no all both either neither such same other
i me my we us our you your he him his she her it its they them their one who whom whose which
what there here
is am are was were be been being has have had having do does did done can could may might must
shall should will would let
of in on at by for to from with without into onto over under between among through about as per
than up down out off after before since until
and or but nor so yet if then else when while where because although though whether that not
also only just how why
"""
_IS_FUNCTION_WORD = frozenset(_FUNCTION_WORDS.split()).__contains__


def plain(text: str) -> str:
    """Token text with its whitespace as such, where ``tokenizer.token_text`` made it visible."""
    return text.translate(_WHITESPACE)


def group(text: str, *, at_line_start_share: float) -> str:
    """The kind of a token: one of ``GROUPS``.

    Args:
      text: decoded, or as ``tokenizer.token_text`` shows it; it may carry a leading space.
      at_line_start_share: share of its occurrences that open a line or a sentence; see
        :func:`line_start_share`.
    """
    text = plain(text)
    word = text.strip()
    opens_lines = at_line_start_share > _MOSTLY
    if not text or _SPECIAL.fullmatch(text):
        return "special"
    if not word or _MARKUP.fullmatch(word) or (opens_lines and _BULLET.fullmatch(word)):
        return "whitespace_markup"
    if _DIGIT.fullmatch(word):
        return "digit"
    if _DELIMITER.fullmatch(word):
        return "math_delimiter"
    if _WORD.fullmatch(word) and opens_lines:
        return "discourse_marker"
    if _IS_FUNCTION_WORD(word.lower()):
        return "function_word"
    if any(char.isalnum() for char in word):
        return "content"
    return "whitespace_markup" if "\n" in text else "punctuation"


def line_start_share(found: Occurrences, token_text: Callable[[int], str]) -> np.ndarray:
    """Share of each type's occurrences that open a line or a sentence, [V]; 0 where unseen.

    An answer opens one. So does what follows a line break or the end of a sentence; blanks and
    Markdown marks in between do not count as words.
    """
    seen = np.flatnonzero(np.bincount(found.token_id, minlength=found.vocab_size))
    ends_V, carries_V = np.zeros((2, found.vocab_size), bool)
    for token_id in seen:
        text = plain(token_text(int(token_id)))
        ends_V[token_id] = _ENDS.fullmatch(text) is not None
        carries_V[token_id] = not ends_V[token_id] and _CARRIES.fullmatch(text) is not None
    order = np.lexsort((found.position, found.answer))
    token_id, answer = found.token_id[order], found.answer[order]
    # The last token before each position that says whether a line or sentence ended there.
    decisive = np.where(carries_V[token_id], -1, np.arange(len(order)))
    before = np.concatenate([[-1], np.maximum.accumulate(decisive)[:-1]]) if len(order) else order
    is_inside = (before >= 0) & (answer[before] == answer)
    opens = ~is_inside | ends_V[token_id[before]]
    count_V, start_V = (
        np.bincount(token_id, weights, minlength=found.vocab_size)
        for weights in (np.ones(len(order)), opens.astype(float))
    )
    return np.divide(start_V, count_V, out=np.zeros(found.vocab_size), where=count_V > 0)


def of_types(found: Occurrences, token_text: Callable[[int], str]) -> dict[int, str]:
    """The kind of every type seen."""
    share_V = line_start_share(found, token_text)
    return {
        int(i): group(token_text(int(i)), at_line_start_share=float(share_V[i]))
        for i in np.unique(found.token_id)
    }


def table(
    stats: TypeStats, kind: dict[int, str], rocks_k: Sequence[int] | np.ndarray
) -> list[dict[str, Any]]:
    """Types, shares of tokens and of KL by kind, for all types and for the rocks.

    Args:
      stats: sums by type.
      kind: of every type seen (:func:`of_types`).
      rocks_k: ids of the rocks.
    """
    is_rock_V = np.isin(np.arange(len(stats.count)), rocks_k)
    number_V = np.full(len(stats.count), -1)
    for token_id, name in kind.items():
        number_V[token_id] = GROUPS.index(name)
    rows = []
    for number, name in enumerate(GROUPS):
        inside_V = number_V == number
        ids, rocks = np.flatnonzero(inside_V), np.flatnonzero(inside_V & is_rock_V)
        rows.append(
            {
                "group": name,
                "types": len(ids),
                "rocks": len(rocks),
                "token_share": shares.token_share(stats, ids),
                "kl_share": shares.coverage(stats, ids),
                "rock_token_share": shares.token_share(stats, rocks),
            }
        )
    return rows
