r"""Graders: whether a response is right, and why.

A grader finds the answer in a response (:mod:`finding` has the rules, and which responses have
none) and compares it with the gold answer. Five are named:

=========== ====================================================================================
``math``    numbers, words, expressions, lists, intervals, sets, matrices: :mod:`equality`
``numeric`` numbers only, exactly; a response that is one number and nothing else is read as it
``choice``  the letter of an option, whatever its case, also "(B) text", or "B" alone
``exact``   the text, without its case and spacing; a response without a mark is its own answer
``ifeval``  whether the response behind its thought follows its :mod:`instructions`
=========== ====================================================================================

A user's own is named ``module:function`` or ``path/to/file.py:function``. It is called with the
response as it is and the gold answer, and returns a :class:`Verdict`, or whether the response is
right, or None where it finds no answer.

A response without a recognisable answer is wrong, and counted apart (``unparsed``): many of them
tell of another format, not of wrong answers.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from opd_jax.evaluate import (
    arithmetic,
    cleaning,
    equality,
    finding,
    instructions,
    judge,
    quantities,
)
from opd_jax.files import path_of


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one response.

    Attributes:
      correct: whether it is right.
      reason: a few words, the same for all responses of a kind, to be counted.
      found: its answer as it is written; None where there is none, and then it is not correct.
    """

    correct: bool
    reason: str
    found: str | None = None

    @property
    def is_unparsed(self) -> bool:
        """Whether no answer was recognised."""
        return self.found is None


class GraderError(ValueError):
    """A grader that does not exist, or a user's own that failed; the message says what to do."""


class Grader(Protocol):
    """What grades responses."""

    def __call__(
        self, text: str, gold: str, *, truncated: bool = False, in_thought: bool = False
    ) -> Verdict:
        """Grade a response.

        Args:
          text: the response.
          gold: the right answer.
          truncated: whether the response was cut by its length limit.
          in_thought: whether its prompt ends inside a thought.
        """
        ...


def math(text: str, gold: str, *, truncated: bool = False, in_thought: bool = False) -> Verdict:
    """The grader ``math``.

    Raises:
      ValueError: the gold answer is empty.
      JudgeError: the gold is an expression, the texts differ, and math-verify is missing.
    """
    gold = gold_answer(gold)
    found = finding.find(text, truncated=truncated, in_thought=in_thought)
    if found.answer is None:
        return Verdict(False, found.missing)
    is_equal, reason = equality.compare(found.answer, gold)
    return Verdict(is_equal, reason, found.answer)


def numeric(text: str, gold: str, *, truncated: bool = False, in_thought: bool = False) -> Verdict:
    """The grader ``numeric``.

    Raises:
      ValueError: the gold answer is no number.
    """
    expected = _quantity(gold_answer(gold))
    if expected is None:
        raise ValueError(
            f"the gold answer {gold!r} is no number: expected one for the grader numeric; use the "
            "grader math or exact"
        )
    found = finding.find(text, truncated=truncated, in_thought=in_thought)
    answer = found.answer
    if answer is None:
        answer = found.rest.strip() if found.rest and not truncated else None
        if answer is None or found.missing != finding.NO_ANSWER or _quantity(answer) is None:
            return Verdict(False, found.missing)
    number = _quantity(answer)
    if number is None and "=" in answer:
        number = _quantity(answer.rpartition("=")[2])
    if number is None:
        return Verdict(False, equality.OTHER_KIND, answer)
    is_equal = number.equals(expected)
    return Verdict(is_equal, equality.NUMBER if is_equal else equality.OTHER_NUMBER, answer)


def choice(text: str, gold: str, *, truncated: bool = False, in_thought: bool = False) -> Verdict:
    """The grader ``choice``.

    Raises:
      ValueError: the gold answer names no letter.
    """
    expected = letter(gold_answer(gold))
    if expected is None:
        raise ValueError(
            f"the gold answer {gold!r} has no letter: expected one such as B for the grader "
            "choice; use the grader exact"
        )
    found = finding.find(text, truncated=truncated, in_thought=in_thought)
    answer = found.answer
    if (answer is None or letter(answer) is None) and found.rest is not None:
        answer = _chosen(found.rest, truncated) or answer
    if answer is None:
        return Verdict(False, found.missing)
    named = letter(answer)
    if named is None:
        return Verdict(False, equality.OTHER_KIND, answer)
    is_equal = named == expected
    return Verdict(is_equal, equality.CHOICE if is_equal else equality.OTHER_CHOICE, answer)


