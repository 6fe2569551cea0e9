#!/usr/bin/env python3
r"""Write short reasoning prompts with checkable integer answers, made by the package reasoning-gym.

    pip install --no-deps -r scripts/requirements-prompts.txt
    scripts/make_reasoning_prompts.py --out=runs/prompts

Makes ``train.jsonl`` and ``heldout.jsonl``; no question is in both, and the same seed gives the
same files. A line holds ``messages`` (one user turn), ``answer`` (an integer as text) and ``task``.
The tasks of ``--set=steps`` have a few small numbers each, to be thought through; of those of
``--set=digits``, one sum, difference or product of two digits, told in a sentence, a model of 135M
parameters solves about half (graded by ``scripts/last_number.py``).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INSTRUCTION = r"Think step by step, then end with \boxed{answer}."

# What reasoning-gym adds to its questions and INSTRUCTION replaces.
BOILERPLATE = re.compile(
    r"\s*(?:Give (?:only )?the [^.]* as your final answer\.|Do not include units\.|"
    r"Your task is to count [^.]*\.\s*Now,|"
    r"State the final answer to the following arithmetic problem:)\s*"
)


@dataclass(frozen=True)
class Task:
    """One reasoning-gym data set: its share of the prompts and its settings."""

    name: str
    share: float
    settings: dict[str, Any] = field(default_factory=dict)
    prefix: str = ""  # put before the question where stripping the boilerplate leaves a bare sum


TASKS = (
    Task("gsm_symbolic", 0.40),
    Task(
        "chain_sum",
        0.15,
        {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
        "What is ",
    ),
    Task("leg_counting", 0.15, {"min_animals": 2, "max_animals": 3, "max_instances": 9}),
    Task("products", 0.10, {"min_digits": 1, "max_digits": 2}),
    Task("simple_equations", 0.10, {"min_terms": 2, "max_terms": 2, "max_value": 20}),
    Task("gcd", 0.05, {"max_numbers": 2, "max_value": 60}),
    Task("letter_counting", 0.05, {"min_words": 2, "max_words": 4}),
)
# One product or sum of two digits: 100 and 200 questions in all, with nothing to think through.
DIGITS = (
    Task(
        "chain_sum",
        0.66,
        {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        "What is ",
    ),
    Task("products", 0.34, {"min_digits": 1, "max_digits": 1}, "What is "),
)
SETS = {"steps": (TASKS, INSTRUCTION), "digits": (DIGITS, "Answer in one short sentence.")}


def clean(question: str, task: Task) -> str:
    """Strip reasoning-gym's answer format from a question and put every space once."""
    text = " ".join(BOILERPLATE.sub(" ", question).split())
    if task.prefix:
        text = task.prefix + text.rpartition(": ")[2].rstrip("=. ") + "?"
    if text[-1] not in ".?":
        text += "."
    return text[0].upper() + text[1:]


def import_reasoning_gym() -> types.ModuleType:
    """Import reasoning-gym, which on import also wants a solver that none of our tasks uses.

    PyPI has no wheel of that solver, pycosat, so installing it takes a C compiler.
    """
    if "pycosat" not in sys.modules and importlib.util.find_spec("pycosat") is None:
        sys.modules["pycosat"] = types.ModuleType("pycosat")
    return importlib.import_module("reasoning_gym")


def draw(
    task: Task, count: int, *, seed: int, max_chars: int, instruction: str
) -> list[dict[str, Any]]:
    """Draw ``count`` different short questions with integer answers.

    Raises:
      ValueError: the data set holds too few of them.
    """
    reasoning_gym = import_reasoning_gym()
    tries = 40 * count
    dataset = reasoning_gym.create_dataset(task.name, size=tries, seed=seed, **task.settings)
    lines: dict[str, dict[str, Any]] = {}
    for item in dataset:
        question = clean(item["question"], task)
        if len(question) > max_chars or not re.fullmatch(r"-?\d+", item["answer"]):
            continue
        content = f"{question} {instruction}"
        lines[content] = {
            "messages": [{"role": "user", "content": content}],
            "answer": item["answer"],
            "task": task.name,
        }
        if len(lines) == count:
            return list(lines.values())
    raise ValueError(
        f"task {task.name} gave {len(lines)} different questions of at most {max_chars} characters "
        f"in {tries} tries, expected {count}: ask for fewer with --train and --heldout, or raise "
        "--max-chars"
    )


def make(
    train: int, heldout: int, *, seed: int, max_chars: int, chosen: str = "steps"
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Draw both sets, each with the tasks' shares; no question is in both."""
    sets: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    rng = random.Random(seed)
    tasks, instruction = SETS[chosen]
    for task in tasks:
        counts = [max(1, round(task.share * total)) for total in (train, heldout)]
        lines = draw(task, sum(counts), seed=seed, max_chars=max_chars, instruction=instruction)
        rng.shuffle(lines)
        sets[0].extend(lines[: counts[0]])
        sets[1].extend(lines[counts[0] :])
    for lines in sets:
        rng.shuffle(lines)
    return sets


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    parser.add_argument(
        "--set", choices=SETS, default="steps", help="which tasks (default steps)", dest="chosen"
    )
    parser.add_argument("--train", type=int, default=2000, help="about how many (default 2000)")
    parser.add_argument("--heldout", type=int, default=100, help="about how many (default 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--max-chars", type=int, default=150, help="longest question kept (default 150)"
    )
    args = parser.parse_args(argv)
    try:
        sets = make(
            args.train, args.heldout, seed=args.seed, max_chars=args.max_chars, chosen=args.chosen
        )
        args.out.mkdir(parents=True, exist_ok=True)
        for name, lines in zip(("train", "heldout"), sets, strict=True):
            path = args.out / f"{name}.jsonl"
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            print(f"wrote {path}: {len(lines)} prompts")
    except ImportError as err:
        print(
            f"make_reasoning_prompts: {err}; expected the package reasoning-gym: "
            "pip install --no-deps -r scripts/requirements-prompts.txt",
            file=sys.stderr,
        )
        return 1
    except (ValueError, OSError) as err:
        print(f"make_reasoning_prompts: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
