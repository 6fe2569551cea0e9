"""How often intervals hold the truth and tests reject what is true: ``scripts/calibrate``.

Data are drawn whose truth is known (``simulated.py``), the package's own functions are applied
(``procedures.py``), and outcomes are counted, with their Monte Carlo error. A row is *off* where an
interval holds the truth less often, or a test rejects it more often, than three errors and the
stated slack allow. Rows that are not judged show what the published way does, or where a law is
known to fail.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from procedures import SIMULATIONS, Row, Simulation

from opd_jax import files

_ERRORS = 3.0  # Monte Carlo errors that a row may be off
_QUICK = 40  # the quick table has this many times fewer runs
_LEAST = 20


@dataclasses.dataclass(frozen=True)
class Result:
    """A measured row: ``error`` is the Monte Carlo standard error."""

    row: Row
    measured: float
    error: float
    runs: int

    @property
    def is_off(self) -> bool:
        """Whether it misleads by more than chance and slack explain."""
        allowed = _ERRORS * self.error + self.row.slack
        excess = self.measured - self.row.nominal
        return self.row.judged and (-excess if self.row.kind == "interval" else excess) > allowed


def measure(
    simulations: Sequence[Simulation], *, seed: int = 0, quick: bool = False, say=lambda line: None
) -> list[Result]:
    """Run simulations and count."""
    results = []
    for number, simulation in enumerate(simulations):
        runs = max(_LEAST, simulation.runs // _QUICK) if quick else simulation.runs
        begun = time.monotonic()
        outcomes = np.array(
            [simulation.draw(np.random.default_rng([seed, number, i])) for i in range(runs)], float
        )
        for row, values in zip(simulation.rows, outcomes.T, strict=True):
            spread = max(values.std(), math.sqrt(row.nominal * (1 - row.nominal)))
            results.append(Result(row, float(values.mean()), float(spread / math.sqrt(runs)), runs))
        say(f"{simulation.rows[0].name}: {runs} runs, {time.monotonic() - begun:.0f}s")
    return results


def table(results: Sequence[Result]) -> list[str]:
    """The results as a Markdown table."""
    lines = [
        "| what | kind | nominal | measured | error | runs | |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in results:
        row = found.row
        word = "**off**" if found.is_off else "" if row.judged else "not judged"
        lines.append(
            f"| {row.name} | {row.kind} | {row.nominal:.3f} | {found.measured:.3f} | "
            f"{found.error:.3f} | {found.runs} | {word} |"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; the exit status is 1 where a row is off."""
    parser = argparse.ArgumentParser(
        "scripts/calibrate", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file")
    parser.add_argument("--quick", action="store_true", help="fewer runs: what the tests do")
    parser.add_argument("--seed", type=int, default=0, help="of all simulated data; default 0")
    flags = parser.parse_args(argv)
    results = measure(
        SIMULATIONS,
        seed=flags.seed,
        quick=flags.quick,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print("\n".join(table(results)))
    if flags.out:
        rows = [
            dataclasses.asdict(x.row)
            | {"measured": x.measured, "error": x.error, "runs": x.runs, "off": x.is_off}
            for x in results
        ]
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(
            flags.out, json.dumps({"seed": flags.seed, "results": rows}, indent=1) + "\n"
        )
    return int(any(found.is_off for found in results))


if __name__ == "__main__":
    sys.exit(main())