def exact(text: str, gold: str, *, truncated: bool = False, in_thought: bool = False) -> Verdict:
    """The grader ``exact``.

    Raises:
      ValueError: the gold answer is empty.
    """
    gold = gold_answer(gold)
    found = finding.find(text, truncated=truncated, in_thought=in_thought)
    answer = found.answer
    if answer is None and found.missing == finding.NO_ANSWER and not truncated:
        answer = (found.rest or "").strip() or None
    if answer is None:
        return Verdict(False, found.missing)
    is_equal = _folded(answer) == _folded(gold)
    return Verdict(is_equal, equality.TEXT if is_equal else equality.OTHER_TEXT, answer)


def ifeval(text: str, gold: str, *, truncated: bool = False, in_thought: bool = False) -> Verdict:
    """The grader ``ifeval``; a response that was cut is checked as it stands, as the harness does.

    Raises:
      ImportError, ValueError: as :func:`instructions.follows`.
    """
    rest = finding.find(text, in_thought=in_thought).rest
    if rest is None:
        return Verdict(False, finding.UNFINISHED_THOUGHT)
    if not rest.strip():
        return Verdict(False, finding.NO_ANSWER)
    does = instructions.follows(rest.strip(), gold)
    return Verdict(does, instructions.FOLLOWED if does else instructions.NOT_FOLLOWED, rest.strip())


def any_of(
    grader: Grader,
    text: str,
    gold: str | tuple[str, ...],
    *,
    truncated: bool = False,
    in_thought: bool = False,
) -> Verdict:
    """Grade a response against one gold answer, or against several of which any will do.

    The verdict is the first that says right; where none does, it is that of the first gold.

    Raises:
      ValueError: a gold answer that the grader cannot use.
    """
    first, *others = (gold,) if isinstance(gold, str) else gold
    told = grader(text, first, truncated=truncated, in_thought=in_thought)
    for other in others if not told.correct else ():
        verdict = grader(text, other, truncated=truncated, in_thought=in_thought)
        if verdict.correct:
            return verdict
    return told


GRADERS: dict[str, Grader] = {
    "math": math,
    "numeric": numeric,
    "choice": choice,
    "exact": exact,
    "ifeval": ifeval,
}


def named(name: str) -> Grader:
    """The grader of a name, as the config has it; a user's own is imported.

    Raises:
      GraderError: there is none, or it cannot be imported.
    """
    return GRADERS[name] if name in GRADERS else _imported(name)


def check(name: str, gold: str) -> None:
    """Check that a named grader can use a gold answer, before anything is sampled for it.

    Raises:
      ValueError: it cannot.
      ImportError, JudgeError: what it needs is not installed.
    """
    if name == "ifeval":
        instructions.follows("x", gold)
    elif name in GRADERS:
        GRADERS[name]("", gold)
        if name == "math" and not judge.is_installed():
            GRADERS[name](r"\boxed{q_{0}+1}", gold)  # raises where only math-verify can tell


def source(name: str) -> Path | None:
    """The file of a user's own grader; None of one that is a part of a package."""
    place = Path(path_of(name.rpartition(":")[0]))
    return place if place.suffix == ".py" and place.is_file() else None


@functools.cache
def _imported(name: str) -> Grader:
    """A user's own grader, imported once."""
    place, colon, function = name.rpartition(":")
    if not colon or not place or not function.isidentifier():
        raise GraderError(
            f"there is no grader {name!r}: expected one of {', '.join(GRADERS)}, or a function of "
            "your own as module:function or file.py:function; set that"
        )
    try:
        module = _module(place)
    except Exception as error:  # a module may raise anything
        raise GraderError(
            f"the grader {name!r} cannot be imported ({type(error).__name__}: {error}): expected "
            "module:function or file.py:function; mend it"
        ) from error
    own = getattr(module, function, None)
    if not callable(own):
        raise GraderError(
            f"{place} has no function {function}: expected the one that the grader {name!r} "
            "names; correct it"
        )
    return _own(name, own)


