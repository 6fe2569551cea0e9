"""Word problems for the embedded pair, and the two house styles in which they are solved.

A problem is a short story whose answer takes two or three steps of small-number arithmetic. The
teacher writes plain equations under English connectives and closes with ``Answer: n``; the student
writes LaTeX bullets and closes with ``\\boxed{n}``. Both state the same steps, so every difference
between the two texts is style.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

LIMIT = 50  # no quantity in a story or a solution exceeds it

NAMES = (
    ("Mia", "she"), ("Ava", "she"), ("Zoe", "she"), ("Lena", "she"), ("Nora", "she"),
    ("Ruth", "she"), ("Ines", "she"), ("Tara", "she"), ("Leo", "he"), ("Sam", "he"),
    ("Max", "he"), ("Omar", "he"), ("Hugo", "he"), ("Ivan", "he"), ("Finn", "he"), ("Raj", "he"),
)  # fmt: skip
THINGS = (
    "apples", "pears", "plums", "shells", "stamps", "coins", "cards", "beads", "books", "pens",
    "stickers", "marbles", "buttons", "cookies", "stones", "tickets",
)  # fmt: skip
CONTAINERS = ("boxes", "bags", "jars", "trays", "packs", "baskets")
GOODS = ("cap", "lamp", "kite", "ball", "mug", "scarf", "puzzle", "vase")
WORK = (("reads", "pages"), ("paints", "tiles"), ("folds", "napkins"), ("plants", "bulbs"))

_FIRST = ("First,", "To start,", "We begin with")
_MIDDLE = ("Then", "Next,", "Now", "After that,")
_LAST = ("So", "Finally,", "That makes")
_OPENINGS = ("Let us count the {unit}.", "We want the number of {unit}.", "Counting {unit}:")
_CLOSINGS = ("Hence", "Thus", "Therefore")
_LATEX = {"+": "+", "-": "-", "*": r"\times", "/": r"\div"}


@dataclass(frozen=True)
class Step:
    """One equation ``left op right = value``; ``op`` is one of ``+ - * /``."""

    left: int
    op: str
    right: int
    value: int


@dataclass(frozen=True)
class Problem:
    """A question, the equations that solve it in order, and the unit of the answer."""

    question: str
    steps: tuple[Step, ...]
    unit: str

    @property
    def answer(self) -> str:
        """The value of the last equation, as digits."""
        return str(self.steps[-1].value)


def problems(seed: int, without: frozenset[str] = frozenset()) -> Iterator[Problem]:
    """Yield problems for ever, none of whose questions is in ``without``."""
    rng = random.Random(seed)
    while True:
        problem = rng.choice(_FAMILIES)(rng)
        values = [x for s in problem.steps for x in (s.left, s.right, s.value)]
        if min(values) >= 1 and max(values) <= LIMIT and problem.question not in without:
            yield problem


def teacher_text(problem: Problem, rng: random.Random) -> str:
    """Solve in the teacher's style: connectives, spaced plain equations, ``Answer: n``."""
    last = len(problem.steps) - 1
    sentences = []
    for i, step in enumerate(problem.steps):
        word = rng.choice(_FIRST if i == 0 else _LAST if i == last else _MIDDLE)
        unit = f" {problem.unit}" if i == last or rng.random() < 0.3 else ""
        sentences.append(f"{word} {step.left} {step.op} {step.right} = {step.value}{unit}.")
    return " ".join(sentences) + f"\nAnswer: {problem.answer}"


def student_text(problem: Problem, rng: random.Random) -> str:
    """Solve in the student's style: a heading, LaTeX bullets without spaces, ``\\boxed{n}``."""
    lines = [rng.choice(_OPENINGS).format(unit=problem.unit)]
    for step in problem.steps:
        lines.append(f"- ${step.left}{_LATEX[step.op]}{step.right}={step.value}$")
    return "\n".join(lines) + f"\n{rng.choice(_CLOSINGS)} \\boxed{{{problem.answer}}}"


def _apply(left: int, op: str, right: int) -> Step:
    exact = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}
    value = exact[op]
    if op == "/" and left % right:
        value = -1  # outside the limits: problems() draws again
    return Step(left, op, right, value)


