#!/usr/bin/env python3
r"""Write sums of two digits, plain and in a sentence, which a model of 135M parameters half solves.

    scripts/make_sum_prompts.py --out=runs/sums

Makes ``train.jsonl`` and ``heldout.jsonl``; no question is in both, and the same seed gives the
same files. A line holds ``messages`` (one user turn, asked for one short sentence,
without which most answers of SmolLM2-135M ramble until they are cut) and ``answer``.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

INSTRUCTION = "Answer in one short sentence."
NAMES = ("Tom", "Anna", "Ben", "Lucy", "Sam", "Mia", "Leo", "Eva")
THINGS = ("apples", "pens", "books", "coins", "cups", "eggs", "balls", "cards")
PLAIN_SHARE = 0.1  # of the questions; there are 81 in all


def question(rng: random.Random) -> tuple[str, int]:
    """A question and its answer."""
    first, second = rng.randint(1, 9), rng.randint(1, 9)
    if rng.random() < PLAIN_SHARE:
        return f"What is {first} + {second}?", first + second
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    told = f"{name} has {first} {thing} and buys {second} more."
    return f"{told} How many {thing} does {name} have now?", first + second


def make(train: int, heldout: int, *, seed: int) -> tuple[list[dict], list[dict]]:
    """Draw both sets; no question is in both.

    Raises:
      ValueError: more are asked for than can be told apart.
    """
    most = len(NAMES) * len(THINGS) * 81 // 2
    if min(train, heldout) < 1 or train + heldout > most:
        raise ValueError(
            f"{train} and {heldout} questions: expected at least 1 of both and at most {most} in "
            "all; change --train or --heldout"
        )
    rng, found = random.Random(seed), {}
    while len(found) < train + heldout:
        text, answer = question(rng)
        found[text] = answer
    rows = [
        {"messages": [{"role": "user", "content": f"{text} {INSTRUCTION}"}], "answer": str(answer)}
        for text, answer in found.items()
    ]
    return rows[:train], rows[train:]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--train", type=int, default=1000, help="questions (default 1000)")
    parser.add_argument("--heldout", type=int, default=128, help="questions (default 128)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        sets = make(args.train, args.heldout, seed=args.seed)
        args.out.mkdir(parents=True, exist_ok=True)
        for name, rows in zip(("train", "heldout"), sets, strict=True):
            path = args.out / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            print(f"wrote {path}: {len(rows)} questions")
    except (ValueError, OSError) as err:
        print(f"make_sum_prompts: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