def is_correct(text: str, gold: str) -> bool:
    """Whether a response marks the gold answer as its answer, by the grader ``math``.

    Raises:
      ValueError, JudgeError: as :func:`math`.
    """
    return math(text, gold).correct


def gold_answer(gold: str) -> str:
    """The answer of a gold, which may itself be a worked solution that marks its answer.

    Raises:
      ValueError: it is empty.
    """
    marked = finding.find(gold).answer
    gold = gold if marked is None else marked
    if not gold.strip():
        raise ValueError(
            "the gold answer is empty: expected a number, a word or an expression; fill `answer`"
        )
    return gold


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(path_of(place))
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file")
    spec = importlib.util.spec_from_file_location(f"grader_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _own(name: str, function: Callable[[str, str], Any]) -> Grader:
    """A user's function as a grader."""

    def grade(
        text: str, gold: str, *, truncated: bool = False, in_thought: bool = False
    ) -> Verdict:
        try:
            told = function(text, gold)
        except Exception as error:
            raise GraderError(
                f"the grader {name} failed on the gold {gold!r} and the response "
                f"{text[:200]!r} ({type(error).__name__}: {error}): expected a verdict; mend it"
            ) from error
        if isinstance(told, Verdict):
            return told
        if told is None:
            return Verdict(False, finding.NO_ANSWER)
        if told in (True, False):
            return Verdict(bool(told), "right" if told else "wrong", text)
        raise GraderError(
            f"the grader {name} returned {told!r}: expected True, False, None or a Verdict; mend it"
        )

    return grade


def _quantity(text: str) -> quantities.Quantity | None:
    try:
        return quantities.read(cleaning.clean(text))
    except (arithmetic.TooLargeError, RecursionError):
        return None


_LETTER = re.compile(
    r"(?:(?:the )?(?:correct |best |right )?(?:option|choice|answer)s?(?: is|:)? )?"
    r"(?:\(([A-Za-z])\)|([A-Za-z])(?=$|[).:]))\)?\s?[.):]?(?P<text>(?:\s.*)?)",
    re.DOTALL | re.IGNORECASE,
)
_TWO = re.compile(
    r"\(?\b[A-Z]\b\)?\s?(?:and|or|,|&|/)\s?\(?[A-Z]\b|^\s?(?:and|or|,|&|/)\s?\(?[A-Z]\b"
)
_PROSE = (
    r"\b(?:option|choice) \(?([A-Z])\b\)? is (?:the )?(?:correct|right|best)",
    r"\b(?:correct|right|best) (?:option|choice|answer)(?: is|:) ?[*_(\[]{0,4}([A-Z])\b",
    r"\b(?:choose|select|pick) (?:option |choice )?[*_(]{0,4}([A-Z])\b",
)
_CHOSEN = tuple(re.compile(pattern, re.IGNORECASE) for pattern in _PROSE)


def letter(text: str) -> str | None:
    """The option that an answer names, in upper case; None for none, or for more than one."""
    match = _LETTER.fullmatch(cleaning.clean(text)[:2000])
    if match is None or _TWO.search(match["text"]):
        return None
    return (match[1] or match[2]).upper()


def _chosen(text: str, truncated: bool) -> str | None:
    """What a response without a mark chooses in words, or says and nothing else."""
    lines = [line for line in text.strip().split("\n") if line.strip()]
    if not truncated and lines and letter(text.strip()[:200]) and len(lines) <= 2:
        return text.strip()
    found = [match for pattern in _CHOSEN for match in pattern.finditer(text)]
    last = max(found, key=lambda match: match.start(), default=None)
    return last[1] if last else None


def _folded(text: str) -> str:
    return re.sub(r"\s+", " ", cleaning.peel(text)).strip().casefold()