def _event(rng: random.Random, value: int, who: str, other: str, thing: str) -> tuple[str, Step]:
    """One thing that happens to a stock of ``value`` things, as a sentence and its equation."""
    op = rng.choice("+" if value < 2 else "+-*" if 2 * value <= LIMIT else "+-")
    if op == "*":
        times = rng.randint(2, min(4, LIMIT // value))
        word = {2: "twice", 3: "3 times", 4: "4 times"}[times]
        return f"A week later {who} has {word} as many.", _apply(value, "*", times)
    amount = rng.randint(2, 30) if op == "+" else rng.randint(1, value - 1)
    if op == "+":
        sentence = rng.choice(
            (
                f"{who.capitalize()} buys {amount} more.",
                f"{who.capitalize()} finds {amount} {thing}.",
                f"{other} brings {amount} {thing}.",
                f"{other} adds {amount} more.",
            )
        )
    else:
        sentence = rng.choice(
            (
                f"{who.capitalize()} gives {amount} to {other}.",
                f"{who.capitalize()} loses {amount} {thing}.",
                f"{who.capitalize()} sells {amount} of them.",
                f"{other} takes {amount} {thing}.",
            )
        )
    return sentence, _apply(value, op, amount)


def _cast(rng: random.Random) -> tuple[str, str, str, str]:
    (name, who), (other, _) = rng.sample(NAMES, 2)
    return name, who, other, rng.choice(THINGS)


def _stock(rng: random.Random) -> Problem:
    """A stock, perhaps counted in containers, to which two or three things happen."""
    name, who, other, thing = _cast(rng)
    if rng.random() < 0.5:
        count, size = rng.randint(2, 9), rng.randint(2, 9)
        steps = [_apply(count, "*", size)]
        text = [f"{name} has {count} {rng.choice(CONTAINERS)} of {size} {thing}."]
        value, num_events = count * size, rng.randint(1, 2)
    else:
        value, num_events, steps = rng.randint(3, 40), rng.randint(2, 3), []
        text = [f"{name} has {value} {thing}."]
    for _ in range(num_events):
        sentence, step = _event(rng, value, who, other, thing)
        text.append(sentence)
        steps.append(step)
        value = step.value
    text.append(f"How many {thing} does {name} have now?")
    return Problem(" ".join(text), tuple(steps), thing)


def _share(rng: random.Random) -> Problem:
    """A stock changed once and then dealt out equally."""
    name, who, other, thing = _cast(rng)
    ways, each = rng.randint(2, 9), rng.randint(2, 10)
    total = ways * each
    change = rng.randint(1, min(30, total - 1))
    op = rng.choice("+-")
    start = total - change if op == "+" else total + change
    event = f"buys {change} more" if op == "+" else f"gives {change} to {other}"
    text = (
        f"{name} has {start} {thing} and {event}. {who.capitalize()} puts them into {ways} equal "
        f"{(kind := rng.choice(CONTAINERS))}. How many {thing} are in each of the {kind}?"
    )
    return Problem(text, (_apply(start, op, change), _apply(total, "/", ways)), thing)


def _compare(rng: random.Random) -> Problem:
    """Two owners, one known relative to the other, then their sum."""
    name, _, other, thing = _cast(rng)
    own = rng.randint(3, 40)
    op = rng.choice("+-*")
    amount = rng.randint(2, 4) if op == "*" else rng.randint(1, own - 1 if op == "-" else 30)
    relation = {"+": "more than", "-": "fewer than", "*": "times as many as"}[op]
    steps = [_apply(own, op, amount)]
    steps.append(_apply(own, "+", steps[0].value))
    text = f"{name} has {own} {thing}. {other} has {amount} {relation} {name}."
    if rng.random() < 0.4:
        lost = rng.randint(1, max(1, steps[1].value - 1))
        steps.append(_apply(steps[1].value, "-", lost))
        text += f" Together they lose {lost}. How many {thing} are left?"
    else:
        text += f" How many {thing} do they have together?"
    return Problem(text, tuple(steps), thing)


def _shop(rng: random.Random) -> Problem:
    """Several goods at a price, with a second good, or change from a payment."""
    name, who, _, _ = _cast(rng)
    good, second = rng.sample(GOODS, 2)
    count, price = rng.randint(2, 9), rng.randint(2, 9)
    steps = [_apply(count, "*", price)]
    text = f"A {good} costs {price} dollars. {name} buys {count}"
    if rng.random() < 0.6:
        extra = rng.randint(2, 30)
        text += f" and a {second} for {extra} dollars"
        steps.append(_apply(steps[-1].value, "+", extra))
    if len(steps) == 1 or rng.random() < 0.5:
        paid = rng.randint(steps[-1].value + 1, max(LIMIT, steps[-1].value + 1))
        text += f". {who.capitalize()} pays with {paid} dollars. How many dollars come back?"
        steps.append(_apply(paid, "-", steps[-1].value))
    else:
        text += f". How many dollars does {name} pay?"
    return Problem(text, tuple(steps), "dollars")


def _work(rng: random.Random) -> Problem:
    """Work at a steady rate over some days, then more of it, towards a total."""
    name, _, _, _ = _cast(rng)
    verb, thing = rng.choice(WORK)
    rate, days = rng.randint(2, 9), rng.randint(2, 9)
    steps = [_apply(rate, "*", days)]
    text = f"{name} {verb} {rate} {thing} a day for {days} days"
    if rng.random() < 0.5:
        more = rng.randint(2, 30)
        steps.append(_apply(steps[-1].value, "+", more))
        text += f" and then {more} more"
    if len(steps) == 1 or rng.random() < 0.5:
        goal = rng.randint(steps[-1].value + 1, max(LIMIT, steps[-1].value + 1))
        steps.append(_apply(goal, "-", steps[-1].value))
        text += f". There are {goal} {thing} in all. How many {thing} are left?"
    else:
        text += f". How many {thing} is that?"
    return Problem(text, tuple(steps), thing)


_FAMILIES = (_stock, _stock, _share, _compare, _shop, _work)
